"""Layers as a caller may write them: numbers, arrays and tensors of numbers, `"embed"`, `"all"`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

EMBED = "embed"
Layer = int | str
"""A 0-based block index, or `"embed"` (the input of block 0)."""
Layers = Any
"""`"all"`, one `Layer`, or several: a list, tuple, range, numpy array or torch tensor."""


def plain_layer(layer: Any) -> Any:
    """Return a numpy or torch integer as an `int`, and anything else unchanged."""
    if isinstance(layer, bool):
        return layer
    if isinstance(layer, Integral):
        return int(layer)
    if getattr(layer, "ndim", None) == 0 and hasattr(layer, "item") and isinstance(layer.item(), Integral):
        return plain_layer(layer.item())
    return layer


def layer_list(layers: Layers) -> list[Any]:
    """Return one layer or several as a list of plain values, not yet checked against a model.

    Example:
        >>> layer_list(torch.tensor([1, 2])), layer_list(np.int64(3)), layer_list(range(2))
        ([1, 2], [3], [0, 1])
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0:
        return [plain_layer(layers)]
    return [plain_layer(layer) for layer in layers]


def layer_index(layers: Sequence[Layer], layer: Layer) -> int:
    """Return the index of `layer` in `layers`.

    Raises:
        ValueError: `layer` is not among them.
    """
    wanted = plain_layer(layer)
    if isinstance(wanted, bool) or wanted not in layers:
        raise ValueError(
            f"expected one of the layers that were read, {list(layers)}; got {layer!r}. Read it first: pass it to "
            "collect(layers=...)."
        )
    return list(layers).index(wanted)
