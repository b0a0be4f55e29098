"""Steering that silently stops, begins at a wrong token, or reads a model that looks ahead."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertLMHeadModel

from steerkit.capture.resid import capture_resid
from steerkit.models.blocks import NoResidualStream, find_blocks
from steerkit.models.hooks import edit_streams, observe_streams
from steerkit.steering.steering import Steering
from tests.reference import greedy
from tests.silent_wrong import plain
from tests.steering.test_steering import vector
from tests.steering.test_watch import BERT, NEW, OPTIONS, PROMPT, BertConfig, bypass, columns, truth, wide
from tests.tiny import tiny_model

On = Callable[[Any, Steering], Any]


def ours(model: Any, steering: Steering) -> Any:
    return steering.on(model)


def tokens_of(model: Any, steering: Steering, on: On, **options: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    with on(model, steering):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, **options)
    return found[0, len(PROMPT) :].tolist()


def check_chunks_of_a_prompt_are_prompt(on: On) -> None:
    model = tiny_model()
    steering = Steering(vector(model, 1), -2.0, "from_last_prompt_token")
    for size in range(1, len(PROMPT) + 1):
        assert tokens_of(model, steering, on, prefill_chunk_size=size) == truth(model, steering)


@contextlib.contextmanager
def first_forward_is_the_prompt(model: Any, steering: Steering) -> Iterator[None]:
    """Steer from the last token of the first forward on, and every token of later forwards."""
    ((layer, value),) = steering.vector.layers.items()
    seen: list[int] = []

    def edit(_: int, stream: Tensor) -> Tensor:
        inside = torch.arange(stream.shape[1]) >= (0 if seen else stream.shape[1] - 1)
        seen.append(stream.shape[1])
        return stream + float(steering.coefficient) * inside[:, None] * value

    with edit_streams({layer: find_blocks(model).modules[layer]}, edit):
        yield


def check_every_token_is_steered_or_the_call_fails(on: On) -> None:
    """A generate whose later forwards run no hooks, as compiled ones do, gives the steered tokens or an error."""
    model = tiny_model()
    steering = Steering(vector(model, 1), -2.0)
    forwards = type(model).forward
    count = [0]

    class Deaf(type(model)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == 1:
                return super().__call__(*args, **kwargs)
            handlers = [layer._forward_hooks.copy() for layer in self.model.layers]
            for layer in self.model.layers:
                layer._forward_hooks.clear()
            try:
                return forwards(self, *args, **kwargs)
            finally:
                for layer, handler in zip(self.model.layers, handlers, strict=True):
                    layer._forward_hooks.update(handler)

    find_blocks(model)
    model.__class__ = Deaf
    try:
        found = tokens_of(model, steering, on)
    except RuntimeError as error:
        assert "hooks" in str(error)
    else:
        low, high = columns(steering.positions)
        layers = dict(steering.vector.layers)
        assert found == greedy(tiny_model(), PROMPT, NEW, (), layers, float(steering.coefficient), low, high)


@contextlib.contextmanager
def hooks_alone(model: Any, steering: Steering) -> Iterator[None]:
    with first_forward_is_the_prompt(model, steering):
        yield


def check_an_encoder_is_refused(find: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    with pytest.raises(NoResidualStream, match="bidirectional"):
        find(wide(BertLMHeadModel(BertConfig(**BERT, is_decoder=False))))


def blocks_that_form_a_chain(model: Any) -> Any:
    """The check without the probe of causality: each block receives what the one before it returned."""
    calls: list[Any] = []
    listed = dict(enumerate(model.bert.encoder.layer))
    with torch.no_grad(), observe_streams(listed, lambda *call: calls.append(call)):
        model(input_ids=torch.arange(1, 6)[None])
    assert all(torch.equal(before[2], after[1]) for before, after in itertools.pairwise(calls))
    return listed


def check_a_reading_that_saw_nothing_is_an_error(read: Callable[[Any], Any]) -> None:
    model = tiny_model()
    find_blocks(model)
    bypass(model)
    with pytest.raises(RuntimeError, match="hooks"):
        read(model)


def captured(model: Any) -> Any:
    with torch.no_grad(), capture_resid(model, [1]) as streams:
        model(input_ids=torch.tensor([PROMPT]))
    return streams


def observed(model: Any) -> Any:
    streams: dict[int, Any] = {}
    modules = {1: find_blocks(model).modules[1]}
    with torch.no_grad(), observe_streams(modules, lambda layer, _, left: streams.update({layer: left})):
        model(input_ids=torch.tensor([PROMPT]))
    return streams


def check_a_second_prompt_is_not_a_continuation(on: On) -> None:
    model = tiny_model()
    steering = Steering(vector(model, 1), -2.0)

    def last(texts: list[list[int]]) -> Tensor:
        with torch.no_grad(), on(model, steering):
            return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in texts][-1]

    torch.testing.assert_close(last([PROMPT[:4], PROMPT]), last([PROMPT]))


@contextlib.contextmanager
def longer_texts_continue(model: Any, steering: Steering) -> Iterator[None]:
    """Take a text that is longer than the one before for its continuation."""
    ((layer, value),) = steering.vector.layers.items()
    prompts: list[int] = []

    def edit(_: int, stream: Tensor) -> Tensor:
        if not prompts or stream.shape[1] <= prompts[0]:
            prompts[:] = [stream.shape[1]]
        inside = torch.arange(stream.shape[1]) >= prompts[0] - 1
        return stream + float(steering.coefficient) * inside[:, None] * value

    with edit_streams({layer: find_blocks(model).modules[layer]}, edit):
        yield


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "chunks of a prompt are prompt": (
        plain(check_chunks_of_a_prompt_are_prompt), ours, first_forward_is_the_prompt
    ),
    "every token is steered, or the call fails": (
        plain(check_every_token_is_steered_or_the_call_fails), ours, hooks_alone
    ),
    "an encoder is refused": (plain(check_an_encoder_is_refused), find_blocks, blocks_that_form_a_chain),
    "a reading that saw nothing is an error": (
        plain(check_a_reading_that_saw_nothing_is_an_error), captured, observed
    ),
    "a second prompt is not a continuation": (
        plain(check_a_second_prompt_is_not_a_continuation), ours, longer_texts_continue
    ),
}  # fmt: skip
