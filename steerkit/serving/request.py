"""What a request asks for: parsed and checked before the engine sees it. Imports neither torch nor vLLM.

A request carries a specification under the key `steerkit`: of `SamplingParams.extra_args` offline, of `vllm_xargs` over
HTTP (there as JSON text). It is one object, or a list of objects that act in this order:

    {"vector": "cheerful", "layer": 16, "coefficient": 2.0, "positions": "from_last_prompt_token", "operation": "add"}

Only `vector` is required; the other fields have the defaults of `steerkit.Steering`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerkit.steering.positions import END, parse_positions, steered_columns

KEY = "steerkit"
FIELDS = ("vector", "layer", "coefficient", "positions", "operation")
OPERATIONS = ("add", "ablate")
SLOTS = 4
"""Largest number of vectors that one request may use at one layer, unless the server's settings say otherwise."""


class BadRequest(ValueError):
    """A specification that cannot be served; the message says what was expected, what came, and the fix."""


@dataclass(frozen=True)
class Served:
    """A vector of the served folder, after its header was checked against the served model.

    Args:
        name: by which requests ask for it.
        content: hash of its layers and values; the workers know it by this.
        layers: layers that it holds.
        zero: layers where its norm is zero, which have no direction to ablate.
        error: why it cannot be served with this model; empty if it can.
    """

    name: str
    content: str
    layers: tuple[int, ...]
    zero: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Push:
    """One checked object of a specification.

    Args:
        content: of the vector, see `Served`.
        layers: where it acts, each with its own part of the vector.
        coefficient: multiplies the vector as stored.
        positions: see `steerkit.Steering`.
        operation: `add` or `ablate`.
    """

    content: str
    layers: tuple[int, ...]
    coefficient: float
    positions: str
    operation: str

    def columns(self, prompt_length: int) -> tuple[int, int]:
        """The half-open range of absolute positions that it steers after a prompt of this length."""
        return steered_columns(self.positions, 0, prompt_length)


def parse(specification: Any, served: Mapping[str, Served], slots: int = SLOTS) -> tuple[Push, ...]:
    """The checked pushes of a specification.

    Args:
        specification: an object, a list of objects, or JSON text of either.
        served: the served vectors by name.
        slots: largest number of vectors at one layer.

    Returns:
        The pushes in their order; those with coefficient 0 are left out, since they change nothing.

    Raises:
        BadRequest: bad JSON, no or an unknown vector, an unknown field, a layer that the vector does not hold, a
            coefficient that is not a finite number, unknown positions or operation, too many vectors at a layer.

    Example:
        >>> parse({"vector": "cheerful"}, {"cheerful": Served("cheerful", "1f", (16,))})[0].layers
        (16,)
    """
    if isinstance(specification, str):
        try:
            specification = json.loads(specification, parse_constant=_no_constant)
        except ValueError as error:
            raise BadRequest(
                f"expected JSON in {KEY!r}; got {specification!r:.80} ({error}). Send valid JSON."
            ) from None
    objects = specification if isinstance(specification, list | tuple) else [specification]
    if not objects:
        raise BadRequest(
            f"expected an object, or a list with one at least, in {KEY!r}; got an empty list. Leave it out."
        )
    pushes = tuple(_push(one, served) for one in objects)
    counts: dict[int, int] = {}
    for push in pushes:
        for layer in push.layers:
            counts[layer] = counts.get(layer, 0) + 1
    if (most := max(counts.values())) > slots:
        raise BadRequest(
            f"expected at most {slots} vectors at one layer; got {most}. Start the server with slots={most}, or add "
            "vectors up before."
        )
    return tuple(push for push in pushes if push.coefficient != 0)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _push(one: Any, served: Mapping[str, Served]) -> Push:
    if not isinstance(one, Mapping):
        raise BadRequest(f"expected an object with 'vector' in {KEY!r}; got {one!r:.80}. Send an object.")
    if unknown := sorted(str(name) for name in set(one) - set(FIELDS)):
        raise BadRequest(f"expected fields among {FIELDS} in {KEY!r}; got {unknown}. Remove or rename them.")
    name = one.get("vector")
    if not isinstance(name, str) or name not in served:
        known = ", ".join(sorted(served)) or "none"
        raise BadRequest(f"expected a served vector ({known}) as 'vector'; got {name!r:.80}. Ask for one of these.")
    vector = served[name]
    if vector.error:
        raise BadRequest(f"expected a vector that fits the served model; got {name!r}: {vector.error}. Use another.")
    operation = one.get("operation", "add")
    if operation not in OPERATIONS:
        raise BadRequest(f"expected an operation among {OPERATIONS}; got {operation!r:.80}. Send one of these.")
    layers = _layers(one.get("layer"), vector)
    if operation == "ablate" and (zero := [layer for layer in layers if layer in vector.zero]):
        raise BadRequest(f"expected a direction to ablate; the vector {name!r} is zero at layers {zero}. Use others.")
    positions = one.get("positions", "from_last_prompt_token")
    try:
        parse_positions(positions)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return Push(vector.content, layers, _coefficient(one.get("coefficient", 1.0)), positions, operation)


def _layers(layer: Any, vector: Served) -> tuple[int, ...]:
    held = vector.layers
    if layer == "all" or (layer is None and len(held) == 1):
        return held
    wanted = layer if isinstance(layer, list | tuple) else [layer]
    bad = [one for one in wanted if isinstance(one, bool) or not isinstance(one, int) or one not in held]
    if bad or not wanted or len(set(wanted)) < len(wanted):
        raise BadRequest(
            f"expected 'layer' as one of the layers {list(held)} of the vector {vector.name!r}, a list of them without "
            f'repeats, or "all"; got {layer!r:.80}. Send such a layer.'
        )
    return tuple(sorted(wanted))


def _coefficient(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequest(f"expected a finite number as 'coefficient'; got {value!r:.80}. Send a number.")
    return float(value)


def to_wire(pushes: Sequence[Push]) -> list[dict[str, Any]]:
    """The pushes as plain data, as they travel to the workers."""
    return [{**asdict(push), "layers": list(push.layers)} for push in pushes]


def from_wire(data: Sequence[Mapping[str, Any]]) -> tuple[Push, ...]:
    """The pushes of `to_wire`."""
    return tuple(Push(**{**one, "layers": tuple(one["layers"])}) for one in data)


def cache_keys(pushes: Sequence[Push], prompt_length: int, stop: int, n_layers: int) -> tuple[tuple[Any, ...], ...]:
    """What the keys and values of the positions before `stop` depend on, beyond the tokens.

    A block of the prefix cache that ends at `stop` may be shared by requests whose tokens up to there and whose keys
    are equal. A push that begins at `stop` or later is not among them, so that what precedes it is shared with plain
    requests; nor is one at the last layer alone, whose output no key or value depends on.

    Args:
        pushes: of the request.
        prompt_length: of the request, in tokens.
        stop: end of the block, in tokens.
        n_layers: number of the model's blocks.
    """
    keys = []
    for push in pushes:
        low, high = push.columns(prompt_length)
        layers = tuple(layer for layer in push.layers if layer < n_layers - 1)
        if low < min(high, stop) and layers:
            keys.append((KEY, push.content, layers, push.coefficient, push.operation, low, min(high, stop)))
    return tuple(keys)


def spans(pushes: Sequence[Push], prompt_length: int, computed: int, scheduled: int) -> list[tuple[Push, int, int]]:
    """Which of a request's scheduled tokens each push steers, as half-open ranges of offsets.

    The absolute position of a token is the number of computed tokens plus its offset. Whether a token belongs to the
    prompt follows from its position alone: a prompt may come in chunks, or again after a preemption with the tokens
    that were generated before.

    Args:
        pushes: of the request.
        prompt_length: of the request's prompt, in tokens.
        computed: tokens that were computed in earlier steps.
        scheduled: tokens of this step.
    """
    found = []
    for push in pushes:
        low, high = push.columns(prompt_length)
        start, stop = max(low - computed, 0), min(high - computed, scheduled)
        if start < stop:
            found.append((push, start, stop))
    return found


__all__ = [
    "END",
    "KEY",
    "SLOTS",
    "BadRequest",
    "Push",
    "Served",
    "cache_keys",
    "from_wire",
    "parse",
    "spans",
    "to_wire",
]
