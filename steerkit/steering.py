"""Steering: what is added to the residual stream, where, and how strongly, for each row of a batch."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit import models, residual
from steerkit.blocks import Blocks, find_blocks, unwrap
from steerkit.vectors import SteeringVector

POSITIONS = ("generated", "from_last_prompt_token", "prompt", "all")
END, LARGEST = 2**62, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Steering:
    """A vector, how strongly it acts, on which positions, and how.

    `add`: `h <- h + coefficient * v` after block l, for every layer l of the vector.
    `ablate`: `h <- h - coefficient * (h . u) u` with `u = v / |v|`; coefficient 1 leaves no component along u.

    Args:
        vector: as stored: the coefficient multiplies it with its norm; `vector.unit()` is for you to say.
        coefficient: one number, or a tensor with one per row of the batch. 0 changes nothing, bit for bit.
        positions: in absolute positions, hence the same with and without a cache and under left padding:
            `"generated"`: the positions of new tokens. The first new token is decided at the last position of the
            prompt, so it is not steered.
            `"from_last_prompt_token"`: these and the last position of the prompt, so that every new token is steered.
            `"prompt"`: the prompt's own positions (padding excluded).
            `"all"`: prompt and new tokens.
            Each may end in `:k` for its first k positions, e.g. `"generated:5"`.
        operation: `"add"` or `"ablate"`.
        foreign: allow a vector that was read from other weights (base against fine-tuned, say).

    Raises:
        TypeError: the vector is no SteeringVector.
        ValueError: an unknown position or operation, or a coefficient that is not finite.
    """

    vector: SteeringVector
    coefficient: float | Float[Tensor, " batch"] = 1.0
    positions: str = "generated"
    operation: Literal["add", "ablate"] = "add"
    foreign: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            raise TypeError(f"expected a SteeringVector; got {type(self.vector).__name__}. Load or make one.")
        parse_positions(self.positions)
        if self.operation not in ("add", "ablate"):
            raise ValueError(f"expected operation 'add' or 'ablate'; got {self.operation!r}. Choose one.")
        value = self.coefficient
        number = isinstance(value, Real) or getattr(value, "ndim", 1) == 0
        if isinstance(value, Tensor) and value.ndim == 1:
            if not torch.isfinite(value).all():
                raise ValueError(f"expected finite coefficients; got {value.tolist()}. Take out the others.")
        elif isinstance(value, bool) or not number or not abs(float(value)) <= LARGEST:
            raise ValueError(f"expected a finite coefficient, or a tensor of one per row; got {value!r}. Give another.")
        else:
            object.__setattr__(self, "coefficient", float(value))
        zero = [layer for layer, norm in self.vector.norms().items() if norm == 0]
        if self.operation == "ablate" and zero:
            raise ValueError(f"expected a direction to ablate; the vector is zero at layers {zero}. Take others.")

    def rows(self, batch: int) -> list[tuple[Steering, float]]:
        """This steering and its coefficient for each of `batch` rows."""
        if isinstance(self.coefficient, Tensor):
            if len(self.coefficient) != batch:
                raise ValueError(f"expected one coefficient per row, {batch}; got {len(self.coefficient)}. Pair them.")
            return [(self, float(c)) for c in self.coefficient]
        return [(self, float(self.coefficient))] * batch

    def check(self, model: nn.Module, blocks: Blocks, weights: tuple[str, str | None]) -> None:
        """`ValueError` unless the vector fits the model: its layers, its width, its weights (see `foreign`)."""
        for layer in self.vector.layers:
            blocks.check(layer)
        if self.vector.d_model != blocks.d_model:
            got = f"got {self.vector.d_model}. Extract it from this model."
            raise ValueError(f"expected a vector of width {blocks.d_model}, the model's; {got}")
        meta = self.vector.meta
        read_from = (meta.get("model_fingerprint"), meta.get("adapter_fingerprint"))
        if not self.foreign and read_from[0] is not None and read_from != weights:
            raise ValueError(
                f"expected a vector read from this model, {weights}; it was read from {read_from} "
                f"({meta.get('checkpoint', 'unknown')}). Say foreign=True to steer with it all the same."
            )

    @contextlib.contextmanager
    def on(self, model: nn.Module, prompt_length: int | Sequence[int] | None = None) -> Iterator[None]:
        """Steer every forward of `model` inside the `with`. Of nested ones the inner acts on the stream first.

        `steerkit.generate` takes it over row by row. For a plain `model.generate` or `model(...)`, the width of a
        sequence's first forward is the prompt; `prompt_length` says it instead where one forward holds prompt and
        continuation (one number, or one per row; columns of left padding not counted). Sequences are told apart by
        their cache; without one, `use_cache=False` has to be said for a forward to continue the one before. With beams
        the coefficient has to be one number.

        Raises:
            ValueError: the vector does not fit the model, or the model keeps no cache to tell new tokens by.
            RuntimeError: a prompt that comes in several chunks, which cannot be told from new tokens; a sequence that
                was begun outside; a block that was to be steered and did not run.
        """
        blocks = find_blocks(model)
        self.check(model, blocks, models.fingerprint(model))
        if self.positions != "all" and not models.accepts(model, "past_key_values"):
            raise ValueError(
                f"expected positions 'all' for {type(unwrap(model)).__name__}, whose forward takes no "
                f"`past_key_values`: its new tokens cannot be told from a prompt; got {self.positions!r}."
            )
        state = _Watch(self, blocks, prompt_length)
        base = unwrap(model)
        active = _active.setdefault(base, [])
        active.append(state)
        try:
            modules = {layer: blocks.modules[layer] for layer in self.vector.layers}
            with (
                residual.arriving(base, state.enter),
                residual.arriving(blocks.owner, state.arrive, state.leave),
                residual.writing(modules, state.change) as state.ran,
            ):
                yield
        finally:
            active.remove(state)


def parse_positions(positions: str) -> tuple[str, int]:
    """`"generated:5"` as `("generated", 5)`; without a number, no limit."""
    name, colon, number = str(positions).partition(":")
    if name not in POSITIONS or (colon and not (number.isdecimal() and int(number) > 0)):
        raise ValueError(
            f"expected positions among {POSITIONS}, or ':k' after one for its first k; got {positions!r}. Choose one."
        )
    return name, int(number) if colon else END


def touches_prompt(positions: str) -> bool:
    """Whether positions of the prompt before its last token are steered."""
    return parse_positions(positions)[0] in ("prompt", "all")


@dataclass
class RowSteering:
    """Steerings compiled for the rows of one batch: per layer, which rows move, by what, in which columns.

    Args:
        rows: for each row its steerings, each with a coefficient.
        prompts: for each row the absolute columns `(start, stop)` of its prompt.
        start: the absolute column of the chunk that is being forwarded; set before each forward.
    """

    rows: Sequence[Sequence[tuple[Steering, float]]]
    prompts: Sequence[tuple[int, int]]
    start: int = 0
    _edits: dict[int, list[_Edit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cast: dict[tuple[int, int, str], Tensor] = {}
        depth = max((len(row) for row in self.rows), default=0)
        for turn in range(depth):  # a row's second steering acts after its first: one edit never holds a row twice
            grouped: dict[tuple[int, str], list[tuple[int, int, int, float, Tensor]]] = {}
            for number, row in enumerate(self.rows):
                if turn >= len(row) or row[turn][1] == 0:
                    continue
                steering, coefficient = row[turn]
                low, high = _columns(steering.positions, *self.prompts[number])
                for layer, vector in steering.vector.layers.items():
                    key = (id(steering.vector), layer, steering.operation)
                    if key not in cast:
                        wide = vector.double()
                        cast[key] = vector if steering.operation == "add" else (wide / wide.norm()).float()
                    grouped.setdefault((layer, steering.operation), []).append(
                        (number, low, high, coefficient, cast[key])
                    )
            for (layer, operation), members in grouped.items():
                self._edits.setdefault(layer, []).append(_Edit(operation, members))

    @property
    def layers(self) -> list[int]:
        """The layers at which any row moves."""
        return sorted(self._edits)

    def change(self, layer: int, stream: Tensor) -> Tensor | None:
        """The stream `[batch, pos, d_model]` of the columns from `start` on, steered; None where nothing moves."""
        changed = None
        for edit in self._edits.get(layer, ()):
            if edit.low < self.start + stream.shape[1] and self.start < edit.high:
                changed = edit.apply(stream if changed is None else changed, self.start)
        return changed


class _Edit:
    """One operation at one layer on some rows, each row at most once; its tensors follow the stream's device."""

    def __init__(self, operation: str, members: Sequence[tuple[int, int, int, float, Tensor]]) -> None:
        numbers, lows, highs, coefficients, vectors = zip(*members, strict=True)
        self.operation, self.count = operation, len(numbers)
        self.low, self.high = min(lows), max(highs)
        self.all_from, self.all_to = max(lows), min(highs)
        self.rows, self.lows, self.highs = (torch.tensor(column) for column in (numbers, lows, highs))
        self.factor, self.vectors = torch.tensor(coefficients)[:, None, None], torch.stack(vectors)[:, None]
        self.delta = self.factor * self.vectors

    def follow(self, stream: Tensor) -> None:
        self.rows, self.lows, self.highs, self.factor, self.vectors = (
            t.to(stream.device) for t in (self.rows, self.lows, self.highs, self.factor, self.vectors)
        )
        self.delta = self.delta.to(stream.device, stream.dtype)

    def apply(self, stream: Tensor, start: int) -> Tensor:
        if self.delta.device != stream.device or self.delta.dtype != stream.dtype:
            self.follow(stream)
        every_row = self.count == stream.shape[0]
        old = stream if every_row else stream[self.rows]
        if self.operation == "add":
            new = old + self.delta
        else:
            wide = old.float()
            along = (wide * self.vectors).sum(-1, keepdim=True)
            new = (wide - self.factor * along * self.vectors).to(old.dtype)
        if not (self.all_from <= start and start + stream.shape[1] <= self.all_to):
            columns = torch.arange(start, start + stream.shape[1], device=stream.device)
            inside = (columns >= self.lows[:, None]) & (columns < self.highs[:, None])
            new = torch.where(inside[..., None], new, old)
        return new if every_row else stream.index_copy(0, self.rows, new)


def _columns(positions: str, start: int, stop: int) -> tuple[int, int]:
    """The half-open range of absolute columns that `positions` means for a prompt in columns `start..stop`."""
    name, limit = parse_positions(positions)
    low = {"generated": stop, "from_last_prompt_token": stop - 1, "prompt": start, "all": start}[name]
    high = stop if name == "prompt" else END
    return low, min(high, low + limit)


_active: weakref.WeakKeyDictionary[nn.Module, list[_Watch]] = weakref.WeakKeyDictionary()


class _Watch:
    """Follows plain forwards of a model: where each sequence's prompt ended, and which columns the chunk holds."""

    def __init__(self, steering: Steering, blocks: Blocks, prompt_length: int | Sequence[int] | None) -> None:
        self.steering, self.blocks, self.prompt_length = steering, blocks, prompt_length
        self.asleep = False
        self.ran: set[int] = set()
        self.outer: Mapping[str, Any] = {}
        self.known: weakref.WeakKeyDictionary[Any, RowSteering] = weakref.WeakKeyDictionary()
        self.compiled: RowSteering | None = None
        self.prompt: Tensor | None = None

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """The whole model's arguments: the padding is read off its mask where the decoder gets a prepared one."""
        self.outer = arguments

    def arrive(self, arguments: Mapping[str, Any]) -> None:
        if self.asleep:
            return
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        entering = ids if ids is not None else embeds if embeds is not None else arguments.get("hidden_states")
        if entering is None:
            raise RuntimeError(
                f"expected ids or embeddings to enter {type(self.blocks.owner).__name__}; got {sorted(arguments)}. "
                "Use steerkit.generate."
            )
        batch, width = entering.shape[:2]
        cache = arguments.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        if start:
            self.compiled = self._continued(cache, batch)
            if width > 1 and self.prompt_length is None:
                raise RuntimeError(
                    f"expected one new token per forward after the prompt; got {width} on top of {start}. A prompt "
                    "that comes in chunks cannot be told from new tokens: use steerkit.generate, or say prompt_length."
                )
        elif not self._repeats(arguments, ids):
            masks = (arguments.get("attention_mask"), self.outer.get("attention_mask"))
            flat = [mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
            self.compiled = self._begin(batch, width, flat[0] if flat else None)
            self.prompt = ids
            if cache is not None:
                self.known[cache] = self.compiled
        assert self.compiled is not None
        self.compiled.start = start
        self.ran.clear()

    def leave(self, output: Any) -> None:
        if self.asleep:
            return
        residual.check_called(self.ran, set(self.steering.vector.layers))
        cache = getattr(output, "past_key_values", None)  # made inside, where none was passed in
        if cache is not None and cache not in self.known and self.compiled is not None:
            self.known[cache] = self.compiled

    def _continued(self, cache: Any, batch: int) -> RowSteering:
        """The steering of a cache that was seen before."""
        compiled = self.known.get(cache)
        if compiled is None or len(compiled.rows) != batch:
            raise RuntimeError("expected to see a sequence from its first forward on; entered steering in its middle.")
        return compiled

    def _repeats(self, arguments: Mapping[str, Any], ids: Tensor | None) -> bool:
        """Whether a forward that is said to use no cache begins with the last prompt, and goes on from there."""
        return (
            False in (arguments.get("use_cache"), self.outer.get("use_cache"))
            and self.compiled is not None
            and self.prompt is not None
            and ids is not None
            and ids.shape[0] == self.prompt.shape[0]
            and ids.shape[1] > self.prompt.shape[1]
            and torch.equal(ids[:, : self.prompt.shape[1]], self.prompt)
        )

    def _begin(self, batch: int, width: int, mask: Tensor | None) -> RowSteering:
        starts, stops = [0] * batch, [width] * batch
        if mask is not None:
            real = (mask[:, :width] != 0).int()
            starts, stops = real.argmax(1).tolist(), (width - real.flip(1).argmax(1)).tolist()
        lengths = [self.prompt_length] * batch if isinstance(self.prompt_length, int) else self.prompt_length
        if lengths is not None:
            if len(lengths) != batch or min(lengths) < 1:
                raise ValueError(f"expected a prompt length from 1 for each row, {batch}; got {lengths}. Count tokens.")
            stops = [start + length for start, length in zip(starts, lengths, strict=True)]
        return RowSteering([[row] for row in self.steering.rows(batch)], list(zip(starts, stops, strict=True)))

    def change(self, layer: int, stream: Tensor) -> Tensor | None:
        if self.asleep:
            return None
        assert self.compiled is not None
        return self.compiled.change(layer, stream)


@contextlib.contextmanager
def taken_over(model: nn.Module) -> Iterator[list[Steering]]:
    """The steerings that are on for this model, asleep inside the `with`: for an engine that applies them itself."""
    states = [state for state in _active.get(unwrap(model), []) if not state.asleep]
    for state in states:
        state.asleep = True
    try:
        yield [state.steering for state in reversed(states)]
    finally:
        for state in states:
            state.asleep = False
