"""Wrong erasures: without the mean, orthogonal in place of the oblique projection, or transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import steerkit as sk
from steerkit.steering import steering
from steerkit.steering.rows import RowSteering
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


Controls = Callable[[sk.Activations, sk.Steering], Sequence[sk.Steering]]


def check_a_control_of_an_erasure_is_another_change(controls: Controls, _: Path) -> None:
    data = acts(classes=2, n=400)
    erasing = sk.erase(sk.leace(data), 1, positions="all+0")
    stream = data.at(1)[None, :20]

    def change(steering: sk.Steering) -> torch.Tensor:
        edited = RowSteering([[steering]], [(0, 20)]).edit(("resid_post", 1), stream)
        assert edited is not None
        return edited - stream

    for control in controls(data, erasing):
        assert not torch.allclose(change(control), change(erasing))


def of_shuffled_labels(data: sk.Activations, erasing: sk.Steering) -> Sequence[sk.Steering]:
    mixed = [sk.controls.shuffle_labels(data, seed, balanced=True) for seed in range(2)]
    return [sk.erase(sk.leace(one), 1, positions="all+0") for one in mixed]


def with_random_vectors(data: sk.Activations, erasing: sk.Steering) -> Sequence[sk.Steering]:
    """The operation reads no vector, so each of them is the erasure itself."""
    vectors = sk.controls.random(erasing.vector, n=2).values()
    with mock.patch.object(steering, "check_vector", lambda *_: None):
        return [sk.Steering(one, 1.0, "all+0", erasing.operation) for one in vectors]


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    f"erasure {mutant.__name__.replace('_', ' ')}": (check_erased_items_are_those_of_the_paper_s_formula, ours, mutant)
    for mutant in (without_the_mean, orthogonal, with_sides_swapped)
} | {
    "a control of an erasure is another change": (
        check_a_control_of_an_erasure_is_another_change, of_shuffled_labels, with_random_vectors
    ),
}  # fmt: skip
