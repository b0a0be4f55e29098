"""Control directions: norms, roles, names, seeds, covariance, and what a shuffle of the labels leaves of the vector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.capture.activations import Activations
from steerkit.vectors.controls import ROLES, roles_of, shuffle_labels, with_role
from steerkit.vectors.extract import extract_again

WIDTH = 32


def paired(n: int = 40, seed: int = 0, grouped: bool = True, names: tuple[str, ...] = ("positive", "negative")):
    """Items with one label each, in turn; the first label is 4 standard deviations along the first axis."""
    rng = np.random.default_rng(seed)
    k = len(names)
    resid = torch.tensor(rng.normal(size=(k * n, 2, WIDTH)), dtype=torch.float32)
    resid[::k, :, 0] += 4
    groups = [str(i // k if grouped else i) for i in range(k * n)]
    items = pd.DataFrame({"label": list(names) * n, "group": groups, "start": 0, "n_tokens": 1})
    return Activations(resid, (3, 5), items, {"model_fingerprint": "m", "n_layers": 8})


MAKE = {
    "random": lambda vectors, acts, **given: sk.controls.random(vectors, **given),
    "matched": sk.controls.matched,
    "shuffled": sk.controls.shuffled,
}


@pytest.mark.parametrize("role", MAKE)
def test_controls_have_names_roles_and_the_norm_of_their_vector_at_every_layer(role: str) -> None:
    acts = paired()
    v = sk.difference_in_means(acts)
    vectors = {"calm": v, "loud": -2.0 * v}
    made = MAKE[role](vectors, acts, n=3)
    assert list(made) == [f"{name}/{role}-{k}" for name in vectors for k in range(3)]
    for name, control in made.items():
        own = vectors[name.split("/")[0]]
        assert control.norms() == pytest.approx(own.norms(), rel=1e-5)
        assert (control.meta["role"], control.meta["control_of"], control.meta["method"]) == (role, name[:4], role)
        assert control.meta["model_fingerprint"] == "m"
    assert roles_of({**vectors, **made})[f"calm/{role}-1"] == (role, "calm")
    assert roles_of(made)[f"calm/{role}-1"] == (role, None)  # the vector is not there: a control of every vector
    assert list(MAKE[role](v, acts, n=1)) == [f"vector/{role}-0"]
    assert len(MAKE[role](v, acts)) == 19


@pytest.mark.parametrize("role", MAKE)
def test_controls_depend_on_the_seed_alone_and_differ_from_each_other(role: str) -> None:
    acts = paired()
    v = sk.difference_in_means(acts)
    first, again, other = (MAKE[role](v, acts, n=4, seed=seed) for seed in (0, np.int64(0), 100))
    assert first == again
    assert len({*first.values(), *other.values()}) == 8


def test_a_matched_direction_varies_as_the_stream_and_a_random_one_in_every_direction_alike() -> None:
    rng = np.random.default_rng(1)
    resid = rng.normal(size=(200, 2, WIDTH))
    resid[:, :, 4] *= 20
    items = pd.DataFrame({"label": "a", "group": range(200)})
    acts = Activations(torch.tensor(resid, dtype=torch.float32), (3, 5), items)
    v = sk.SteeringVector({3: torch.ones(WIDTH), 5: 2 * torch.ones(WIDTH)})
    for layer in (3, 5):
        share = {
            role: np.mean([float(one.unit().layers[layer][4]) ** 2 for one in made.values()])
            for role, made in (("matched", sk.controls.matched(v, acts, 60)), ("random", sk.controls.random(v, 60)))
        }
        assert share["random"] < 3 / WIDTH and share["matched"] > 0.5
    signs = [float(one.layers[3][4]) > 0 for one in sk.controls.matched(v, acts, 60).values()]
    assert 15 < sum(signs) < 45


@pytest.mark.parametrize("grouped", [True, False], ids=["pairs", "no groups"])
def test_shuffled_vectors_have_no_component_along_the_vector_on_average(grouped: bool) -> None:
    acts = paired(grouped=grouped)
    v = sk.difference_in_means(acts)
    cosines = [control.cosine(v)[3] for control in sk.controls.shuffled(v, acts, 60).values()]
    assert abs(np.mean(cosines)) < 0.08
    assert np.abs(cosines).mean() < 0.25  # about sqrt(2 / (pi * 32)) = 0.14 for isotropic directions
    plain = [sk.difference_in_means(shuffle_labels(acts, seed)).cosine(v)[3] for seed in range(60)]
    assert abs(np.mean(plain)) < 0.25 and np.abs(plain).mean() > 1.5 * np.abs(cosines).mean()


@pytest.mark.parametrize("balanced", [False, True])
def test_labels_are_shuffled_within_groups_that_hold_several_labels(balanced: bool) -> None:
    acts = paired(names=("1", "2", "3"))
    for seed in range(5):
        mixed = shuffle_labels(acts, seed, balanced)
        within = mixed.items.groupby("group")["label"].apply(sorted)
        assert all(labels == ["1", "2", "3"] for labels in within)
        assert not mixed.items["label"].equals(acts.items["label"])
        assert torch.equal(mixed.resid, acts.resid) and mixed.items["group"].equals(acts.items["group"])
        assert shuffle_labels(acts, seed, balanced).items["label"].equals(mixed.items["label"])


@pytest.mark.parametrize("balanced", [False, True])
def test_items_without_groups_of_their_own_are_shuffled_one_by_one(balanced: bool) -> None:
    acts = paired(grouped=False)
    mixed = shuffle_labels(acts, 0, balanced).items
    assert mixed["label"].value_counts().to_dict() == {"positive": 40, "negative": 40}
    assert 0.3 < (mixed["label"] != acts.items["label"]).mean() < 0.7


def clustered(sizes: list[int], seed: int = 0):
    """Groups with one label each, in turn, that differ along the first four axes; the label has no effect."""
    rng = np.random.default_rng(seed)
    centres = np.zeros((len(sizes), WIDTH))
    centres[:, :4] = rng.normal(size=(len(sizes), 4))
    resid = np.repeat(centres, sizes, 0) + rng.normal(size=(sum(sizes), WIDTH)) / 2
    labels = np.repeat(rng.permutation(["positive", "negative"] * (len(sizes) // 2)), sizes)
    items = pd.DataFrame({"label": labels, "group": np.repeat(np.arange(len(sizes)).astype(str), sizes)})
    return Activations(torch.tensor(resid, dtype=torch.float32)[:, None], (3,), items)


@pytest.mark.parametrize("balanced", [False, True])
def test_groups_with_one_label_exchange_it_as_whole_groups(balanced: bool) -> None:
    acts = clustered([4, 7, 3, 5, 4, 9, 2, 6])
    before = acts.items.groupby("group")["label"].first()
    for seed in range(5):
        mixed = shuffle_labels(acts, seed, balanced)
        after = mixed.items.groupby("group")["label"]
        assert (after.nunique() == 1).all()
        assert after.first().value_counts().to_dict() == {"positive": 4, "negative": 4}
        if balanced:
            assert (after.first() == before).sum() == 4
        assert shuffle_labels(acts, seed, balanced).items["label"].equals(mixed.items["label"])


def test_shuffled_vectors_of_labelled_groups_lie_where_groups_differ_as_the_vector_does() -> None:
    exceeded = 0
    for seed in range(30):
        acts = clustered([10] * 12, seed)
        v = sk.difference_in_means(acts)
        share = lambda one: float(one.unit().layers[3][:4].norm())  # noqa: E731
        exceeded += max(map(share, sk.controls.shuffled(v, acts, 19, seed=100 * seed).values())) < share(v)
    assert exceeded <= 6  # 1 in 20 without an effect; 28 of 30 where items are shuffled


@pytest.mark.parametrize("balanced", [False, True])
def test_a_group_that_lost_an_item_does_not_undo_the_pairing_of_the_others(balanced: bool) -> None:
    acts = paired()
    broken = acts.where(acts.items.index != 3)
    for seed in range(5):
        mixed = shuffle_labels(broken, seed, balanced).items
        labels = mixed.groupby("group")["label"].nunique()
        assert labels["1"] == 1 and (labels.drop("1") == 2).all()
        assert mixed["label"].value_counts().to_dict() == {"positive": 40, "negative": 39}
        assert 0.3 < (mixed["label"] != broken.items["label"]).mean() < 0.7
    two = Activations(acts.resid, acts.layers, acts.items.assign(group=["a", "b", *acts.items["group"][2:]]))
    alone = {tuple(shuffle_labels(two, seed, balanced).items["label"][:2]) for seed in range(20)}
    assert alone == {("positive", "negative"), ("negative", "positive")}  # the two single items exchange their labels


def test_few_whole_groups_are_said_and_a_missing_group_or_label_is_refused() -> None:
    with pytest.warns(UserWarning, match=r"the labels of 4 whole groups .*6 different assignments.*Read more groups"):
        shuffle_labels(clustered([5] * 4))
    acts = clustered([5] * 6)  # 20 assignments, and no warning
    shuffle_labels(acts)
    for column in ("label", "group"):
        some = acts.items.assign(**{column: acts.items[column].mask(acts.items.index > 25)})
        with pytest.raises(ValueError, match=rf"expected a {column} for every item; 4 have none"):
            shuffle_labels(Activations(acts.resid, acts.layers, some))
    with pytest.raises(ValueError, match=r"expected a column 'agent' in the items; got \['label', 'group'\]"):
        shuffle_labels(acts, label="agent")


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_shuffle_does_not_depend_on_the_index_of_the_items(grouped: bool, balanced: bool) -> None:
    acts = paired(8, grouped=grouped)
    doubled = acts.items.set_index(pd.Index([0, 1] * 8))
    mixed = shuffle_labels(Activations(acts.resid, acts.layers, doubled), 1, balanced).items["label"]
    assert mixed.tolist() == shuffle_labels(acts, 1, balanced).items["label"].tolist()


def test_a_balanced_shuffle_swaps_half_of_the_pairs_and_shares_out_the_labels_of_larger_groups() -> None:
    for n in (40, 41):
        acts = paired(n)
        counts = {
            int((shuffle_labels(acts, seed, True).items["label"] == acts.items["label"]).sum()) // 2
            for seed in range(10)
        }
        assert counts <= {n // 2, n - n // 2}
    for grouped in (True, False):
        acts = paired(30, grouped=grouped, names=("1", "2", "3"))
        table = pd.crosstab(acts.items["label"], shuffle_labels(acts, 0, True).items["label"]).to_numpy()
        assert np.abs(table - 10).max() <= 1


@pytest.mark.parametrize("method", ["difference_in_means", "pca", "logistic"])
def test_extract_again_repeats_each_method_of_two_labels(method: str) -> None:
    acts = paired(names=("harmful", "harmless"))
    v = getattr(sk, method)(acts, "harmful", "harmless")
    assert extract_again(v, acts) == v
    assert extract_again(v, paired(seed=1, names=("harmful", "harmless"))) != v
    assert len(sk.controls.shuffled({"v": v}, acts, 2)) == 2


def test_extract_again_repeats_one_against_others() -> None:
    acts = paired(names=("1", "2", "3"))
    vectors = sk.one_against_others(acts)
    assert all(extract_again(v, acts) == v for v in vectors.values())
    assert list(sk.controls.shuffled(vectors, acts, 1)) == [f"{k}/shuffled-0" for k in "123"]


def test_only_the_two_labels_of_a_vector_are_shuffled() -> None:
    acts = paired(names=("formal", "plain", "angry"))
    acts.resid[2::3] += 1000  # an item of the third label in a mean would show
    v = sk.difference_in_means(acts, "formal", "plain")
    (control,) = sk.controls.shuffled({"v": v}, acts, 1).values()
    alone = acts.where(acts.items["label"] != "angry")
    assert control == next(iter(sk.controls.shuffled({"v": v}, alone, 1).values()))
    assert max(control.unit().layers[3].abs()) < 0.9


def test_a_vector_without_a_method_needs_a_function_that_extracts_it() -> None:
    acts = paired()
    v = sk.SteeringVector({3: torch.ones(WIDTH)})
    with pytest.raises(ValueError, match=r"expected a method among .*Pass extract="):
        sk.controls.shuffled(v, acts)
    made = sk.controls.shuffled(v, acts, 2, extract=lambda some: sk.difference_in_means(some).at(3, 5))
    assert [list(one.layers) for one in made.values()] == [[3], [3]]
    total = sk.difference_in_means(acts) + sk.difference_in_means(acts)
    with pytest.raises(ValueError, match=r"got 'sum', 'positive', 'negative'"):
        extract_again(total, acts)


@pytest.mark.parametrize("role", ["matched", "shuffled"])
def test_activations_of_another_model_or_adapter_give_no_controls_and_another_position_is_said(role: str) -> None:
    known = {"model_fingerprint": "m", "adapter_fingerprint": None, "read_position": "last"}
    acts = replace(paired(), meta=known)
    v = sk.difference_in_means(acts)
    for name, value in (("model_fingerprint", "other"), ("adapter_fingerprint", "other")):
        with pytest.raises(ValueError, match=rf"expected activations of the model that 'calm' was .*'{name}': 'other'"):
            MAKE[role]({"calm": v}, replace(acts, meta={**known, name: value}), n=1)
    with pytest.raises(ValueError, match="expected activations at resid_post; got mlp_out"):
        MAKE[role](v, replace(acts, site="mlp_out"), n=1)
    with pytest.warns(UserWarning, match=r"at the read position of 'calm', 'last'; got 'mean'") as caught:
        MAKE[role]({"calm": v}, replace(acts, meta={**known, "read_position": "mean"}), n=3)
    assert len(caught) == 1
    assert MAKE[role](v, replace(acts, meta={}), n=1)  # nothing is known of them


def test_what_is_no_control_is_refused() -> None:
    acts = paired()
    v = sk.difference_in_means(acts)
    for n in (-1, 2.5, True):
        with pytest.raises(ValueError, match=r"expected the number of controls per vector.*got .*Pass e\.g\. 19"):
            sk.controls.random(v, n)
    assert sk.controls.random(v, 0) == {}
    with pytest.raises(ValueError, match=r"expected a role among .*got 'control'\. Pass one"):
        with_role(v, "control")
    with pytest.raises(ValueError, match=r"one of the layers that were read, \[3, 5\]; got 7"):
        sk.controls.matched(sk.SteeringVector({7: torch.ones(WIDTH)}), acts)
    assert [with_role(v, role).meta["role"] for role in ROLES] == list(ROLES)
    assert with_role(v, "other", of="w").meta["method"] == "difference_in_means"
