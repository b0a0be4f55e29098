"""The threshold of a condition, its ROC curve and its firing rates, against scikit-learn and counting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_curve

import steerkit as sk
from steerkit.capture.activations import Activations
from tests.tiny import tiny_model, tiny_tokenizer

DIRECTION = sk.SteeringVector({2: torch.tensor([2.0, 0.0])})


def acts(positive: list[float], negative: list[float], position: Any = "last") -> Activations:
    """Items whose scores along `DIRECTION` are these."""
    scores = torch.tensor([*positive, *negative])
    labels = ["harmful"] * len(positive) + ["harmless"] * len(negative)
    items = pd.DataFrame({"label": labels, "group": [str(i // 2) for i in range(len(labels))]})
    resid = torch.stack([scores, torch.ones_like(scores)], 1)[:, None]
    return Activations(resid, (2,), items, {"read_position": position})


def drawn(n: int, seed: int) -> Activations:
    rng = np.random.default_rng(seed)
    return acts((rng.normal(size=n) + 1).tolist(), rng.normal(size=n).tolist())


def test_the_roc_curve_is_that_of_scikit_learn_and_the_choice_maximises_youdens_index() -> None:
    data = drawn(60, 0)
    found = sk.calibrate_condition(DIRECTION, data, positive="harmful")
    truth = [one == "harmful" for one in data.items["label"]]
    scores = data.at(2)[:, 0].numpy()
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(found.roc["true_rate"], true[1:-1])
    np.testing.assert_allclose(found.roc["false_rate"], false[1:-1])
    (chosen,) = found.roc[found.roc["chosen"]].itertuples()
    assert chosen.true_rate - chosen.false_rate == pytest.approx((true - false).max())
    assert found.condition.above == chosen.threshold and found.condition.layer == 2
    assert found.condition.meta["true_rate"] == chosen.true_rate and found.condition.meta["n_positive"] == 60


def test_a_limit_of_the_false_rate_holds_and_the_true_rate_is_the_largest_under_it() -> None:
    data = drawn(60, 1)
    scores, truth = data.at(2)[:, 0].numpy(), (data.items["label"] == "harmful").to_numpy()
    for limit in (0.0, 0.05, 0.3):
        above = sk.calibrate_condition(DIRECTION, data, positive="harmful", max_false_rate=limit).condition.above
        allowed = [t for t in scores if (scores[~truth] > t).mean() <= limit]
        assert (scores[~truth] > above).mean() <= limit
        assert (scores[truth] > above).mean() == max((scores[truth] > t).mean() for t in allowed)


def test_of_equally_good_thresholds_the_one_in_the_widest_gap_is_chosen() -> None:
    found = sk.calibrate_condition(DIRECTION, acts([5.0, 9.0], [0.0, 1.0]), positive="harmful")
    assert found.condition.above == 3.0 and found.roc_auc == 1.0


def test_firing_rates_are_shares_of_items_over_groups() -> None:
    condition = sk.Condition(DIRECTION, above=0.5)
    table = sk.firing_rates(condition, acts([0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0])).set_index("label")
    assert table["rate"].to_dict() == {"harmful": 0.75, "harmless": 0.25}
    assert table["n"].tolist() == [4, 4] and table["n_groups"].tolist() == [2, 2]
    assert ((table["low"] < table["rate"]) & (table["rate"] < table["high"])).all()


def test_what_is_calibrated_on_prompts_fires_in_generation_where_the_activations_say() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    generator = torch.Generator().manual_seed(3)
    direction = sk.SteeringVector({1: torch.randn(32, generator=generator)})
    prompts = ["Hello", "Two words", "x = 1", "?"]
    read = sk.collect(model, tokenizer, prompts, layers=1, position="last")
    order = sk.Condition(direction, above=0.0).scores(read.at(1)).argsort(descending=True).tolist()
    labels = ["positive" if i in order[:2] else "negative" for i in range(4)]
    read = sk.collect(model, tokenizer, prompts, layers=1, position="last", labels=labels)
    condition = sk.calibrate_condition(direction, read).condition
    assert sk.firing_rates(condition, read).set_index("label")["rate"].to_dict() == {"positive": 1.0, "negative": 0.0}
    push = sk.SteeringVector({2: 20 * torch.randn(32, generator=generator)})
    conditional, always, never = (
        sk.generate(model, tokenizer, prompts, max_new_tokens=4, return_details=True, steering=one)
        for one in (sk.Steering(push, when=condition), sk.Steering(push), None)
    )
    for i, label in enumerate(labels):
        expected = always if label == "positive" else never
        assert conditional[i].ids == expected[i].ids and always[i].ids != never[i].ids


@pytest.mark.parametrize("positive", ["harmful", "harmless"])
def test_a_probe_is_turned_towards_the_positive_label_whichever_class_that_is(positive: str) -> None:
    data = drawn(60, 2)
    probe = sk.fit_probe(data, "label")
    found = sk.calibrate_condition(probe, data, positive=positive)
    p = probe.scores(data.at(2))[:, probe.classes.index(positive)]
    torch.testing.assert_close(found.condition.scores(data.at(2)).double(), (p / (1 - p)).log(), rtol=1e-4, atol=1e-4)
    rates = sk.firing_rates(found.condition, data).set_index("label")["rate"]
    assert rates[positive] > 0.5 > rates.drop(positive).max()
    assert found.condition.layer == 2 and found.roc_auc > 0.6


def test_activations_of_another_site_or_model_are_refused() -> None:
    good = acts([5.0, 9.0], [0.0, 1.0])
    own = dict.fromkeys(("model_fingerprint", "adapter_fingerprint"), "a" * 16)
    other = {**own, "model_fingerprint": "b" * 16}
    direction = sk.SteeringVector(DIRECTION.layers, own)
    at_mlp = replace(good, site="mlp_out")
    with pytest.raises(ValueError, match="expected activations of resid_post, which the condition reads; got mlp_out"):
        sk.calibrate_condition(direction, at_mlp, positive="harmful")
    there = sk.SteeringVector(DIRECTION.layers, own, "mlp_out")
    assert sk.calibrate_condition(there, at_mlp, positive="harmful").condition.site == "mlp_out"
    elsewhere = replace(good, meta={**good.meta, **other})
    with pytest.raises(ValueError, match="expected activations of the condition's model"):
        sk.calibrate_condition(direction, elsewhere, positive="harmful")
    found = sk.calibrate_condition(direction, elsewhere, positive="harmful", foreign=True).condition
    assert len(sk.firing_rates(found, elsewhere)) == 2  # the threshold belongs to these weights
    with pytest.raises(ValueError, match="expected activations of the condition's model"):
        sk.firing_rates(found, replace(good, meta={**good.meta, **own}))


def test_what_cannot_be_calibrated_is_refused() -> None:
    good = acts([5.0, 9.0], [0.0, 1.0])
    cases: list[tuple[Activations, dict[str, Any], str]] = [
        (good, {"positive": "bad"}, "Pass positive="),
        (good, {"positive": "harmful", "label": "kind"}, "column 'kind'"),
        (good, {"positive": "harmless"}, "Reverse the direction"),
        (good, {"positive": "harmful", "max_false_rate": 1.0}, "max_false_rate in"),
        (acts([5.0], [6.0, 1.0, 1.5]), {"positive": "harmful", "max_false_rate": 0.0}, "Raise max_false_rate"),
        (acts([5.0], [1.0], "mean"), {"positive": "harmful"}, 'position="last"'),
    ]
    for data, options, message in cases:
        with pytest.raises(ValueError, match=message):
            sk.calibrate_condition(DIRECTION, data, **options)
    with pytest.raises(ValueError, match="width 3"):
        sk.calibrate_condition(sk.SteeringVector({2: torch.ones(3)}), good, positive="harmful")
