"""Erasure as a steering: the stream after it is the erased stream, position by position and row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerkit as sk
from steerkit.steering.operations import named
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = [f"{word} {i}" for i in range(40) for word in ("glad", "grey")]
PROMPTS = ["The sea is", "A", "once upon a time"]


def eraser_of(model: Any, tokenizer: Any) -> sk.Eraser:
    acts = sk.collect(model, tokenizer, TEXTS, labels=[text[:4] for text in TEXTS], layers=[1, 2])
    return sk.leace(acts)


@pytest.mark.parametrize("coefficient", [1.0, 0.5])
@pytest.mark.parametrize("positions", ["all", "all+0", "from_last_prompt_token"])
def test_the_steered_stream_is_the_erased_stream_at_the_steered_positions(coefficient: float, positions: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    eraser = eraser_of(model, tokenizer)
    ids = torch.tensor([sk.render(tokenizer, PROMPTS[0]).ids])
    with torch.no_grad(), sk.capture_resid(model, 2) as plain:
        model(ids)
    with torch.no_grad(), sk.erase(eraser, 2, coefficient, positions).on(model), sk.capture_resid(model, 2) as read:
        model(ids)
    before, after = plain[2][0].double(), read[2][0].double()
    wanted = before + coefficient * (eraser.at(2)(before) - before)
    first = {"all": 1, "all+0": 0, "from_last_prompt_token": ids.shape[1] - 1}[positions]
    torch.testing.assert_close(after[first:], wanted[first:], atol=1e-4, rtol=1e-4)
    assert torch.equal(after[:first], before[:first])


def test_rows_of_a_mixed_batch_write_what_they_write_alone_and_a_sweep_names_the_erasure(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    eraser = eraser_of(model, tokenizer)
    erasing = sk.erase(eraser, 2)
    each = [None, erasing, sk.erase(eraser, 1)]
    together = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8, steering=each)
    for prompt, steering, text in zip(PROMPTS, each, together, strict=True):
        assert sk.generate(model, tokenizer, [prompt], max_new_tokens=8, steering=steering) == [text]
    assert together != sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert erasing.operation == f"leace:{eraser.at(2).content()}:resid_post.2"
    assert named(erasing.operation).name == erasing.operation
    settings: dict[str, Any] = {
        "coefficients": [0, 1],
        "max_new_tokens": 4,
        "stream_norms": {},
        "out": tmp_path / "run",
    }
    table = sk.sweep(model, tokenizer, erasing.vector, PROMPTS, operation=erasing.operation, **settings).table
    swept = table[table["coefficient"] == 1]["text"].tolist()
    assert swept == sk.generate(model, tokenizer, PROMPTS, max_new_tokens=4, steering=erasing)


def test_the_vector_of_two_classes_is_the_difference_of_their_means() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    acts = sk.collect(model, tokenizer, TEXTS, labels=[text[:4] for text in TEXTS], layers=[2])
    difference = sk.difference_in_means(acts, "glad", "grey")
    erasing = sk.erase(sk.leace(acts), 2)
    assert abs(erasing.vector.cosine(difference)[2]) == pytest.approx(1, abs=1e-4)
    assert erasing.vector.meta["model_fingerprint"] == difference.meta["model_fingerprint"]


def test_an_eraser_of_another_site_erases_there() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    acts = sk.collect(model, tokenizer, TEXTS, labels=[text[:4] for text in TEXTS], layers=[1], site="mlp_out")
    eraser = sk.leace(acts)
    ids = torch.tensor([sk.render(tokenizer, PROMPTS[0]).ids])
    with torch.no_grad(), sk.capture_resid(model, 1, site="mlp_out") as plain:
        model(ids)
    erasing = sk.erase(eraser, 1, positions="all+0")
    with torch.no_grad(), erasing.on(model), sk.capture_resid(model, 1, site="mlp_out") as read:
        model(ids)
    torch.testing.assert_close(read[1][0].double(), eraser.at(1)(plain[1][0]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="expected activations of mlp_out"):
        eraser.apply(sk.collect(model, tokenizer, TEXTS, layers=[1]))


def test_an_erasure_takes_no_vector_but_its_own_and_its_controls_are_erasures_of_shuffled_labels() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    acts = sk.collect(model, tokenizer, TEXTS, labels=[text[:4] for text in TEXTS], layers=[1])
    erasing = sk.erase(sk.leace(acts), 1)
    assert erasing.scaled(0.5).operation == sk.Steering(erasing.vector, operation=erasing.operation).operation
    for other in (*sk.controls.random(erasing.vector, n=1).values(), erasing.vector * 2.0, vector(model, 2)):
        with pytest.raises(ValueError, match="expected the vector of the erasure for 'leace:"):
            sk.Steering(other, operation=erasing.operation)
    with pytest.raises(ValueError, match="at mlp_out"):
        sk.Steering(erasing.vector, operation=erasing.operation, site="mlp_out")
    with pytest.raises(ValueError, match="as a control the eraser of shuffled labels"):
        both = {"vector": erasing.vector, **sk.controls.matched(erasing.vector, acts, n=1)}
        sk.sweep(model, tokenizer, both, PROMPTS, coefficients=[1], operation=erasing.operation, max_new_tokens=1)
    for seed in range(3):
        mixed = sk.leace(sk.controls.shuffle_labels(acts, seed, balanced=True))
        control = sk.erase(mixed, 1)
        assert control.operation != erasing.operation and mixed.at(1).left.shape == (1, 32)
        after = mixed.apply(acts).at(1)[acts.items["label"] == "glad"].mean(0)
        before = acts.at(1)[acts.items["label"] == "glad"].mean(0)
        gap = (before - acts.at(1).mean(0)).norm()
        assert (after - before).norm() < 0.3 * gap  # the true difference stays


def test_what_cannot_be_erased_is_refused() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    labels = [text[:4] for text in TEXTS]
    with pytest.raises(ValueError, match="layers that were read"):
        sk.erase(eraser_of(model, tokenizer), 3)
    with pytest.raises(ValueError, match="got 'embed'"):
        sk.erase(sk.leace(sk.collect(model, tokenizer, TEXTS, labels=labels, layers=["embed"])), "embed")  # type: ignore[arg-type]
    same = sk.collect(model, tokenizer, ["a", "b", "a", "b"] * 10, labels=["x", "x", "y", "y"] * 10, layers=[1])
    with pytest.raises(ValueError, match="Nothing to erase"), pytest.warns(UserWarning, match="held-out"):
        sk.erase(sk.leace(same.__class__(same.resid[:20], same.layers, same.items[:20])), 1)


def test_the_same_stream_is_erased_at_both_of_its_sites() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    texts = [f"{word} {i}" for i in range(20) for word in ("glad", "grey")]
    read = {"labels": [text[:4] for text in texts]}
    before = sk.leace(sk.collect(model, tokenizer, texts, layers=2, site="resid_pre", **read))
    after = sk.leace(sk.collect(model, tokenizer, texts, layers=1, **read))
    assert before.at(2).content() == after.at(1).content()
    each = [sk.erase(before, 2, positions="all"), sk.erase(after, 1, positions="all")]
    one, other = (sk.generate(model, tokenizer, ["glad"], max_new_tokens=8, steering=steering) for steering in each)
    assert one == other != sk.generate(model, tokenizer, ["glad"], max_new_tokens=8)
