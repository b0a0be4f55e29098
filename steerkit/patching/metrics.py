"""Metrics of patching: one number per run, from the logits at the last prompt token or along the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Metric = Literal["logprob_diff", "kl"] | Callable[[Tensor], Tensor]
METRICS = ("logprob_diff", "kl")


@dataclass(frozen=True)
class Measure:
    """A metric of one pair of prompts.

    Args:
        kind: `logprob_diff`, `kl`, or a function from logits `[batch, vocabulary]` to `[batch]`.
        answers: token ids of the right and the wrong answer; None where the metric does not need them.
        reference: log-probabilities `[vocabulary]` of the clean run, for `kl`.
    """

    kind: Metric
    answers: tuple[tuple[int, ...], tuple[int, ...]] | None
    reference: Tensor | None = None

    @property
    def suffixes(self) -> list[tuple[int, ...]]:
        """The ids after the prompt that are forwarded too, one list per run that the metric needs."""
        if self.kind != "logprob_diff" or self.answers is None or all(len(answer) == 1 for answer in self.answers):
            return [()]
        return [answer[:-1] for answer in self.answers]

    def of(self, logits: list[Float[Tensor, "batch pos vocabulary"]]) -> Float[Tensor, " batch"]:
        """The metric of each row.

        Args:
            logits: per suffix, those from the last prompt token on.
        """
        if callable(self.kind):
            found = self.kind(logits[0][:, -1].float())
            if not isinstance(found, Tensor) or found.shape != (len(logits[0]),):
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"expected a metric of shape [{len(logits[0])}], one number per row; got {shape}. Reduce the "
                    "vocabulary only."
                )
            return found
        if self.kind == "kl":
            assert self.reference is not None
            predicted = logits[0][:, -1].float().log_softmax(-1)
            reference = self.reference.to(predicted.device)
            return (reference.exp() * (reference - predicted)).sum(-1)
        assert self.answers is not None
        if len(logits) == 1:
            right, wrong = (logits[0][:, -1].float().log_softmax(-1)[:, answer[0]] for answer in self.answers)
            return right - wrong
        right, wrong = (_log_prob(one, answer) for one, answer in zip(logits, self.answers, strict=True))
        return right - wrong


def _log_prob(logits: Float[Tensor, "batch pos vocabulary"], answer: tuple[int, ...]) -> Float[Tensor, " batch"]:
    """The log-probability of all tokens of an answer, from the logits at the last prompt token and along it."""
    ids = torch.tensor(answer, device=logits.device)
    return logits.float().log_softmax(-1).gather(-1, ids.expand(len(logits), -1)[..., None])[..., 0].sum(-1)


def check_metric(metric: Any, answers: Any, mode: str, method: str) -> None:
    """`ValueError` for an unknown metric, one that needs answers and has none, or one without a slope."""
    if not callable(metric) and metric not in METRICS:
        raise ValueError(f"expected a metric among {METRICS}, or a function of the logits; got {metric!r}. Pass one.")
    if metric == "logprob_diff" and answers is None:
        raise ValueError("expected answers=(right, wrong) for the metric 'logprob_diff'; got none. Pass two texts.")
    if metric == "kl" and mode == "noising" and method == "attribution":
        raise ValueError(
            "expected a metric with a slope at the clean run for method='attribution' in mode 'noising'; got 'kl', the "
            "divergence from this very run, whose slope there is 0. Pass method='exact', or metric='logprob_diff'."
        )
