from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.capture.activations import Activations
from steerkit.vectors.controls import random_like, shuffled
from steerkit.vectors.extract import difference_in_means, extract_again, logistic, one_against_others, pca
from steerkit.vectors.vector import SteeringVector


def acts(n: int = 20, seed: int = 0, layers: tuple = ("embed", 0, 1)) -> Activations:
    rng = np.random.default_rng(seed)
    labels = ["positive", "negative"] * n
    resid = torch.tensor(rng.normal(size=(2 * n, len(layers), 6)), dtype=torch.float32)
    resid[::2, :, 0] += 3
    items = pd.DataFrame({"label": labels, "group": [str(i // 2) for i in range(2 * n)], "start": 0, "n_tokens": 1})
    return Activations(resid, layers, items, {"model_fingerprint": "m", "adapter_fingerprint": None})


def test_difference_in_means_equals_a_slow_loop_over_pairs() -> None:
    activations = acts()
    found = difference_in_means(activations)
    assert list(found.layers) == [0, 1]
    for column, layer in ((1, 0), (2, 1)):
        total = torch.zeros(6, dtype=torch.float64)
        for pair in range(20):
            total += activations.resid[2 * pair, column].double() - activations.resid[2 * pair + 1, column].double()
        assert torch.allclose(found.layers[layer].double(), total / 20, atol=1e-6)
    assert found.meta["n"] == 20 and found.meta["method"] == "difference_in_means"


def test_unpaired_labels_give_the_difference_of_their_own_means() -> None:
    activations = acts().where([True] * 30 + [False, True] * 5)
    labels = np.array(activations.items["label"])
    expected = activations.resid[labels == "positive", 1].mean(0) - activations.resid[labels == "negative", 1].mean(0)
    assert torch.allclose(difference_in_means(activations).layers[0], expected, atol=1e-6)


def test_one_against_others_equals_the_mean_over_groups_of_own_minus_mean_of_others() -> None:
    rng = np.random.default_rng(0)
    resid = torch.tensor(rng.normal(size=(30, 1, 4)), dtype=torch.float32)
    items = pd.DataFrame({"label": ["a", "b", "c"] * 10, "group": [str(i // 3) for i in range(30)]})
    found = one_against_others(Activations(resid, (5,), items))
    cube = resid.reshape(10, 3, 4)
    for number, label in enumerate("abc"):
        others = [i for i in range(3) if i != number]
        slow = torch.stack([g[number] - g[others].mean(0) for g in cube]).mean(0)
        assert torch.allclose(found[label].layers[5], slow, atol=1e-6)
    assert torch.allclose(sum(v.layers[5] for v in found.values()), torch.zeros(4), atol=1e-5)


def test_pca_and_logistic_point_where_the_difference_is() -> None:
    activations = acts(200)
    true = torch.zeros(6)
    true[0] = 1
    for method in (pca, logistic):
        direction = method(activations).layers[0]
        assert float(direction.norm()) == pytest.approx(1, abs=1e-5)
        assert float(direction @ true) > 0.9


def test_pca_is_the_first_singular_vector_of_the_differences() -> None:
    activations = acts(50)
    differences = (activations.resid[::2, 2] - activations.resid[1::2, 2]).double().numpy()
    values, vectors = np.linalg.eigh(differences.T @ differences)
    slow = torch.tensor(vectors[:, values.argmax()])
    assert abs(float(pca(activations).layers[1].double() @ slow)) == pytest.approx(1, abs=1e-6)


METHODS = (difference_in_means, pca, logistic)


def labelled(labels: list) -> Activations:
    activations = acts(len(labels) // 2)
    return replace(activations, items=activations.items.assign(label=labels))


@pytest.mark.parametrize("method", METHODS)
def test_labels_that_are_no_strings_are_compared_as_text(method) -> None:
    activations, wanted = labelled([1, 0] * 8), method(acts(8))
    for positive, negative in ((1, 0), ("1", "0")):
        found = method(activations, positive, negative)
        assert found == wanted
        assert (found.meta["positive"], found.meta["negative"]) == ("1", "0")
    with pytest.raises(ValueError, match=r"one of the labels \['0', '1'\]; got 'x'"):
        method(activations, "x", 0)
    with pytest.raises(ValueError, match=r"expected two different labels; got 1 on both sides"):
        method(activations, 1, "1")


@pytest.mark.parametrize("method", [*METHODS, one_against_others])
def test_a_missing_label_is_refused_with_the_way_to_drop_its_item(method) -> None:
    for missing in (None, float("nan")):
        activations = labelled(["positive", "negative"] * 4 + [missing] * 2)
        with pytest.raises(ValueError, match=r"expected a label for every item; 2 of 10 have none\. .*drop them: acts"):
            method(activations)
        assert method(activations.where(activations.items["label"].notna()))


def test_the_number_in_a_vector_is_that_of_the_smaller_label_and_is_not_called_pairs() -> None:
    activations = labelled(["positive"] * 3 + ["negative"] * 9)
    assert difference_in_means(activations).meta["n"] == logistic(activations).meta["n"] == 3
    assert {label: v.meta["n"] for label, v in one_against_others(activations).items()} == {
        "positive": 3,
        "negative": 9,
    }
    assert repr(logistic(activations)).startswith("SteeringVector(2 layers, d_model 6, n = 3, norms 1")


def test_the_penalty_of_a_logistic_vector_is_stored_and_its_shuffled_controls_have_it(tmp_path) -> None:
    activations = acts()
    strict, default = logistic(activations, c=1e-3), logistic(activations)
    assert (strict.meta["c"], default.meta["c"]) == (1e-3, 1.0)
    strict.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    assert extract_again(loaded, activations) == strict != default
    (of_strict, of_default) = (next(iter(shuffled(v, activations, 1).values())) for v in (loaded, default))
    assert of_strict.cosine(of_default)[0] < 0.999


def test_pca_does_not_need_differences_at_the_embedding() -> None:
    activations = acts()
    activations.resid[:, 0] = 1.0  # as where all continuations end in the same token
    assert pca(activations) == pca(replace(activations, resid=activations.resid[:, 1:], layers=(0, 1)))
    for method in (pca, logistic):
        with pytest.raises(ValueError, match=r"expected activations of a block; got 'embed' alone"):
            method(replace(activations, resid=activations.resid[:, :1], layers=("embed",)))


def test_pca_names_differences_that_are_zero_and_those_that_cancel() -> None:
    activations = acts(4)
    mirrored = activations.resid.clone()
    mirrored[4:] = mirrored[[1, 0, 3, 2]]
    with pytest.raises(ValueError, match=r"at layer 0 they cancel, so its sign is undefined"):
        pca(replace(activations, resid=mirrored))
    mirrored[:, 2] = 1.0
    with pytest.raises(ValueError, match=r"got only zeros at layer 1"):
        pca(replace(activations, resid=mirrored[:, 1:][:, [1]], layers=(1,)))


def test_arithmetic_gives_new_vectors_and_leaves_the_old_ones() -> None:
    v, w = SteeringVector({0: torch.tensor([3.0, 4.0])}), SteeringVector({0: torch.tensor([1.0, 0.0])})
    assert (v + w).layers[0].tolist() == [4, 4]
    assert (v - w).layers[0].tolist() == [2, 4]
    assert (2 * v / 4).layers[0].tolist() == [1.5, 2]
    assert (-v).layers[0].tolist() == [-3, -4]
    assert v.unit().norms()[0] == pytest.approx(1)
    assert w.scaled_to(v).layers[0].tolist() == [5, 0]
    assert v.cosine(w)[0] == pytest.approx(0.6)
    assert v.layers[0].tolist() == [3, 4]
    with pytest.raises(AttributeError):
        v.meta = {}


def test_a_random_direction_has_the_norms_of_its_vector_and_its_seed_alone() -> None:
    v = SteeringVector({0: torch.full((64,), 2.0), 3: torch.ones(64)})
    a, b = random_like(v, 1), random_like(v, 2)
    assert a.norms() == pytest.approx(v.norms())
    assert abs(a.cosine(b)[0]) < 0.5
    assert torch.equal(a.layers[3], random_like(v, 1).layers[3])


def test_a_random_direction_turns_all_layers_alike_so_that_their_pushes_add_up_alike() -> None:
    generator = torch.Generator().manual_seed(99)
    first = torch.randn(64, generator=generator)
    rows = {k: first + k * torch.randn(64, generator=generator) / 3 for k in range(3)} | {3: first, 4: -2 * first}
    v = SteeringVector(rows)
    stacked = torch.stack([v.layers[k] for k in rows]).double()
    for seed in range(5):
        turned = random_like(v, seed)
        found = torch.stack([turned.layers[k] for k in rows]).double()
        torch.testing.assert_close(found @ found.T, stacked @ stacked.T, rtol=1e-4, atol=1e-3)
        assert max(abs(c) for c in turned.cosine(v).values()) < 0.5


def test_a_random_direction_points_everywhere_alike() -> None:
    v = SteeringVector({0: torch.eye(8)[0], 1: torch.eye(8)[0] + torch.eye(8)[1]})
    for layer in v.layers:
        turned = torch.stack([random_like(v, seed).unit().layers[layer] for seed in range(2000)])
        torch.testing.assert_close(turned.T @ turned / 2000, torch.eye(8) / 8, rtol=0, atol=0.02)
        assert turned.mean(0).norm() < 0.06


def test_a_random_direction_of_one_layer_is_a_normal_draw_of_its_norm() -> None:
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(7))
    found = random_like(SteeringVector({5: torch.full((64,), 2.0)}), 7).layers[5]
    torch.testing.assert_close(found, drawn / drawn.norm() * 16)


def test_a_saved_vector_comes_back_equal_with_its_provenance(tmp_path) -> None:
    v = difference_in_means(acts())
    v.save(tmp_path / "v.safetensors")
    back = SteeringVector.load(tmp_path / "v.safetensors")
    assert back.meta == v.meta
    assert all(torch.equal(back.layers[layer], v.layers[layer]) for layer in v.layers)
    from safetensors import safe_open

    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        header = json.loads(file.metadata()["steerkit"])
    assert header["hook_point"] == "resid_post" and header["layer_convention"] == "0-based block index"


def test_what_is_no_vector_file_is_refused_and_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "v.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        SteeringVector.load(path)
    path.write_bytes(b"not a vector")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        SteeringVector.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="expected format"):
        SteeringVector.load(path)
    SteeringVector({0: torch.ones(2)}).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SteeringVector({0: torch.zeros(2)}).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_vector_from_pairs_moves_text_towards_the_positive_side(smollm) -> None:
    model, tokenizer = smollm
    pairs = [
        sk.ContrastPair(f"I think that {thing} is", " wonderful, lovely and great.", " terrible, awful and bad.")
        for thing in ("the food", "this film", "the weather", "her idea", "our town", "the music")
    ]
    vector = difference_in_means(sk.collect(model, tokenizer, pairs, layers=[12], position="mean"))
    from steerkit.scores.fluency import log_probabilities

    def margin(coefficient: float) -> float:
        steering = [sk.Steering(vector, coefficient, "all")] * 2
        good, bad = log_probabilities(model, tokenizer, ["The trip was"] * 2, [" wonderful", " terrible"], steering)
        return float(good.sum() - bad.sum())

    assert margin(1.0) > margin(0.0) > margin(-1.0)


def test_vectors_are_equal_by_layers_and_values_and_can_be_in_sets() -> None:
    v = SteeringVector({0: torch.tensor([3.0, 4.0]), 2: torch.ones(2)}, {"n": 1})
    same = SteeringVector({2: torch.ones(2), 0: torch.tensor([3.0, 4.0])}, {"n": 2})
    assert v == same and hash(v) == hash(same) and len({v, same, 2 * v}) == 2
    assert v != 2 * v and v != v.at(0) and v != SteeringVector({0: torch.tensor([3.0, 4.0]), 3: torch.ones(2)})
    assert v in [2 * v, same] and 2 * v not in [v, same] and v != "v" and {v: 1}[same] == 1
    assert sk.Steering(v, 1.0, layer="all") == sk.Steering(same, 1.0, layer="all")
    assert sk.Steering(v, 1.0, layer=0) != sk.Steering(2 * v, 1.0, layer=0)


def test_a_saved_vector_is_equal_to_the_one_that_was_saved(tmp_path) -> None:
    v = difference_in_means(acts())
    v.save(tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors") == v


@pytest.mark.parametrize("layers", [[1, 3], range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3]), (3, 1)])
def test_layers_of_a_vector_are_chosen_by_lists_ranges_arrays_and_tensors(layers) -> None:
    v = SteeringVector({layer: torch.full((2,), layer + 1.0) for layer in range(4)})
    assert v.at(layers) == v.at(1, 3) == v.at(np.int64(1), torch.tensor(3))
    assert v.at(torch.tensor(3)) == v.at(np.int64(3)) == v.at(3)
    assert all(type(layer) is int for layer in v.at(layers).layers)
    with pytest.raises(ValueError, match=r"expected layers 0 to 3, each once; got \[1, 7\]"):
        v.at([1, 7])


@pytest.mark.usefixtures("only_our_own_checks")
def test_a_vector_takes_numpy_and_torch_layers_as_keys_and_refuses_a_layer_twice() -> None:
    v = SteeringVector({np.int64(3): torch.ones(2), torch.tensor(1): torch.ones(2)})
    assert list(v.layers) == [1, 3] and all(type(layer) is int for layer in v.layers)
    with pytest.raises(ValueError, match="expected each layer once; got layer 1 twice"):
        SteeringVector({1: torch.ones(2), torch.tensor(1): torch.ones(2)})


def test_one_layers_direction_is_put_at_every_layer() -> None:
    v = SteeringVector({1: torch.tensor([3.0, 4.0]), 2: torch.ones(2)}, {"n_layers": 4, "method": "pca"})
    everywhere = v.at_all(1)
    assert list(everywhere.layers) == [0, 1, 2, 3] and everywhere.meta == v.meta
    assert all(value.tolist() == [3, 4] for value in everywhere.layers.values())
    assert v.at_all(np.int64(2), n_layers=4) == v.at(2).at_all(2)
    everywhere.layers[0][0] = 9  # no memory is shared
    assert everywhere.layers[1][0] == 3 == v.layers[1][0]


def test_the_number_of_layers_of_at_all_is_known_and_fits() -> None:
    v = SteeringVector({1: torch.ones(2), 2: torch.ones(2)})
    with pytest.raises(ValueError, match=r"expected the number of the model's layers in meta.*Pass n_layers="):
        v.at_all(1)
    assert list(v.at_all(1, n_layers=3).layers) == [0, 1, 2]
    for n_layers in (2, 0, True, 3.0):
        with pytest.raises(ValueError, match=rf"expected n_layers above 2; got {n_layers}"):
            v.at_all(1, n_layers=n_layers)
    with pytest.raises(ValueError, match=r"expected layers among \[1, 2\], each once; got \[3\]"):
        v.at_all(3, n_layers=5)
    known = SteeringVector(v.layers, {"n_layers": 4})
    with pytest.raises(ValueError, match=r"expected n_layers 4, as meta\['n_layers'\] says; got 5"):
        known.at_all(1, n_layers=5)


def test_a_vector_at_all_layers_steers_all_of_them(llama) -> None:
    model, tokenizer = llama
    v = difference_in_means(sk.collect(model, tokenizer, {"positive": ["a"], "negative": ["b"]}, layers=1))
    steering = sk.Steering(v.at_all(1), 1.0, layer="all", positions="all")
    with torch.no_grad(), sk.capture_resid(model, 0) as plain:
        model(input_ids=torch.tensor([[5]]))
    with torch.no_grad(), steering.on(model), sk.capture_resid(model, 0) as steered:
        model(input_ids=torch.tensor([[5]]))
    assert torch.allclose(steered[0] - plain[0], v.layers[1].expand(1, 1, -1), atol=1e-5)


def test_the_provenance_of_a_sum_is_what_both_operands_share() -> None:
    shared = {"model_fingerprint": "m", "read_position": "last", "n_layers": 9}
    v = SteeringVector({0: torch.ones(2)}, {**shared, "method": "pca", "n": 8, "data_sha256": "a", "positive": "x"})
    w = SteeringVector({0: torch.eye(2)[0]}, {**shared, "method": "logistic", "n": 9, "data_sha256": "b"})
    for total, method in ((v + w, "sum"), (v - w, "difference")):
        assert total.meta == {**shared, "method": method, "operands": [v.content(), w.content()]}
    assert (v + v).meta["n"] == 8 and (v + v).meta["data_sha256"] == "a"
    assert (v - w).layers[0].tolist() == [0, 1] and v.meta["n"] == 8
    control = sk.controls.random({"v": v}, n=1)["v/random-0"]
    assert "role" not in (v + control).meta


def test_a_sum_is_saved_with_its_provenance(tmp_path) -> None:
    total = difference_in_means(acts()) - difference_in_means(acts(seed=1))
    total.save(tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors").meta == total.meta
