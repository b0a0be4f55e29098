"""Buffers that steer a batch of tokens: a bank of vectors, and per token and layer which of them act, and how strongly.

Only their contents change from step to step, never their shapes: the same code runs eagerly, in a compiled graph, and
would in a captured one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.serving.request import NORMS, Asked, Push, Read, spans
from steerkit.serving.sampling import Draws, Turn
from steerkit.steering.operations import direction_of
from steerkit.vectors.vector import SteeringVector

COUNTS = ("steps", "compiled_steps", "mixed_steps", "partial_prefills", "steered_tokens", "preemptions")
"""What a steerer counts: steps; steps whose hooks did not run in Python; steps with prompts beside new tokens; parts of
a prompt that were not its last; tokens that were steered; and requests that were preempted."""
Reader = Callable[[str], SteeringVector]
"""Returns a vector by the hash of its content."""


class LayerBuffers(nn.Module):
    """The buffers of one layer.

    Args:
        bank: `[vector, d_model]`, shared by all layers; row 0 is zero.
        tokens: largest number of tokens of a step.
        slots: largest number of vectors that act on one token.
        sums: largest number of sums that are read at a time; 0: nothing can be read.
    """

    bank: Tensor
    row: Tensor
    add: Tensor
    ablate: Tensor
    sum: Tensor
    norm: Tensor
    weight: Tensor
    into: Tensor
    norms: Tensor
    norm_into: Tensor

    def __init__(self, bank: Tensor, tokens: int, slots: int, sums: int) -> None:
        super().__init__()
        device, d_model = bank.device, bank.shape[1]
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("row", torch.zeros(slots, tokens, dtype=torch.long, device=device), persistent=False)
        self.register_buffer("add", torch.zeros(slots, tokens, device=device), persistent=False)
        self.register_buffer("ablate", torch.zeros(slots, tokens, device=device), persistent=False)
        self.slots, self.sums = slots, sums
        if sums:
            wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
            sizes = {"sum": (sums + 1, d_model), "norm": (sums + 1,), "weight": (tokens,), "norms": (NORMS + 1,)}
            for name, size in sizes.items():
                self.register_buffer(name, torch.zeros(size, dtype=wide, device=device), persistent=False)
            for name in ("into", "norm_into"):
                self.register_buffer(name, torch.zeros(tokens, dtype=torch.long, device=device), persistent=False)
        self.active = self.reading = False
        self.called = False

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The steered `hidden`; what is to be read is added to the sums.

        Args:
            hidden: `[..., token, d_model]`, what the block returned; the stream, or its last summand.
            residual: the other summand of the stream; None where `hidden` is the stream.
        """
        compiling = torch.compiler.is_compiling()
        self.called = self.called or not compiling
        tokens = hidden.shape[-2]
        if compiling or self.active:
            for slot in range(self.slots):
                vectors = self.bank[self.row[slot, :tokens]]
                hidden = hidden + (self.add[slot, :tokens, None] * vectors).to(hidden.dtype)
                along = (stream_of(hidden, residual).float() * vectors).sum(-1, keepdim=True)
                hidden = hidden - (self.ablate[slot, :tokens, None] * along * vectors).to(hidden.dtype)
        if self.sums and (compiling or self.reading):
            stream = stream_of(hidden, residual).reshape(-1, hidden.shape[-1])[:tokens].to(self.sum.dtype)
            weight, into = self.weight[:tokens], self.into[:tokens]
            self.sum.index_add_(0, into, weight[:, None] * stream)
            norms = stream.norm(dim=-1)
            self.norm.index_add_(0, into, weight * norms)
            self.norms.index_copy_(0, self.norm_into[:tokens], norms)
        return hidden


class Steerer:
    """Fills the buffers of all layers for each step.

    Args:
        n_layers: number of blocks.
        d_model: width of the stream.
        tokens: largest number of tokens of a step.
        slots: largest number of vectors that act on one token at one layer.
        capacity: largest number of (vector, layer) pairs.
        sums: largest number of sums that are read at a time.
        device: of the model.
        read: returns a vector by content.
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        tokens: int,
        slots: int,
        capacity: int,
        sums: int,
        device: torch.device,
        read: Reader,
    ) -> None:
        self.bank = torch.zeros(2 * capacity + 1, d_model, device=device)
        self.layers = [LayerBuffers(self.bank, tokens, slots, sums) for _ in range(n_layers)]
        self.read = read
        self.draws = Draws()
        self.turns: list[Turn] = []
        self.sum_of: dict[str, int] = {}
        self.tokens_of: dict[str, int] = {}
        self.norms_of: dict[str, list[int]] = {}
        self.n_sums = sums
        self.seen: dict[str, int] = {}
        self.rows: dict[tuple[str, int, str], int] = {}
        self.used_at: dict[tuple[str, int, str], int] = {}
        self.requests: dict[str, Asked] = {}
        self.counts = dict.fromkeys(COUNTS, 0)

    def row(self, push: Push, layer: int) -> int:
        """The row of the bank that holds what a push needs of its vector at a layer; it is read on first use."""
        key = (push.content, layer, push.operation)
        self.used_at[key] = self.counts["steps"]
        if key not in self.rows:
            if len(self.rows) + 1 >= len(self.bank):
                oldest = min(self.rows, key=lambda one: self.used_at[one])
                if self.used_at[oldest] == self.counts["steps"]:  # removed vectors, whose requests run, beside new ones
                    raise RuntimeError(
                        f"expected requests of one step with at most {len(self.rows)} pairs of vector and layer; got "
                        "more. Start the engine with a larger capacity."
                    )
                self.rows[key] = self.rows.pop(oldest)
                del self.used_at[oldest]
            else:
                self.rows[key] = len(self.rows) + 1
            value = direction_of(push.operation, self.read(push.content).layers[layer])
            self.bank[self.rows[key]] = value.to(self.bank)
        return self.rows[key]

    def begin(
        self, requests: Sequence[str], starts: Sequence[int], computed: Sequence[int], prompts: Sequence[int]
    ) -> None:
        """Fill the buffers for a step.

        Args:
            requests: ids, in the order of the batch.
            starts: `[request + 1]`, where each request's tokens begin in the batch, and where the last one's end.
            computed: tokens of each request that earlier steps computed.
            prompts: length of each request's prompt.
        """
        self._count(starts, computed, prompts)
        self.rest()
        self.turns = []
        filled: dict[int, list[tuple[int, int, int, Push]]] = {}
        for index, name in enumerate(requests):
            asked = self.requests.get(name)
            if asked is None:
                continue
            start, scheduled = int(starts[index]), int(starts[index + 1]) - int(starts[index])
            begun, prompt = int(computed[index]), int(prompts[index])
            taken: dict[int, int] = {}
            for push, low, high in spans(asked.pushes, asked.prompt or prompt, begun, scheduled):
                self.counts["steered_tokens"] += high - low
                for layer in push.layers:
                    slot = taken.get(layer, 0)
                    taken[layer] = slot + 1
                    filled.setdefault(layer, []).append((slot, start + low, start + high, push))
            if asked.draw is not None and begun + scheduled >= prompt:
                self.turns.append(Turn(index, asked.draw, begun + scheduled - prompt))
            if asked.read is not None:
                self._fill_read(name, asked.read, start, begun, scheduled)
        for layer, entries in filled.items():
            buffers = self.layers[layer]
            buffers.active = True
            for slot, low, high, push in entries:
                buffers.row[slot, low:high] = self.row(push, layer)
                strengths = buffers.add if push.operation == "add" else buffers.ablate
                strengths[slot, low:high] = push.coefficient

    def rest(self) -> None:
        """Steer and read nothing from here on: between two steps vLLM may run tokens of no request."""
        for buffers in self.layers:
            if buffers.active:
                buffers.row.zero_()
                buffers.add.zero_()
                buffers.ablate.zero_()
                buffers.active = False
            if buffers.reading:
                buffers.into.zero_()
                buffers.norm_into.zero_()
                buffers.weight.zero_()
                buffers.reading = False

    def _fill_read(self, name: str, read: Read, start: int, begun: int, scheduled: int) -> None:
        """Mark the tokens of this step that are read; not one that an earlier step has read (preemption)."""
        seen = self.seen.get(name, 0)
        low, high = max(read.start, seen, begun), min(read.stop, begun + scheduled)
        self.seen[name] = max(seen, begun + scheduled)
        if low >= high:
            return
        here = slice(start + low - begun, start + high - begun)
        if read.each:
            rows = torch.tensor(self._norm_rows(read)[low - read.start : high - read.start])
            for layer in read.layers:
                self.layers[layer].reading = True
                self.layers[layer].norm_into[here] = rows.to(self.bank.device)
            return
        into = self._sum_row(read.key)
        self.tokens_of[read.key] += high - low
        for layer in read.layers:
            buffers = self.layers[layer]
            buffers.reading = True
            buffers.into[here] = into
            buffers.weight[here] = read.weight

    def _sum_row(self, key: str) -> int:
        """The row of a key's sum; where all are in use, that of the oldest key, which is lost if it is asked for."""
        if key not in self.sum_of:
            free = sorted(set(range(1, self.n_sums + 1)) - set(self.sum_of.values()))
            if not free:
                oldest = next(iter(self.sum_of))
                free = [self.sum_of.pop(oldest)]
                del self.tokens_of[oldest]
                self._zero_sums(free[0])
            self.sum_of[key] = free[0]
            self.tokens_of[key] = 0
        return self.sum_of[key]

    def _norm_rows(self, read: Read) -> list[int]:
        """The rows of a key's norms, one per position; where too few are free, those of the oldest keys are lost."""
        if read.key not in self.norms_of:
            while len(free := set(range(1, NORMS + 1)).difference(*self.norms_of.values())) < read.stop - read.start:
                del self.norms_of[next(iter(self.norms_of))]
            self.norms_of[read.key] = rows = sorted(free)[: read.stop - read.start]
            for layer in read.layers:
                self.layers[layer].norms[rows] = torch.nan
        return self.norms_of[read.key]

    def _zero_sums(self, row: int) -> None:
        for buffers in self.layers:
            buffers.sum[row] = 0
            buffers.norm[row] = 0

    def take_sums(self, keys: Sequence[str]) -> dict[str, Any]:
        """The sums of these keys, `{key: {"sum": [layer][d_model], "norm": [layer], "tokens": n}}`, and forget them.

        Of a key that each position was read for, `{"norms": [layer][position]}`, NaN where none was read. A key that
        was pushed out by newer ones, or that nothing was read for, is left out.
        """
        taken: dict[str, Any] = {}
        for key in keys:
            if rows := self.norms_of.pop(key, None):
                taken[key] = {"norms": [buffers.norms[rows].tolist() for buffers in self.layers]}
                continue
            row = self.sum_of.pop(key, None)
            if row is None:
                continue
            taken[key] = {
                "sum": [buffers.sum[row].tolist() for buffers in self.layers],
                "norm": [float(buffers.norm[row]) for buffers in self.layers],
                "tokens": self.tokens_of.pop(key),
            }
            self._zero_sums(row)
        return taken

    def choose(self, logits: Tensor | None) -> None:
        """Choose the tokens of this step's requests that ask for it, in place; once per step."""
        turns, self.turns = self.turns, []
        if turns and logits is not None:
            self.draws.choose(logits, turns)

    def finish(self, name: str) -> None:
        """Forget a request."""
        asked = self.requests.pop(name, None)
        self.seen.pop(name, None)
        if asked is not None and asked.draw is not None:
            self.draws.forget(asked.draw)

    def _count(self, starts: Sequence[int], computed: Sequence[int], prompts: Sequence[int]) -> None:
        """Count the step, and whether the hooks of the step before ran in Python."""
        if self.counts["steps"] and not any(buffers.called for buffers in self.layers):
            self.counts["compiled_steps"] += 1
        for buffers in self.layers:
            buffers.called = False
        begun, prompt = np.asarray(computed), np.asarray(prompts)
        after = begun + np.diff(np.asarray(starts))
        self.counts["steps"] += 1
        self.counts["partial_prefills"] += int((after < prompt).sum())
        self.counts["mixed_steps"] += int((begun < prompt).any() and (begun >= prompt).any())


def stream_of(hidden: Float[Tensor, ...], residual: Float[Tensor, ...] | None) -> Float[Tensor, ...]:
    """The stream after a block, from what the block returned."""
    return hidden if residual is None else hidden + residual
