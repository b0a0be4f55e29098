"""Erase: a LEACE erasure as a steering of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steerkit.capture.layers import EMBED, plain_layer
from steerkit.probes.erasure import Eraser, Erasure
from steerkit.steering.operations import registered
from steerkit.steering.steering import Steering
from steerkit.vectors.vector import SteeringVector

PROVENANCE = ("checkpoint", "model_type", "model_fingerprint", "adapter_fingerprint", "n_layers", "d_model")


def erase(
    eraser: Eraser,
    layer: int,
    coefficient: float = 1.0,
    positions: str = "from_last_prompt_token",
    foreign: bool = False,
) -> Steering:
    """Return a steering that erases a concept at one layer, `h <- h - c (h - mean) right left`.

    Its operation is named by its place and by a hash of what it was fitted on (activations, labels, shrinkage), so rows
    of a sweep with another erasure are other rows. Save the eraser to resume a sweep in another process. It takes no
    other vector, which it would not read: a control of an erasure is the erasure of shuffled labels.
    Like `ablate`, positions `"prompt"` and `"all"` leave out position 0. vLLM refuses it by name.

    Args:
        eraser: from `sk.leace`.
        layer: a block that the eraser holds.
        coefficient: 1 erases, 0 changes nothing.
        positions: as for `Steering`. Read the activations where you erase: the guarantee is about such positions.
        foreign: as for `Steering`.

    Returns:
        A `Steering`. Its vector is the first direction that is subtracted, for two classes the difference of their
        means; it fixes layer and model.

    Raises:
        ValueError: a layer that the eraser does not hold, `"embed"`, or nothing to erase (equal class means).

    Example:
        >>> eraser = sk.leace(acts, label="agent")
        >>> sk.generate(model, tokenizer, prompts, max_new_tokens=40, steering=sk.erase(eraser, layer=14))
        >>> mixed = [sk.controls.shuffle_labels(acts, seed, balanced=True, label="agent") for seed in range(19)]
        >>> controls = [sk.erase(sk.leace(one, label="agent"), layer=14) for one in mixed]

    Source: Belrose et al. 2023, arXiv 2306.03819.
    """
    erasure = eraser.at(layer)
    if plain_layer(layer) == EMBED:
        raise ValueError("expected a block to steer; got 'embed', which is read only. Pass a layer from 0.")
    if not len(erasure.left):
        raise ValueError(f"expected classes with different means at layer {layer}; all are equal. Nothing to erase.")
    meta = {name: eraser.meta[name] for name in PROVENANCE if name in eraser.meta}
    vector = SteeringVector({int(plain_layer(layer)): erasure.left[0]}, {**meta, "method": "leace"}, eraser.site)
    place = f"{eraser.site}.{plain_layer(layer)}"  # two erasers of one stream have one map
    operation = registered(f"leace:{erasure.content()}:{place}", _Erase(erasure, vector))
    known: Any = operation.function  # of an earlier fit to the same data, which may differ in its last bits
    return Steering(replace(known.vector, meta=vector.meta), coefficient, positions, operation, foreign)


class _Erase:
    """The operation of an erasure; its tensors follow the stream's device.

    Args:
        erasure: the map.
        vector: the only vector that it is used with.
    """

    def __init__(self, erasure: Erasure, vector: SteeringVector) -> None:
        self.vector = vector
        self.parts: Mapping[Any, tuple[Tensor, ...]] = {
            torch.device("cpu"): tuple(part.float() for part in (erasure.mean, erasure.right, erasure.left))
        }

    def __call__(self, stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
        """`h - c (h - mean) right left`; the direction is not read."""
        if stream.device not in self.parts:
            own = self.parts[torch.device("cpu")]
            self.parts = {**self.parts, stream.device: tuple(part.to(stream.device) for part in own)}
        mean, right, left = self.parts[stream.device]
        centred, change = stream - mean, torch.zeros_like(stream)
        for read, written in zip(right.T, left, strict=True):  # sums, since the bits of a product depend on the batch
            change = change + (centred * read).sum(-1, keepdim=True) * written
        return stream - strength * change
