"""Wrong token ids: text encoded again, added spaces, lost ends, keys and rows that are not what the model read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import steerkit as sk
from steerkit.generation.sampling import OVERFLOWED, likeliest, random_stream
from steerkit.scores.fluency import perplexity
from steerkit.text.prompt import encode_prompt, render
from steerkit.text.spans import SpannedText, passage_of
from steerkit.text.tokens import decode, encode
from tests.silent_wrong import plain
from tests.steering.test_steering import vector
from tests.text.test_prompts import prefix_space_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer

# What is scored is what was generated


def check_a_score_is_of_the_generated_ids(score: Callable[[Any, Any, Any], Sequence[float]]) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    table = sk.sweep(
        model, tokenizer, vector(model, 1), ["ab", "Two words"], coefficients=[3], max_new_tokens=8, temperature=1.0
    ).table
    model.generation_config.eos_token_id = [256, table["ids"][0][2]]
    table = sk.sweep(
        model, tokenizer, vector(model, 1), ["ab", "Two words"], coefficients=[3], max_new_tokens=8, temperature=1.0
    ).table
    truth = []
    for row in table.itertuples():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*row.prompt_ids, *row.ids]])).logits[
                0, len(row.prompt_ids) - 1 : -1
            ]
        truth.append(float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(row.ids)).exp()))
    np.testing.assert_allclose(score(model, tokenizer, table), truth, rtol=1e-3)


def of_the_ids(model: Any, tokenizer: Any, table: Any) -> Sequence[float]:
    return sk.SweepResult(table).score("perplexity", model=model, tokenizer=tokenizer).table["perplexity"].tolist()


def of_the_text(model: Any, tokenizer: Any, table: Any) -> Sequence[float]:
    return perplexity(model, tokenizer, table["prompt"].tolist(), table["text"].tolist()).tolist()


def without_the_end(model: Any, tokenizer: Any, table: Any) -> Sequence[float]:
    ends = {256, *model.generation_config.eos_token_id}
    ids = [tuple(token for token in row if token not in ends) for row in table["ids"]]
    return perplexity(model, tokenizer, table["prompt"].tolist(), ids).tolist()


# The boundary between a prompt and its continuation


def check_a_continuation_has_no_token_of_its_own(ids_of: Callable[[Any, str], Sequence[int]]) -> None:
    """On a tokenizer that puts a space before every text, prompt and continuation are the ids of the whole."""
    tokenizer = prefix_space_tokenizer()
    for first, then in (("Hello", " was"), ("he", "ll"), ("was", " Hello was")):
        whole = encode_prompt(tokenizer, first + then)
        assert (*encode_prompt(tokenizer, first), *ids_of(tokenizer, then)) == whole


def encoded_alone(tokenizer: Any, text: str) -> Sequence[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_a_continuation_decodes_to_itself(text_of: Callable[[Any, Sequence[int]], str]) -> None:
    tokenizer = prefix_space_tokenizer()
    for text in (" was", "was", "  was ", "Hello"):
        assert text_of(tokenizer, encode(tokenizer, text)) == text


def decoded_alone(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def check_a_span_is_where_its_text_is(range_of: Callable[[Any, str, int, int], tuple[int, int]]) -> None:
    tokenizer = prefix_space_tokenizer()
    for start, stop in ((0, 5), (5, 9), (9, 14)):
        text = "Hello was here"
        low, high = range_of(tokenizer, text, start, stop)
        ids = passage_of(tokenizer, SpannedText(text, ((start, stop),)), "g").ids
        assert 0 <= low < high <= len(ids)
        assert tokenizer.decode(ids[low:high]).strip() == text[start:stop].strip()


def by_pieces(tokenizer: Any, text: str, start: int, stop: int) -> tuple[int, int]:
    return passage_of(tokenizer, SpannedText(text, ((start, stop),)), "g").spans[0]


def by_length_differences(tokenizer: Any, text: str, start: int, stop: int) -> tuple[int, int]:
    """The first tokens (BOS) are counted as the difference between two encodings of the same text."""
    if start:
        return by_pieces(tokenizer, text, start, stop)
    whole = tokenizer(text[:stop])["input_ids"]
    return len(whole) - len(encode(tokenizer, text[:stop])), len(whole)


# Keys of random numbers, and rows without a finite logit


def check_numbers_depend_on_the_value_of_a_seed(stream: Callable[[Any, int], np.ndarray]) -> None:
    assert stream((3, "a"), 4).tolist() == stream((np.int64(3), "a"), 4).tolist()
    assert stream((3, "a"), 4).tolist() != stream((4, "a"), 4).tolist()


def keyed_by_its_text(key: Any, count: int) -> np.ndarray:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


def check_a_row_without_finite_logits_has_no_token(choose: Callable[[Tensor], Tensor]) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, float("nan"), 1.0], [float("inf"), 0.0, 1.0]])
    assert choose(logits).tolist() == [1, OVERFLOWED, OVERFLOWED]


def argmax(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


# A prompt on disk


def check_a_stored_prompt_is_read_again_as_it_was(store: Callable[[Any, Any], Any]) -> None:
    """What is stored of a chat is read again, as a string would be, without another first token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for prompt in ("ab", [{"role": "user", "content": "Hi"}]):
        rendered = render(tokenizer, prompt)
        assert encode_prompt(tokenizer, store(tokenizer, rendered)) == rendered.ids


def its_ids(tokenizer: Any, prompt: Any) -> Any:
    return sk.Prompt(prompt.ids, prompt.text)


def its_text(tokenizer: Any, prompt: Any) -> Any:
    return prompt.text


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "a score is of the generated ids": (plain(check_a_score_is_of_the_generated_ids), of_the_ids, of_the_text),
    "a score includes the end token": (plain(check_a_score_is_of_the_generated_ids), of_the_ids, without_the_end),
    "a continuation has no added space": (plain(check_a_continuation_has_no_token_of_its_own), encode, encoded_alone),
    "a continuation keeps its first space": (plain(check_a_continuation_decodes_to_itself), decode, decoded_alone),
    "a span is where its text is": (plain(check_a_span_is_where_its_text_is), by_pieces, by_length_differences),
    "a numpy seed is a seed": (plain(check_numbers_depend_on_the_value_of_a_seed), random_stream, keyed_by_its_text),
    "a row that overflows has no token": (plain(check_a_row_without_finite_logits_has_no_token), likeliest, argmax),
    "a stored prompt is read as it was": (plain(check_a_stored_prompt_is_read_again_as_it_was), its_ids, its_text),
}
