"""Probabilities of given continuations, and rows that are taken for others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import steerkit as sk
from steerkit.io.rows import read_rows
from steerkit.sweeps.plan import Cell, Planned, prompt_rows, steerings_at
from steerkit.sweeps.store import RowStore
from steerkit.text.tokens import encode
from tests.reference import steered_logits
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

Scored = Callable[[Any, Any, str, str, sk.Steering], float]


def ours(model: Any, tokenizer: Any, prompt: str, choice: str, steering: sk.Steering) -> float:
    return float(sk.score_choices(model, tokenizer, [prompt], [choice], steering=steering)["log_prob"].item())


def without_the_first_token(model: Any, tokenizer: Any, prompt: str, choice: str, steering: sk.Steering) -> float:
    first, *rest = choice
    return ours(model, tokenizer, prompt + first, "".join(rest), steering)


def with_the_choice_as_prompt(model: Any, tokenizer: Any, prompt: str, choice: str, steering: sk.Steering) -> float:
    """The choice is steered from its last token on, where the prompt is taken to end."""
    ids = (*encode(tokenizer, prompt), *encode(tokenizer, choice))
    logs = steered_logits(model, ids, steering.vector.layers, 0.4, range(len(ids) - 1, len(ids))).log_softmax(-1)
    return float(sum(logs[i - 1, ids[i]] for i in range(len(prompt), len(ids))))


def check_a_choice_has_all_its_tokens_steered_from_the_end_of_the_prompt(score: Scored, _: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    push = vector(model, 1)
    ids = (*encode(tokenizer, "Hello"), *encode(tokenizer, " (A)"))
    logs = steered_logits(model, ids, push.layers, 0.4, range(4, len(ids))).double().log_softmax(-1)
    wanted = sum(float(logs[i - 1, ids[i]]) for i in range(5, len(ids)))
    found = score(model, tokenizer, "Hello", " (A)", sk.Steering(push, 0.4))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def also_all_of_it(score: Scored, path: Path) -> None:
    check_a_choice_has_all_its_tokens_steered_from_the_end_of_the_prompt(score, path)


def key(one: Planned) -> Any:
    return one.key


def by_name(one: Planned) -> Any:
    return one.cell.place, one.cell.coefficient, one.prompt["id"], one.sample


def check_a_stored_row_is_not_taken_for_that_of_another_vector(key_of: Callable[[Planned], Any], _: Path) -> None:
    model = tiny_model()
    plans = []
    for size in (1.0, 2.0):
        steerings = steerings_at({"v": vector(model, 1) * size}, None, "all", "add", False)
        plans.append(Planned.each(Cell.each(steerings, [1.0]), prompt_rows(["Hello"]), 1))
    first, second = ({key_of(one) for one in plan} for plan in plans)
    assert len(first & second) == 1, "only the unsteered row is the same"
    with pytest.raises(KeyError):
        {key_of(one): one for one in plans[0]}[key_of(plans[1][1])]


Sweep = Callable[..., sk.SweepResult]


def check_a_resumed_sweep_stores_each_row_once(resume: Sweep, folder: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    given = (model, tokenizer, vector(model, 1), ["Hello", "The sea"])
    settings: dict[str, Any] = {"layers": [1], "max_new_tokens": 3, "out": folder}
    begun = sk.sweep(*given, coefficients=[1.0], **settings)
    whole = resume(*given, coefficients=[1.0, 2.0], **settings)
    rows = read_rows(folder / "rows.jsonl")
    assert len(rows) == len({tuple(row["key"]) for row in rows}) == 2 * 3
    kept = whole.table[whole.table["coefficient"] <= 1].reset_index(drop=True)
    assert kept["text"].tolist() == begun.table["text"].tolist()


def forgets_what_is_done(*given: Any, **settings: Any) -> sk.SweepResult:
    """Computes all rows again: the first reading of the folder, by which a sweep leaves out rows, finds none."""
    read = RowStore.read
    answers = iter([lambda _: {}])
    with mock.patch.object(RowStore, "read", lambda self: next(answers, read)(self)):
        return sk.sweep(*given, **settings)


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "a choice is scored from its first token on": (
        check_a_choice_has_all_its_tokens_steered_from_the_end_of_the_prompt, ours, without_the_first_token
    ),
    "a choice is steered as new tokens": (also_all_of_it, ours, with_the_choice_as_prompt),
    "a stored row is identified by the content of its vector": (
        check_a_stored_row_is_not_taken_for_that_of_another_vector, key, by_name
    ),
    "a resumed sweep stores each row once": (
        check_a_resumed_sweep_stores_each_row_once, sk.sweep, forgets_what_is_done
    ),
}  # fmt: skip
