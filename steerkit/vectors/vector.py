"""Steering vectors: one vector per layer, with arithmetic, provenance and a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.layers import Layers, layer_list, plain_layer
from steerkit.io.tensors import HEADER, read_tensors, write_tensors
from steerkit.models.site_names import DEFAULT, check_name
from steerkit.vectors.file import FORMAT, compose, layers_of, parse
from steerkit.vectors.file import content as content_of


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector:
    """One vector per layer, to be added to (or projected out of) the residual stream after that block.

    `v + w`, `v - w`, `-v`, `v * 2.0`, `v / 2.0`, `v.unit()` and `v.at(14)` return new vectors; sums need equal layers.
    `v == w` and `hash(v)` compare site, layers and values bit by bit, not `meta`; vectors can be in sets and be keys.

    Args:
        layers: layer -> `[d_model]`, stored in float32 on the CPU, in the order of the layers. `layer` l is
            `resid_post` of block l, 0-based: the vector is added at the hook point where it was read.
        meta: provenance: model fingerprint, read position, method, number of pairs or items, hashes.
        site: where in a block it was read and is added: `"resid_post"` or another name of `steerkit.models.sites`.

    Raises:
        ValueError: an unknown site, no layer, unequal widths, a layer that is no block index, NaN or infinity (in
            float32).

    Example:
        >>> v = SteeringVector({14: torch.randn(576)})
        >>> v.unit().norms()
        {14: 1.0}
    """

    layers: Mapping[int, Float[Tensor, " d_model"]]
    meta: Mapping[str, Any] = field(default_factory=dict)
    site: str = DEFAULT

    def __post_init__(self) -> None:
        check_name(self.site)
        if not isinstance(self.layers, Mapping) or not self.layers:
            got = "none" if isinstance(self.layers, Mapping) else type(self.layers).__name__
            raise ValueError(f"expected a vector at one layer at least; got {got}. Pass {{layer: tensor}}.")
        checked: dict[int, Tensor] = {}
        for key, value in self.layers.items():
            layer = plain_layer(key)
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"expected layers to be block indices from 0; got {key!r}. Count the blocks from 0.")
            if layer in checked:
                raise ValueError(f"expected each layer once; got layer {layer} twice. Drop one of the two.")
            checked[layer] = _checked_tensor(layer, value)
        widths = sorted({value.shape[0] for value in checked.values()})
        if len(widths) != 1:
            raise ValueError(f"expected equal widths at all layers; got {widths}. Pass vectors of one model.")
        object.__setattr__(self, "layers", dict(sorted(checked.items())))
        object.__setattr__(self, "meta", dict(self.meta))

    @property
    def d_model(self) -> int:
        """Width of the residual stream, or of the site."""
        return int(next(iter(self.layers.values())).shape[0])

    def norms(self) -> dict[int, float]:
        """Return the L2 norm per layer."""
        return {layer: float(value.double().norm()) for layer, value in self.layers.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        same_place = self.site == other.site and list(self.layers) == list(other.layers)
        return same_place and self.content() == other.content()

    def __hash__(self) -> int:
        return hash(self.content())

    def __repr__(self) -> str:
        norms = list(self.norms().values())
        count = f", n = {self.meta['n']}" if "n" in self.meta else ""
        sizes = f"norms {min(norms):.3g}-{max(norms):.3g}"
        site = "" if self.site == DEFAULT else f"{self.site}, "
        return f"SteeringVector({site}{len(norms)} layers, d_model {self.d_model}{count}, {sizes})"

    def at(self, *layers: Layers) -> SteeringVector:
        """Return the same vector at these layers only: `v.at(14)`, `v.at(8, 10)` or `v.at([8, 10])`.

        Args:
            layers: numbers, or one list, range, numpy array or torch tensor of them.

        Raises:
            ValueError: no layer, a layer that the vector does not hold, or a layer given twice.
        """
        wanted = layer_list(layers[0]) if len(layers) == 1 else [plain_layer(layer) for layer in layers]
        kept = [n for n in wanted if isinstance(n, Integral) and not isinstance(n, bool) and n in self.layers]
        if not wanted or len(set(kept)) < len(wanted):
            own = list(self.layers)
            is_range = len(own) > 2 and own == list(range(own[0], own[-1] + 1))
            known = f"{own[0]} to {own[-1]}" if is_range else f"among {own}"
            raise ValueError(f"expected layers {known}, each once; got {wanted}. Pass layers that the vector holds.")
        return replace(self, layers={int(layer): self.layers[int(layer)] for layer in kept})

    def at_all(self, layer: int, n_layers: int | None = None) -> SteeringVector:
        """Return the vector of one layer, copied to every layer of the model: `v_l = v_layer` for all l.

        Use it to steer all layers with one direction. The pushes add up along the residual stream, so a coefficient
        that suits one layer is too strong for all of them.

        Args:
            layer: the layer whose vector is copied.
            n_layers: number of blocks of the model; default `meta["n_layers"]`, which `collect` records.

        Raises:
            ValueError: the vector does not hold `layer`; `n_layers` is neither given nor in `meta`, is not above the
                layers that the vector holds, or differs from `meta`.

        Example:
            >>> sk.Steering(vector.at_all(14), 0.1, layer="all")
        """
        value = self.at(layer).layers[plain_layer(layer)]
        recorded = self.meta.get("n_layers")
        count = plain_layer(recorded if n_layers is None else n_layers)
        if count is None:
            raise ValueError(
                "expected the number of the model's layers in meta['n_layers']; got none. Pass n_layers=, e.g. "
                "model.config.num_hidden_layers."
            )
        last = max(self.layers)
        if isinstance(count, bool) or not isinstance(count, int) or count <= last or recorded not in (None, count):
            known = f"{recorded}, as meta['n_layers'] says" if recorded is not None else f"above {last}"
            raise ValueError(f"expected n_layers {known}; got {count!r}. Pass the number of the model's blocks.")
        return replace(self, layers=dict.fromkeys(range(count), value))

    def unit(self) -> SteeringVector:
        """Return the direction: each layer's vector divided by its L2 norm.

        Raises:
            ValueError: the norm is zero at a layer.
        """
        zero = [layer for layer, norm in self.norms().items() if norm == 0]
        if zero:
            raise ValueError(
                f"expected vectors of norm above 0; got norm 0 at layers {zero}, which have no direction. Leave these "
                "layers out with .at(...)."
            )
        return self._map(lambda value: value.double() / value.double().norm())

    def scaled_to(self, norms: SteeringVector) -> SteeringVector:
        """Return the same directions with another vector's norms, layer by layer, e.g. for a control of equal norm."""
        self._check_same_layers(norms)
        unit = self.unit()
        return replace(self, layers={layer: unit.layers[layer] * norm for layer, norm in norms.norms().items()})

    def cosine(self, other: SteeringVector) -> dict[int, float]:
        """Return the cosine with another vector, per layer."""
        self._check_same_layers(other)
        mine, others = self.unit().layers, other.unit().layers
        return {layer: float((mine[layer].double() @ others[layer].double()).clamp(-1, 1)) for layer in self.layers}

    def __mul__(self, factor: float) -> SteeringVector:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"expected a number to multiply the vector by; got {type(factor).__name__}. Pass a float.")
        return self._map(lambda value: value * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        if isinstance(factor, bool) or not isinstance(factor, Real) or not factor:
            raise ValueError(
                f"expected a number other than 0 to divide the vector by; got {factor!r}. Pass another number."
            )
        return self * (1 / factor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._combined(other, 1.0, "sum")

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._combined(other, -1.0, "difference")

    def content(self) -> str:
        """Return 16 hexadecimal digits that depend on the site, layers and values alone, for provenance."""
        return content_of(self.layers, self.site)

    def _combined(self, other: SteeringVector, sign: float, method: str) -> SteeringVector:
        """Return `self + sign * other`; its `meta` keeps what both share, and how each was made in `operands`."""
        if not isinstance(other, SteeringVector):
            raise TypeError(
                f"expected a vector to add; got {type(other).__name__}. Make a SteeringVector of it: "
                "SteeringVector({layer: tensor})."
            )
        self._check_same_layers(other)
        for key in ("model_fingerprint", "adapter_fingerprint"):
            if self.meta.get(key) != other.meta.get(key):
                raise ValueError(
                    f"expected vectors of one model; {key} is {self.meta.get(key)} and {other.meta.get(key)}. Extract "
                    "both from one."
                )
        shared = {key: value for key, value in self.meta.items() if key in other.meta and other.meta[key] == value}
        meta = {**shared, "method": method, "operands": [self.content(), other.content()]}
        values = {layer: value + sign * other.layers[layer] for layer, value in self.layers.items()}
        return replace(self, layers=values, meta=meta)

    def _map(self, change: Callable[[Tensor], Tensor]) -> SteeringVector:
        return replace(self, layers={layer: change(value) for layer, value in self.layers.items()})

    def _check_same_layers(self, other: SteeringVector) -> None:
        if self.site != other.site:
            raise ValueError(f"expected vectors of one site; got {self.site} and {other.site}. Extract both at one.")
        if list(self.layers) != list(other.layers) or self.d_model != other.d_model:
            raise ValueError(
                f"expected equal layers and widths; got {list(self.layers)} of {self.d_model} and "
                f"{list(other.layers)} of {other.d_model}. Pass .at(...) of both."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically: tensors `layer.N`, and a header as JSON (docs/vector-format.md).

        Raises:
            ValueError: `meta` contradicts the file format, or a field has a wrong type; nothing is written.
        """
        header = compose(self.meta, self.layers, self.site)
        write_tensors(path, {f"layer.{layer}": value for layer, value in self.layers.items()}, header)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a file written by `save`; `steerkit.read_vectors` reads files of other projects.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: not a safetensors file of this format, damaged, or of an unknown hook point or layer convention.
        """
        metadata, tensors = read_tensors(path)
        if HEADER not in metadata:
            raise ValueError(
                f"expected format {FORMAT!r} in the header {HEADER!r} of {path}; got no such header. "
                "Use steerkit.read_vectors for files of other projects."
            )
        try:
            layers = layers_of(tensors, "layer")
            return cls(layers, *parse(metadata[HEADER], layers))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _checked_tensor(layer: int, value: Any) -> Tensor:
    """Return a copy of one layer's vector in float32 on the CPU."""
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.numel() or value.is_complex():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected a real tensor [d_model] at layer {layer}; got {got}. Convert or reshape it.")
    copied = value.detach().to("cpu", torch.float32, copy=True)
    if not torch.isfinite(copied).all():
        raise ValueError(
            f"expected a finite vector at layer {layer}; got NaN or infinity in float32. Scale it down, or extract it "
            "again."
        )
    return copied
