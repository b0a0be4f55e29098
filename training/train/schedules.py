"""Schedules of GRPO's format weight `w_fmt` and length clip `l`, as pure functions of the training progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "staged", "gated"]
STAGED_WEIGHTS, STAGED_CLIPS = (1.0, 0.554, 0.107), (2048, 1280, 512)


def linear(start: float, stop: float, progress: float) -> float:
    """Return `start + (stop - start) * p`, with p the progress clamped to [0, 1].

    Example:
        >>> linear(2000, 500, 0.5)
        1250.0
    """
    return start + (stop - start) * min(1.0, max(0.0, progress))


def staged(values: Sequence[float], progress: float) -> float:
    """Return `values[min(n - 1, floor(n * p))]`, with p the progress clamped to [0, 1] and n stages of equal length.

    Raises:
        ValueError: no values.

    Example:
        >>> staged((2048, 1280, 512), 0.5)
        1280
    """
    if not values:
        raise ValueError("expected at least one stage; got none. Pass a value for each stage.")
    return values[min(len(values) - 1, int(min(1.0, max(0.0, progress)) * len(values)))]


@dataclass(frozen=True)
class Gate:
    """State of a gated schedule.

    Args:
        progress: progress of the schedule in [0, 1].
        success: exponential moving average of the mean clip reward; None before the first step.
    """

    progress: float = 0.0
    success: float | None = None


def pass_gate(gate: Gate, observed: float, step: float, floor: float = 0.2, memory: float = 0.5) -> Gate:
    """Return the gate after one optimisation step; progress increases only while the policy succeeds often enough.

        success'  = memory * success + (1 - memory) * observed
        progress' = min(1, progress + step)  if success' >= floor, else progress

    A clip below the length of what the policy can write would set every reward, and with it the gradient, to 0.

    Args:
        gate: state before the step.
        observed: share of this step's completions that earned the clip reward, in [0, 1].
        step: increase of the progress, 1 / number of steps of a schedule that never waits.
        floor: lowest moving average at which the progress increases.
        memory: weight of the past in the moving average.

    Raises:
        ValueError: an observation outside [0, 1], NaN included.

    Example:
        >>> pass_gate(Gate(0.5, 0.5), observed=0.0, step=0.25)
        Gate(progress=0.75, success=0.25)
    """
    if not 0 <= observed <= 1:
        raise ValueError(f"expected a success rate within 0 and 1; got {observed!r}. Pass a share of completions.")
    success = observed if gate.success is None else memory * gate.success + (1 - memory) * observed
    return Gate(min(1.0, gate.progress + step) if success >= floor else gate.progress, success)


@dataclass(frozen=True)
class Anneal:
    """Schedule of `w_fmt` and `l`, which decrease together during training.

    At progress p, with w0, w1 and l0, l1 the values at the start and at the end:

        w_fmt = w0 + (w1 - w0) * p        l = round(l0 + (l1 - l0) * p)

    Args:
        kind: `"linear"`: p grows linearly with the steps. `"staged"`: three stages of equal length, as in the released
            script. `"gated"`: p is the progress of a `Gate`.
        weight: `w_fmt` at the start and at the end.
        clip: `l` at the start and at the end, in tokens.
        weights: `w_fmt` of each stage for `"staged"`.
        clips: `l` of each stage for `"staged"`, in tokens.
        floor: success rate below which a gated schedule waits.
        share: share of the training steps after which the schedule ends (a gated one: if it never waits).

    Raises:
        ValueError: an unknown kind, a clip below 1 token, a negative weight, or a share outside (0, 1].

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3: `w_fmt` from 1.0 to 0.05, `l` from 2000 to 500.

    Example:
        >>> Anneal("linear").at(0.5)
        (0.525, 1250)
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
            raise ValueError(
                f"expected a share of the steps above 0 and up to 1; got {self.share}. Pass e.g. share=1.0."
            )
        if self.kind not in ("linear", "staged", "gated"):
            raise ValueError(
                f"expected a schedule 'linear', 'staged' or 'gated'; got {self.kind!r}. Pass one of these."
            )
        if min(*self.clip, *self.clips) < 1 or min(*self.weight, *self.weights) < 0:
            raise ValueError(f"expected clips from 1 token and weights from 0; got {self}. Pass larger values.")

    def pace(self, steps: int) -> float:
        """Return the progress per training step, `1 / max(1, round(share * steps) - 1)`.

        Progress 1 is reached in the last step of the schedule's share.
        """
        return 1 / max(1, round(self.share * steps) - 1)

    def at(self, progress: float) -> tuple[float, int]:
        """Return `(w_fmt, l)` at a progress in [0, 1]: of the training steps, or of the gate."""
        if self.kind == "staged":
            return staged(self.weights, progress), int(staged(self.clips, progress))
        return linear(*self.weight, progress), round(linear(*self.clip, progress))
