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

from steerkit.io.files import atomic_path
from steerkit.vectors.file import FORMAT, compose, layers_of, parse, read_tensors
from steerkit.vectors.file import content as content_of

HEADER = "steerkit"


@dataclass(frozen=True, repr=False)
class SteeringVector:
    """One vector per layer, to be added to (or projected out of) the residual stream after that block.

    Args:
        layers: layer -> `[d_model]`, float32 on the CPU, in the order of the layers. `layer` l is `resid_post` of
            block l, 0-based: the vector is added exactly where it was read.
        meta: provenance: model fingerprint, read position, method, number of pairs, hashes.

    `v + w`, `v - w`, `-v`, `v * 2.0`, `v.unit()` and `v.at(14)` give new vectors; sums need equal layers.

    Raises:
        ValueError: no layer, unequal widths, a layer that is no block index, NaN or infinity (in float32).
    """

    layers: Mapping[int, Float[Tensor, " d_model"]]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not self.layers:
            got = "none" if isinstance(self.layers, Mapping) else type(self.layers).__name__
            raise ValueError(f"expected a vector at one layer at least; got {got}. Give {{layer: tensor}}.")
        clean: dict[int, Tensor] = {}
        for layer, value in self.layers.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"expected layers to be block indices from 0; got {layer!r}. Count the blocks from 0.")
            if not isinstance(value, Tensor) or value.ndim != 1 or not value.numel() or value.is_complex():
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"expected a real tensor [d_model] at layer {layer}; got {got}. Reshape it.")
            clean[layer] = value.detach().to("cpu", torch.float32, copy=True)
            if not torch.isfinite(clean[layer]).all():
                raise ValueError(
                    f"expected a finite vector at layer {layer}; got NaN or infinity in float32. Scale or mend it."
                )
        if len({v.shape for v in clean.values()}) != 1:
            widths = sorted({v.shape[0] for v in clean.values()})
            raise ValueError(f"expected equal widths at all layers; got {widths}. Take vectors of one model.")
        object.__setattr__(self, "layers", dict(sorted(clean.items())))
        object.__setattr__(self, "meta", dict(self.meta))

    @property
    def d_model(self) -> int:
        """The width of the stream that it is made for."""
        return int(next(iter(self.layers.values())).shape[0])

    def norms(self) -> dict[int, float]:
        """The L2 norm per layer."""
        return {layer: float(value.double().norm()) for layer, value in self.layers.items()}

    def __repr__(self) -> str:
        norms = list(self.norms().values())
        count = f", {self.meta['n']} pairs" if "n" in self.meta else ""
        sizes = f"norms {min(norms):.3g}-{max(norms):.3g}"
        return f"SteeringVector({len(norms)} layers, d_model {self.d_model}{count}, {sizes})"

    def at(self, *layers: int) -> SteeringVector:
        """The same vector at these layers only."""
        whole = [int(n) for n in layers if isinstance(n, Integral) and not isinstance(n, bool) and n in self.layers]
        if not layers or len(set(whole)) < len(layers):
            there = list(self.layers)
            run = len(there) > 2 and there == list(range(there[0], there[-1] + 1))
            known = f"{there[0]} to {there[-1]}" if run else f"among {there}"
            raise ValueError(f"expected layers {known}, each once; got {list(layers)}. Choose of these.")
        return replace(self, layers={layer: self.layers[layer] for layer in whole})

    def unit(self) -> SteeringVector:
        """The direction: each layer's vector divided by its L2 norm; `ValueError` where the norm is zero."""
        zero = [layer for layer, norm in self.norms().items() if norm == 0]
        if zero:
            raise ValueError(
                f"expected vectors of norm above 0; it is 0 at layers {zero}, so there is no direction. Take others."
            )
        return self._map(lambda value: value.double() / value.double().norm())

    def scaled_to(self, norms: SteeringVector) -> SteeringVector:
        """The same directions with another vector's norms, layer by layer: how a control gets an equal dose."""
        self._same_layers(norms)
        unit = self.unit()
        return replace(self, layers={layer: unit.layers[layer] * norm for layer, norm in norms.norms().items()})

    def cosine(self, other: SteeringVector) -> dict[int, float]:
        """The cosine with another vector, per layer."""
        self._same_layers(other)
        a, b = self.unit().layers, other.unit().layers
        return {layer: float((a[layer].double() @ b[layer].double()).clamp(-1, 1)) for layer in self.layers}

    def __mul__(self, factor: float) -> SteeringVector:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"expected a number to multiply the vector by; got {type(factor).__name__}. Give a float.")
        return self._map(lambda value: value * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        if isinstance(factor, bool) or not isinstance(factor, Real) or not factor:
            raise ValueError(f"expected a number other than 0 to divide the vector by; got {factor!r}. Give another.")
        return self * (1 / factor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            raise TypeError(f"expected a vector to add; got {type(other).__name__}. Make a SteeringVector of it.")
        self._same_layers(other)
        for key in ("model_fingerprint", "adapter_fingerprint"):
            if self.meta.get(key) != other.meta.get(key):
                raise ValueError(
                    f"expected vectors of one model; {key} is {self.meta.get(key)} and {other.meta.get(key)}. Extract "
                    "both from one."
                )
        return replace(self, layers={layer: value + other.layers[layer] for layer, value in self.layers.items()})

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + (-other)

    def content(self) -> str:
        """16 hexadecimal digits that depend on the layers and values alone, for provenance."""
        return content_of(self.layers)

    def _map(self, change: Callable[[Tensor], Tensor]) -> SteeringVector:
        return replace(self, layers={k: change(v) for k, v in self.layers.items()})

    def _same_layers(self, other: SteeringVector) -> None:
        if list(self.layers) != list(other.layers) or self.d_model != other.d_model:
            raise ValueError(
                f"expected equal layers and widths; got {list(self.layers)} of {self.d_model} and "
                f"{list(other.layers)} of {other.d_model}. Take .at(...) of both."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: tensors `layer.N`, and a header as JSON (docs/vector-format.md); atomically.

        Raises:
            ValueError: `meta` contradicts what a steering vector is, or a field has a wrong type; nothing is written.
        """
        from safetensors.torch import save_file

        header = compose(self.meta, self.layers)
        tensors = {f"layer.{layer}": value.contiguous() for layer, value in self.layers.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={HEADER: header})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a file that `save` wrote; those of other projects are read by `steerkit.read_vectors`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, not one of ours, damaged, or of another hook point or convention.
        """
        metadata, tensors = read_tensors(path)
        if HEADER not in metadata:
            raise ValueError(
                f"expected format {FORMAT!r} in the header {HEADER!r} of {path}; got no such header. "
                "Files of other projects are read by steerkit.read_vectors."
            )
        try:
            layers = layers_of(tensors, "layer")
            return cls(layers, parse(metadata[HEADER], layers))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
