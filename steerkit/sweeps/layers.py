"""The layers of a sweep: where a vector is steered, the label of that place in the table, and its natural order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal

LayerSet = int | tuple[int, ...] | Literal["all"]
"""One layer, several that are steered at once, or all layers of the vector at once."""
Label = int | str
"""A `LayerSet` in the column `layer`: 14, "8+10" or "all"."""


def layer_sets(layers: Any) -> list[LayerSet]:
    """What `sweep` is given as `layers`, as a list: each a layer, a tuple of layers steered at once, or `"all"`.

    Accepts a number, `"all"`, or any list, tuple, range, array or tensor of layer sets; only a tuple inside it is
    steered at once.

    Raises:
        ValueError: nothing, something else, or a layer set given twice.
    """
    given = layers.tolist() if hasattr(layers, "tolist") else layers
    several = isinstance(given, Iterable) and not isinstance(given, str)
    places = [_layer_set(one) for one in (given if several else [given])]
    if not places or len(set(places)) < len(places):
        raise ValueError(
            f"expected layers that differ, each a number, a tuple of numbers or 'all'; got {layers!r}. List each once."
        )
    return places


def _layer_set(one: Any) -> LayerSet:
    if isinstance(one, str) and one == "all":
        return "all"
    if isinstance(one, Integral) and not isinstance(one, bool):
        return int(one)
    several = list(one) if isinstance(one, Iterable) and not isinstance(one, str) else []
    if not several or not all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in several):
        raise ValueError(f"expected a layer as a number, a tuple of numbers or 'all'; got {one!r}. Pass a number.")
    return tuple(int(layer) for layer in several) if len(several) > 1 else int(several[0])


def label_of(place: LayerSet | Sequence[int]) -> Label:
    """The place as it is shown in a table: 14, "8+10" or "all"."""
    return place if isinstance(place, int | str) else "+".join(map(str, place))


def layers_of(label: Label) -> tuple[int, ...] | Literal["all"]:
    """The layers that a label names; `"all"` for the label "all"."""
    return "all" if label == "all" else tuple(int(layer) for layer in str(label).split("+"))


def natural_order(label: Label) -> tuple[int, tuple[int, ...]]:
    """A sort key: single layers by number, then sets of layers, then "all"."""
    layers = layers_of(label)
    return (2, ()) if layers == "all" else (int(len(layers) > 1), layers)
