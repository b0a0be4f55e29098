"""Buffers that steer a batch of tokens: a bank of vectors, and per token and layer which of them act, and how strongly.

Only their contents change from step to step, never their shapes: the same code runs eagerly, in a compiled graph, and
would in a captured one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.serving.request import Push, spans
from steerkit.steering.operations import direction_of
from steerkit.vectors.vector import SteeringVector

COUNTS = ("steps", "compiled_steps", "mixed_steps", "partial_prefills", "steered_tokens")
"""What a steerer counts: steps; steps whose hooks did not run in Python; steps with prompts beside new tokens; parts of
a prompt that were not its last; and tokens that were steered."""
Reader = Callable[[str], SteeringVector]
"""Returns a vector by the hash of its content."""


class LayerBuffers(nn.Module):
    """The buffers of one layer.

    Args:
        bank: `[vector, d_model]`, shared by all layers; row 0 is zero.
        tokens: largest number of tokens of a step.
        slots: largest number of vectors that act on one token.
    """

    def __init__(self, bank: Tensor, tokens: int, slots: int) -> None:
        super().__init__()
        device = bank.device
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("row", torch.zeros(slots, tokens, dtype=torch.long, device=device), persistent=False)
        self.register_buffer("add", torch.zeros(slots, tokens, device=device), persistent=False)
        self.register_buffer("ablate", torch.zeros(slots, tokens, device=device), persistent=False)
        self.slots = slots
        self.active = False
        self.called = False

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The steered `hidden`.

        Args:
            hidden: `[..., token, d_model]`, what the block returned; the stream, or its last summand.
            residual: the other summand of the stream; None where `hidden` is the stream.
        """
        if not torch.compiler.is_compiling():
            self.called = True
            if not self.active:
                return hidden
        tokens = hidden.shape[-2]
        for slot in range(self.slots):
            vectors = self.bank[self.row[slot, :tokens]]
            hidden = hidden + (self.add[slot, :tokens, None] * vectors).to(hidden.dtype)
            stream = (hidden if residual is None else hidden + residual).float()
            along = (stream * vectors).sum(-1, keepdim=True)
            hidden = hidden - (self.ablate[slot, :tokens, None] * along * vectors).to(hidden.dtype)
        return hidden


class Steerer:
    """Fills the buffers of all layers for each step.

    Args:
        n_layers: number of blocks.
        d_model: width of the stream.
        tokens: largest number of tokens of a step.
        slots: largest number of vectors that act on one token at one layer.
        capacity: largest number of (vector, layer) pairs.
        device: of the model.
        read: returns a vector by content.
    """

    def __init__(
        self, n_layers: int, d_model: int, tokens: int, slots: int, capacity: int, device: torch.device, read: Reader
    ) -> None:
        self.bank = torch.zeros(2 * capacity + 1, d_model, device=device)
        self.layers = [LayerBuffers(self.bank, tokens, slots) for _ in range(n_layers)]
        self.read = read
        self.rows: dict[tuple[str, int, str], int] = {}
        self.used_at: dict[tuple[str, int, str], int] = {}
        self.requests: dict[str, tuple[Push, ...]] = {}
        self.counts = dict.fromkeys(COUNTS, 0)

    def row(self, push: Push, layer: int) -> int:
        """The row of the bank that holds what a push needs of its vector at a layer; it is read on first use."""
        key = (push.content, layer, push.operation)
        self.used_at[key] = self.counts["steps"]
        if key not in self.rows:
            if len(self.rows) + 1 >= len(self.bank):
                oldest = min(self.rows, key=lambda one: self.used_at[one])
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
        for buffers in self.layers:
            if buffers.active:
                buffers.row.zero_()
                buffers.add.zero_()
                buffers.ablate.zero_()
                buffers.active = False
        filled: dict[int, list[tuple[int, int, int, Push]]] = {}
        for index, name in enumerate(requests):
            pushes = self.requests.get(name)
            if not pushes:
                continue
            start, scheduled = int(starts[index]), int(starts[index + 1]) - int(starts[index])
            taken: dict[int, int] = {}
            for push, low, high in spans(pushes, int(prompts[index]), int(computed[index]), scheduled):
                self.counts["steered_tokens"] += high - low
                for layer in push.layers:
                    slot = taken.get(layer, 0)
                    taken[layer] = slot + 1
                    filled.setdefault(layer, []).append((slot, start + low, start + high, push))
        for layer, entries in filled.items():
            buffers = self.layers[layer]
            buffers.active = True
            for slot, low, high, push in entries:
                buffers.row[slot, low:high] = self.row(push, layer)
                strengths = buffers.add if push.operation == "add" else buffers.ablate
                strengths[slot, low:high] = push.coefficient

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
