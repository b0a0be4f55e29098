"""What the plugin does to a request before the engine sees it, without vLLM."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from steerkit.serving import plugin
from steerkit.serving.folder import Model, VectorFolder
from steerkit.serving.plugin import Settings
from steerkit.serving.remote import BY_CONTENT
from steerkit.serving.request import DRAW, KEY, READ, from_wire
from steerkit.serving.vllm import VLLM
from steerkit.vectors.vector import SteeringVector

READING = {"key": "job", "layers": [0], "start": 0, "stop": 2, "weight": 1.0, "each": False}
DRAWING = {"name": "row", "stream": [], "temperature": 0.5, "top_p": 1.0}
ONE = {"vector": "one"}


class Refused(Exception):
    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)


class Params(SimpleNamespace):
    def clone(self) -> Params:
        return copy.deepcopy(self)


@pytest.fixture
def processor(tmp_path, monkeypatch) -> Any:
    """A front end that serves the vector `one`."""
    exceptions = ModuleType("vllm.exceptions")
    exceptions.VLLMValidationError = Refused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    SteeringVector({1: torch.ones(8)}).save(tmp_path / "one.safetensors")
    folder, settings = VectorFolder(tmp_path, Model("llama", 4, 8)), Settings(str(tmp_path), sums=1)
    return SimpleNamespace(_steerkit=(folder, settings), model_config=SimpleNamespace(max_model_len=64))


def sent(processor: Any, extra: Any, prompt: Any = None, n: int = 1, **more: Any) -> Any:
    """The parameters that reach the engine."""
    params = Params(extra_args=extra, n=n, max_tokens=5, skip_reading_prefix_cache=None)
    prompt = {"prompt_token_ids": [1, 2, 3]} if prompt is None else prompt
    return plugin._process_inputs(lambda *args, **_: args[3], processor, "request", prompt, params, **more)


def test_a_plain_request_passes_as_it_is(processor) -> None:
    for extra in (None, {}, {"other": 1}):
        assert sent(processor, extra).extra_args == extra


def test_a_steered_request_reaches_the_engine_checked(processor) -> None:
    found = sent(processor, {KEY: ONE, "other": 1}).extra_args
    assert found["other"] == 1
    assert [(push.layers, push.coefficient) for push in from_wire(found[KEY]).pushes] == [((1,), 1.0)]
    assert KEY not in sent(processor, {KEY: {**ONE, "coefficient": 0}}).extra_args


def test_a_request_that_reads_takes_nothing_from_the_prefix_cache(processor) -> None:
    assert sent(processor, {READ: READING}).skip_reading_prefix_cache
    assert not sent(processor, {KEY: ONE}).skip_reading_prefix_cache


@pytest.mark.parametrize(
    ("extra", "more", "message"),
    [
        ({"Steering": ONE}, {}, "Steering"),
        ({KEY: {"vector": "two"}}, {}, "expected a served vector"),
        ({KEY: ONE}, {"lora_request": object()}, "an adapter"),
        ({KEY: ONE}, {"resumable": True}, "a streamed one"),
        ({KEY: ONE}, {"prompt": {"prompt_embeds": torch.ones(1, 8)}}, "a prompt of tokens"),
        ({KEY: ONE, DRAW: DRAWING}, {"n": 2}, "n=2"),
        ({READ: READING}, {"n": 2}, "n=2"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_the_engine(processor, extra, more, message) -> None:
    with pytest.raises(Refused, match=message):
        sent(processor, extra, **more)


def test_an_engine_without_steering_refuses_and_one_without_sums_does_not_read(processor) -> None:
    folder, settings = processor._steerkit
    processor._steerkit = (folder, Settings(settings.vectors))
    with pytest.raises(Refused, match="expected an engine that reads"):
        sent(processor, {READ: READING})
    processor._steerkit = None
    with pytest.raises(Refused, match="started without"):
        sent(processor, {KEY: ONE})


def test_an_engine_of_this_process_removes_the_oldest_vectors_of_jobs_when_there_is_no_room(tmp_path) -> None:
    engine = object.__new__(VLLM)
    engine.settings = Settings(str(tmp_path), capacity=3)
    engine.folder = VectorFolder(tmp_path, Model("llama", 4, 8), capacity=3)
    for name in (f"{BY_CONTENT}1", "mine", f"{BY_CONTENT}2"):
        engine.put(name, SteeringVector({1: torch.ones(8)}))
    engine.make_room({f"{BY_CONTENT}1"}, 1)
    assert sorted(engine.folder.served()) == [f"{BY_CONTENT}1", "mine"]
    engine.make_room(set(), 1)
    assert sorted(engine.folder.served()) == [f"{BY_CONTENT}1", "mine"]
    engine.make_room(set(), 2)
    assert sorted(engine.folder.served()) == ["mine"]
