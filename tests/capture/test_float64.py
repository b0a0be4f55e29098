"""No float64 on devices without it (MPS): a stub of such tensors refuses every float64 result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import steerkit as sk
from steerkit.capture.norms import stream_norms
from steerkit.vectors.lens import tokens_of
from tests.tiny import tiny_model, tiny_tokenizer


class OnMps(Tensor):
    """A stub of a tensor on MPS: its results are stubs too, none may be float64, and `cpu()` leaves the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        if isinstance(result, tuple | list):
            return type(result)(_moved(one, OnMps) for one in result) if type(result) in (tuple, list) else result
        name = getattr(func, "__name__", "")  # a torch.device is that of the parameters, hence the stub device
        to_cpu = name == "cpu" or (name == "to" and "cpu" in [one for one in args[1:] if isinstance(one, str)])
        return _moved(result, Tensor if to_cpu else OnMps)


def _moved(value: Any, kind: type[Tensor]) -> Any:
    return value.as_subclass(kind) if isinstance(value, Tensor) else value


@pytest.fixture
def on_mps():
    """A tiny model whose streams are `OnMps`, and its tokenizer."""
    model = tiny_model("llama", seed=3)
    sk.collect(model, tiny_tokenizer(), ["a"])  # the blocks are verified before
    handle = model.model.embed_tokens.register_forward_hook(lambda _, __, out: out.as_subclass(OnMps))
    yield model, tiny_tokenizer()
    handle.remove()


def test_the_stub_refuses_float64_and_leaves_the_device_with_cpu(on_mps) -> None:
    x = torch.ones(2).as_subclass(OnMps)
    for make in (lambda: x.double(), lambda: x.to("cpu", torch.float64), lambda: (x * 2).float().to(torch.float64)):
        with pytest.raises(TypeError, match="float64"):
            make()
    assert type(x.cpu().double()) is Tensor
    with torch.no_grad(), sk.capture_resid(on_mps[0], 2) as streams:
        on_mps[0](input_ids=torch.tensor([[1, 2]]))
    assert type(streams[2]) is OnMps


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
@pytest.mark.parametrize("position", ["last", "mean"])
def test_reading_makes_no_float64_on_the_device(position: str, on_mps) -> None:
    texts = {"a": ["one", "two three"], "b": ["four", "five"]}
    acts = sk.collect(*on_mps, texts, position=position)
    means = sk.collect_means(*on_mps, texts, position=position)
    assert type(acts.resid) is Tensor and type(means.mean) is Tensor
    assert torch.allclose(
        sk.difference_in_means(acts, "a", "b").layers[2], sk.difference_in_means(means, "a", "b").layers[2], atol=1e-5
    )
    assert len(stream_norms(*on_mps, ["a"], [" b"])) == 4


def test_projections_and_the_logit_lens_make_no_float64_on_the_device(on_mps) -> None:
    v = sk.SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    assert len(sk.project(*on_mps, ["abc"], v)) == 3
    assert len(tokens_of(*on_mps, v, ["abc"], k=2)) == 4


def test_probes_and_vectors_take_tensors_of_the_device() -> None:
    x = torch.tensor(np.random.default_rng(0).normal(size=(40, 6)), dtype=torch.float32).as_subclass(OnMps)
    y = np.arange(40) % 2
    for solver in ("steerkit", "scikit-learn"):
        probe = sk.fit_probe(x, y, solver=solver)
        assert type(probe.scores(x)) is Tensor and probe.scores(x).dtype == torch.float64
    v = sk.SteeringVector({0: x[0]})
    assert type(v.layers[0]) is Tensor and v.unit().norms()[0] == pytest.approx(1)
