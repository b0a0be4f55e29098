"""Wrong erasures: without the mean, orthogonal in place of the oblique projection, or transposed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import steerkit as sk
from tests.probes.test_erasure import acts, slow

Erase = Callable[[sk.Activations], torch.Tensor]


def check_erased_items_are_those_of_the_paper_s_formula(erase: Erase, _: Path) -> None:
    data = acts()
    x = data.at(1).double()
    mean, projection = slow(x, data.items["label"])
    torch.testing.assert_close(erase(data), x - (x - mean) @ projection.T, rtol=1e-6, atol=1e-6)


def ours(data: sk.Activations) -> torch.Tensor:
    return sk.leace(data).at(1)(data.at(1))


def without_the_mean(data: sk.Activations) -> torch.Tensor:
    """Linear in place of affine: equal class means too, and the items move away from where they were."""
    erasure, x = sk.leace(data).at(1), data.at(1).double()
    return x - x @ erasure.right @ erasure.left


def orthogonal(data: sk.Activations) -> torch.Tensor:
    """Projects out the differences between the class means: equal class means too, but a larger change."""
    return sk.leace(data, shrinkage=1.0).at(1)(data.at(1))


def with_sides_swapped(data: sk.Activations) -> torch.Tensor:
    """The transpose of the projection."""
    erasure, x = sk.leace(data).at(1), data.at(1).double()
    return x - (x - erasure.mean) @ erasure.left.T @ erasure.right.T


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    f"erasure {mutant.__name__.replace('_', ' ')}": (check_erased_items_are_those_of_the_paper_s_formula, ours, mutant)
    for mutant in (without_the_mean, orthogonal, with_sides_swapped)
}
