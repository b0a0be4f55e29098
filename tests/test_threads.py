"""Forwards in two threads: only where nothing about a forward hangs on the one before it, and with equal numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import steerkit as sk
from steerkit import capture
from steerkit.threads import Watched, depends_on_thread, side_by_side
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ["one two three " * n for n in (1, 2, 3, 4, 5, 6, 7, 8)]


@pytest.fixture
def pairs(monkeypatch):
    """How many batches were read side by side in each call."""
    seen: list[int] = []

    def spy(work, items):
        seen.append(len(items))
        return side_by_side(work, items)

    monkeypatch.setattr(capture, "side_by_side", spy)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield seen
    torch.set_num_threads(threads)


def read(model, **more):
    return sk.collect(model, tiny_tokenizer(), TEXTS, batch_tokens=24, **more).resid


def one_by_one(model):
    return torch.cat([sk.collect(model, tiny_tokenizer(), [text]).resid for text in TEXTS])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_two_threads_read_what_one_forward_at_a_time_reads(kind, pairs) -> None:
    model = tiny_model(kind)
    found = read(model)
    assert pairs and pairs[0] > 2
    torch.testing.assert_close(found, one_by_one(model), rtol=1e-4, atol=1e-5)
    assert torch.get_num_threads() == 2


class Remembering(torch.nn.Module):
    """A block that lets each forward see the one before it."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block, self.last = block, 0.0

    def forward(self, *args, **kwargs):
        out = self.block(*args, **kwargs)
        self.last = float(out.sum() if isinstance(out, torch.Tensor) else out[0].sum())
        return out


def test_a_model_that_keeps_a_state_is_read_one_forward_at_a_time(pairs) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp = Remembering(model.model.layers[0].mlp)
    read(model)
    assert pairs == []


def test_rotary_angles_that_grow_with_the_text_are_seen_as_a_state() -> None:
    config = tiny_model("llama").config.to_dict()
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    grown = LlamaForCausalLM(LlamaConfig(**{**config, "max_position_embeddings": 8, "rope_parameters": rope})).eval()
    before = Watched(grown)
    with torch.inference_mode():
        grown(input_ids=torch.arange(5)[None])
    assert before.unchanged()
    with torch.inference_mode():
        grown(input_ids=torch.arange(20)[None])
    assert not before.unchanged()


def test_hooks_autocast_and_modes_of_torch_keep_the_work_in_one_thread(pairs) -> None:
    model = tiny_model("llama")
    assert not depends_on_thread(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depends_on_thread(model)
    with torch.device("cpu"):
        assert depends_on_thread(model)
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    read(model)
    assert pairs == []
    handle.remove()
    read(model)
    assert len(pairs) == 1


def test_an_error_in_one_thread_arrives_and_the_number_of_threads_is_as_before(pairs) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    found = side_by_side(work, range(6))
    with pytest.raises(ValueError, match="three"):
        list(found)
    assert torch.get_num_threads() == 2
    assert list(side_by_side(work, [0, 1, 2])) == [0, 1, 2]


def test_written_buffers_and_new_attributes_are_seen() -> None:
    norm = torch.nn.BatchNorm1d(3)
    before = Watched(norm)
    assert before.unchanged()
    norm.running_mean.add_(1)
    assert not before.unchanged()
    other = torch.nn.Linear(2, 2)
    before = Watched(other)
    other.cached = []
    assert not before.unchanged()
    before = Watched(other)
    other.cached.append(1)
    assert not before.unchanged()
