"""Arguments and results of `collect`: chats, labels, groups, layers, the token column, warnings, short reprs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.capture import collect as capture
from steerkit.text.prompt import encode_prompt, render
from tests.capture.test_capture import PAIRS, TEXTS, relative
from tests.reference import hidden_states

CHATS = [
    [{"role": "user", "content": "How do tides work?"}],
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}),
]
HARMFUL, HARMLESS = ["Build a bomb", "Steal a car now"], ["Bake bread", "Plant a tree", "Read"]
MIXED = {"harmful": HARMFUL, "harmless": HARMLESS}


def test_a_chat_is_read_as_the_chat_template_renders_it(llama) -> None:
    model, tokenizer = llama
    acts = sk.collect(model, tokenizer, [*CHATS, "plain"], layers=[1])
    for row, chat in enumerate(CHATS):
        assert relative(hidden_states(model, encode_prompt(tokenizer, chat))[2][-1], acts.at(1)[row]) < 1e-5
    assert acts.items["token"].tolist() == ["<|assistant|>", "<|assistant|>", "n"]
    assert acts.items["start"].tolist() == [0, 0, 0]


def test_template_arguments_reach_the_chat_template_of_chats_and_of_pairs(llama) -> None:
    model, tokenizer = llama
    kwargs = {"add_generation_prompt": False}
    acts = sk.collect(model, tokenizer, CHATS, layers=[1], chat_template_kwargs=kwargs)
    assert acts.items["token"].tolist() == ["<|end|>"] * 2
    assert acts.meta["chat_template_kwargs"] == kwargs
    pair = sk.ContrastPair(CHATS[0], "yes", "no")
    read = sk.collect(model, tokenizer, [pair], layers=[1], chat_template_kwargs=kwargs)
    assert read.items["start"].tolist() == [len(encode_prompt(tokenizer, CHATS[0], kwargs))] * 2
    assert read.meta["data_sha256"] != sk.collect(model, tokenizer, [pair], layers=[1]).meta["data_sha256"]
    with pytest.raises(ValueError, match="it refuses them"):
        tokenizer_that_refuses = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
        tokenizer_that_refuses.chat_template = "{{ raise_exception('no') }}"
        sk.collect(model, tokenizer_that_refuses, CHATS)


def test_a_mapping_from_labels_to_texts_gives_a_difference_in_means_of_these_labels(llama) -> None:
    model, tokenizer = llama
    acts = sk.collect(model, tokenizer, MIXED, layers=1)
    assert acts.items["label"].tolist() == ["harmful"] * 2 + ["harmless"] * 3
    assert acts.items["group"].tolist() == list("01234")
    vector = sk.difference_in_means(acts, "harmful", "harmless")
    slow = acts.at(1)[:2].mean(0) - acts.at(1)[2:].mean(0)
    assert torch.allclose(vector.layers[1], slow, atol=1e-6)
    means = sk.collect_means(model, tokenizer, MIXED, layers=1)
    assert (means.labels, means.counts) == (("harmful", "harmless"), (2, 3))
    assert torch.allclose(sk.difference_in_means(means, "harmful", "harmless").layers[1], slow, atol=1e-6)
    each = sk.collect_each(model, tokenizer, MIXED, layers=1, positions=["last", "first"])
    assert torch.equal(each["last"].resid, acts.resid) and each["first"].items["label"].equals(acts.items["label"])


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series])
def test_labels_and_groups_are_given_one_per_text(kind, llama) -> None:
    model, tokenizer = llama
    texts = ["one", CHATS[0], "three"]
    acts = sk.collect(model, tokenizer, texts, layers=1, labels=kind(["a", "b", "a"]), groups=kind([7, 7, 9]))
    assert acts.items["label"].tolist() == ["a", "b", "a"] and acts.items["group"].tolist() == ["7", "7", "9"]
    plain = sk.collect(model, tokenizer, texts, layers=1)
    assert torch.equal(plain.resid, acts.resid)
    assert plain.items["label"].tolist() == [""] * 3 and plain.meta["data_sha256"] != acts.meta["data_sha256"]


def test_labels_of_means_follow_their_texts_through_windows(llama, monkeypatch) -> None:
    from steerkit.capture import collect as module

    model, tokenizer = llama
    labels, groups = ["a", "b"] * 4, list("11223344")
    whole = sk.collect_means(model, tokenizer, TEXTS, labels=labels, groups=groups)
    monkeypatch.setattr(module, "WINDOW", 3)
    parts = sk.collect_means(model, tokenizer, TEXTS, labels=labels, groups=groups)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-4, atol=1e-6)
    assert (parts.counts, parts.meta) == ((4, 4), whole.meta)


@pytest.mark.usefixtures("only_our_own_checks")
@pytest.mark.parametrize(
    ("texts", "given", "message"),
    [
        (["a", "b"], {"labels": ["x"]}, r"expected one label per text, 2; got 1\. Pass one for each text"),
        (["a", "b"], {"groups": [1, 2, 3]}, r"expected one group per text, 2; got 3\. Pass one for each text"),
        (MIXED, {"groups": ["g"]}, "expected one group per text, 5; got 1"),
        (MIXED, {"labels": ["x"] * 5}, r"expected labels once; got labels= and a mapping.*Drop labels="),
        (["a", "b"], {"labels": "ab"}, r"expected labels as a list.*got 'ab'\. Put them in a list"),
        (["a", "b"], {"labels": ["x", None]}, r"expected a label for every text; text 1 has none\."),
        (["a", "b"], {"groups": [1, float("nan")]}, r"expected a group for every text; text 1 has none\."),
        (PAIRS[:1], {"labels": ["x"]}, r"got a ContrastPair as text 0, which holds its own labels.*Drop the labels"),
        ([sk.SpannedText("abc", ((1, 2),))], {"groups": ["x"]}, r"got a SpannedText as text 0.*Drop the groups"),
        ({"a": PAIRS[:1]}, {}, "got a ContrastPair as text 0"),
        ({"a": ["x"], "b": []}, {}, r"expected a non-empty list of texts under each label.*Put them in a list"),
        ({"a": "x"}, {}, "expected a non-empty list of texts under each label"),
        ({}, {}, "expected a non-empty list of texts"),
        (CHATS[0], {}, r"expected a prompt string or a list of.*in a list of its own"),
        ([["a", "b"]], {}, "expected a prompt string or a list of"),
        ([[{"role": "user"}]], {}, "expected a prompt string or a list of"),
    ],
)
@pytest.mark.parametrize("read", [sk.collect, sk.collect_means], ids=["collect", "means"])
def test_labels_groups_and_texts_that_do_not_fit_are_refused(read, texts, given, message: str, llama) -> None:
    with pytest.raises(ValueError, match=message):
        read(*llama, texts, **given)


@pytest.mark.parametrize(
    "layers", [torch.tensor([1, 2]), np.array([1, 2]), range(1, 3), (1, 2), [np.int64(1), torch.tensor(2)]]
)
def test_layers_are_accepted_as_lists_ranges_arrays_and_tensors(layers, llama) -> None:
    acts = sk.collect(*llama, ["ab"], layers=layers)
    assert acts.layers == (1, 2) and all(type(layer) is int for layer in acts.layers)
    with torch.no_grad(), sk.capture_resid(llama[0], layers) as streams:
        llama[0](input_ids=torch.tensor([[1, 2]]))
    assert list(streams) == [1, 2]
    assert torch.equal(acts.at(torch.tensor(2)), acts.at(2)) and torch.equal(acts.at(np.int64(1)), acts.at(1))


@pytest.mark.parametrize("layer", [2, np.int64(2), torch.tensor(2), np.array(2)])
def test_one_layer_is_accepted_as_a_number_of_any_kind(layer, llama) -> None:
    assert sk.collect(*llama, ["ab"], layers=layer).layers == (2,)


@pytest.mark.parametrize("layers", [torch.tensor([1.0]), np.array([True]), torch.tensor([1, 1]), torch.tensor([])])
def test_arrays_that_hold_no_layers_are_refused(layers, llama) -> None:
    with pytest.raises(ValueError, match=r"expected (a layer from 0 to 3|one layer at least)"):
        sk.collect(*llama, ["ab"], layers=layers)
    with pytest.raises(ValueError, match="one of the layers that were read"):
        sk.collect(*llama, ["ab"], layers=1).at(True)


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
@pytest.mark.parametrize("position", ["last", "first", "mean", 0, -1])
def test_the_token_column_holds_the_token_that_was_read_in_any_batch(position, llama) -> None:
    model, tokenizer = llama
    texts = [*TEXTS[1:], sk.SpannedText("One, two and three.", ((0, 4), (5, 8), (13, 18)))]
    one = sk.collect(model, tokenizer, texts, position=position, layers=1, batch_tokens=1)
    eight = sk.collect(model, tokenizer, texts, position=position, layers=1, batch_tokens=10_000)
    pd.testing.assert_frame_equal(one.items, eight.items)
    spans = [*TEXTS[1:], "One,", "two", "three"]
    ids = [tokenizer(text)["input_ids"] for text in spans]
    index = {"last": -1, "first": 0}.get(position, position)
    expected = [None] * len(spans) if position == "mean" else [tokenizer.decode([row[index]]) for row in ids]
    assert one.items["token"].tolist() == expected


def test_the_token_column_of_a_pair_is_from_its_continuation(llama) -> None:
    acts = sk.collect(*llama, [sk.ContrastPair("Is it?", "Yes", "No")], position="first", layers=1)
    assert acts.items["token"].tolist() == ["Y", "N"]


def sink_warnings(*args: object, read=sk.collect, **kwargs: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(*args, **kwargs)
    assert all(one.category is UserWarning for one in caught)
    return [str(one.message) for one in caught]


def test_a_mean_over_position_0_warns_of_the_attention_sink_and_names_the_fix(llama) -> None:
    (message,) = sink_warnings(*llama, ["one", *PAIRS], position="mean", layers=[1])
    assert "position 0 in 1 of 13 spans" in message and "attention sink" in message
    assert "position='last'" in message and "SpannedText or ContrastPair that starts after position 0" in message
    assert len(sink_warnings(*llama, ["one"] * 3, position="mean", read=sk.collect_means)) == 1
    assert len(sink_warnings(*llama, ["one"], positions=["last", "mean"], read=sk.collect_each)) == 1
    assert len(sink_warnings(*llama, [CHATS[0]], position="mean")) == 1


def test_a_token_that_is_read_at_position_0_warns_of_the_attention_sink_at_every_position(llama) -> None:
    texts = ["a", "Two", "Three", sk.SpannedText("b", ((0, 1),), prompt="Say")]
    for position, at_zero in (("last", 1), ("first", 3), ("letter", 1), (0, 3), (-1, 1), ("mean", 3)):
        some = texts if position != "letter" else ["a", "?a", texts[3]]
        for read in (sk.collect, sk.collect_means):
            (message,) = sink_warnings(*llama, some, position=position, layers=[1], read=read)
            assert f"position={position!r}" in message and f"position 0 in {at_zero} of {len(some)} spans" in message
            assert "SpannedText or ContrastPair that starts after position 0" in message


def test_positions_after_0_and_the_embedding_do_not_warn(llama) -> None:
    later = [*PAIRS, sk.SpannedText("One two", ((3, 7),))]
    for texts, position, layers in (
        (later, "mean", "all"), (later, "first", "all"), (TEXTS[1:], "last", "all"), (TEXTS[1:], -2, "all"),
        (TEXTS, "mean", "embed"), (TEXTS, "last", "embed"),
    ):  # fmt: skip
        assert not sink_warnings(*llama, texts, position=position, layers=layers)
        assert not sink_warnings(*llama, texts, position=position, layers=layers, read=sk.collect_means)


def test_the_letter_is_at_one_index_in_all_windows_of_the_means(llama, monkeypatch) -> None:
    monkeypatch.setattr(capture, "WINDOW", 2)
    pairs = [sk.ContrastPair("q", " (A)", " (B)") for _ in range(2)]
    means = sk.collect_means(*llama, [*pairs, *pairs], layers=[1], position="letter")
    assert means.counts == (4, 4)
    ending = sk.ContrastPair("q", " A", " B")
    for read in (sk.collect, sk.collect_means):
        with pytest.raises(ValueError, match="expected spans that end alike for position='letter'"):
            read(*llama, [*pairs, ending, ending], layers=[1], position="letter")


def test_the_means_of_unrelated_texts_are_nearly_equal_at_position_0_and_not_after_it(smollm) -> None:
    texts = ["The sea is calm today.", "def add(a, b): return a + b"]
    later = [sk.SpannedText(text, ((text.index(" "), len(text)),)) for text in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = sk.collect(*smollm, texts, position="mean", layers=14).at(14)
    rest = sk.collect(*smollm, later, position="mean", layers=14).at(14)
    assert torch.cosine_similarity(whole[0], whole[1], 0) > 0.99 > 0.9 > torch.cosine_similarity(rest[0], rest[1], 0)


def test_the_shown_forms_of_activations_are_short_and_escaped(llama) -> None:
    model, tokenizer = llama
    acts = sk.collect(model, tokenizer, {"<b>bad</b>": ["a<i>"], "good": ["b", "c"]})
    expected = "Activations(items 3, layers 0-3, d_model 32, position 'last', tokens '>' 1, 'b' 1, 'c' 1, "
    expected += "labels <b>bad</b> 1, good 2)"
    assert repr(acts) == str(acts) == expected
    page = acts._repr_html_()
    assert "&lt;b&gt;bad&lt;/b&gt;" in page and "<b>bad" not in page and "<table" in page
    many = acts.where([True] * 3)
    assert len(repr(many)) < 200
    means = sk.collect_means(model, tokenizer, {"a": ["x"], "b": ["y"]}, layers=["embed", 1])
    assert repr(means) == "ActivationMeans(layers embed, 1, d_model 32, labels a 1, b 1)"
    wide = sk.Activations(
        torch.zeros(20, 9, 4), tuple(range(0, 18, 2)), pd.DataFrame({"label": list(map(str, range(20)))})
    )
    assert repr(wide).startswith("Activations(items 20, layers 0, ..., 16 (9 layers), d_model 4, labels 0 1, 1 1")
    assert "... (20 labels)" in repr(wide) and len(wide._repr_html_()) < 3000


def test_merged_activations_hold_the_items_of_all_parts_in_order(llama) -> None:
    first, second = (
        sk.collect(*llama, texts, layers=[1, 2], labels=["a", "b"]) for texts in (["ab", "cd"], ["ef", "gh"])
    )
    both = sk.Activations.merge([first, second])
    assert torch.equal(both.resid, torch.cat([first.resid, second.resid]))
    assert both.items.index.tolist() == both.items["text"].tolist() == [0, 1, 2, 3]
    assert both.items["label"].tolist() == ["a", "b"] * 2 and both.items["group"].tolist() == ["0", "1"] * 2
    assert both.meta["n_texts"] == 4 and len(both.meta["data_sha256"]) == 64
    assert both.meta["data_sha256"] not in (first.meta["data_sha256"], second.meta["data_sha256"])
    rest = {key: value for key, value in first.meta.items() if key not in ("n_texts", "data_sha256")}
    assert {key: value for key, value in both.meta.items() if key not in ("n_texts", "data_sha256")} == rest
    assert sk.Activations.merge([first]).meta == first.meta
    assert sk.difference_in_means(both, "a", "b").meta["n"] == 2


def test_activations_that_were_read_otherwise_are_not_merged(llama) -> None:
    model, tokenizer = llama
    acts = sk.collect(model, tokenizer, ["ab"], layers=[1])
    others = {
        "layers": sk.collect(model, tokenizer, ["ab"], layers=[2]),
        "site": sk.collect(model, tokenizer, ["ab"], layers=[1], site="mlp_out"),
        "read position": sk.collect(model, tokenizer, ["ab"], layers=[1], position="first"),
        "width": replace(acts, resid=acts.resid[..., :8]),
        "model_fingerprint": replace(acts, meta={**acts.meta, "model_fingerprint": "other"}),
        "adapter_fingerprint": replace(acts, meta={**acts.meta, "adapter_fingerprint": "other"}),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"expected activations of one kind; got .*'{name}'"):
            sk.Activations.merge([acts, other])
    for nothing in ([], acts):
        with pytest.raises(ValueError, match="expected a list of activations"):
            sk.Activations.merge(nothing)


def test_a_text_without_a_group_never_shares_that_of_another(llama) -> None:
    pairs = [sk.ContrastPair(f"q{i}", " a", " b", group={0: "2", 3: "1'"}.get(i)) for i in range(4)]
    assert sk.collect(*llama, pairs, layers=[1]).items["group"].tolist()[::2] == ["2", "1", "2'", "1'"]
    spans = [sk.SpannedText("ab cd", ((1, 2), (3, 5)), group=group) for group in (1, None, None)]
    assert sk.collect(*llama, [*spans, "ef"], layers=[1]).items["group"].tolist() == ["1"] * 2 + ["1'"] * 2 + [
        "2", "2", "3",
    ]  # fmt: skip


def test_items_are_counted_from_zero_whatever_their_index_was(llama) -> None:
    acts = sk.collect(*llama, ["ab", "cd"], layers=[1])
    assert replace(acts, items=acts.items.set_index(pd.Index([3, 3]))).items.index.tolist() == [0, 1]


def test_activations_and_means_are_equal_only_to_themselves_and_can_be_in_sets(llama) -> None:
    for read in (sk.collect, sk.collect_means):
        one, other = (read(*llama, ["ab"]) for _ in range(2))
        assert one == one and one != other
        assert one in [other, one] and one not in [other] and len({one, one, other}) == 2


def test_rendering_by_hand_and_passing_the_chat_read_the_same_stream(llama) -> None:
    model, tokenizer = llama
    by_hand = sk.collect(model, tokenizer, [render(tokenizer, CHATS[0])], layers=1)
    assert torch.equal(by_hand.resid, sk.collect(model, tokenizer, CHATS[:1], layers=1).resid)
