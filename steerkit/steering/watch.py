"""Follow plain forwards and `generate` calls inside `with steering.on(model)`."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steerkit.models.blocks import Blocks
from steerkit.models.cache_argument import cache_in, cache_of
from steerkit.models.hooks import check_called
from steerkit.models.model import unwrap
from steerkit.steering.rows import RowEdit, RowSteering
from steerkit.vectors.vector import SteeringVector


class Steers(Protocol):
    """What is read of a `Steering` here."""

    @property
    def vector(self) -> SteeringVector: ...
    def per_row(self, batch: int) -> Sequence[RowEdit]: ...


class Watch:
    """Follows plain forwards of a model: where each sequence's prompt ended, and which columns the chunk holds.

    Args:
        steering: what is applied.
        blocks: the model's blocks.
        prompt_length: tokens of the prompt, one number or one per row; None takes a sequence's first forward as prompt.
    """

    def __init__(self, steering: Steers, blocks: Blocks, prompt_length: int | Sequence[int] | None) -> None:
        self.steering, self.blocks, self.prompt_length = steering, blocks, prompt_length
        self.suspended = False
        self.ran: set[int] = set()
        self.model_arguments: Mapping[str, Any] = {}
        self.of_cache: weakref.WeakKeyDictionary[Any, RowSteering] = weakref.WeakKeyDictionary()
        self.compiled: RowSteering | None = None
        self.prompt: Tensor | None = None

    def enter_model(self, arguments: Mapping[str, Any]) -> None:
        """Keep the whole model's arguments: the decoder may get a prepared mask, from which padding cannot be read."""
        self.model_arguments = arguments

    def enter_blocks(self, arguments: Mapping[str, Any]) -> None:
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
        batch, width = entering.shape[:2]
        cache = cache_in(arguments)
        start = int(cache.get_seq_length()) if cache is not None else 0
        if start:
            self.compiled = self._continued(cache, batch)
            if width > 1 and self.prompt_length is None:
                raise RuntimeError(
                    f"expected one new token per forward after the prompt; got {width} on top of {start}. A prompt "
                    "that comes in chunks cannot be told from new tokens. Use steerkit.generate, or pass prompt_length."
                )
        elif not self._repeats(arguments, ids):
            masks = (arguments.get("attention_mask"), self.model_arguments.get("attention_mask"))
            flat = [mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
            self.compiled = self._begin(batch, width, flat[0] if flat else None)
            self.prompt = ids
            if cache is not None:
                self.of_cache[cache] = self.compiled
        assert self.compiled is not None
        self.compiled.start = start
        self.ran.clear()

    def leave_blocks(self, output: Any) -> None:
        """Check that every steered block ran, and remember a cache that the model made itself."""
        if self.suspended:
            return
        check_called(self.ran, set(self.steering.vector.layers))
        cache = cache_of(output)
        if cache is not None and cache not in self.of_cache and self.compiled is not None:
            self.of_cache[cache] = self.compiled

    def edit(self, layer: int, stream: Tensor) -> Tensor | None:
        """The steered stream after a block; None where nothing changes."""
        if self.suspended:
            return None
        assert self.compiled is not None
        return self.compiled.edit(layer, stream)

    def _continued(self, cache: Any, batch: int) -> RowSteering:
        """The steering of a cache that was seen before."""
        compiled = self.of_cache.get(cache)
        if compiled is None or len(compiled.rows) != batch:
            raise RuntimeError(
                "expected to see a sequence from its first forward on; this one began outside the steering context."
            )
        return compiled

    def _repeats(self, arguments: Mapping[str, Any], ids: Tensor | None) -> bool:
        """Whether a forward with `use_cache=False` begins with the last prompt and continues it."""
        return (
            False in (arguments.get("use_cache"), self.model_arguments.get("use_cache"))
            and self.compiled is not None
            and self.prompt is not None
            and ids is not None
            and ids.shape[0] == self.prompt.shape[0]
            and ids.shape[1] > self.prompt.shape[1]
            and torch.equal(ids[:, : self.prompt.shape[1]], self.prompt)
        )

    def _begin(self, batch: int, width: int, mask: Tensor | None) -> RowSteering:
        """Compile the steering for sequences whose first forward this is."""
        starts, stops = [0] * batch, [width] * batch
        if mask is not None:
            real = (mask[:, :width] != 0).int()
            starts, stops = real.argmax(1).tolist(), (width - real.flip(1).argmax(1)).tolist()
        lengths = [self.prompt_length] * batch if isinstance(self.prompt_length, int) else self.prompt_length
        if lengths is not None:
            if len(lengths) != batch or min(lengths) < 1:
                raise ValueError(
                    f"expected a prompt length of at least 1 for each of {batch} rows; got {lengths}. Count tokens."
                )
            stops = [start + length for start, length in zip(starts, lengths, strict=True)]
        return RowSteering([[one] for one in self.steering.per_row(batch)], list(zip(starts, stops, strict=True)))


watching: weakref.WeakKeyDictionary[nn.Module, list[Watch]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[list[Any]]:
    """Suspend the steerings that are on for this model; yields them, innermost context first.

    For an engine that applies them itself, and for scores of the unsteered model.
    """
    watches = [watch for watch in watching.get(unwrap(model), []) if not watch.suspended]
    for watch in watches:
        watch.suspended = True
    try:
        yield [watch.steering for watch in reversed(watches)]
    finally:
        for watch in watches:
            watch.suspended = False
