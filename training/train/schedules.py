"""Schedules of GRPO's format weight and length clip: pure functions of progress, and of a gate's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "staged", "gated"]
STAGED_WEIGHTS, STAGED_CLIPS = (1.0, 0.554, 0.107), (2048, 1280, 512)


def linear(start: float, stop: float, progress: float) -> float:
    """`start + (stop - start) * progress`, with progress held within 0 and 1."""
    return start + (stop - start) * min(1.0, max(0.0, progress))


def staged(values: Sequence[float], progress: float) -> float:
    """The value of the stage that `progress` in [0, 1] falls into, all stages being equally long."""
    if not values:
        raise ValueError("expected one stage at least; got none.")
    return values[min(len(values) - 1, int(min(1.0, max(0.0, progress)) * len(values)))]


@dataclass(frozen=True)
class Gate:
    """How far a gated schedule has come, and how often the policy has lately succeeded under it.

    Args:
        progress: in [0, 1].
        success: exponential moving average of the clip reward's mean; None before the first observation.
    """

    progress: float = 0.0
    success: float | None = None


def pass_gate(gate: Gate, observed: float, step: float, floor: float = 0.2, memory: float = 0.5) -> Gate:
    """The gate after one optimisation step: progress grows by `step` only while the success rate is at least `floor`.

    Shrinking the clip below what the policy can write turns every reward into 0, and with it the gradient.

    Args:
        observed: share of this step's completions that earned the clip reward, in [0, 1].
        step: 1 / number of steps that the schedule takes when it never waits.
        floor: the least moving average at which it goes on.
        memory: weight of the past in the moving average.

    Raises:
        ValueError: an observation outside [0, 1], NaN included.
    """
    if not 0 <= observed <= 1:
        raise ValueError(f"expected a success rate within 0 and 1; got {observed!r}.")
    success = observed if gate.success is None else memory * gate.success + (1 - memory) * observed
    return Gate(min(1.0, gate.progress + step) if success >= floor else gate.progress, success)


@dataclass(frozen=True)
class Anneal:
    """How `w_fmt` and `l` go down together in training.

    Args:
        kind: `"linear"` in the steps; `"staged"`, the released script's three stages; `"gated"`, linear in a gate's
            progress.
        weight: `w_fmt` at the start and at the end.
        clip: `l` in tokens at the start and at the end.
        weights, clips: the stages' values for `"staged"`.
        floor: success rate below which a gated schedule waits.
        share: of the training steps, after which the schedule has arrived (a gated one: if it never waits).

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3: 1.0 to 0.05, and 2000 to 500 tokens.
    """

    kind: Kind = "linear"
    weight: tuple[float, float] = (1.0, 0.05)
    clip: tuple[int, int] = (2000, 500)
    weights: tuple[float, ...] = STAGED_WEIGHTS
    clips: tuple[int, ...] = STAGED_CLIPS
    floor: float = 0.2
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"expected a share of the steps above 0 and up to 1; got {self.share}.")
        if self.kind not in ("linear", "staged", "gated"):
            raise ValueError(f"expected a schedule 'linear', 'staged' or 'gated'; got {self.kind!r}.")
        if min(*self.clip, *self.clips) < 1 or min(*self.weight, *self.weights) < 0:
            raise ValueError(f"expected clips from 1 token and weights from 0; got {self}.")

    def pace(self, steps: int) -> float:
        """Progress per training step: 1 is reached in the last step of the schedule's share."""
        return 1 / max(1, round(self.share * steps) - 1)

    def at(self, progress: float) -> tuple[float, int]:
        """`(w_fmt, l)` at a progress in [0, 1]: of the steps, or of the gate."""
        if self.kind == "staged":
            return staged(self.weights, progress), int(staged(self.clips, progress))
        return linear(*self.weight, progress), round(linear(*self.clip, progress))
