"""Steering: a vector, how strongly it acts, at which layers and positions, and how."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.layers import Layer
from steerkit.models.active import watching
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.cache_argument import counts_tokens
from steerkit.models.identity import check_origin, fingerprint
from steerkit.models.kernels import use_kernels
from steerkit.models.model import unwrap
from steerkit.models.site_names import DEFAULT, check_name
from steerkit.models.sites import find_sites, width_of
from steerkit.steering.conditions import Condition
from steerkit.steering.operations import Operation, check_vector, named, needs_direction
from steerkit.steering.positions import parse_positions
from steerkit.steering.watch import Watch
from steerkit.vectors.vector import SteeringVector

ADDING = ("add", "add_normed")
"""Operations whose push has a norm, so that a dose has a meaning."""
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Steering:
    """A vector, how strongly it acts, at which layers, site and positions, and how.

    `add`: `h <- h + coefficient * v` after block l, for every layer l that is steered.
    `ablate`: `h <- h - coefficient * (h . u) u` with `u = v / |v|`; coefficient 1 leaves no component along u.
    `add_normed`: `add`, then scaled to the norm of h.
    `clamp:a:b`: `h <- h + coefficient * (clip(h . u, a, b) - h . u) u`; coefficient 1 brings the projection into
    [a, b], `clamp:a` to a, and `clamp` to |v|.
    `rotate`: turns h by `coefficient` radians towards u, not beyond it; the norm stays.

    Args:
        vector: as stored: the coefficient multiplies it with its norm. Call `vector.unit()` for a unit-norm vector.
        coefficient: one number, or a tensor with one per row of the batch. 0 changes nothing, bit for bit.
        positions: absolute positions, hence the same with and without a cache and under left padding:
            `"from_last_prompt_token"`: the last position of the prompt and all new tokens. Every new token is steered.
            `"generated"`: the positions of new tokens only. The first new token is decided at the last position of the
            prompt, so it is not steered.
            `"prompt"`: the positions of the prompt (padding excluded).
            `"all"`: prompt and new tokens.
            Each may end in `:k` for its first k positions, e.g. `"generated:5"`.
            `ablate` at `"prompt"` and `"all"` leaves out position 0, an attention sink whose ablation destroys texts;
            `"prompt+0"` and `"all+0"` include it. For other operations `+0` changes nothing.
        operation: `"add"`, `"ablate"`, `"add_normed"`, `"clamp"`, `"clamp:value"`, `"clamp:low:high"`, `"rotate"`, or
            an `Operation` of your own. After construction its name.
        foreign: allow a vector that was read from other weights, e.g. a base model's for a fine-tuned one.
        layer: where it acts: one layer of the vector, several at once, or `"all"` layers of the vector at once. A
            vector that holds one layer needs no `layer`. After construction `vector` holds the steered layers only.
        site: where in the block it acts, h being the value there: `"resid_post"`, `"resid_pre"`, `"resid_mid"`,
            `"attn_out"`, `"mlp_out"` or `"z"` (the attention heads side by side; zeros in the vector leave a head as it
            is, except under `add_normed` and `rotate`). Default: where the vector was read. The model must have the
            site, see docs/architectures.md.
        when: a `Condition`: the steering acts only in rows, or at positions, where it holds. None: everywhere.
        dose: instead of a coefficient: the norm of the push in units of the stream's norm, signed, for `add` and
            `add_normed`. The coefficient is NaN until `resolved(norms)` sets it; `on(model, norms=...)`,
            `sk.generate` and `sk.score_choices` do so. Without `norms=` these two measure the norms over all prompts of
            the call: the coefficient of one prompt then depends on the others. Functions without `norms=`, such as
            `sk.project`, `sk.logit_lens` and `steerkit.scores.fluency.kl`, take `steering.resolved(norms)`.

    Raises:
        TypeError: `vector` is not a SteeringVector, or `when` not a Condition.
        ValueError: an unknown position, operation, site or layer; a coefficient or dose that is not finite, or both; a
            dose for an operation that adds nothing; no `layer` for a vector that holds several; a condition that is
            decided after the steering would act; an erasure with another vector than its own.

    Example:
        >>> steering = sk.Steering(vector, 1.5, layer=14)
        >>> sk.generate(model, tokenizer, prompts, max_new_tokens=40, steering=steering)
    """

    vector: SteeringVector
    coefficient: float | Float[Tensor, " batch"] = 1.0
    positions: str = "from_last_prompt_token"
    operation: str | Operation = "add"
    foreign: bool = False
    layer: int | Sequence[int] | Literal["all"] | None = field(default=None, kw_only=True)
    site: str | None = field(default=None, kw_only=True)
    when: Condition | None = field(default=None, kw_only=True)
    dose: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            raise TypeError(f"expected a SteeringVector; got {type(self.vector).__name__}. Load or make one.")
        object.__setattr__(self, "vector", at_layers(self.vector, self.layer))
        steered = tuple(self.vector.layers)
        object.__setattr__(self, "layer", steered[0] if len(steered) == 1 else steered)
        object.__setattr__(self, "site", check_name(self.vector.site if self.site is None else self.site))
        parse_positions(self.positions)
        object.__setattr__(self, "operation", named(self.operation).name)
        check_vector(self.operation, self.vector, str(self.site))
        if self.dose is None:
            object.__setattr__(self, "coefficient", _checked_coefficient(self.coefficient))
        else:
            self._check_dose()
            object.__setattr__(self, "dose", float(self.dose))
            object.__setattr__(self, "coefficient", math.nan)
        if self.when is not None:
            if not isinstance(self.when, Condition):
                raise TypeError(f"expected a Condition as when=; got {type(self.when).__name__}. Make one.")
            self.when.check(steered, self.positions, str(self.site))
        if needs_direction(self.operation):
            zero = [layer for layer, norm in self.vector.norms().items() if norm == 0]
            if zero:
                raise ValueError(
                    f"expected a direction to {self.operation}; the vector is zero at layers {zero}. Use other layers."
                )

    def _key(self) -> tuple[Any, ...]:
        """What equality and hash compare: every field, a coefficient per row as a tuple."""
        coefficient = self.coefficient
        per_row = tuple(coefficient.tolist()) if isinstance(coefficient, Tensor) else coefficient
        settings = self.positions, self.operation, self.foreign, self.when, self.site, self.dose
        return self.vector, per_row, *settings

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Steering) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def scaled(self, coefficient: float) -> Steering:
        """The same steering with another coefficient, and without a dose."""
        return replace(self, coefficient=coefficient, dose=None)

    def dose_of_one(self, norms: Mapping[Layer, float]) -> float:
        """The relative dose of coefficient 1: the mean over the steered layers of `|v_l| / norm_l`."""
        return sum(norm / norms[layer] for layer, norm in self.vector.norms().items()) / len(self.vector.layers)

    def resolved(self, norms: Mapping[Layer, float]) -> Steering:
        """The same steering with the coefficient that its dose means; unchanged without a dose.

        `coefficient = dose / mean over the steered layers of (|v_l| / norm_l)`.

        Args:
            norms: norm of the stream per layer, see `steerkit.steering.dose.median_norms`.

        Raises:
            ValueError: `norms` lacks a steered layer, or the vector is zero.
        """
        if self.dose is None:
            return self
        if missing := [layer for layer in self.vector.layers if not norms.get(layer, math.nan) > 0]:
            raise ValueError(
                f"expected norms of the stream at the layers {list(self.vector.layers)} for a dose; got none for "
                f"{missing}. Pass norms=, or texts with a steered position beyond the first."
            )
        if (one := self.dose_of_one(norms)) == 0:
            raise ValueError("expected a vector with a norm for a dose; got a zero vector. Pass another vector.")
        return self.scaled(self.dose / one)

    def _check_dose(self) -> None:
        if self.operation not in ADDING:
            raise ValueError(
                f"expected a coefficient for {self.operation!r}, whose change has no fixed norm; got dose={self.dose}. "
                f"Pass a coefficient, or an operation among {ADDING}."
            )
        given = self.coefficient
        if not (isinstance(given, Real) and (given == 1 or math.isnan(given))):
            raise ValueError(f"expected a coefficient or a dose; got {given} and dose={self.dose}. Pass one of them.")
        number = isinstance(self.dose, Real) and not isinstance(self.dose, bool)
        if not number or not math.isfinite(self.dose):
            raise ValueError(f"expected a finite dose; got {self.dose!r}. Pass another number.")

    def per_row(self, batch: int) -> list[Steering]:
        """This steering once for each of `batch` rows, each with one number as coefficient.

        Raises:
            ValueError: the coefficient is a tensor of another length.
        """
        if not isinstance(self.coefficient, Tensor):
            return [self] * batch
        if len(self.coefficient) != batch:
            raise ValueError(
                f"expected one coefficient per row, {batch}; got {len(self.coefficient)}. Pass one per prompt."
            )
        return [self.scaled(float(one)) for one in self.coefficient]

    def check(self, model: nn.Module, blocks: Blocks, weights: tuple[str, str | None]) -> None:
        """`ValueError` unless the vector fits the model.

        Its layers, site and width, the model's type and number of layers must fit; its weights too, unless `foreign`.
        The same for the vector of a condition.
        """
        if self.dose is not None:
            raise ValueError(
                f"expected a coefficient; got dose={self.dose}, which needs the norms of the stream. Pass "
                "steering.resolved(norms), with norms such as result.meta['stream_norms'] of a sweep."
            )
        width = width_of(model, blocks, str(self.site), self.vector.layers)
        if self.vector.d_model != width:
            at = "" if self.site == DEFAULT else f" at {self.site}"
            raise ValueError(
                f"expected a vector of width {width}, the model's{at}; got {self.vector.d_model}. Extract it from "
                "this model."
            )
        if self.when is not None:
            self._check_when(self.when, model, blocks)
            check_origin("a condition", self.when.direction.meta, model, weights, self.foreign)
            check_origin("a condition with a threshold", self.when.meta, model, weights, self.foreign)
        check_origin("a vector", self.vector.meta, model, weights, self.foreign)

    def _check_when(self, when: Condition, model: nn.Module, blocks: Blocks) -> None:
        """`ValueError` unless the model has the condition's place, of its width, before that of the steering."""
        site, layer = when.place
        width = width_of(model, blocks, site, [layer])
        if len(when.weights) != width:
            at = "" if site == DEFAULT else f" at {site}"
            raise ValueError(
                f"expected a condition of width {width}, the model's{at}; got {len(when.weights)}. Read it from this "
                "model."
            )
        beside = site in ("z", "attn_out") and self.site == "mlp_out" and layer == min(self.vector.layers)
        if beside and layer not in find_sites(model).layers("resid_mid"):
            raise ValueError(
                f"expected a condition that a forward reaches before mlp_out of layer {layer}; got one at {site}, and "
                "attention and MLP of this block read the same stream, in any order. Read an earlier layer, or "
                "resid_pre."
            )

    @contextlib.contextmanager
    def on(
        self,
        model: nn.Module,
        prompt_length: int | Sequence[int] | None = None,
        norms: Mapping[Layer, float] | None = None,
    ) -> Iterator[None]:
        """Steer every forward of `model` inside the `with`. Nested contexts apply innermost first.

        `steerkit.generate` reads it off the model and applies it row by row. `model.generate` is followed too, also
        with chunked prefill, a cache that was filled before, beams (with one number as coefficient) and static caches,
        which are not compiled inside the `with`. For plain forwards, `model(...)`, the prompt's length must be known:
        a forward without earlier tokens is a prompt of its own; pass `prompt_length` where a forward also holds new
        tokens, or continues a cache. Positions `"all"` need no prompt length.

        Args:
            prompt_length: tokens of the prompt, one number or one per row, left padding not counted.
            norms: norm of the stream per layer, for a `dose`; e.g. `result.meta["stream_norms"]` of a sweep.

        Raises:
            ValueError: a dose without norms; the vector does not fit the model, or the model takes no cache, so that
                new tokens cannot be told from the prompt.
            RuntimeError: a forward that continues a cache, without `prompt_length`; a block that was to be steered and
                whose hook did not run.

        Warns:
            UserWarning: no position was steered inside the `with`.
        """
        blocks = find_blocks(model)
        steering = self if norms is None else self.resolved(norms)
        steering.check(model, blocks, fingerprint(model))
        if self.positions not in ("all", "all+0") and not counts_tokens(model):
            raise ValueError(
                f"expected positions 'all' for {type(unwrap(model)).__name__}, whose forward takes no KV cache: its "
                f"new tokens cannot be told from a prompt; got {self.positions!r}."
            )
        watch = Watch(steering, model, blocks, prompt_length)
        base = unwrap(model)
        active = watching.setdefault(base, [])
        active.append(watch)
        try:
            with use_kernels(model), watch.following(base):
                yield
        finally:
            active.remove(watch)


def steerings_per_row(
    steering: Steering | Sequence[Steering | None] | None, active: Sequence[Steering], count: int
) -> list[tuple[Steering, ...]]:
    """The steerings of each of `count` rows: those that are on for the model, then the row's own.

    Args:
        steering: one for all rows, or one (or None) per row.
        active: those that are on, see `steerkit.steering.watch.suspended`.

    Raises:
        TypeError: an entry that is no Steering.
        ValueError: another number of steerings than rows.
    """
    shared = [one.per_row(count) for one in (*active, *([steering] if isinstance(steering, Steering) else []))]
    rows = [tuple(column[i] for column in shared) for i in range(count)]
    if steering is None or isinstance(steering, Steering):
        return rows
    several = list(steering) if isinstance(steering, Sequence) else [steering]
    if stray := [one for one in several if not (one is None or isinstance(one, Steering))]:
        raise TypeError(
            f"expected a Steering, or a list with one (or None) per prompt; got {type(stray[0]).__name__}. Pass "
            "Steering(vector, coefficient)."
        )
    if len(steering) != count:
        raise ValueError(
            f"expected one steering (or None) per prompt, {count}; got {len(steering)}. Pass one per prompt."
        )
    return [row if one is None else (*row, *one.per_row(1)) for row, one in zip(rows, steering, strict=True)]


def at_layers(vector: SteeringVector, layer: int | Sequence[int] | Literal["all"] | None) -> SteeringVector:
    """The vector at the layers that are to be steered.

    Args:
        layer: one layer, several, or `"all"`; None for a vector that holds one layer.

    Raises:
        ValueError: None for a vector that holds several layers; a layer that the vector does not hold.
    """
    if layer is None:
        if len(vector.layers) > 1:
            known = list(vector.layers)
            raise ValueError(
                f"expected a layer, since the vector holds {len(known)}: {known}. Pass layer={known[len(known) // 2]} "
                'for one of them, or layer="all" to steer all of them at once.'
            )
        return vector
    if isinstance(layer, str):
        if layer != "all":
            raise ValueError(f'expected a layer, several, or "all"; got {layer!r}. Pass a number.')
        return vector
    if isinstance(layer, Integral):
        layers: Sequence[int] = [int(layer)]
    else:
        layers = layer.tolist() if hasattr(layer, "tolist") else list(layer)  # type: ignore[arg-type]
    return vector if list(layers) == list(vector.layers) else vector.at(*layers)


def _checked_coefficient(value: Any) -> float | Tensor:
    """One finite number as a float, or a tensor of finite numbers, one per row."""
    if isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) == 1:
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        if not torch.isfinite(value).all():
            raise ValueError(f"expected finite coefficients; got {value.tolist()}. Remove the others.")
        return value
    number = isinstance(value, Real) or getattr(value, "ndim", 1) == 0
    if isinstance(value, bool) or not number or not abs(float(value)) <= LARGEST:
        raise ValueError(f"expected a finite coefficient, or one per row; got {value!r}. Pass another number.")
    return float(value)
