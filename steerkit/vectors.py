"""Steering vectors: directions in the residual stream, how they are found, and the file they travel in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit import artifacts, headers
from steerkit.activations import EMBED, ActivationMeans, Activations

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
        return headers.content(self.layers)

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

        header = headers.compose(self.meta, self.layers)
        tensors = {f"layer.{layer}": value.contiguous() for layer, value in self.layers.items()}
        with artifacts.atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={HEADER: header})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a file that `save` wrote; those of other projects are read by `steerkit.read_vectors`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, not one of ours, damaged, or of another hook point or convention.
        """
        metadata, tensors = headers.read_tensors(path)
        if HEADER not in metadata:
            raise ValueError(
                f"expected format {headers.FORMAT!r} in the header {HEADER!r} of {path}; got no such header. "
                "Files of other projects are read by steerkit.read_vectors."
            )
        try:
            layers = headers.layers_of(tensors, "layer")
            return cls(layers, headers.parse(metadata[HEADER], layers))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def difference_in_means(
    activations: Activations | ActivationMeans, positive: str = "positive", negative: str = "negative"
) -> SteeringVector:
    """CAA: `v_l = mean(h_l | positive) - mean(h_l | negative)` per layer (Rimsky et al. 2024, arXiv 2312.06681).

    With as many positives as negatives this is also the mean of the pairs' differences; the labels need not be paired.

    Args:
        activations: what was read, or its running means; sums are in float64.
        positive: label of the items with the property.
        negative: label of the items without it.

    Raises:
        ValueError: a label has no items, or stands on both sides.
    """
    if positive == negative:
        raise ValueError(f"expected two different labels; got {positive!r} on both sides. Name another one.")
    means = activations if isinstance(activations, ActivationMeans) else means_of(activations)
    count = [n for label, n in zip(means.labels, means.counts, strict=True) if label in (positive, negative)]
    difference = means.of(positive) - means.of(negative)
    return _vector(difference, means, "difference_in_means", min(count), positive=positive, negative=negative)


def one_against_others(activations: Activations | ActivationMeans) -> dict[str, SteeringVector]:
    """Per label i: `v_i = m_i - mean of m_j over j != i`, m the label's mean (Yi et al. 2026, arXiv 2604.24881, 4).

    Equal to the paper's mean over groups where every group holds every label equally often.
    """
    means = activations if isinstance(activations, ActivationMeans) else means_of(activations)
    if len(means.labels) < 2:
        raise ValueError(f"expected two labels at least; got {list(means.labels)}. Read texts with another one too.")
    others = (means.mean.sum(0, keepdim=True) - means.mean) / (len(means.labels) - 1)
    return {
        label: _vector(means.mean[i] - others[i], means, "one_against_others", means.counts[i], positive=label)
        for i, label in enumerate(means.labels)
    }


def pca(activations: Activations, positive: str = "positive", negative: str = "negative") -> SteeringVector:
    """The first principal direction of the pairs' differences, about zero, unit length, turned towards `positive`.

    The right singular vector of the largest singular value of the matrix of differences `[pair, d_model]`.

    Raises:
        ValueError: unequal numbers of positives and negatives.
    """
    plus, minus = _sides(activations, positive, negative)
    if len(plus) != len(minus):
        raise ValueError(
            f"expected as many {positive!r} as {negative!r} items; got {len(plus)} and {len(minus)}. Pair them up."
        )
    rows = []
    for column, layer in enumerate(activations.layers):
        difference = (plus[:, column] - minus[:, column]).double()
        direction = torch.linalg.svd(difference, full_matrices=False).Vh[0]
        rows.append(direction * torch.sign(difference.mean(0) @ direction))
        if not rows[-1].norm() > 0.5:
            raise ValueError(
                f"expected differences that point somewhere; they are all zero at layer {layer}. Leave that layer out."
            )
    return _vector(torch.stack(rows), activations, "pca", len(plus), positive=positive, negative=negative)


def logistic(
    activations: Activations, positive: str = "positive", negative: str = "negative", c: float = 1.0
) -> SteeringVector:
    """The unit normal of a logistic probe's boundary, mapped back from standardised features to the raw stream.

    `w_raw = w_std / scale`: the direction left in standardised space points elsewhere (see `steerkit.probes`).
    """
    from steerkit.probes import fit_probe

    labels = activations.items["label"]
    kept = activations.where(labels.isin([positive, negative]))
    blocks = tuple(layer for layer in kept.layers if layer != EMBED)
    kept = replace(kept, resid=kept.resid[:, [kept.layers.index(layer) for layer in blocks]], layers=blocks)
    names = kept.items["label"].tolist()
    rows = [fit_probe(kept.at(layer), names, c=c).direction(positive) for layer in blocks]
    return _vector(torch.stack(rows), kept, "logistic", len(kept) // 2, positive=positive, negative=negative)


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """`vector` turned at random, the control for "any push does it": `V Q`, V its layers as rows, Q a random rotation.

    Each layer is an isotropic random direction of the same norm, and two layers have the cosine that they have in
    `vector`: at several layers at once its pushes add up as those of `vector` do.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randn(vector.d_model, generator=generator) for _ in vector.layers])
    axes, _ = _frame(drawn.double())
    _, mixed = _frame(torch.stack([row.double() for row in vector.layers.values()]))
    noise = dict(zip(vector.layers, (axes @ mixed).T, strict=True))
    return SteeringVector(noise, {**vector.meta, "method": "random", "seed": seed}).scaled_to(vector)


def _frame(rows: Float[Tensor, "layer d_model"]) -> tuple[Float[Tensor, "d_model axis"], Float[Tensor, "axis layer"]]:
    """Orthonormal axes, and the rows in them: `rows.T = axes @ mixed`, the first row along the first axis."""
    axes, mixed = torch.linalg.qr(rows.T)
    sign = torch.where(mixed.diagonal() < 0, -1.0, 1.0)
    return axes * sign, mixed * sign[:, None]


def means_of(activations: Activations) -> ActivationMeans:
    """Means per label in float64; labels in alphabetical order."""
    if "label" not in activations.items:
        raise ValueError(f"expected a column 'label' in the items; got {list(activations.items)}. Add one.")
    labels = activations.items["label"].astype(str)
    names = tuple(sorted(labels.unique()))
    rows = [activations.resid[torch.tensor((labels == name).tolist())] for name in names]
    mean = torch.stack([row.double().mean(0) for row in rows])
    return ActivationMeans(mean, tuple(map(len, rows)), names, activations.layers, activations.meta)


def _sides(activations: Activations, positive: str, negative: str) -> tuple[Tensor, Tensor]:
    means = means_of(activations)  # names the labels that are there, if one is missing
    means.of(positive), means.of(negative)
    labels = activations.items["label"]
    return activations.where(labels == positive).resid, activations.where(labels == negative).resid


def _vector(
    rows: Float[Tensor, "layer d_model"], source: Activations | ActivationMeans, method: str, n: int, **meta: Any
) -> SteeringVector:
    blocks: Sequence[tuple[int, Tensor]] = [
        (int(layer), row) for layer, row in zip(source.layers, rows, strict=True) if layer != EMBED
    ]
    return SteeringVector(dict(blocks), {**source.meta, "method": method, "n": n, **meta})
