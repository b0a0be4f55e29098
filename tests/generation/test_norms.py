"""Norms over continuations that share a prompt equal those of plain forwards over prompt and continuation."""

from __future__ import annotations

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
