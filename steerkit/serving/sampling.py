"""Sampling in a worker: tokens drawn as by `steerkit.generate`, so that a sweep keeps its shared random numbers.

vLLM's own seeds give other texts. Where a request asks for it, the token is chosen here, from the logits that the model
returned, and all others are ruled out before vLLM's sampler sees them. It works with either of vLLM's model runners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.generation.sampling import OVERFLOWED, likeliest, random_stream, sample
from steerkit.models.model import widest_float
from steerkit.serving.request import Draw


@dataclass(frozen=True)
class Turn:
    """A row of logits from which a token is chosen.

    Args:
        row: its number in the batch.
        draw: how it is chosen.
        step: number of tokens that the request has already.
    """

    row: int
    draw: Draw
    step: int


@dataclass
class Draws:
    """Chooses tokens, and remembers the requests whose logits were not finite.

    Args:
        overflowed: names of such requests, with the number of tokens that they had before.
    """

    overflowed: dict[str, int] = field(default_factory=dict)
    _numbers: dict[tuple[object, ...], np.ndarray] = field(default_factory=dict)

    def choose(self, logits: Float[Tensor, "batch vocabulary"], turns: Sequence[Turn]) -> None:
        """Leave in each turn's row of logits the chosen token alone; in place.

        A row that overflowed gets token 0; what follows is not used.
        """
        groups: dict[tuple[float, float], list[Turn]] = {}
        for turn in turns:
            groups.setdefault((turn.draw.temperature, turn.draw.top_p), []).append(turn)
        for (temperature, top_p), several in groups.items():
            rows = torch.tensor([turn.row for turn in several], device=logits.device)
            chosen = logits if len(several) == len(logits) else logits[rows]
            if temperature == 0:
                tokens = likeliest(chosen)
            else:
                uniform = torch.tensor([self._number(turn) for turn in several], dtype=torch.float64)
                tokens = sample(chosen, uniform.to(logits.device, widest_float(logits.device)), temperature, top_p)
            lost = tokens == OVERFLOWED
            if temperature == 0 and not lost.any():
                continue  # vLLM's own choice is the same
            for turn, overflowed in zip(several, lost.tolist(), strict=True):
                if overflowed:
                    self.overflowed.setdefault(turn.draw.name, turn.step)
            logits[rows] = float("-inf")
            logits[rows, tokens.clamp(min=0)] = 0.0

    def _number(self, turn: Turn) -> float:
        key = (turn.draw.stream, turn.draw.count)
        if key not in self._numbers:
            self._numbers[key] = random_stream(turn.draw.stream, turn.draw.count)
        return float(self._numbers[key][min(turn.step, turn.draw.count - 1)])  # a step that vLLM throws away may follow

    def forget(self, draw: Draw) -> None:
        """Drop the random numbers of a request that has ended."""
        self._numbers.pop((draw.stream, draw.count), None)
