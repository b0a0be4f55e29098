"""Linear layers through other kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steerkit.models.kernels import missing, use_kernels
from tests.bits import differences, population
from tests.tiny import tiny_model

KIND = "torch" if missing() else "onednn"
Run = Callable[[Any, Tensor], Tensor]


def ours(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), use_kernels(layer, KIND):  # type: ignore[arg-type]
        y: Tensor = layer(x)
    return y


def _is_that_of_float64(run: Run, layer: Any) -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    weight = layer.weight.double().T if isinstance(layer, nn.Linear) else layer.weight.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(run(layer, x).double(), x.double() @ weight + bias, atol=1e-4, rtol=1e-4)


def check_a_changed_weight_is_used(run: Run, _: Path) -> None:
    layer = nn.Linear(12, 12)
    with torch.no_grad():
        _is_that_of_float64(run, layer)
        layer.weight.data += 1  # torch does not count this edit
        _is_that_of_float64(run, layer)


def once_packed() -> Run:
    kept: dict[int, Tensor] = {}

    def run(layer: Any, x: Tensor) -> Tensor:
        weight = kept.setdefault(layer.weight.data_ptr(), layer.weight.detach().clone())
        return nn.functional.linear(x, weight, layer.bias)

    return run


def check_a_bias_is_added_once_for_each_output(run: Run, _: Path) -> None:
    with torch.no_grad():
        for layer in (nn.Linear(12, 12), nn.Linear(12, 12, bias=False)):
            _is_that_of_float64(run, layer)


def without_bias(layer: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight)


def check_the_axes_of_a_weight_are_those_of_its_layer(run: Run, _: Path) -> None:
    """A square weight fits both ways."""
    with torch.no_grad():
        for layer in (nn.Linear(12, 12), Conv1D(12, 12)):
            _is_that_of_float64(run, layer)


def as_a_linear_layer(layer: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


def check_a_text_has_the_same_bits_in_any_batch(kernels: Callable[[Any], Any], _: Path) -> None:
    if KIND == "torch":
        pytest.skip(f"torch's kernels do not promise it; oneDNN's: {missing()}")
    model = tiny_model()
    with kernels(model):
        found = differences(model, population(model, 24, 60, 1, shared=40), 3, alone=4)
    assert found["rows compared"] > 20 and found["rows with other bits"] == 0


def packed(model: Any) -> Any:
    return use_kernels(model, "onednn")


@contextlib.contextmanager
def summed_in_as_many_parts_as_rows(model: Any) -> Iterator[None]:
    """A kernel that cuts the sum of a product by the size of the batch: right to the last bits alone."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = zip(x.chunk(len(x), -1), weight.chunk(len(x), -1), strict=True)
        total = sum(part @ own.T for part, own in parts)
        assert isinstance(total, Tensor)
        return total if bias is None else total + bias

    with use_kernels(model, "torch"), mock.patch.object(nn.functional, "linear", linear):
        yield


SILENT: dict[str, tuple[Any, Any, Any]] = {
    "a text has the same bits in any batch": (
        check_a_text_has_the_same_bits_in_any_batch,
        packed,
        summed_in_as_many_parts_as_rows,
    ),
    "a changed weight is used": (check_a_changed_weight_is_used, ours, once_packed()),
    "a bias is added": (check_a_bias_is_added_once_for_each_output, ours, without_bias),
    "the axes of a weight": (check_the_axes_of_a_weight_are_those_of_its_layer, ours, as_a_linear_layer),
}
