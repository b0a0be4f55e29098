"""LEACE equals the paper's formula written out, erases exactly on its items, and is scored on held-out rows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import steerkit as sk
from steerkit.probes import erasure
from steerkit.probes.erasure import fit_erasure

STORED = Path(__file__).with_name("leace_reference.json")


def acts(n: int = 200, width: int = 12, classes: int = 3, seed: int = 0, per_group: int = 2) -> sk.Activations:
    """Correlated features of different scales; the class moves the mean along random directions, layer 1 more."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, width, generator=generator)
    layers = [torch.randn(n, width, generator=generator) @ mix + scale * means[labels] + 5 for scale in (1.0, 4.0)]
    items = {"label": [f"agent {k}" for k in labels.tolist()], "start": 0, "n_tokens": 1}
    items |= {
        "group": [str(i // (per_group * classes)) for i in range(n)],
        "other": [str(i // 3 % 2) for i in range(n)],
    }
    return sk.Activations(torch.stack(layers, 1), (0, 1), pd.DataFrame(items), {"checkpoint": "c"})


def slow(x: torch.Tensor, labels: Any, shrinkage: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, and the projection `W^+ (W S)(W S)^+ W` of theorem 4.3, with full matrices."""
    x = x.double()
    z = torch.tensor(pd.get_dummies(pd.Series(list(labels))).to_numpy(dtype=float))
    mean = x.mean(0)
    cov = (x - mean).T @ (x - mean) / len(x)
    cov = (1 - shrinkage) * cov + shrinkage * cov.trace() / len(cov) * torch.eye(len(cov), dtype=torch.float64)
    cross = (x - mean).T @ (z - z.mean(0)) / len(x)
    values, vectors = torch.linalg.eigh(cov)
    big = values > 1e-9 * values.max()
    w = vectors[:, big] @ torch.diag(values[big] ** -0.5) @ vectors[:, big].T
    whitened = w @ cross
    onto = whitened @ torch.linalg.pinv(whitened, rtol=1e-7)
    return mean, torch.linalg.pinv(w, rtol=1e-7) @ onto @ w


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_the_erasure_is_the_formula_of_the_paper_with_full_matrices(classes: int, shrinkage: float) -> None:
    data = acts(classes=classes)
    eraser = sk.leace(data, shrinkage=shrinkage)
    assert eraser.classes == tuple(sorted(set(data.items["label"])))
    erased = eraser.apply(data)
    for number, layer in enumerate((0, 1)):
        x = data.at(layer).double()
        mean, projection = slow(x, data.items["label"], shrinkage)
        wanted = x - (x - mean) @ projection.T
        torch.testing.assert_close(eraser.at(layer)(x), wanted, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(erased.resid[:, number], wanted.float())
        assert eraser.at(layer).left.shape == (classes - 1, 12)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_erasure_equals_that_of_the_package_concept_erasure(classes: int) -> None:
    """Its output on fixed items is stored; tests/probes/leace_reference.py computes it."""
    stored = json.loads(STORED.read_text())
    assert stored["package"] == "concept-erasure 0.2.4"
    case = stored["cases"][str(classes)]
    x, wanted = (torch.tensor(case[name], dtype=torch.float64) for name in ("x", "erased"))
    codes = torch.tensor(case["codes"])
    assert len(codes.unique()) == classes and (wanted - x).abs().max() > 1
    torch.testing.assert_close(fit_erasure(x, codes, classes)(x), wanted, rtol=1e-9, atol=1e-9)


def test_erased_classes_have_one_mean_and_a_probe_without_penalty_finds_nothing() -> None:
    data = acts()
    erased = sk.leace(data).apply(data)
    for layer in (0, 1):
        means = pd.DataFrame(erased.at(layer).double().numpy()).groupby(data.items["label"]).mean()
        assert np.ptp(means.to_numpy(), axis=0).max() < 1e-4
        x, y = erased.at(layer).double().numpy(), data.items["label"]
        fitted = LogisticRegression(C=1e6, max_iter=5000).fit(x, y)
        assert abs(fitted.coef_).max() < 1e-3
        assert LogisticRegression(C=1e6, max_iter=5000).fit(data.at(layer).numpy(), y).score(data.at(layer), y) > 0.5


def test_erasing_twice_is_erasing_once_and_no_other_erasure_changes_the_items_less() -> None:
    data = acts()
    x = data.at(1).double()
    once = sk.leace(data).at(1)
    torch.testing.assert_close(once(once(x)), once(x), rtol=1e-9, atol=1e-9)
    change = (once(x) - x).pow(2).sum()
    orthogonal = sk.leace(data, shrinkage=1.0).at(1)
    assert change < (orthogonal(x) - x).pow(2).sum()
    difference = orthogonal.left / orthogonal.left.norm(dim=1, keepdim=True)
    torch.testing.assert_close(orthogonal.right, orthogonal.left.T / orthogonal.left.norm(dim=1) ** 2)
    torch.testing.assert_close(difference @ difference.T, torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_few_items_warn_and_are_erased_all_the_same_and_stay_separable_where_held_out() -> None:
    with pytest.warns(UserWarning, match="held-out items stay separable"):
        few = sk.leace(acts(n=12, width=40, classes=2))
    data = acts(n=12, width=40, classes=2)
    erased = few.apply(data).at(0)
    torch.testing.assert_close(erased[0::2].mean(0), erased[1::2].mean(0), atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.leace(data, shrinkage=0.1)


def test_held_out_rows_are_separable_before_and_not_after_erasure_and_the_control_stays_separable() -> None:
    table = sk.probe_erased(acts(n=3000), folds=4, layers=1).set_index("features")
    before, after, control = (table.loc[name] for name in ("resid", "erased", "erased_shuffled"))
    assert after["accuracy"] < 0.40 < 0.9 < before["accuracy_low"]
    assert abs(control["accuracy"] - before["accuracy"]) < 0.05
    assert set(table["n"]) == {3000} and set(table["n_groups"]) == {500} and set(table["folds"]) == {4}
    assert np.allclose(table["majority"], 1 / 3)


def test_erasing_another_column_leaves_the_label_separable() -> None:
    table = sk.probe_erased(acts(n=600), erase="other", layers=[1]).set_index("features")["accuracy"]
    assert table["erased"] > 0.9 * table["resid"] > 0.6


def test_a_fold_s_rows_are_fitted_on_by_neither_erasure_nor_probe() -> None:
    """Labels of the scored rows replaced: their scores change, the fits do not."""
    for folds in (3, 4, 5, 8):
        fold = np.arange(40) % folds
        for left_out in range(folds):
            fitted, probed = (half.numpy() for half in erasure._halves(fold, left_out, folds))
            assert not (fitted & probed).any() and set(fold[fitted | probed]) == set(range(folds)) - {left_out}
            assert fitted.any() and probed.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.leace(acts(), label="persona"), "expected a column 'persona'"),
        (lambda: sk.leace(acts(classes=1)), "two classes at least"),
        (lambda: sk.leace(acts(), shrinkage=1.5), "between 0 and 1"),
        (lambda: sk.leace(acts(), shrinkage=True), "between 0 and 1"),
        (lambda: sk.leace(acts()).at(7), "layers that were read"),
        (lambda: sk.leace(acts()).apply(acts(width=8)), "width 12"),
        (lambda: sk.probe_erased(acts(), erase="persona"), "expected a column 'persona'"),
        (lambda: sk.probe_erased(acts(), group="topic"), "expected a column 'topic'"),
        (lambda: sk.probe_erased(acts(), folds=2), "3 folds at least"),
        (lambda: sk.probe_erased(acts(), layers=[]), "one layer at least"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_all_erasures_of_the_same_rows_share_one_decomposition(monkeypatch) -> None:
    rows: list[int] = []
    spread_of = erasure.spread_of
    monkeypatch.setattr(erasure, "spread_of", lambda x, *given: rows.append(len(x)) or spread_of(x, *given))
    data = acts(120)
    sk.probe_erased(data, folds=4, shrinkage=0.1)
    assert len(rows) == 2 * 4  # layers x folds, for the erasure of labels and that of permuted ones
    codes = torch.arange(120) % 3
    spread = spread_of(data.at(1), 0.1)
    for labels in (codes, codes.flip(0)):
        shared, alone = fit_erasure(spread, labels, 3), fit_erasure(data.at(1), labels, 3, 0.1)
        assert all(torch.equal(getattr(shared, part), getattr(alone, part)) for part in ("mean", "right", "left"))


def test_the_control_of_labelled_groups_permutes_whole_groups_and_that_of_others_items() -> None:
    rng = np.random.default_rng
    fold, group_of = np.arange(80) // 4 % 5, np.arange(80) // 4
    whole = torch.arange(80) // 4 % 2
    permuted = erasure._shuffled(whole, group_of, fold, rng(0)).view(20, 4)
    assert (
        (permuted == permuted[:, :1]).all() and permuted[:, 0].sum() == 10 and not torch.equal(permuted.ravel(), whole)
    )
    for labels, groups in ((torch.arange(80) % 2, group_of), (whole, np.arange(80))):
        expected = labels[torch.from_numpy(rng(0).permutation(80))]
        assert torch.equal(erasure._shuffled(labels, groups, fold, rng(0)), expected)
