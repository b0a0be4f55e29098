"""Activations: what was read from the residual stream, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

EMBED = "embed"
Layer = int | str


def layer_index(layers: Sequence[Layer], layer: Layer) -> int:
    """Where `layer` stands in `layers`; `ValueError` naming what is there if it is not among them."""
    if layer not in layers:
        raise ValueError(f"expected one of the layers that were read, {list(layers)}; got {layer!r}. Read it first.")
    return list(layers).index(layer)


@dataclass(frozen=True)
class Activations:
    """One vector per item and layer, read from the residual stream.

    Args:
        resid: `[item, layer, d_model]` in float32 on the CPU. `resid[i, j]` is the stream after block `layers[j]`
            (`resid_post`, before the final norm), pooled over the item's span. `"embed"` is the input of block 0.
        layers: the layers, in the order of the second axis; 0-based block indices or `"embed"`.
        items: one row per item, in the order of the first axis: `text` (index of the text it was read from), `label`
            (`positive`/`negative` for contrast pairs, the span's own label else), `group` (what must not straddle a
            split), `start` (token index of the span in its text) and `n_tokens` (length of the span in tokens).
        meta: provenance: model, read position, versions.

    Raises:
        ValueError: the shapes disagree, or an activation is NaN or infinite.
    """

    resid: Float[Tensor, "item layer d_model"]
    layers: tuple[Layer, ...]
    items: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.resid.ndim != 3 or self.resid.shape[:2] != (len(self.items), len(self.layers)):
            raise ValueError(
                f"expected resid of shape [{len(self.items)} items, {len(self.layers)} layers, d_model]; "
                f"got {list(self.resid.shape)}. Give one row of `items` per item and one entry of `layers` per layer."
            )
        finite = torch.isfinite(self.resid).all(dim=-1)
        if not finite.all():
            item, column = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"expected finite activations; got NaN or infinity in item {item} at layer {self.layers[column]}. "
                "Load the model in float32 or bfloat16 (float16 overflows), or drop that text."
            )

    def __len__(self) -> int:
        return len(self.items)

    def at(self, layer: Layer) -> Float[Tensor, "item d_model"]:
        """The items' vectors at one layer."""
        return self.resid[:, layer_index(self.layers, layer)]

    def where(self, keep: Sequence[bool] | np.ndarray | pd.Series) -> Activations:
        """The items for which `keep` (one boolean per item) is true."""
        kept = np.asarray(keep)
        if kept.dtype != bool or kept.shape != (len(self),):
            got = f"{kept.dtype} of shape {kept.shape}"
            raise ValueError(f"expected {len(self)} booleans, one per item; got {got}. Compare a column of items.")
        return replace(self, resid=self.resid[torch.tensor(kept)], items=self.items[kept].reset_index(drop=True))


@dataclass(frozen=True)
class ActivationMeans:
    """Means of the residual stream per label: what `Activations` would average to, in memory that does not grow.

    Args:
        mean: `[label, layer, d_model]` in float64.
        counts: how many spans each mean is over.
        labels: the labels, in the order of the first axis.
        layers: the layers, in the order of the second axis.
        meta: provenance.
    """

    mean: Float[Tensor, "label layer d_model"]
    counts: tuple[int, ...]
    labels: tuple[str, ...]
    layers: tuple[Layer, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def of(self, label: str) -> Float[Tensor, "layer d_model"]:
        """The mean of one label at every layer."""
        if label not in self.labels:
            raise ValueError(f"expected one of the labels {list(self.labels)}; got {label!r}. Name one of those.")
        return self.mean[self.labels.index(label)]
