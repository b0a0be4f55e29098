"""Prompts that begin alike are forwarded once up to where they part, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import steerkit as sk
from steerkit.generation import cache, cascade, engine
from steerkit.generation.batches import exact
from steerkit.generation.cache import ReservedLayer, shared_prefix_lengths
from steerkit.generation.cascade import CascadeEngine
from steerkit.generation.engine import Engine, Row
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

SHOTS = tuple(range(5, 45))
OTHER = tuple(range(44, 4, -1))


def forwarded(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> int:
    """Tokens that two padded batches have: the shared prefixes, and the rest of every prompt except its last token."""
    starts = {prompt[:n] for prompt, n in zip(prompts, lengths, strict=True)}
    rest = max(len(prompt) - 1 - n for prompt, n in zip(prompts, lengths, strict=True))
    return len(starts) * max(lengths) + len(prompts) * rest


def every_way(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """What each way costs in which neighbours in sorted order share a beginning from some depth on."""
    whole = len(prompts) * (max(map(len, prompts)) - 1)
    costs = [whole]
    order = sorted(prompts)
    for depth in range(1, max(map(len, prompts))):
        groups: list[list[tuple[int, ...]]] = []
        for prompt in order:
            if groups and len(prompt) >= depth and prompt[:depth] == groups[-1][-1][:depth]:
                groups[-1].append(prompt)
            else:
                groups.append([prompt])
        shared = [agreed(group) for group in groups if len(group) > 1]
        if shared:
            longest = max(shared)
            lengths = [min(agreed(g) if len(g) > 1 else len(p), longest, len(p) - 1) for g in groups for p in g]
            rest = max(len(p) - 1 - n for p, n in zip((p for g in groups for p in g), lengths, strict=True))
            starts = {p[:n] for p, n in zip((p for g in groups for p in g), lengths, strict=True)}
            costs.append(len(starts) * longest + len(prompts) * rest)
    return costs


def agreed(group: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of them begin with."""
    return next((i for i, column in enumerate(zip(*group, strict=False)) if len(set(column)) > 1), min(map(len, group)))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=9, unique=True))
@example([(1,), (1, 2), (1, 2, 0)])
@example([(0, 1, 1, 1, 1, 0), (0, 1, 1, 1, 1, 2), (2, 2, 2, 2, 1), (2, 2, 2, 2, 0), (1,)])
def test_the_cheapest_of_all_ways_to_share_is_taken(prompts: list[tuple[int, ...]]) -> None:
    lengths = shared_prefix_lengths(prompts, 1)
    assert all(0 <= n < len(prompt) for prompt, n in zip(prompts, lengths, strict=True))
    costs = every_way(prompts)
    assert (forwarded(prompts, lengths) if any(lengths) else costs[0]) == min(costs)


def test_what_saves_too_little_is_not_shared() -> None:
    prompts = [(*SHOTS, 1, n) for n in range(5)]  # 5 * 41 tokens, or 41 and 5 * 0
    saved = 5 * 41 - 41
    assert shared_prefix_lengths(prompts, saved) == [41] * 5
    assert shared_prefix_lengths(prompts, saved + 1) == [0] * 5
    assert shared_prefix_lengths([SHOTS], 1) == [0]


def test_each_of_several_beginnings_is_forwarded_once_with_room_for_prompts_that_begin_like_no_other() -> None:
    prompts = [(*SHOTS, 1, 2), (*SHOTS, 3), (*OTHER, 1, 2, 3), (*OTHER, 2, 2), (7, 8, 9)]
    assert shared_prefix_lengths(prompts, 1) == [40, 40, 40, 40, 2]


PROMPTS = [
    (*SHOTS, 1, 2), (*SHOTS, 3), (*OTHER, 1, 2, 3), (*OTHER, 2, 2), (7, 8, 9), SHOTS, (*SHOTS, 1), (4,),
    (*OTHER[:20], 3),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("engine_type", [Engine, CascadeEngine])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:2], [(*SHOTS, n) for n in range(6)]])
def test_logits_are_those_of_plain_forwards(kind: str, engine_type, prompts, monkeypatch) -> None:
    monkeypatch.setattr(cache, "MIN_SAVED_TOKENS", {"cpu": 1, "cuda": 1})
    model = tiny_model(kind)
    exact(model)
    widths = []
    with torch.inference_mode():
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        batch = engine_type(model, [Row(prompt) for prompt in prompts], 2)
        hook.remove()
        cost = sum(rows * columns for rows, columns in widths)
        assert cost < len(prompts) * (batch.width - 1)
        assert len(widths) in (1, 2, 3)
        new = torch.tensor([[3]] * len(prompts))
        ours = torch.cat([batch.forward(batch.last_tokens(), batch.width - 1), batch.forward(new, batch.width)], dim=1)
        plain = [model(input_ids=torch.tensor([[*prompt, 3]])).logits[0, -2:] for prompt in prompts]
    torch.testing.assert_close(ours, torch.stack(plain), rtol=1e-4, atol=1e-4)


def test_texts_after_shared_beginnings_are_those_of_one_prompt_at_a_time(smollm, monkeypatch) -> None:
    monkeypatch.setattr(cache, "MIN_SAVED_TOKENS", {"cpu": 1, "cuda": 1})
    model, tokenizer = smollm
    shots = "".join(f"Q: What is {a} + 2?\nA: {a + 2}\n\n" for a in (3, 8))
    prompts = [f"{shots}Q: What is {a} + 1?\nA:" for a in (5, 12, 7)]
    steering = sk.Steering(vector(model, 14, size=2.0), 1.0, "from_last_prompt_token")
    for pushed in (None, steering):
        together = sk.generate(model, tokenizer, prompts, max_new_tokens=5, steering=pushed)
        assert together == [sk.generate(model, tokenizer, [p], max_new_tokens=5, steering=pushed)[0] for p in prompts]


def test_prompts_that_are_steered_themselves_share_nothing(monkeypatch) -> None:
    asked = []
    for module in (engine, cascade):
        monkeypatch.setattr(
            module, "shared_prefix_lengths", lambda prompts, _: asked.append(prompts) or [0] * len(prompts)
        )
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["one two three", "one two four"]
    exact(model)
    asked.clear()
    sk.generate(model, tokenizer, prompts, max_new_tokens=3, steering=sk.Steering(vector(model, 1), 0.4, "all"))
    assert not asked
    sk.generate(model, tokenizer, prompts, max_new_tokens=3)
    assert asked  # without the steering they would


class OnAnotherDevice:
    """An index tensor that is not where the layer is: it can be moved and nothing else."""

    def __init__(self, index: torch.Tensor) -> None:
        self.index, self.moved_to = index, list[torch.device]()

    def to(self, device: torch.device) -> torch.Tensor:
        self.moved_to.append(device)
        return self.index


def test_a_shared_prefix_is_copied_by_indices_on_the_layer_s_own_device() -> None:
    source, copy = ReservedLayer(5), ReservedLayer(7)
    states = torch.randn(2, 3, 4, 8)
    source.update(states, -states)
    rows, columns = OnAnotherDevice(torch.tensor([[1], [0]])), OnAnotherDevice(torch.tensor([[0, 1], [2, 3]]))
    copy.copy_from(source, rows, columns)  # type: ignore[arg-type]
    assert rows.moved_to == columns.moved_to == [states.device]
    assert torch.equal(copy.keys, torch.stack([states[1, :, :2], states[0, :, 2:]]))
    assert torch.equal(copy.values, -copy.keys)
