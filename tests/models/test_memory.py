"""Pages of mapped weights: given back where they are a file's, never where they hold what the file does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerkit.models import memory
from steerkit.models.identity import fingerprint
from steerkit.models.kernels import missing, use_kernels
from steerkit.models.memory import few_values, is_released, release_file_pages

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux only")
SIDE = 1024


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """A tensor of 4 MiB that is mapped from a file, all of it read once."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, tmp_path / "weight.safetensors")
    loaded = load_file(tmp_path / "weight.safetensors")["weight"]
    assert torch.equal(loaded, weight)
    return loaded


@linux
def test_unchanged_pages_of_a_file_are_given_back_and_come_back_with_the_same_numbers(mapped) -> None:
    before = mapped.clone()
    assert release_file_pages(mapped) > 0.9 * mapped.numel() * 4
    assert torch.equal(mapped, before)
    assert is_released(mapped)
    assert release_file_pages(mapped) > 0.9 * mapped.numel() * 4 and torch.equal(mapped, before)


@linux
@pytest.mark.parametrize("change", ["one number", "through .data", "all"])
def test_what_was_written_stays(mapped, change: str) -> None:
    if change == "one number":
        mapped[500, 3] = 7.0
    elif change == "through .data":
        mapped.data[2] = 7.0
    else:
        mapped.mul_(2)
    after = mapped.clone()
    assert release_file_pages(mapped) == 0
    assert torch.equal(mapped, after)


def test_memory_of_no_file_and_small_or_strided_tensors_are_left_alone(mapped) -> None:
    own = torch.ones(SIDE, SIDE)
    assert release_file_pages(own) == 0 and not is_released(own) and own.min() == 1
    assert release_file_pages(mapped[0, :4]) == 0
    assert release_file_pages(mapped.T) == 0
    assert release_file_pages(torch.empty(4, 4, device="meta")) == 0


def test_without_the_system_calls_nothing_is_done(mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert release_file_pages(mapped) == 0
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert release_file_pages(mapped) == 0


@linux
@pytest.mark.skipif(missing() is not None, reason="this torch has no oneDNN operations")
def test_a_packed_weight_is_held_once_also_after_its_fingerprint_was_read(mapped, monkeypatch) -> None:
    given: list[int] = []
    real = memory.release_file_pages

    def release(tensor: torch.Tensor) -> int:
        given.append(real(tensor))
        return given[-1]

    monkeypatch.setattr("steerkit.models.identity.release_file_pages", release)
    monkeypatch.setattr("steerkit.models.kernels.release_file_pages", release)
    layer = torch.nn.Linear(SIDE, SIDE, bias=False)
    layer.weight = torch.nn.Parameter(mapped)
    rows = torch.randn(3, SIDE)
    expected = torch.nn.functional.linear(rows, mapped)
    with use_kernels(layer, "onednn"), torch.no_grad():
        torch.testing.assert_close(layer(rows), expected, rtol=1e-4, atol=1e-3)
    assert given[0] > 0.9 * mapped.numel() * 4
    first = fingerprint(layer)
    assert len(given) == 2 and given[1] > 0
    assert fingerprint(layer) == first and len(given) == 2  # the values are known: nothing was read
    with torch.no_grad():
        layer.weight.data.view(-1)[(SIDE * SIDE - 1) // 63] += 1  # one of the 64 values; torch counts no such edit
    assert fingerprint(layer) != first
    with torch.no_grad():
        layer.weight[0] = 0
    with use_kernels(layer, "onednn"), torch.no_grad():
        assert layer(rows)[:, 0].abs().max() == 0
    assert not any(given[2:])


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (70, 9)])
def test_a_few_values_tell_another_weight_and_an_edit_of_all(shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape, dtype=torch.bfloat16)
    before = few_values(weight)
    assert few_values(weight.clone()) == before and len(before) == 2 * 16 * bool(weight.numel())
    weight.data.add_(1)
    assert few_values(weight) != before or not weight.numel()
