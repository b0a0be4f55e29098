"""The slow truth: one row at a time, no cache, nothing shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.models.blocks import find_blocks


def hidden_states(model: Any, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """transformers' own hidden states of one unpadded text, `[pos, d_model]` each; entry l + 1 is after block l."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False).hidden_states
    return tuple(state[0] for state in states)


def steered_logits(
    model: Any, ids: Sequence[int], layers: dict[int, Tensor], coefficient: float, columns: range, ablate: bool = False
) -> Tensor:
    """Logits `[pos, vocabulary]` of one unpadded text, with the vectors applied at these columns; no cache."""
    handles = []
    for layer, vector in layers.items():

        def hook(_: Any, __: Any, out: Any, vector: Tensor = vector) -> Any:
            stream = (out if isinstance(out, Tensor) else out[0]).clone()
            for column in columns[: max(0, stream.shape[1] - columns.start)]:
                if ablate:
                    unit = vector / vector.norm()
                    stream[0, column] -= coefficient * (stream[0, column] @ unit) * unit
                else:
                    stream[0, column] += coefficient * vector
            return stream if isinstance(out, Tensor) else (stream, *out[1:])

        handles.append(find_blocks(model).modules[layer].register_forward_hook(hook))
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def greedy(
    model: Any,
    prompt: Sequence[int],
    new: int,
    ends: Sequence[int] = (),
    layers: dict[int, Tensor] | None = None,
    coefficient: float = 0.0,
    first: int | None = None,
    stop: int = 10**9,
    ablate: bool = False,
) -> list[int]:
    """Greedy continuation of one prompt, the whole text forwarded anew for every token; steered from column `first`."""
    ids = list(prompt)
    start = len(prompt) if first is None else first
    for _ in range(new):
        token = int(
            steered_logits(
                model, ids, layers or {}, coefficient, range(start, stop if stop < 10**9 else len(ids)), ablate
            )[-1].argmax()
        )
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]
