"""Follow plain forwards and `generate` calls inside `with steering.on(model)`."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

from torch import Tensor, nn

from steerkit.models.blocks import Blocks
from steerkit.models.cache_argument import cache_in
from steerkit.models.hooks import check_called, observe_calls, wrapped_method
from steerkit.models.site_names import DEFAULT, Place
from steerkit.models.sites import edit_places
from steerkit.steering.conditions import Condition
from steerkit.steering.operations import Operation, named
from steerkit.steering.positions import parse_positions, steered_columns
from steerkit.steering.rows import RowEdit, RowSteering
from steerkit.vectors.vector import SteeringVector


class Steers(Protocol):
    """What is read of a `Steering` here."""

    @property
    def vector(self) -> SteeringVector: ...
    @property
    def positions(self) -> str: ...
    @property
    def operation(self) -> str | Operation: ...
    @property
    def site(self) -> str | None: ...
    @property
    def when(self) -> Condition | None: ...
    def per_row(self, batch: int) -> Sequence[RowEdit]: ...


@dataclass
class _Generation:
    """A running `generate` call.

    Args:
        width: columns of the prompt, left padding included.
        given: tokens of the prompt that the returned sequences begin with.
        mask: the attention mask that was passed, `[row, column]`.
        forwarded: columns that forwards have held so far.
    """

    width: int
    given: int
    mask: Tensor | None
    forwarded: int = 0


@dataclass(frozen=True)
class _Seen:
    """The columns of one batch that forwards inside the `with` have held.

    Args:
        start, stop: half-open range of columns.
        cache: that holds their keys; None where no forward was given one.
    """

    start: int = 0
    stop: int = 0
    cache: weakref.ref[Any] | None = None

    def after(self, cache: Any, start: int, stop: int) -> _Seen:
        """The columns after a forward; those of before count where it continues the same cache."""
        held = None if cache is None else weakref.ref(cache)
        same = self.cache is None or held is None or self.cache() is cache  # the first forward may make its cache
        continues = 0 < start <= self.stop and same
        return _Seen(self.start if continues else start, stop, held or self.cache)


class Watch:
    """Follows a model's forwards: where each sequence's prompt ends, and which columns a forward holds.

    The prompt's length is never guessed from the shapes of forwards. It is known inside `generate`, from
    `prompt_length`, or in a forward without earlier tokens in its cache and without a later forward on that cache.

    Args:
        steering: what is applied.
        model: the model.
        blocks: its blocks.
        prompt_length: tokens of the prompt, one number or one per row.
    """

    def __init__(
        self, steering: Steers, model: nn.Module, blocks: Blocks, prompt_length: int | Sequence[int] | None
    ) -> None:
        self.steering, self.model, self.blocks, self.prompt_length = steering, model, blocks, prompt_length
        self.needs_prompt = parse_positions(steering.positions)[0] != "all"
        self.suspended = False
        self.used = False  # whether a position was steered, or `steerkit.generate` applied the steering
        self.ran: set[Place] = set()
        self.generation: _Generation | None = None
        self.model_arguments: Mapping[str, Any] = {}
        self.compiled: RowSteering | None = None
        read = [] if steering.when is None else [steering.when.place]
        self.places: set[Place] = {*((steering.site or DEFAULT, layer) for layer in steering.vector.layers), *read}
        self.seen = _Seen()

    @contextlib.contextmanager
    def following(self, base: nn.Module) -> Iterator[None]:
        """Steer every forward of the model inside the `with`, and check from outside the hooks that they all ran.

        transformers compiles the model for some caches and then runs no hooks: this is off inside the `with`.
        """
        with (
            wrapped_method(base, "_valid_auto_compile_criteria", lambda _: lambda *args, **kwargs: False),
            wrapped_method(base, "generate_batch", self._refusing_packed),
            wrapped_method(base, "generate", self._generating),
            wrapped_method(base, "forward", self._checking),
            observe_calls(base, self._enter_model),
            observe_calls(self.blocks.owner, self._enter_blocks, self._leave_blocks),
            edit_places(self.model, self.blocks, self.places, self._edit) as self.ran,
        ):
            yield
        if not self.used:
            warnings.warn(
                f"the steering (positions {self.steering.positions!r}) touched no position inside this `with`: no "
                "forward of the model ran there, or none held such a position. Nothing was steered.",
                UserWarning,
                stacklevel=5,
            )

    def _checking(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that raises unless the hooks of all steered blocks ran in it."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            self.ran.clear()
            output = forward(*args, **kwargs)
            if not self.suspended:
                check_called(self.ran, self.places)
            return output

        return checked

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """A `generate` that tells its forwards the length of the prompt, and checks that they held all tokens."""

        def followed(*args: Any, **kwargs: Any) -> Any:
            if self.suspended or self.generation is not None:
                return generate(*args, **kwargs)
            self.generation = _generation_of(args, kwargs)
            try:
                output = generate(*args, **kwargs)
                self._check_generated(self.generation, output)
            finally:
                self.generation = None
            return output

        return followed

    def _check_generated(self, generation: _Generation, output: Any) -> None:
        """`RuntimeError` unless the forwards that were seen hold every token but the last one of each sequence."""
        sequences = getattr(output, "sequences", output)
        if not isinstance(sequences, Tensor) or sequences.ndim != 2:
            return
        needed = generation.width + sequences.shape[1] - generation.given - 1
        if generation.forwarded < needed:
            raise RuntimeError(
                f"expected the hooks to run for all {needed} tokens that were read; they ran for "
                f"{generation.forwarded}. The rest ran in compiled code, which calls no hooks. Pass "
                "disable_compile=True to generate, or use steerkit.generate."
            )

    def _refusing_packed(self, _: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                "expected one sequence per row; generate_batch packs several into one. Use model.generate or "
                "steerkit.generate."
            )

        return refused

    def _enter_model(self, arguments: Mapping[str, Any]) -> None:
        """Keep the whole model's arguments: the decoder may get a prepared mask, from which padding cannot be read."""
        self.model_arguments = arguments

    def _enter_blocks(self, arguments: Mapping[str, Any]) -> None:
        """Find out, before the blocks run, which sequences and columns this forward holds."""
        if self.suspended:
            return
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        entering = ids if ids is not None else embeds if embeds is not None else arguments.get("hidden_states")
        if entering is None:
            raise RuntimeError(
                f"expected ids or embeddings to enter {type(self.blocks.owner).__name__}; got {sorted(arguments)}. "
                "Use steerkit.generate."
            )
        self.ran.clear()
        batch, width = entering.shape[:2]
        cache = cache_in(arguments)
        start = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        masks = (arguments.get("attention_mask"), self.model_arguments.get("attention_mask"))
        flat = [mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch]
        prompts = self._prompts(batch, start, width, flat[0] if flat else None)
        if self.compiled is None or self.compiled.prompts != prompts:
            self.compiled = RowSteering([[one] for one in self.steering.per_row(batch)], prompts)
        self.compiled.start = start
        self.seen = self.seen.after(cache, start, start + width)
        when = self.steering.when
        if when is not None and when.decide == "prompt" and any(stop <= self.seen.start for _, stop in prompts):
            raise RuntimeError(
                f"expected a forward that holds the end of the prompt, where the condition is decided; this one "
                f"continues a cache whose first {self.seen.start} tokens were read elsewhere. Read the prompt inside "
                "the `with`, or pass decide='token'."
            )
        operation = named(self.steering.operation).name
        columns = [steered_columns(self.steering.positions, *prompt, operation) for prompt in prompts]
        self.used |= any(low < start + width and start < high for low, high in columns)
        if self.generation is not None:
            self.generation.forwarded = max(self.generation.forwarded, start + width)

    def _leave_blocks(self, _: Any) -> None:
        if not self.suspended:
            check_called(self.ran, self.places)

    def _prompts(self, batch: int, start: int, width: int, mask: Tensor | None) -> list[tuple[int, int]]:
        """The columns `(start, stop)` of each row's prompt, for a forward of `width` columns from `start` on.

        Raises:
            RuntimeError: tokens before this forward, where it is not known which of all belong to the prompt.
            ValueError: a `prompt_length` for another number of rows.
        """
        known = self.generation
        if known is not None and mask is None and known.mask is not None and known.mask.shape[0] == batch:
            mask = known.mask
        starts, ends = _padding_of(mask, batch, start + width)
        given = self.prompt_length
        lengths: Any = [int(given)] * batch if isinstance(given, Integral) else given
        if lengths is not None:
            if len(lengths) != batch or min(lengths) < 1:
                raise ValueError(
                    f"expected a prompt length of at least 1 for each of {batch} rows; got {lengths}. Count tokens."
                )
            return [(first, first + length) for first, length in zip(starts, lengths, strict=True)]
        if known is not None:
            return [(first, known.width) for first in starts]
        if start and self.needs_prompt:
            raise RuntimeError(
                f"expected to know which of {start + width} tokens belong to the prompt; {start} of them were in the "
                "cache before this forward. Pass prompt_length= to `on`, use positions 'all', or generate with "
                "model.generate or steerkit.generate."
            )
        return list(zip(starts, ends, strict=True))

    def _edit(self, place: Place, stream: Tensor) -> Tensor | None:
        """The steered value at a place; None where nothing changes."""
        if self.suspended:
            return None
        assert self.compiled is not None
        return self.compiled.edit(place, stream)


def _padding_of(mask: Tensor | None, batch: int, stop: int) -> tuple[list[int], list[int]]:
    """The first and the end of the columns before `stop` that are no padding, for each row."""
    if mask is None:
        return [0] * batch, [stop] * batch
    real = (mask[:, :stop] != 0).int()
    is_empty = real.sum(1) == 0  # a chunk of padding only
    starts = real.argmax(1).masked_fill(is_empty, stop)
    ends = (real.shape[1] - real.flip(1).argmax(1)).masked_fill(is_empty, stop)
    return starts.tolist(), ends.tolist()


def _generation_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Generation:
    """What the arguments of `generate` say about the prompt.

    The attention mask may hold more columns than the ids: those of a cache that was filled before.
    """
    names = ("inputs", "input_ids", "inputs_embeds")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor) and tensor.ndim >= 2]
    ids = [tensor.shape[1] for tensor in tensors if tensor.ndim == 2]
    mask = kwargs.get("attention_mask")
    widths = [tensor.shape[1] for tensor in tensors]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        widths.append(mask.shape[1])
    else:
        mask = None
    returned = ids[0] if ids else 0 if tensors else 1  # without any input, generate begins with the BOS token
    return _Generation(max(widths, default=1), returned, mask)
