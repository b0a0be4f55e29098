"""What a request asks for: parsed and checked before the engine sees it. Imports neither torch nor vLLM.

A request carries a specification under the key `steerkit`: of `SamplingParams.extra_args` offline, of `vllm_xargs` over
HTTP (there as JSON text). It is one object, or a list of objects that act in this order:

    {"vector": "cheerful", "layer": 16, "coefficient": 2.0, "positions": "from_last_prompt_token", "operation": "add"}

Only `vector` is required; the other fields have the defaults of `steerkit.Steering`. Three further keys serve our own
client:

    steerkit_prompt: how many of the prompt's tokens count as the prompt; the others count as generated.
    steerkit_draw: {"name": "row 7", "stream": [0, "p1", 2], "temperature": 0.7, "top_p": 0.9}, tokens drawn as by
        `steerkit.generate` with these random numbers; the name is how an overflow of this request is reported.
    steerkit_read: {"key": "job/positive", "layers": [16], "start": 3, "stop": 9, "weight": 0.5}, adds the stream at
        these positions, times the weight, to the sum of this key.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from steerkit.steering.positions import END, parse_positions, steered_columns

KEY = "steerkit"
PROMPT, DRAW, READ = "steerkit_prompt", "steerkit_draw", "steerkit_read"
KEYS = (KEY, PROMPT, DRAW, READ)
NORMS = 4096
"""Largest number of positions whose norms are read at a time."""
FIELDS = ("vector", "layer", "coefficient", "positions", "operation")
OPERATIONS = ("add", "ablate")
SLOTS = 4
"""Largest number of vectors that one request may use at one layer, unless the server's settings say otherwise."""


LARGEST: Mapping[str, float] = {"float16": 5e4}
"""Norm of the stream above which requests are refused, by number format; `LARGEST_WIDE` for all others.

A stream that overflows leaves NaN in the blocks of the key-value cache, which attention on a CPU reads again when the
blocks belong to other requests.
"""
LARGEST_WIDE = 1e30
STREAM_NORM = 1e4
"""The norm that the stream of an unsteered request is taken to have at most."""
LARGEST_COEFFICIENT = 3e38
"""The workers hold coefficients in float32."""


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
        norm: its largest norm at a layer.
        largest: norm above which the model's stream could overflow.
        error: why it cannot be served with this model; empty if it can.
    """

    name: str
    content: str
    layers: tuple[int, ...]
    zero: tuple[int, ...] = ()
    norm: float = 0.0
    largest: float = LARGEST_WIDE
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
        return steered_columns(self.positions, 0, prompt_length, self.operation)


@dataclass(frozen=True)
class Draw:
    """How the tokens of a request are chosen.

    Args:
        name: under which an overflow is reported.
        stream: what the random numbers are keyed by, see `steerkit.generation.sampling.random_stream`.
        temperature: 0 is greedy.
        top_p: of the nucleus.
        count: largest number of new tokens.
    """

    name: str
    stream: tuple[Any, ...]
    temperature: float
    top_p: float
    count: int


@dataclass(frozen=True)
class Read:
    """Which positions of a request are added to which sum.

    Args:
        key: of the sum.
        layers: whose output is read.
        start, stop: half-open range of absolute positions.
        weight: factor of every position.
        each: read the norm of the stream at each position instead of a sum.
    """

    key: str
    layers: tuple[int, ...]
    start: int
    stop: int
    weight: float
    each: bool = False


@dataclass(frozen=True)
class Asked:
    """Everything that a request asks for.

    Args:
        pushes: its steerings.
        prompt: number of tokens that count as the prompt; None: all of it.
        draw: how its tokens are chosen; None: by vLLM.
        read: what is read; None: nothing.
    """

    pushes: tuple[Push, ...] = ()
    prompt: int | None = None
    draw: Draw | None = None
    read: Read | None = None


def parse_all(
    extra: Mapping[str, Any], served: Mapping[str, Served], *, slots: int, n_prompt: int, n_new: int, n_layers: int
) -> Asked:
    """Everything that a request asks for, checked.

    Args:
        extra: the request's extra arguments.
        served: the served vectors by name.
        slots: see `parse`.
        n_prompt: number of the prompt's tokens.
        n_new: largest number of new tokens.
        n_layers: number of the model's blocks.

    Raises:
        BadRequest: see `parse`; a misspelt key; a value that is out of range; reading with steering.
    """
    check_keys(extra)
    pushes = parse(extra[KEY], served, slots) if KEY in extra else ()
    prompt = extra.get(PROMPT)
    if prompt is not None and (isinstance(prompt, bool) or not isinstance(prompt, int) or not 1 <= prompt <= n_prompt):
        raise BadRequest(f"expected {PROMPT!r} from 1 to the prompt's {n_prompt} tokens; got {prompt!r:.80}. Lower it.")
    draw = _draw(_object(extra[DRAW], DRAW, Draw, {"count"}), n_new) if DRAW in extra else None
    read = _read(_object(extra[READ], READ, Read, set()), n_prompt, n_layers) if READ in extra else None
    if read is not None and pushes:
        raise BadRequest(f"expected either {KEY!r} or {READ!r}; got both. Read the stream without steering.")
    return Asked(pushes, prompt, draw, read)


FIELDS_OF_A_STEERING = ("vector", "layer", "coefficient", "positions")


def meant_for_steering(name: str) -> bool:
    """Whether an unknown field at the top level of a request looks like a steering in the wrong place."""
    name = name.lower()
    like = name.startswith("steer") or name in (*FIELDS_OF_A_STEERING, "extra_body", "extra_args")
    return like or bool(difflib.get_close_matches(name, ["vllm_xargs"], cutoff=0.8))


def check_keys(extra: Mapping[str, Any]) -> None:
    """`BadRequest` for a key that begins like ours and is none, or for the fields of a steering without their key."""
    if misspelt := [name for name in extra if name not in KEYS and name.lower().startswith("steer")]:
        raise BadRequest(f"expected keys among {KEYS}; got {misspelt}. Rename it.")
    if KEY not in extra and (bare := [name for name in extra if name in FIELDS_OF_A_STEERING]):
        raise BadRequest(
            f"expected the fields {bare} in a JSON object that is the value of {KEY!r}, as text; got them without it. "
            f'Send {{"{KEY}": "{{...}}"}}.'
        )


def _object(given: Any, key: str, kind: type, left_out: set[str]) -> dict[str, Any]:
    given = _read_json(given, key)
    names = {one.name for one in fields(kind)} - left_out
    if not isinstance(given, Mapping) or set(given) != names:
        raise BadRequest(f"expected an object with {sorted(names)} in {key!r}; got {given!r:.80}. Send these.")
    return dict(given)


def _draw(given: dict[str, Any], n_new: int) -> Draw:
    temperature, top_p, stream = given["temperature"], given["top_p"], given["stream"]
    if not _is_number(temperature) or temperature < 0 or not _is_number(top_p) or not 0 < top_p <= 1:
        raise BadRequest(
            f"expected a temperature from 0 and a top_p above 0 and at most 1; got {temperature!r:.80} and "
            f"{top_p!r:.80}. Correct them."
        )
    if not isinstance(stream, list | tuple) or not isinstance(given["name"], str):
        raise BadRequest(f"expected a list as 'stream' and a text as 'name' in {DRAW!r}; got others. Correct them.")
    return Draw(given["name"], _tuple(stream), float(temperature), float(top_p), n_new)


def _tuple(given: Any) -> Any:
    return tuple(map(_tuple, given)) if isinstance(given, list | tuple) else given


def _read(given: dict[str, Any], n_prompt: int, n_layers: int) -> Read:
    layers, start, stop = given["layers"], given["start"], given["stop"]
    whole = [start, stop, *(layers if isinstance(layers, list | tuple) else [None])]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in whole) or not 0 <= start < stop <= n_prompt:
        raise BadRequest(
            f"expected layers as a list, and 0 <= start < stop <= {n_prompt} in {READ!r}; got {given!r:.120}. Correct "
            "them."
        )
    if not layers or min(layers) < 0 or max(layers) >= n_layers or len(set(layers)) < len(layers):
        raise BadRequest(f"expected layers from 0 to {n_layers - 1}, each once; got {layers!r:.80}. Correct them.")
    kinds = isinstance(given["key"], str), _is_number(given["weight"]), isinstance(given["each"], bool)
    if not all(kinds):
        raise BadRequest(
            f"expected a text as 'key', a number as 'weight' and a boolean as 'each' in {READ!r}; got others. Correct "
            "them."
        )
    if given["each"] and stop - start > NORMS:
        raise BadRequest(f"expected the norms of at most {NORMS} positions; got {stop - start}. Read them in parts.")
    return Read(given["key"], tuple(layers), start, stop, float(given["weight"]), given["each"])


def _is_number(value: Any) -> bool:
    """Whether a value is a number that float64 holds."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False


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
            coefficient that is not a finite number or so large that the stream could overflow, unknown positions or
            operation, too many vectors at a layer.

    Example:
        >>> parse({"vector": "cheerful"}, {"cheerful": Served("cheerful", "1f", (16,))})[0].layers
        (16,)
    """
    specification = _read_json(specification, KEY)
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
    used = [served[one["vector"]] for one in objects]
    strengths = [
        (push.layers, push.coefficient, push.operation, one.norm) for push, one in zip(pushes, used, strict=True)
    ]
    if (bound := largest_stream(strengths)) > (largest := min(one.largest for one in used)):
        raise BadRequest(
            f"expected a stream of norm {largest:g} at most; got coefficients under which it could be {bound:.3g}: it "
            "could overflow, and spoil other requests. Lower them."
        )
    return tuple(push for push in pushes if push.coefficient != 0)


def _read_json(given: Any, key: str) -> Any:
    """What JSON text holds; anything else as it is."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"expected JSON in {key!r}; got {given!r:.80} ({error}). Send valid JSON.") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key twice among {[name for name, _ in pairs]}")
    return found


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


def largest_stream(strengths: Sequence[tuple[Sequence[int], float, str, float]]) -> float:
    """The largest norm that a stream can have under pushes, from layer to layer and in their order.

    `add`: `||h + c v|| <= ||h|| + |c| ||v||`; `ablate`: `||h - c (h.u) u|| <= max(1, |1 - c|) ||h||`. The stream is
    taken to begin with the norm `STREAM_NORM`, to which the blocks add nothing.

    Args:
        strengths: of each push the layers, the coefficient, the operation, and the largest norm of its vector.

    Returns:
        The norm; infinite where it is beyond float64.

    Example:
        >>> largest_stream([((16,), 2.0, "add", 300.0)])
        10600.0
    """
    bound = STREAM_NORM
    for layer in sorted({layer for layers, *_ in strengths for layer in layers}):
        for layers, coefficient, operation, norm in strengths:
            if layer in layers:
                bound = bound + abs(coefficient) * norm if operation == "add" else bound * max(1, abs(1 - coefficient))
    return bound


def _coefficient(value: Any) -> float:
    if not _is_number(value) or abs(value) > LARGEST_COEFFICIENT:
        raise BadRequest(
            f"expected a finite number, {LARGEST_COEFFICIENT:g} at most, as 'coefficient'; got {value!r:.80}. Send one."
        )
    return float(value)


def to_wire(asked: Asked) -> dict[str, Any]:
    """What is asked for as plain data, as it travels to the workers."""
    return asdict(asked)


def from_wire(data: Mapping[str, Any]) -> Asked:
    """What is asked for, of `to_wire`; sequences may have become lists on the way."""
    pushes = tuple(Push(**{**one, "layers": tuple(one["layers"])}) for one in data["pushes"])
    draw, read = data["draw"], data["read"]
    return Asked(
        pushes,
        data["prompt"],
        None if draw is None else Draw(**{**draw, "stream": _tuple(draw["stream"])}),
        None if read is None else Read(**{**read, "layers": tuple(read["layers"])}),
    )


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
    "DRAW",
    "END",
    "KEY",
    "KEYS",
    "NORMS",
    "PROMPT",
    "READ",
    "SLOTS",
    "Asked",
    "BadRequest",
    "Draw",
    "Push",
    "Read",
    "Served",
    "cache_keys",
    "check_keys",
    "from_wire",
    "largest_stream",
    "meant_for_steering",
    "parse",
    "parse_all",
    "spans",
    "to_wire",
]
