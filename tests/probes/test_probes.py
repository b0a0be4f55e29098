"""Probes: the optimum against scikit-learn's, the raw space, and each control on data where its answer is known."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from steerkit.capture.activations import Activations
from steerkit.probes.folds import deal_folds, permuted_labels, permuted_over
from steerkit.probes.probe import Probe, fit_probe, probe_layers
from steerkit.stats.mean import accuracy_interval

COUNTS = ["n", "n_groups", "n_classes", "folds"]
COLUMNS = ["layer", "features", "labels", "accuracy", "accuracy_low", "accuracy_high", "roc_auc", *COUNTS]


def made(n: int, d: int, k: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Correlated features of very different scales and offsets; labels from a linear rule plus `noise`."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, d + 1) ** -0.7
    x = (rng.normal(size=(n, d)) * spread) @ rng.normal(size=(d, d)) * np.exp(2 * rng.normal(size=d)) + 5
    logits = (x - x.mean(0)) / x.std(0) @ rng.normal(size=(d, k))
    y = (logits / logits.std() + noise * rng.gumbel(size=(n, k))).argmax(1)
    y[:k] = range(k)
    return torch.from_numpy(x).float(), y


def activations(
    x: torch.Tensor, labels: object, groups: object = None, n_tokens: object = 5, start: object = 0, layers: tuple = ()
) -> Activations:
    x = x if x.ndim == 3 else x[:, None]
    groups = np.arange(len(x)) if groups is None else groups
    items = {"text": range(len(x)), "label": labels, "group": groups, "start": start, "n_tokens": n_tokens}
    return Activations(x.float(), layers or tuple(range(x.shape[1])), pd.DataFrame(items))


def sklearn_fit(x: torch.Tensor, y: np.ndarray, c: float = 1.0):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=50000))
    return model.fit(x.double().numpy(), y)


def loss_of(probe: Probe, x: torch.Tensor, y: np.ndarray, c: float) -> float:
    """scikit-learn's objective, from the raw-space weights."""
    x = x.double()
    scale = torch.from_numpy(StandardScaler().fit(x.numpy()).scale_)
    w = probe.weights * scale
    w = w[1:] - w[:1] if len(w) == 2 else w
    log_p = torch.log_softmax(x @ probe.weights.T + probe.bias, 1)
    return float(-log_p[range(len(y)), y].sum() + w.square().sum() / (2 * c))


def sklearn_loss(model, x: torch.Tensor, y: np.ndarray, c: float) -> float:
    w = model[-1].coef_
    return float(-model.predict_log_proba(x.double().numpy())[range(len(y)), y].sum() + (w**2).sum() / (2 * c))


def rows(result, **where) -> pd.DataFrame:
    table = result.table
    for column, value in where.items():
        table = table[table[column] == value]
    return table


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize(
    ("n", "d", "noise", "c"),
    [(400, 40, 1.0, 1.0), (400, 40, 0.0, 1.0), (60, 200, 0.0, 1.0), (60, 200, 1.0, 100.0), (300, 30, 1.0, 1e-3)],
    ids=["noisy", "separable", "n<d", "n<d, weak penalty", "strong penalty"],
)
def test_loss_and_predictions_are_those_of_scikit_learn(k: int, n: int, d: int, noise: float, c: float) -> None:
    x, y = made(n + 200, d, k, noise, seed=k)
    x, other, y = x[:n], x[n:], y[:n]
    model, probe = sklearn_fit(x, y, c), fit_probe(x, y, c=c)
    ours, theirs = loss_of(probe, x, y, c), sklearn_loss(model, x, y, c)
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert probe.classes == tuple(range(k))
    for items in (x, other):
        p = model.predict_proba(items.double().numpy())
        np.testing.assert_allclose(probe.scores(items).numpy(), p, atol=3e-3)
        clear = np.sort(p, 1)[:, -1] - np.sort(p, 1)[:, -2] > 6e-3
        assert clear.mean() > 0.9
        assert (np.array(probe.predict(items)) == p.argmax(1))[clear].all()


def test_twenty_items_with_a_constant_feature_have_scikit_learns_loss() -> None:
    x, y = made(20, 100, 2, 0.5)
    x[:, 3] = 0.1
    probe = fit_probe(x, y)
    assert loss_of(probe, x, y, 1.0) == pytest.approx(sklearn_loss(sklearn_fit(x, y), x, y, 1.0), rel=2e-6)
    assert probe.weights[:, 3].abs().max() < 1e-9


def test_weak_penalty_on_separable_data_stays_finite_and_does_not_exceed_scikit_learns_loss() -> None:
    x, y = made(50, 120, 3, 0.0)
    for c in (1e4, 1e7):
        probe = fit_probe(x, y, c=c)
        assert torch.isfinite(probe.weights).all()
        assert loss_of(probe, x, y, c) <= sklearn_loss(sklearn_fit(x, y, c), x, y, c) * (1 + 1e-5)


def test_direction_is_in_the_raw_space_and_the_standardised_one_is_not() -> None:
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 100.0])
    truth = np.array([1.0, 0.01]) / np.hypot(1.0, 0.01)
    x = rng.normal(size=(4000, 2)) * scale + 7
    y = np.where((x - 7) @ truth + 0.3 * rng.logistic(size=4000) > 0, "yes", "no")
    probe = fit_probe(torch.from_numpy(x), y)

    def recovers(direction: torch.Tensor) -> bool:
        slope = float(direction[1] / direction[0])
        return abs(slope - 0.01) < 0.001 and float(direction @ torch.from_numpy(truth)) > 0.999

    standardised = Probe(probe.classes, probe.weights * torch.from_numpy(x.std(0)), probe.bias)
    assert recovers(probe.direction("yes"))
    assert not recovers(standardised.direction("yes"))
    assert torch.allclose(probe.direction("yes"), -probe.direction("no"))


def test_logits_on_raw_activations_are_scikit_learns_on_standardised_ones() -> None:
    x, y = made(300, 20, 3, 1.0)
    probe = fit_probe(x, y, tol=1e-12)
    logits = x.double() @ probe.weights.T + probe.bias
    np.testing.assert_allclose(logits, sklearn_fit(x, y).decision_function(x.double().numpy()), atol=1e-5)


def test_direction_is_a_class_against_the_mean_of_the_others() -> None:
    weights = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]).double()
    direction = Probe(("a", "b", "c"), weights, torch.zeros(3).double()).direction("a")
    assert torch.allclose(direction, torch.tensor([3.0, -1.5]).double() / 11.25**0.5)


def test_unconverged_fit_warns_with_the_norm_of_the_gradient() -> None:
    x, y = made(200, 30, 3, 1.0)
    with pytest.warns(RuntimeWarning, match=r"in 1 steps; got gradient norms up to \d.* in 1 of 1 fits\. Raise"):
        fit_probe(x, y, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_probe(x, y)


def test_folds_never_split_a_group_and_spread_the_classes() -> None:
    rng = np.random.default_rng(1)
    for seed in range(20):
        groups = pd.Series(rng.permutation(np.repeat(np.arange(30), 4)))
        y = (groups.to_numpy() % 10 == 0).astype(int)  # three groups hold the second class
        group_of, fold = deal_folds(groups, y, ("a", "b"), 3, seed)
        assert (pd.Series(fold).groupby(groups.to_numpy()).nunique() == 1).all()
        assert (pd.Series(fold).groupby(group_of).nunique() == 1).all()
        assert set(fold) == {0, 1, 2} == set(fold[y == 1])


def test_what_only_marks_the_group_is_not_read_as_the_class() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 10)
    x = torch.from_numpy(rng.normal(size=(40, 60))[group] + 0.01 * rng.normal(size=(400, 60)))
    labels = rng.permutation(np.arange(40) % 2)[group]
    result = probe_layers(activations(x, labels, group))
    assert rows(result, layer=0, labels="true").accuracy.item() < 0.7
    leaky = probe_layers(activations(x, labels))
    assert rows(leaky, layer=0, labels="true").accuracy.item() > 0.95


def by_hand(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    return fit_probe(torch.from_numpy(x[train]), y[train]).scores(torch.from_numpy(x[test])).numpy()


def pair_area(positive: np.ndarray, score: np.ndarray, fold: np.ndarray) -> float:
    """How often a positive scores above a negative of its fold, pair by pair."""
    wins = [
        (float(score[i] > score[j]) + float(score[i] >= score[j])) / 2
        for i in np.flatnonzero(positive)
        for j in np.flatnonzero(~positive & (fold == fold[i]))
    ]
    return float(np.mean(wins))


def test_every_figure_is_that_of_separate_fits_fold_by_fold() -> None:
    rng = np.random.default_rng(3)
    n, depth, k, folds = 90, 3, 3, 4
    y = rng.integers(0, k, n)
    x = rng.normal(size=(n, depth, 6)) + np.eye(6)[y][:, None] * np.array([0.8, 1.0, 0.9])[:, None]
    x = x.astype(np.float32)
    groups = rng.permutation(np.arange(n) // 3)
    names = np.array(["a", "b", "c"])[y]
    result = probe_layers(activations(torch.from_numpy(x), names, groups), folds=folds, seed=4)
    _, fold = deal_folds(pd.Series(groups), y, ("a", "b", "c"), folds, 4)

    p = np.zeros((depth, n, k))
    chosen = []
    for i in range(folds):
        inner = np.zeros((depth, n))
        for layer in range(depth):
            p[layer, fold == i] = by_hand(x[:, layer], y, fold != i, fold == i)
            for j in set(range(folds)) - {i}:
                test = fold == j
                s = by_hand(x[:, layer], y, (fold != i) & (fold != j), test)
                inner[layer, test] = s.argmax(1) == y[test]
        chosen.append(int(inner[:, fold != i].mean(1).argmax()))
    for layer in range(depth):
        row = rows(result, layer=layer, labels="true").iloc[0]
        assert row.accuracy == pytest.approx((p[layer].argmax(1) == y).mean())
        areas = [pair_area(y == j, p[layer][:, j], fold) for j in range(k)]
        assert row.roc_auc == pytest.approx(np.mean(areas), abs=1e-3)
        interval = accuracy_interval((p[layer].argmax(1) == y).astype(float), groups.tolist())
        assert (row.accuracy_low, row.accuracy_high) == pytest.approx((interval.low, interval.high))
        confusion = np.zeros((k, k), dtype=int)
        np.add.at(confusion, (y, p[layer].argmax(1)), 1)
        np.testing.assert_array_equal(result.confusion[layer], confusion)
        probe = fit_probe(torch.from_numpy(x[:, layer]), names)
        for j, name in enumerate(probe.classes):
            assert torch.allclose(result.directions[layer][j], probe.direction(name), atol=1e-3)
    assert result.meta["nested_layers"] == chosen
    nested = np.array([p[chosen[fold[i]], i].argmax() == y[i] for i in range(n)]).mean()
    assert rows(result, layer="nested").accuracy.item() == pytest.approx(nested)
    assert list(result.table) == COLUMNS
    assert result.classes == ("a", "b", "c")
    assert result.meta["majority_accuracy"] == np.bincount(y).max() / n
    assert len(result.table) == 2 * depth + 2
    assert (result.table[COUNTS] == [n, 30, k, folds]).all(axis=None)


@pytest.mark.parametrize("paired", [True, False])
def test_shuffled_labels_are_at_chance_within_their_interval(paired: bool) -> None:
    rng = np.random.default_rng(5)
    n = 400
    y = np.arange(n) % 2
    acts = activations(
        torch.from_numpy(rng.normal(size=(n, 20)) + 2 * y[:, None]), y, np.arange(n) // 2 if paired else np.arange(n)
    )
    results = [probe_layers(acts, seed=seed) for seed in range(6)]
    shuffled = pd.concat(rows(result, labels="shuffled") for result in results)
    assert all(rows(result, layer=0, labels="true").accuracy.item() > 0.99 for result in results)
    assert ((shuffled.accuracy_low <= 0.5) & (shuffled.accuracy_high >= 0.5)).sum() >= 4
    assert shuffled.accuracy.mean() == pytest.approx(0.5, abs=0.025)
    assert shuffled.roc_auc.mean() == pytest.approx(0.5, abs=0.03)


def test_shuffled_labels_are_at_chance_or_below_where_every_group_has_one_label() -> None:
    """A group that is left out has fewer groups of its own label in training than of the others."""
    y = np.arange(480) // 10 % 2
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(480, 5)) + 3 * y[:, None])
    result = probe_layers(activations(x, y, np.arange(480) // 10), folds=6)
    assert rows(result, layer=0, labels="true").accuracy.item() > 0.99
    shuffled = rows(result, labels="shuffled").iloc[0]
    assert 0.35 < shuffled.accuracy < 0.55 and shuffled.accuracy_high < 0.6


def test_permuted_labels_keep_their_number_and_give_every_fold_its_share() -> None:
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    fold = np.repeat(np.arange(5), 20)
    items = np.arange(100)
    assert permuted_over(y, items) == "whole groups"  # each item is one
    permuted = permuted_labels(y, items, fold, np.random.default_rng(0))
    assert torch.equal(permuted.sort().values, y)
    counts = pd.crosstab(fold, permuted.numpy()).to_numpy()
    assert np.abs(counts - [10, 6, 4]).max() <= 1
    again = permuted_labels(y, items, fold, np.random.default_rng(1))
    assert 0.2 < (permuted == again).double().mean() < 0.6
    rare, sizes = torch.tensor([0] * 500 + [1] * 3 + [2] * 7), np.repeat([0, 1, 2], [500, 5, 5])
    assert len(set(sizes[permuted_labels(rare, np.arange(510), sizes, np.random.default_rng(0)) == 1])) > 1


def test_labels_are_permuted_over_what_is_exchangeable() -> None:
    rng = np.random.default_rng(0)
    pairs, of_pair = torch.tensor([0, 1] * 40), np.arange(80) // 2
    assert permuted_over(pairs, of_pair) == "within groups"
    flipped = permuted_labels(pairs, of_pair, of_pair % 5, rng)
    assert (flipped.view(-1, 2).sum(1) == 1).all() and 10 < int((flipped[::2] == 1).sum()) < 30
    whole, of_group = torch.tensor([0] * 60 + [1] * 60), np.arange(120) // 10
    assert permuted_over(whole, of_group) == "whole groups"
    dealt = permuted_labels(whole, of_group, of_group % 3, rng).view(12, 10)
    assert (dealt == dealt[:, :1]).all() and dealt[:, 0].sum() == 6 and not torch.equal(dealt.flatten(), whole)
    assert permuted_over(torch.tensor([0, 1, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2])) == "items"


def test_without_an_effect_the_area_is_one_half_however_unequal_groups_of_one_label_are() -> None:
    sizes = np.array([40] + [6] * 11)
    groups, y = np.repeat(np.arange(12), sizes), np.repeat(np.arange(12) % 2, sizes)
    areas = []
    for seed in range(40):
        x = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(y), 5)))
        areas.append(rows(probe_layers(activations(x, y, groups), seed=seed), labels="true", layer=0).roc_auc.item())
    assert np.mean(areas) == pytest.approx(0.5, abs=0.04)


def test_the_band_of_shuffled_labels_holds_the_accuracy_of_grouped_labels_without_an_effect() -> None:
    outside = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(16), 12)
        x = rng.normal(size=(16, 8))[groups] + 0.5 * rng.normal(size=(192, 8))
        y = rng.permutation(np.arange(16) % 2)[groups]
        result = probe_layers(activations(torch.from_numpy(x), y, groups), folds=4, seed=seed)
        accuracy = rows(result, labels="true", layer=0).accuracy.item()
        band = rows(result, labels="shuffled").iloc[0]
        outside += not band.accuracy_low <= accuracy <= band.accuracy_high
    assert outside <= 6


def test_a_band_of_permutations_that_cannot_be_estimated_is_missing() -> None:
    x = torch.randn(16, 1, 16, generator=torch.Generator().manual_seed(4))
    table = probe_layers(activations(x, np.arange(16) % 2, np.arange(16) // 2), folds=3).table
    (shuffled,) = table[table["labels"] == "shuffled"].itertuples()
    assert np.isnan(shuffled.accuracy_low) and np.isnan(shuffled.accuracy_high) and 0 <= shuffled.accuracy <= 1
    rest = table[table["labels"] == "true"]
    assert rest[["accuracy_low", "accuracy_high"]].notna().all(axis=None)


def test_larger_groups_are_dealt_first_so_that_folds_have_equal_shares_of_a_label() -> None:
    sizes = [40, *[4] * 10] * 2
    groups = pd.Series(np.repeat(np.arange(22), sizes))
    y = np.repeat([0] * 11 + [1] * 11, sizes)
    _, fold = deal_folds(groups, y, ("a", "b"), 3, 0)
    counts = pd.crosstab(fold, y).to_numpy()
    assert (counts.max(0) == 40).all() and (np.sort(counts, axis=0)[:2] == 20).all()


def test_one_huge_activation_neither_stops_the_fits_nor_changes_their_optimum() -> None:
    x, y = made(300, 40, 2, 1.0)
    x[7] = 1000 * x.std(0)
    groups = np.arange(300) // 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = probe_layers(activations(x, y, groups))
    _, fold = deal_folds(pd.Series(groups), y, (0, 1), 5, 0)
    p = np.zeros(300)
    for i in range(5):
        p[fold == i] = sklearn_fit(x[fold != i], y[fold != i]).predict(x[fold == i].double().numpy()) == y[fold == i]
    assert rows(result, layer=0, labels="true").accuracy.item() == pytest.approx(p.mean(), abs=0.01)


def test_length_and_position_alone_reach_one_when_they_give_the_label_away() -> None:
    rng = np.random.default_rng(6)
    y = np.arange(120) % 2
    x = torch.from_numpy(rng.normal(size=(120, 10)))
    told = probe_layers(activations(x, y, n_tokens=5 + 20 * y + rng.integers(0, 5, 120)))
    placed = probe_layers(activations(x, y, start=50 - 20 * y))
    silent = probe_layers(activations(x, y, n_tokens=rng.integers(0, 5, 120)))
    for result in (told, placed):
        row = rows(result, features="length_position").iloc[0]
        assert (row.accuracy, row.roc_auc, row.layer) == (1.0, 1.0, None)
    assert rows(silent, features="length_position").accuracy.item() < 0.65


def test_nested_choice_is_at_chance_on_noise_where_the_best_layer_is_not() -> None:
    rng = np.random.default_rng(7)
    best, nested = [], []
    for seed in range(4):
        x = torch.from_numpy(rng.normal(size=(80, 40, 4)))
        result = probe_layers(activations(x, np.arange(80) % 2), seed=seed)
        best.append(rows(result, labels="true", features="resid").iloc[:-1].accuracy.max())
        nested.append(rows(result, layer="nested").accuracy.item())
    assert min(best) > 0.58
    assert abs(np.mean(nested) - 0.5) < 0.07


def test_nested_choice_finds_the_layer_that_knows() -> None:
    y = np.arange(100) % 2
    x = np.random.default_rng(8).normal(size=(100, 3, 5))
    x[:, 1] += 3 * y[:, None]
    result = probe_layers(activations(torch.from_numpy(x), y, layers=("embed", 4, 9)))
    assert result.meta["nested_layers"] == [4] * 5
    assert rows(result, layer="nested").accuracy.item() == rows(result, layer=4, labels="true").accuracy.item() > 0.95
    assert result.meta["embed_read"] is True
    assert len(rows(result, layer="embed")) == 2
    without = probe_layers(activations(torch.from_numpy(x), y, layers=("embed", 4, 9)), layers=[9, 4])
    assert without.meta["embed_read"] is False
    assert list(without.directions) == [9, 4]


def test_same_seed_same_result_and_another_seed_another_one() -> None:
    x, y = made(150, 10, 3, 1.0)
    acts = activations(x, y)
    a, b, c = (probe_layers(acts, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(a.table, b.table)
    assert all(torch.equal(a.directions[layer], b.directions[layer]) for layer in a.directions)
    true = [rows(result, layer=0, labels="true").accuracy.item() for result in (a, c)]
    assert true[0] != true[1]
    assert not rows(a, labels="shuffled").accuracy.equals(rows(c, labels="shuffled").accuracy)


def test_order_of_the_items_does_not_change_the_accuracy() -> None:
    x, y = made(150, 10, 3, 1.0)
    groups = np.arange(150) // 3
    order = np.random.default_rng(0).permutation(150)
    a = probe_layers(activations(x, y, groups))
    b = probe_layers(activations(x[order], y[order], groups[order]))
    for layer in (0, "nested"):
        one, other = (rows(result, layer=layer, labels="true").accuracy.item() for result in (a, b))
        assert one == pytest.approx(other)


def test_layer_at_which_all_items_are_equal_gives_the_majority_and_no_direction() -> None:
    y = np.arange(90) % 3 // 2
    result = probe_layers(activations(torch.full((90, 1, 8), 0.3), y))
    assert rows(result, layer=0, labels="true").accuracy.item() == pytest.approx(2 / 3)
    assert result.meta["majority_accuracy"] == pytest.approx(2 / 3)
    assert not result.directions[0].any()
    with pytest.raises(ValueError, match="all are 0, as where all items are equal"):
        fit_probe(torch.full((90, 8), 0.3), y).direction(1)


def test_a_probe_of_activations_is_that_of_their_tensor_and_carries_layer_site_and_provenance() -> None:
    x, y = made(60, 4, 3, 1.0)
    acts = replace(activations(torch.stack([x, 2 * x], 1), y, layers=(3, 7)), site="mlp_out", meta={"n_layers": 9})
    probe, plain = fit_probe(acts, "label", layer=7), fit_probe((2 * x).float(), y)
    assert (probe.layer, probe.site, probe.meta) == (7, "mlp_out", {"n_layers": 9})
    assert (plain.layer, plain.site, plain.meta) == (None, "resid_post", {})
    assert torch.equal(probe.weights, plain.weights) and repr(probe).endswith("d_model 4, mlp_out of layer 7)")
    assert torch.equal(fit_probe(acts, y, layer=7).weights, probe.weights)
    assert fit_probe(x, y, layer=3, site="z").site == "z"
    for message, call in {
        r"expected a layer; the activations hold \[3, 7\]": lambda: fit_probe(acts, "label"),
        r"expected a column 'mood' in acts.items": lambda: fit_probe(acts, "mood", layer=3),
        r"the site of the activations, mlp_out; got 'z'": lambda: fit_probe(acts, "label", layer=3, site="z"),
        r"expected a site among": lambda: fit_probe(x, y, site="mlp"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_errors_say_what_was_expected_and_what_came() -> None:
    x, y = made(60, 4, 3, 1.0)
    probe = fit_probe(x, y)
    for message, call in {
        r"expected x of shape \[60 labels, d_model\]; got \[59, 4\]": lambda: fit_probe(x[1:], y),
        r"two classes at least; got \[7\]": lambda: fit_probe(x, [7] * 60),
        r"a label for every item; item 2 has none": lambda: fit_probe(x[:3], ["a", "b", None]),
        r"expected finite x": lambda: fit_probe(x / 0, y),
        r"expected c above 0; got -1.0": lambda: fit_probe(x, y, c=-1.0),
        r"one of the classes \[0, 1, 2\]; got 'joy'": lambda: probe.direction("joy"),
        r"x of shape \[item, 4\]; got \[60, 3\]": lambda: probe.scores(x[:, 1:]),
        r"expected columns \['emotion'\] in acts.items": lambda: probe_layers(activations(x, y), label="emotion"),
        r"one layer at least; got none": lambda: probe_layers(activations(x, y), layers=[]),
        r"one of the layers that were read, \[0\]; got 3": lambda: probe_layers(activations(x, y), layers=[3]),
        r"as many groups as folds; got 5 folds and 4 g": lambda: probe_layers(activations(x, y, np.arange(60) % 4)),
        r"3 folds at least .* got 2 folds": lambda: probe_layers(activations(x, y), folds=2),
        r"class 'rare' is in 2, so it is missing from a training fold": lambda: probe_layers(
            activations(x, ["rare", "rare", *["a", "b"] * 29])
        ),
        r"a group for every item; 60 have none": lambda: probe_layers(activations(x, y, [None] * 60)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


DEGENERATE = {
    "random": lambda: made(200, 20, 3, 1.0),
    "two classes, n<d": lambda: made(60, 200, 2, 1.0),
    "separable": lambda: made(80, 30, 3, 0.0),
    "a constant feature and two equal ones": lambda: constant_and_equal(),
    "all items equal": lambda: (torch.full((60, 8), 0.3), np.arange(60) % 3 // 2),
    "one huge activation": lambda: huge(),
    "a rare class": lambda: (made(90, 12, 2, 1.0)[0], np.array([2] * 5 + [0, 1] * 42 + [0])),
}


def constant_and_equal() -> tuple[torch.Tensor, np.ndarray]:
    x, y = made(40, 60, 2, 0.5)
    x[:, 3] = 0.1
    x[:, 5] = x[:, 4]
    return x, y


def huge() -> tuple[torch.Tensor, np.ndarray]:
    x, y = made(120, 10, 2, 1.0)
    x[7] = 1000 * x.std(0)
    return x, y


@pytest.mark.parametrize("kind", DEGENERATE)
def test_both_solvers_give_equal_weights_and_probabilities(kind: str) -> None:
    x, y = DEGENERATE[kind]()
    ours, theirs = (fit_probe(x, y, tol=1e-12, solver=solver) for solver in ("steerkit", "scikit-learn"))
    assert ours.classes == theirs.classes
    assert (ours.weights - theirs.weights).norm() <= 1e-4 * theirs.weights.norm()
    np.testing.assert_allclose(ours.scores(x).numpy(), theirs.scores(x).numpy(), atol=1e-4)
    default = fit_probe(x, y)
    np.testing.assert_allclose(default.scores(x).numpy(), theirs.scores(x).numpy(), atol=3e-3)


def test_the_reference_is_scikit_learns_pipeline() -> None:
    for k in (2, 3):
        x, y = made(150, 12, k, 1.0, seed=k)
        p = sklearn_fit(x, y, 2.0).predict_proba(x.double().numpy())
        np.testing.assert_allclose(fit_probe(x, y, c=2.0, solver="scikit-learn").scores(x).numpy(), p, atol=1e-6)


@pytest.mark.parametrize("kind", ["signal", "noise", "all items equal"])
def test_profiles_of_both_solvers_are_equal(kind: str) -> None:
    rng = np.random.default_rng(9)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 2, 6)) + (kind == "signal") * np.array([1.0, 3.0])[:, None] * y[:, None, None]
    x = np.full_like(x, 0.3) if kind == "all items equal" else x
    acts = activations(torch.from_numpy(x), y, np.arange(60) // 2, n_tokens=rng.integers(1, 9, 60))
    ours, theirs = (probe_layers(acts, folds=3, solver=solver) for solver in ("steerkit", "scikit-learn"))
    assert list(ours.table) == list(theirs.table) and theirs.meta["solver"] == "scikit-learn"
    for column, atol in (("accuracy", 1 / 60 + 1e-9), ("roc_auc", 0.01)):
        np.testing.assert_allclose(ours.table[column], theirs.table[column], atol=atol)
    assert all(torch.allclose(ours.directions[k], theirs.directions[k], atol=0.02) for k in ours.directions)
    assert ours.meta["nested_layers"] == theirs.meta["nested_layers"] or kind == "noise"


def test_an_unknown_solver_is_refused() -> None:
    x, y = made(60, 4, 3, 1.0)
    for call in (lambda: fit_probe(x, y, solver="newton"), lambda: probe_layers(activations(x, y), solver="newton")):
        with pytest.raises(ValueError, match=r"expected a solver among \['steerkit', 'scikit-learn'\]; got 'newton'"):
            call()
    with pytest.raises(ValueError, match="expected c above 0"):
        fit_probe(x, y, c=0, solver="scikit-learn")


def test_layers_of_a_profile_are_numbers_lists_arrays_or_all() -> None:
    y = np.arange(40) % 2
    acts = activations(torch.from_numpy(np.random.default_rng(0).normal(size=(40, 3, 4))), y, layers=("embed", 4, 9))
    for layers in (9, np.int64(9), torch.tensor(9), [9], np.array([9]), torch.tensor([9]), range(9, 10)):
        assert list(probe_layers(acts, layers=layers, folds=3).directions) == [9]
    assert list(probe_layers(acts, layers="embed", folds=3).directions) == ["embed"]
    assert list(probe_layers(acts, folds=3).directions) == ["embed", 4, 9]


def test_the_shown_forms_of_a_profile_are_short_and_escaped() -> None:
    y = np.arange(40) % 2
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 2, 4)) + 3 * y[:, None, None])
    result = probe_layers(activations(x, np.array(["<b>good</b>", "bad"])[y]), folds=4)
    assert repr(result).startswith("ProbeResult(layers 0, 1, classes <b>good</b>, bad, nested accuracy ")
    assert repr(result).endswith("n 40, majority accuracy 0.500)") and len(repr(result)) < 200
    page = result._repr_html_()
    assert "&lt;b&gt;good&lt;/b&gt;" in page and "<b>good" not in page and "<table" in page
    assert page.count("<tr") == 1 + len(result.table)
    assert repr(fit_probe(x[:, 0], y)) == "Probe(classes 0, 1, d_model 4)"


def test_probes_and_profiles_are_equal_only_to_themselves_and_can_be_in_sets() -> None:
    x, y = made(60, 4, 2, 1.0)
    for one, other in (
        [fit_probe(x, y) for _ in range(2)],
        [probe_layers(activations(x, y), folds=3) for _ in range(2)],
    ):
        assert one == one and one != other and one in [other, one] and len({one, one, other}) == 2
