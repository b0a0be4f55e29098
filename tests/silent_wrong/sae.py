"""Wrong rows of autoencoders: the encoder's direction for the decoder's, thresholds without a bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import steerkit as sk
from tests.vectors.test_sae import D_IN, NEW, OLD, encode, tensors, write

Read = Callable[[Path], tuple[torch.Tensor, torch.Tensor, float]]
ROW = 3


def check_a_row_is_the_decoder_s_and_active_above_its_threshold(read: Read, folder: Path) -> None:
    """`read` gives the decoder row, the unit encoder direction and the threshold along it."""
    x = 2 * torch.randn(500, D_IN, generator=torch.Generator().manual_seed(1))
    for name, config in (("old", OLD), ("new", NEW)):
        decoder, unit, threshold = read(write(folder / name, config))
        assert torch.equal(decoder, tensors()["W_dec"][ROW])
        assert torch.equal(x @ unit > threshold, encode(x, config)[:, ROW] > 0)


def ours(folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    row = sk.read_sae(folder, ROW)[ROW]
    (decoder,), (unit,) = row.decoder.layers.values(), row.encoder.unit().layers.values()
    return decoder, unit, row.above


def encoder_for_decoder(folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    _, unit, threshold = ours(folder)
    return tensors()["W_enc"][:, ROW], unit, threshold


def without_the_encoder_bias(folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    decoder, unit, threshold = ours(folder)
    w = tensors()
    return decoder, unit, threshold + float(w["b_enc"][ROW] / w["W_enc"][:, ROW].norm())


def without_the_decoder_bias(folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Wrong where the configuration subtracts it from the input."""
    decoder, unit, threshold = ours(folder)
    return decoder, unit, threshold - (float(tensors()["b_dec"] @ unit) if folder.name == "old" else 0)


def with_a_threshold_in_units_of_the_feature(folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Not divided by the norm of the encoder column."""
    decoder, unit, threshold = ours(folder)
    return decoder, unit, threshold * float(tensors()["W_enc"][:, ROW].norm())


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    f"autoencoder rows {mutant.__name__.replace('_', ' ')}": (
        check_a_row_is_the_decoder_s_and_active_above_its_threshold, ours, mutant
    )
    for mutant in (
        encoder_for_decoder,
        without_the_encoder_bias,
        without_the_decoder_bias,
        with_a_threshold_in_units_of_the_feature,
    )
}  # fmt: skip
