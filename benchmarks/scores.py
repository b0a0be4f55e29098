"""Scores: ROUGE-L against rouge-score, probes against scikit-learn; equal results, and the ratio of the times."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

import steerkit as sk
from benchmarks import inputs
from benchmarks.timing import Measured, measured, seconds
from steerkit.capture.activations import Activations
from steerkit.probes.folds import deal_folds
from steerkit.probes.probe import PERMUTATIONS
from steerkit.scores.text import rouge_l

FOLDS, ITEMS, WIDTH = 5, 3000, 576


def rouge(parts: int = 5) -> Iterator[Measured]:
    """2 000 pairs of 300 words in five parts, both sides in turn; each value is equal to rouge-score's."""
    from rouge_score.rouge_scorer import RougeScorer

    words = " ".join(answer for q in inputs.questions() for answer in q.answers.values()).split()
    rng = np.random.default_rng(0)

    def text() -> str:
        at = int(rng.integers(len(words) - 300))
        mine = words[at : at + 300]
        return " ".join(mine[i] for i in np.sort(rng.permutation(300)[:240]).tolist() + list(range(60)))

    pairs = [(text(), text()) for _ in range(2000)]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    ours, theirs, worst = [], [], 0.0
    for part in range(parts):
        left, right = zip(*pairs[part::parts], strict=True)
        started = time.perf_counter()
        mine = rouge_l(left, right)
        middle = time.perf_counter()
        other = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(left, right, strict=True)]
        theirs.append(time.perf_counter() - middle)
        ours.append(middle - started)
        worst = max(worst, float(np.abs(mine - np.array(other)).max()))
    assert worst <= 1e-12, worst
    yield measured(
        "ROUGE-L of 2 000 pairs of 300 words",
        "rouge-score",
        ours,
        theirs,
        ">= 40",
        f"largest difference {worst:.0e}; {parts} parts of {2000 // parts} pairs",
    )


def _noise(layers: int) -> Activations:
    """Isotropic noise with three random labels, the slowest case for a solver."""
    rng = np.random.default_rng(0)
    resid = torch.from_numpy(rng.normal(size=(ITEMS, layers, WIDTH)).astype(np.float32))
    return Activations(resid, tuple(range(layers)), _items(rng), {})


def _stream() -> Activations:
    """The last token's stream of 3 000 texts at all 30 layers, with three labels, a third of them random."""
    model, tokenizer = inputs.model()
    texts = [text for question in inputs.questions() for text in question.answers.values()]
    pieces = [" ".join(text.split()[at : at + 12]) for text in texts for at in range(0, 72, 8)]
    pieces = [piece for piece in dict.fromkeys(pieces) if len(piece) > 20][:ITEMS]
    acts = sk.collect(model, tokenizer, pieces)
    rng = np.random.default_rng(1)
    items = _items(rng, len(pieces))
    hint = np.array([sum(map(str.isdigit, piece)) for piece in pieces])
    informed = np.digitize(hint, np.quantile(hint, [1 / 3, 2 / 3]))
    kept = rng.random(len(pieces)) < 2 / 3
    items["label"] = np.where(kept, informed, items["label"].astype(int)).astype(str)
    return Activations(acts.resid, acts.layers, items, {})


def _items(rng: np.random.Generator, n: int = ITEMS) -> pd.DataFrame:
    return pd.DataFrame(
        {"label": rng.integers(3, size=n).astype(str), "group": np.arange(n).astype(str), "start": 0, "n_tokens": 1}
    )


def _sklearn(x: np.ndarray, y: np.ndarray, train: np.ndarray, tol: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=tol, max_iter=2000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(x[train], y[train])
    return fit


def _loss(z: np.ndarray, y: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> float:
    """The objective of both: `sum -log p + |W|^2 / 2` on standardised features."""
    logits = z @ weights.T + bias
    top = logits.max(1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    return float(-log_p[np.arange(len(y)), y].sum() + (weights**2).sum() / 2)


def optimum(x: np.ndarray, y: np.ndarray) -> float:
    """The relative difference of our loss to that of scikit-learn at a tight tolerance."""
    ours = sk.fit_probe(torch.from_numpy(x), y)
    tight = _sklearn(x, y, np.arange(len(y)), 1e-10)
    scaler, model = tight[0], tight[-1]
    z = scaler.transform(x)
    weights = ours.weights.numpy() * scaler.scale_
    bias = ours.bias.numpy() + ours.weights.numpy() @ scaler.mean_
    best = _loss(z, y, model.coef_, model.intercept_)
    return (_loss(z, y, weights, bias) - best) / best


def probe(name: str, acts: Activations, layers: list[int]) -> Measured:
    """All fits of `probe_layers` at a layer, controls included, against the same fits by scikit-learn."""
    y = acts.items["label"].astype(int).to_numpy()
    _, fold = deal_folds(acts.items["group"], y, (0, 1, 2), FOLDS, 0)
    a, b = np.triu_indices(FOLDS)
    train = [np.flatnonzero((fold != i) & (fold != j)) for i, j in zip(a, b, strict=True)]
    outer = [np.flatnonzero(fold != i) for i in range(FOLDS)]
    rng = np.random.default_rng(0)
    ours, theirs, excess = [], [], []
    for layer in layers:
        x = acts.at(layer).double().numpy()
        ours.append(seconds(lambda layer=layer: sk.probe_layers(acts, layers=[layer], folds=FOLDS)))

        def loop(x: np.ndarray = x) -> None:
            for rows in [*train, np.arange(len(y))]:
                _sklearn(x, y, rows, 1e-4)
            for _ in range(PERMUTATIONS):
                for rows in outer:
                    _sklearn(x, rng.permutation(y), rows, 1e-4)

        theirs.append(seconds(loop))
        excess.append(optimum(x, y))
    fits = len(train) + 1 + PERMUTATIONS * FOLDS
    return measured(
        f"probes, {name}: {len(y)} x {acts.resid.shape[-1]}, 3 classes, {FOLDS} folds, {fits} fits a layer",
        "scikit-learn in a loop, same scaler, C, its default tolerance",
        ours,
        theirs,
        ">= 3",
        f"per layer, {len(layers)} layers of {len(acts.layers)}; our loss above a tight optimum by "
        f"{max(excess):.0e} at most, relative",
    )


def all_probes() -> Iterator[Measured]:
    """Probes of the model's stream, and of noise."""
    yield probe("the stream of SmolLM2", _stream(), [2, 9, 16, 23, 29])
    yield probe("isotropic noise (the worst case)", _noise(3), [0, 1, 2])
