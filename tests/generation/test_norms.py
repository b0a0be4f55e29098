"""Norms over continuations that share a prompt equal those of plain forwards over prompt and continuation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from steerkit.generation import norms as module
from steerkit.generation.norms import shared_median_norms
from steerkit.steering.dose import median_norms
from tests.tiny import tiny_model

CHOICES = ((9,), (9, 10), (9, 11), (12, 13, 14))
PROMPTS = ((7,), (1, 2, 3, 4, 5), tuple(range(20, 70)))
TEXTS = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES]


@pytest.mark.parametrize(
    "positions", ["from_last_prompt_token", "generated", "from_last_prompt_token:2", "generated:1"]
)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_norms_over_shared_prompts_equal_those_of_plain_forwards(kind, positions, site, monkeypatch) -> None:
    model = tiny_model(kind)
    wanted = median_norms(model, TEXTS, None, positions, "add", site)
    monkeypatch.setattr(module, "median_norms", lambda *_: pytest.fail("plain forwards"))
    found = shared_median_norms(model, TEXTS, positions, "add", site)
    assert list(found) == list(wanted) and list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-4)


STEERED: dict[tuple[str, str], Callable[[int, int], list[int]]] = {
    ("generated", "add"): lambda prompt, text: list(range(prompt, text)),
    ("generated:2", "add"): lambda prompt, text: list(range(prompt, min(prompt + 2, text))),
    ("from_last_prompt_token", "add"): lambda prompt, text: list(range(prompt - 1, text)),
    ("from_last_prompt_token:3", "add_normed"): lambda prompt, text: list(range(prompt - 1, min(prompt + 2, text))),
    ("prompt", "add"): lambda prompt, text: list(range(prompt)),
    ("prompt:2", "add"): lambda prompt, text: list(range(min(2, prompt))),
    ("all", "add"): lambda prompt, text: list(range(text)),
    ("all:4", "add"): lambda prompt, text: list(range(min(4, text))),
    ("prompt", "ablate"): lambda prompt, text: list(range(1, prompt)),
    ("all:2", "ablate"): lambda prompt, text: list(range(1, min(3, text))),
    ("all+0", "ablate"): lambda prompt, text: list(range(text)),
    ("all+0:2", "ablate"): lambda prompt, text: list(range(min(2, text))),
    ("prompt+0:3", "ablate"): lambda prompt, text: list(range(min(3, prompt))),
}  # fmt: skip
"""Positions and operation -> the steered positions of a text with so many tokens in its prompt and in all."""


def norms_at(model: Any, site: str, ids: tuple[int, ...]) -> np.ndarray:
    """`[layer, pos]` of one text, by hooks on transformers' own modules and a plain forward."""
    found: list[np.ndarray] = []
    handles = []
    for block in model.model.layers:
        module = {"resid_post": block, "mlp_out": block.mlp}[site]

        def keep(_: Any, __: Any, out: Any) -> None:
            stream = out if isinstance(out, torch.Tensor) else out[0]
            found.append(stream[0].double().pow(2).sum(-1).sqrt().numpy())

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack(found)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
@pytest.mark.parametrize(("positions", "operation"), STEERED)
def test_norms_are_the_medians_over_the_steered_positions_but_0_of_plain_forwards(positions, operation, site) -> None:
    model = tiny_model()
    rows = []
    for prompt, choice in TEXTS:
        ids = (*prompt, *choice)
        norms = norms_at(model, site, ids)
        rows += [norms[:, t] for t in STEERED[positions, operation](len(prompt), len(ids)) if t > 0]
    wanted = dict(enumerate(np.median(np.stack(rows), axis=0)))
    for found in (
        median_norms(model, TEXTS, None, positions, operation, site),
        shared_median_norms(model, TEXTS, positions, operation, site),
    ):
        assert found == pytest.approx(wanted, rel=1e-5)
    some = median_norms(model, TEXTS, [2, 0], positions, operation, site)
    assert some == pytest.approx({2: wanted[2], 0: wanted[0]}, rel=1e-5)


def test_a_prompt_is_forwarded_once_for_its_choices() -> None:
    model = tiny_model()
    shared_median_norms(model, TEXTS, "generated", "add")
    counted: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: counted.append(args[0].shape[0] * args[0].shape[1]))
    texts = [(PROMPTS[2], (9, token)) for token in range(10, 20)]
    shared_median_norms(model, texts, "generated", "add")
    assert sum(counted) < len(PROMPTS[2]) + 40 < sum(len(prompt) + len(ids) for prompt, ids in texts)


def test_positions_in_the_prompt_and_prompts_that_differ_are_read_by_plain_forwards() -> None:
    model = tiny_model()
    assert shared_median_norms(model, TEXTS, "all", "add") == median_norms(model, TEXTS, None, "all", "add")
    several = [(prompt, (9,)) for prompt in PROMPTS]
    wanted = median_norms(model, several, None, "generated", "add")
    assert shared_median_norms(model, several, "generated", "add") == wanted
    assert shared_median_norms(model, [((7,), (8,))] * 2, "prompt:1", "add") == {}
    assert torch.is_inference_mode_enabled() is False
