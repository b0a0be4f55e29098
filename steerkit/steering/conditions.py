"""Conditions: a steering acts only where the stream, or another site, read along a direction or by a probe, crosses a
threshold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from steerkit.models.site_names import DEFAULT, Place, place_order
from steerkit.probes.probe import Probe
from steerkit.vectors.vector import SteeringVector

Decide = Literal["prompt", "token"]


@dataclass(frozen=True, eq=False)
class Condition:
    """Where a steering acts: where a score of the stream after a layer's block is above (or below) a threshold.

    The score of a stream h is `h . v / |v|` for a vector, in the unit of the stream, and `log p / (1 - p)` for a probe
    of two classes, with p the probability of the second class. A condition holds where `above < score < below`. h is
    the value of the site that the vector or the probe was read at; `"resid_post"` is the stream after the block.
    It reads the stream before the steering that it controls, and after those that act before it. A score that is no
    number (the stream overflowed) meets no condition. The score is computed in float32 for each position by itself, so
    it is the same up to rounding with a cache, under left padding and in any batch.

    Args:
        direction: a vector, or a `Probe` of two classes.
        layer: whose block is read; a forward must reach it before the first steered place. None for a vector that
            holds one layer, or a probe that carries its layer.
        above: the condition holds for larger scores.
        below: the condition holds for smaller scores. With `above` both must hold.
        decide: `"prompt"`: once per row, at the last position of the prompt; the steering then acts at all of its
            positions or at none. `"token"`: at each position by the stream of this position.
        meta: provenance of the threshold, see `calibrate_condition`; not compared.

    Attributes:
        weights: made from `direction`: the score is `h . weights + offset`.
        offset: see `weights`.

    Raises:
        TypeError: `direction` is neither a vector nor a Probe.
        ValueError: no layer, or one that the vector does not hold or where it is zero; a probe of more than two
            classes, or of another layer; no threshold, one that is not finite, or an empty interval; an unknown
            `decide`.

    Example:
        >>> harmful = sk.Condition(vector, layer=10, above=2.5)
        >>> steering = sk.Steering(refusal, 1.0, layer=14, when=harmful)

    Source: Lee et al. 2024, "Programming Refusal with Conditional Activation Steering" (CAST), arXiv 2409.05907; there
    the score is a cosine similarity.
    """

    direction: SteeringVector | Probe
    layer: int | None = None
    above: float | None = None
    below: float | None = None
    decide: Decide = "prompt"
    meta: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False)
    weights: Float[Tensor, " d_model"] = field(init=False, repr=False)
    offset: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.decide not in get_args(Decide):
            raise ValueError(f"expected decide among {get_args(Decide)}; got {self.decide!r}. Choose one.")
        given = [bound for bound in (self.above, self.below) if bound is not None]
        bad = [one for one in given if isinstance(one, bool) or not isinstance(one, Real)]
        if bad or not given or not all(math.isfinite(one) for one in given):
            raise ValueError(
                f"expected a finite number as above= or below=; got {self.above!r} and {self.below!r}. Pass one."
            )
        if len(given) == 2 and given[0] >= given[1]:
            raise ValueError(f"expected above < below; got {self.above} and {self.below}. Swap them.")
        for name in ("above", "below"):
            bound = getattr(self, name)
            object.__setattr__(self, name, None if bound is None else float(bound))
        weights, offset = self._weights()
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "offset", offset)

    def _weights(self) -> tuple[Tensor, float]:
        """The score as `h . weights + offset`; checks direction and layer."""
        if isinstance(self.direction, SteeringVector):
            held = list(self.direction.layers)
            layer = held[0] if self.layer is None and len(held) == 1 else self.layer
            if layer not in held:
                raise ValueError(f"expected one of the vector's layers {held}; got {layer!r}. Pass layer=.")
            object.__setattr__(self, "layer", int(layer))
            vector = self.direction.layers[layer].double()
            if not vector.any():
                raise ValueError(f"expected a direction; the vector is zero at layer {layer}. Use another layer.")
            return (vector / vector.norm()).float(), 0.0
        if not isinstance(self.direction, Probe):
            kind = type(self.direction).__name__
            raise TypeError(f"expected a SteeringVector or a Probe; got {kind}. Load or make one.")
        if len(self.direction.classes) != 2:
            raise ValueError(
                f"expected a probe of two classes; got {list(self.direction.classes)}. Fit one class against the rest."
            )
        own = self.direction.layer
        chosen = own if self.layer is None else self.layer
        if isinstance(chosen, bool) or not isinstance(chosen, Integral) or chosen < 0 or own not in (None, chosen):
            where = "that the probe was fitted at" if own is None else f"{own}, at which the probe was fitted"
            raise ValueError(f"expected the layer {where}, a block's; got {chosen!r}. Pass layer=.")
        object.__setattr__(self, "layer", int(chosen))
        (w0, w1), (b0, b1) = self.direction.weights, self.direction.bias
        return (w1 - w0).float(), float(b1 - b0)

    @property
    def site(self) -> str:
        """What is read of the block: where the vector or the probe was read."""
        return self.direction.site

    @property
    def place(self) -> Place:
        """The site and the layer that are read."""
        assert self.layer is not None
        return self.site, self.layer

    @property
    def bounds(self) -> tuple[float, float]:
        """The open interval of scores in which the condition holds."""
        return (
            -math.inf if self.above is None else float(self.above),
            math.inf if self.below is None else float(self.below),
        )

    def scores(self, x: Float[Tensor, "item d_model"]) -> Float[Tensor, " item"]:
        """The score of each stream, in float32."""
        return (x.float() * self.weights.to(x.device)).sum(-1) + self.offset

    def holds(self, x: Float[Tensor, "item d_model"]) -> Bool[Tensor, " item"]:
        """Whether the condition holds for each stream."""
        scores, (low, high) = self.scores(x), self.bounds
        return (scores > low) & (scores < high)

    def _key(self) -> tuple[Any, ...]:
        return self.content(), self.place, self.bounds, self.decide

    def content(self) -> str:
        """Hash of the score: SHA-256 of the weights and the offset."""
        return hashlib.sha256(self.weights.numpy().tobytes() + repr(self.offset).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Condition) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        """The condition in words, with the hash of its score: what identifies it in tables."""
        low = "" if self.above is None else f"{float(self.above)!r} < "
        high = "" if self.below is None else f" < {float(self.below)!r}"
        site = "" if self.site == DEFAULT else f"{self.site} "
        return f"{low}{self.content()}@{site}{self.layer}{high}, {self.decide}"

    def check(self, layers: Sequence[int], positions: str, site: str = DEFAULT) -> None:
        """`ValueError` unless the condition is decided before the steering acts.

        Args:
            layers: that are steered.
            positions: of the steering.
            site: where it acts.
        """
        first = site, min(layers)
        if place_order(self.place) > place_order(first):
            raise ValueError(
                f"expected a condition that a forward reaches before the steering, which begins at {site} of layer "
                f"{first[1]}; got one at {self.site} of layer {self.layer}. Read an earlier layer or site, or steer a "
                "later one."
            )
        if self.decide == "prompt" and positions.partition(":")[0] not in ("generated", "from_last_prompt_token"):
            raise ValueError(
                f"expected positions 'generated' or 'from_last_prompt_token' for a condition that is decided at the "
                f"end of the prompt; got {positions!r}. Pass decide='token', or other positions."
            )


def described(condition: Condition | None) -> dict[str, Any] | None:
    """A condition as plain data: what identifies it, and the provenance of its threshold."""
    if condition is None:
        return None
    return {
        "score": "probe" if isinstance(condition.direction, Probe) else "projection",
        "content": condition.content(),
        "site": condition.site,
        "layer": condition.layer,
        "above": condition.above,
        "below": condition.below,
        "decide": condition.decide,
        "meta": dict(condition.meta),
    }
