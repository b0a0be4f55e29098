"""Training on other ids, batches, lengths or ends than those that were asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from steerkit.models.ends import ends_of
from steerkit.text.prompt import encode_prompt
from steerkit.text.tags import tags
from tests.silent_wrong import plain
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.test_boundaries import smollm2_tokenizer, trace, two_ends
from training.problems.sources import PARTS, part_of
from training.train.checkpoints import add_tags, check_batch
from training.train.grpo import GRPO
from training.train.sft import SFT, _check_lengths, encode_examples, examples

Encode = Callable[[Any, Sequence[Mapping[str, str]]], list[dict[str, list[int]]]]


def check_the_prompt_is_the_one_that_generation_reads(encode: Encode) -> None:
    tokenizer = smollm2_tokenizer()
    rows = examples([trace(1), trace(22)], SFT(target="untagged"))
    for row, example in zip(rows, encode(tokenizer, rows), strict=True):
        first = next(i for i, label in enumerate(example["labels"]) if label != -100)
        assert tuple(example["input_ids"][:first]) == encode_prompt(tokenizer, row["prompt"])


def in_two_parts(tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> list[dict[str, list[int]]]:
    return encode_examples(tokenizer, rows, frozenset({tokenizer.eos_token_id}))


def at_once(tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> list[dict[str, list[int]]]:
    """Prompt and completion encoded together, and cut where the prompt alone would end."""
    encoded = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        cut = len(tokenizer(row["prompt"])["input_ids"])
        encoded.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return encoded


def check_a_long_example_keeps_its_end_or_is_refused(limit: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
    tokenizer = tiny_tokenizer()
    encoded = in_two_parts(tokenizer, examples([trace(1), trace(3, words=200)], SFT(target="untagged")))
    with pytest.raises(ValueError, match="1 of 2 traces are longer"):
        kept = limit(encoded)
        assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in kept)


def refused(encoded: Sequence[Any]) -> Sequence[Any]:
    _check_lengths(encoded, 512, None)
    return encoded


def cut_on_the_right(encoded: Sequence[Any]) -> Sequence[Any]:
    return [{key: ids[:512] for key, ids in row.items()} for row in encoded]


def check_a_step_has_the_batch_that_was_asked_for(accumulation: Callable[[int, int], int]) -> None:
    for batch, micro in ((32, 8), (12, 8), (20, 8), (4, 8)):
        try:
            steps = accumulation(batch, micro)
        except ValueError:
            continue
        assert steps * micro == batch


def divided(batch: int, micro: int) -> int:
    check_batch("batch", batch, micro)
    return batch // micro


def rounded(batch: int, micro: int) -> int:
    return max(1, batch // micro)


def check_new_tags_begin_near_the_mean(add: Callable[[Any, Any, Sequence[str]], Any]) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.resize_token_embeddings(len(tokenizer) + 64)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[len(tokenizer) :] = 5.0
    mean, size = weight[: len(tokenizer)].mean(0), weight[: len(tokenizer)].norm(dim=1).mean()
    tagged = add(model, tokenizer, tags(3, 2))
    rows = weight[[tagged.convert_tokens_to_ids(tag) for tag in tags(3, 2)]]
    assert (rows - mean).norm(dim=1).max() < 0.5 * size


def resized_where_needed(model: Any, tokenizer: Any, names: Sequence[str]) -> Any:
    tagged = copy.deepcopy(tokenizer)
    tagged.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in names])
    if len(tagged) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tagged))
    return tagged


def check_every_end_ends(is_finished: Callable[[Any, Any, Sequence[int]], bool]) -> None:
    model, tokenizer, eos, end = two_ends()
    assert is_finished(model, tokenizer, [65, eos]) and is_finished(model, tokenizer, [65, end])
    assert not is_finished(model, tokenizer, [65, 66])


def by_any_end(model: Any, tokenizer: Any, ids: Sequence[int]) -> bool:
    return ids[-1] in ends_of(model, tokenizer)


def by_the_tokenizers_end(model: Any, tokenizer: Any, ids: Sequence[int]) -> bool:
    return ids[-1] == tokenizer.eos_token_id


def check_every_epoch_asks_each_problem_once(steps: Callable[[GRPO, int], int]) -> None:
    for inner, prompts in ((1, 1), (3, 1), (3, 4)):
        setting = GRPO(epochs=6.0, inner=inner, prompts=prompts)
        asked = steps(setting, 20) / inner * prompts
        assert asked == 6 * 20


def in_passes(setting: GRPO, problems: int) -> int:
    return setting.steps_for(problems)


def in_optimiser_steps(setting: GRPO, problems: int) -> int:
    """As many optimisation steps as generations are needed: with several steps on each, too few problems are asked."""
    return math.ceil((setting.epochs or 0) * problems / setting.prompts)


def check_a_question_stays_in_its_part(part: Callable[[str, int], str]) -> None:
    questions = [f"What is {n} + {n}?" for n in range(20)]
    held = {question: part(question, row) for row, question in enumerate(questions)}
    assert held == {question: part(question, row) for row, question in enumerate(["new", *questions]) if row}


def by_question(question: str, row: int) -> str:
    return part_of(question)


def by_row(question: str, row: int) -> str:
    return PARTS[row % 2]


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "training reads generation's prompt": (
        plain(check_the_prompt_is_the_one_that_generation_reads), in_two_parts, at_once
    ),
    "a long example is refused": (plain(check_a_long_example_keeps_its_end_or_is_refused), refused, cut_on_the_right),
    "a step has the batch that was asked for": (
        plain(check_a_step_has_the_batch_that_was_asked_for), divided, rounded
    ),
    "new tags begin near the mean": (plain(check_new_tags_begin_near_the_mean), add_tags, resized_where_needed),
    "every declared end ends a text": (plain(check_every_end_ends), by_any_end, by_the_tokenizers_end),
    "an epoch asks each problem once": (plain(check_every_epoch_asks_each_problem_once), in_passes, in_optimiser_steps),
    "a question stays in its part": (plain(check_a_question_stays_in_its_part), by_question, by_row),
}  # fmt: skip
