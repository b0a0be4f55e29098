"""Calibration of a condition: its threshold from labelled activations, with the ROC curve, and its firing rates."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from steerkit.capture.activations import Activations
from steerkit.models.identity import other_model
from steerkit.probes.probe import Probe
from steerkit.stats.areas import roc_auc
from steerkit.stats.mean import accuracy_interval
from steerkit.steering.conditions import Condition, Decide
from steerkit.vectors.vector import SteeringVector

KEPT = (
    *("checkpoint", "model_type", "model_fingerprint", "adapter_fingerprint", "n_layers"),
    *("read_position", "data_sha256"),
)


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """A condition with the ROC curve that its threshold was chosen from.

    Args:
        condition: with the chosen threshold.
        roc: one row per threshold, descending: threshold, true_rate (share of positive items whose score is above it),
            false_rate (of the other items), chosen.
        roc_auc: area under the ROC curve.
    """

    condition: Condition
    roc: pd.DataFrame
    roc_auc: float

    def __repr__(self) -> str:
        (row,) = self.roc[self.roc["chosen"]].itertuples()
        return (
            f"Calibration(above {row.threshold:.4g} at layer {self.condition.layer}: true rate {row.true_rate:.3f}, "
            f"false rate {row.false_rate:.3f}, ROC AUC {self.roc_auc:.3f})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.roc.head(20).to_html()}"


def calibrate_condition(
    direction: SteeringVector | Probe,
    acts: Activations,
    layer: int | None = None,
    *,
    positive: str = "positive",
    label: str = "label",
    max_false_rate: float | None = None,
    decide: Decide = "prompt",
    foreign: bool = False,
) -> Calibration:
    """Choose the threshold of a condition on validation activations, and return it with its ROC curve.

    Thresholds are the midpoints between neighbouring scores. The chosen one has the largest true rate minus false rate
    (Youden's J); with `max_false_rate` the largest true rate among those whose false rate is at most that. Of equal
    ones it is the one with the widest gap between the scores beside it, which rounding crosses least.

    Read `acts` where the condition decides: at the last token of prompts (`sk.collect(..., position="last")`) for
    `decide="prompt"`. Use prompts that neither the direction was made from nor the result is reported on.

    Args:
        direction: a vector, or a `Probe` of two classes, see `Condition`. A probe is turned so that its score rises
            with the probability of `positive`, whichever of its classes that is.
        acts: activations of validation items, at the site of the direction, with a column of labels.
        layer: see `Condition`.
        positive: the label of the items where the condition should hold; all other items are negative.
        label: the column of `acts.items` with the labels.
        max_false_rate: largest share of negative items where the condition holds, in [0, 1).
        decide: see `Condition`.
        foreign: allow activations of other weights than the direction's.

    Returns:
        A `Calibration`; `condition.meta` holds the rates, the numbers of items and where they were read.

    Raises:
        TypeError: no activations.
        ValueError: an unknown column, only one class, activations of another site or model or read elsewhere than where
            the prompt decides, positives that score below negatives (ROC AUC at most 0.5), or no threshold with
            `max_false_rate`.

    Example:
        >>> validation = sk.collect(model, tokenizer, {"harmful": harmful, "harmless": harmless}, layers=10)
        >>> found = sk.calibrate_condition(vector, validation, 10, positive="harmful", max_false_rate=0.05)
        >>> steering = sk.Steering(refusal, 1.0, layer=14, when=found.condition)

    Source: Lee et al. 2024, "Programming Refusal with Conditional Activation Steering" (CAST), arXiv 2409.05907; Youden
    1950, "Index for rating diagnostic tests".
    """
    if isinstance(direction, Probe):
        direction = _towards(positive, direction)
    draft = Condition(direction, layer, above=0.0, decide=decide)
    truth, scores = _labelled(draft, acts, label, positive, foreign)
    position = acts.meta.get("read_position", "last")
    if decide == "prompt" and position not in ("last", -1):
        raise ValueError(
            f"expected activations read at the last token, where a prompt decides; got position {position!r}. Collect "
            'them with position="last", or pass decide="token".'
        )
    is_rate = isinstance(max_false_rate, int | float) and 0 <= max_false_rate < 1
    if max_false_rate is not None and not is_rate:
        raise ValueError(f"expected max_false_rate in [0, 1); got {max_false_rate!r}. Pass e.g. 0.05.")
    area = roc_auc(truth, scores)
    if area <= 0.5:
        raise ValueError(
            f"expected items labelled {positive!r} to score above the others; the ROC AUC is {area:.3f}. Reverse the "
            "direction (-vector; a probe whose classes include this label is turned towards it), or choose another "
            "layer."
        )
    roc, gaps = _roc(truth, scores)
    gain = roc["true_rate"] - roc["false_rate"]
    if max_false_rate is not None:
        gain = roc["true_rate"].where(roc["false_rate"] <= max_false_rate, -1.0)
    if gain.max() <= 0:
        raise ValueError(
            f"expected a threshold with a false rate of at most {max_false_rate}; only ones that no positive item "
            "exceeds have it. Raise max_false_rate, or choose another layer."
        )
    best = int(np.where(np.isclose(gain, gain.max()), gaps, -1.0).argmax())
    chosen = roc.iloc[best]
    meta = {
        "positive": positive,
        "n_positive": int(truth.sum()),
        "n_negative": int((~truth).sum()),
        "true_rate": float(chosen["true_rate"]),
        "false_rate": float(chosen["false_rate"]),
        "roc_auc": area,
        "max_false_rate": max_false_rate,
        **{name: acts.meta[name] for name in KEPT if name in acts.meta},
    }
    condition = Condition(direction, layer, above=float(chosen["threshold"]), decide=decide, meta=meta)
    return Calibration(condition, roc.assign(chosen=np.arange(len(roc)) == best), area)


def firing_rates(condition: Condition, acts: Activations, label: str = "label", foreign: bool = False) -> pd.DataFrame:
    """Return the share of items of each label where a condition holds, with Wilson's 95 % interval over groups.

    Args:
        condition: read at its layer.
        acts: activations of held-out items.
        label: the column of `acts.items` with the labels.
        foreign: allow activations of other weights than those that the condition was calibrated on.

    Returns:
        One row per label: label, rate, low, high, n (items), n_groups.

    Raises:
        TypeError: no condition, or no activations.
        ValueError: an unknown column, a layer that was not read, or another site or model.

    Example:
        >>> sk.firing_rates(found.condition, test)
    """
    streams, rows = _streams(condition, acts, foreign), []
    holds = condition.holds(streams).numpy().astype(float)
    labels = _column(acts, label)
    for name in dict.fromkeys(labels):
        mine = np.array([one == name for one in labels])
        found = accuracy_interval(holds[mine], groups=acts.items["group"][mine].tolist())
        rows.append((name, found.mean, found.low, found.high, int(mine.sum()), found.n))
    return pd.DataFrame(rows, columns=["label", "rate", "low", "high", "n", "n_groups"])


def _towards(positive: str, probe: Probe) -> Probe:
    """The probe with `positive` as its second class, the one that a condition's score rises with."""
    if len(probe.classes) != 2 or probe.classes[0] != positive:
        return probe
    return replace(probe, classes=probe.classes[::-1], weights=probe.weights.flip(0), bias=probe.bias.flip(0))


def _labelled(
    condition: Condition, acts: Activations, label: str, positive: str, foreign: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each item is positive, and its score."""
    scores = condition.scores(_streams(condition, acts, foreign)).numpy()
    labels = _column(acts, label)
    truth = np.array([one == positive for one in labels])
    if truth.all() or not truth.any():
        raise ValueError(
            f"expected items labelled {positive!r} and others; got labels {sorted(set(labels))}. Pass positive=."
        )
    return truth, scores


def _streams(condition: Condition, acts: Activations, foreign: bool) -> Any:
    if not isinstance(condition, Condition):
        raise TypeError(f"expected a Condition; got {type(condition).__name__}. Make one, or calibrate it.")
    if not isinstance(acts, Activations):
        raise TypeError(f"expected activations; got {type(acts).__name__}. Read them by sk.collect.")
    site, layer = condition.place
    if acts.site != site:
        raise ValueError(f"expected activations of {site}, which the condition reads; got {acts.site}. Pass site=.")
    known = condition.meta if "model_fingerprint" in condition.meta else condition.direction.meta
    if (other := other_model(acts.meta, known)) and not foreign:
        raise ValueError(
            f"expected activations of the condition's model, {known.get('checkpoint', 'unknown')}; got those of "
            f"{acts.meta.get('checkpoint', 'unknown')}, with {other}. Read them from that model, or pass foreign=True."
        )
    streams = acts.at(layer)
    if streams.shape[1] != len(condition.weights):
        raise ValueError(
            f"expected activations of width {len(condition.weights)}, the direction's; got {streams.shape[1]}. Read "
            "them from the same model."
        )
    return streams


def _column(acts: Activations, label: str) -> Sequence[Any]:
    if label not in acts.items:
        raise ValueError(f"expected a column {label!r} in acts.items; got {list(acts.items)}. Name one of these.")
    return acts.items[label].tolist()


def _roc(truth: np.ndarray, scores: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """The rates above each midpoint of neighbouring scores, descending, and the gap between these scores."""
    levels = np.unique(scores.astype(float))[::-1]
    thresholds, gaps = (levels[:-1] + levels[1:]) / 2, levels[:-1] - levels[1:]
    above = scores[None].astype(float) > thresholds[:, None]
    table = pd.DataFrame(
        {
            "threshold": thresholds,
            "true_rate": above[:, truth].mean(1),
            "false_rate": above[:, ~truth].mean(1),
        }
    )
    return table, gaps
