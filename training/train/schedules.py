"""Schedules of GRPO's format weight `w_fmt` and length clip `l`, as pure functions of the training progress."""

from __future__ import annotations

import math
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


def pass_gate(progress: float, now: float, under_next: float, step: float, floor: float = 0.2) -> float:
    """Return the progress of a gated schedule after one generation step, in [0, 1].

        progress + step   if under_next >= floor
        progress - step   else if now < floor
        progress          else

    The next limit is tested before it holds: a clip below the length of what the policy can write would set every
    reward, and with it the gradient, to 0. If the policy fails under the limit that holds, the limit opens again.

    Args:
        progress: progress before the step.
        now: share of the step's completions that earned the clip reward, in [0, 1].
        under_next: share that would have earned it under the limit of the next step.
        step: increase of the progress per generation step of a schedule that never waits.
        floor: lowest share with which the schedule goes on.

    Raises:
        ValueError: a share outside [0, 1], NaN included.

    Example:
        >>> pass_gate(0.5, now=0.6, under_next=0.1, step=0.25)
        0.5
    """
    for share in (now, under_next):
        if not 0 <= share <= 1:
            raise ValueError(f"expected a success rate within 0 and 1; got {share!r}. Pass a share of completions.")
    if under_next >= floor:
        return min(1.0, progress + step)
    return max(0.0, progress - step) if now < floor else progress


@dataclass(frozen=True)
class Anneal:
    """Schedule of `w_fmt` and `l`, which decrease together during training.

    At progress p, with w0, w1 and l0, l1 the values at the start and at the end:

        w_fmt = w0 + (w1 - w0) * p        l = round(l0 + (l1 - l0) * p)

    Args:
        kind: `"linear"`: p grows linearly with the steps. `"staged"`: three stages of equal length, as in the released
            script. `"gated"`: p waits and goes back as `pass_gate` says.
        weight: `w_fmt` at the start and at the end.
        clip: `l` at the start and at the end, in tokens.
        weights: `w_fmt` of each stage for `"staged"`.
        clips: `l` of each stage for `"staged"`, in tokens.
        floor: success rate below which a gated schedule waits, or goes back.
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
        if not 0 <= self.floor <= 1 or not self.weights or not self.clips:
            raise ValueError(
                f"expected a floor from 0 to 1 and at least one weight and clip; got {self}. Pass other values."
            )
        if self.kind not in ("linear", "staged", "gated"):
            raise ValueError(
                f"expected a schedule 'linear', 'staged' or 'gated'; got {self.kind!r}. Pass one of these."
            )
        if min(*self.clip, *self.clips) < 1 or min(*self.weight, *self.weights) < 0:
            raise ValueError(f"expected clips from 1 token and weights from 0; got {self}. Pass larger values.")

    def pace(self, steps: int, inner: int = 1) -> float:
        """Return the progress per generation step.

        Progress 1 is reached in the last generation step of the schedule's share, which is generation step
        `ceil(round(share * steps) / inner) - 1`, counted from 0.

        Args:
            steps: optimisation steps.
            inner: optimisation steps per generation step.
        """
        return 1 / max(1, math.ceil(max(1, round(self.share * steps)) / inner) - 1)

    def at(self, progress: float) -> tuple[float, int]:
        """Return `(w_fmt, l)` at a progress in [0, 1]: see `pace` and `pass_gate`."""
        if self.kind == "staged":
            return staged(self.weights, progress), int(staged(self.clips, progress))
        return linear(*self.weight, progress), round(linear(*self.clip, progress))
