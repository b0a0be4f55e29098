"""Patching equals a slow loop of plain hooks without a cache, TransformerLens, and its own definition."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import steerkit as sk
from steerkit.models.blocks import find_blocks
from steerkit.models.hooks import counted_forwards
from steerkit.models.site_names import SITES
from steerkit.models.sites import NoSite
from steerkit.patching.result import over_pairs
from steerkit.patching.runs import Runs
from steerkit.stats.mean import mean_interval
from steerkit.steering.steering import Steering
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import encode
from steerkit.vectors.vector import SteeringVector
from tests.lens_patching import effects_of, lens_effects
from tests.small_models import build
from tests.tiny import tiny_model, tiny_tokenizer

CLEAN, CORRUPTED, ANSWERS = "The sea is", "The fog is", (" A", " B")
MODES = ("denoising", "noising")


@contextlib.contextmanager
def put_in(block: Any, site: str, new: Tensor, start: int, stop: int, columns: slice) -> Iterator[None]:
    """Overwrite one site of a Llama block by plain hooks: `[pos, width]` at `[start, stop)`."""
    entered: list[Tensor] = []

    def change(h: Tensor) -> Tensor:
        h = h.clone()
        h[0, start:stop, columns] = new[start:stop, columns]
        return h

    def before(module: Any, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    def attention(module: Any, args: Any, out: Any) -> Any:
        if site == "attn_out":
            return (change(out[0]), *out[1:])
        return (change(entered[-1] + out[0]) - entered[-1], *out[1:])

    handles = [block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))]
    if site == "resid_pre":
        handles.append(block.register_forward_pre_hook(before))
    elif site == "z":
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(before))
    elif site in ("attn_out", "resid_mid"):
        handles.append(block.self_attn.register_forward_hook(attention))
    else:
        module = block.mlp if site == "mlp_out" else block
        handles.append(module.register_forward_hook(lambda module, args, out: change(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(model: Any, ids: tuple[int, ...], answers: list[tuple[int, ...]]) -> float:
    """log p(right) - log p(wrong), each answer's tokens scored in a forward of the whole text."""
    found = []
    for answer in answers:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits[0]
        rows = logits[len(ids) - 1 : -1].log_softmax(-1)
        found.append(float(sum(row[token] for row, token in zip(rows, answer, strict=True))))
    return found[0] - found[1]


def slowly(model: Any, tokenizer: Any, row: pd.Series, mode: str, answers: Any, span: tuple[int, int]) -> float:
    """The effect of one place of a Llama, from its definition."""
    clean, corrupted = (encode_prompt(tokenizer, text) for text in (CLEAN, CORRUPTED))
    base, other = (corrupted, clean) if mode == "denoising" else (clean, corrupted)
    right = [encode(tokenizer, text) for text in answers]
    with torch.no_grad(), sk.capture_resid(model, row["layer"], site=row["site"]) as read:
        model(input_ids=torch.tensor([other]))
    columns = slice(None) if pd.isna(row["head"]) else slice(8 * row["head"], 8 * row["head"] + 8)
    with put_in(find_blocks(model).modules[row["layer"]], row["site"], read[row["layer"]][0], *span, columns):
        patched = difference(model, base, right)
    m_base, m_other = difference(model, base, right), difference(model, other, right)
    return (patched - m_base) / (m_other - m_base)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("site", SITES)
def test_every_place_equals_a_slow_loop_of_plain_hooks_without_a_cache(site: str, mode: Any) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, sites=site, layers=[0, 2], mode=mode)
    assert len(result.table) == 2 * 10 * (4 if site == "z" else 1)
    for _, row in result.table.iloc[:: 3 if site == "z" else 1].iterrows():
        slow = slowly(model, tokenizer, row, mode, ANSWERS, (row["position"], row["position"] + 1))
        assert row["effect"] == pytest.approx(slow, abs=2e-3), row
        assert row["token"] == (CORRUPTED if mode == "denoising" else CLEAN)[row["position"]]


@pytest.mark.parametrize("mode", MODES)
def test_answers_of_several_tokens_and_spans_equal_the_slow_loop(mode: Any) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    answers = (" wet", " B")
    spans = {"subject": (4, 7), "rest": (-3, 10)}
    result = sk.patch(
        model, tokenizer, CLEAN, CORRUPTED, answers, sites=["attn_out", "resid_mid"], positions=spans, mode=mode
    )
    assert result.table["position"].unique().tolist() == ["subject", "rest"]
    for _, row in result.table.iterrows():
        span = {"subject": (4, 7), "rest": (7, 10)}[row["position"]]
        assert row["effect"] == pytest.approx(slowly(model, tokenizer, row, mode, answers, span), abs=2e-3)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neox", "opt", "mistral", "jamba", "minicpm3"])
def test_effects_with_and_without_a_cached_prefix_agree_and_whole_streams_give_1(kind: str, monkeypatch: Any) -> None:
    """Also for sliding windows and recurrent layers, where no prefix is cut from the cache."""
    model = build(kind) if kind not in ("gpt2", "gemma2", "gpt_neox") else tiny_model(kind)
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {"sites": ["resid_post", "attn_out"], "layers": [1, 2]}
    fast = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, **options, batch_rows=3)
    monkeypatch.setattr(Runs, "_prefix", None)
    slow = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, **options)
    assert fast.table["effect"].tolist() == pytest.approx(slow.table["effect"].tolist(), abs=2e-3)
    whole = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ("A", "B"), positions={"all": (0, 10)}, layers=[0, 2])
    assert whole.table["effect"].tolist() == pytest.approx([1, 1], abs=1e-3)


def test_the_effects_of_pairs_have_their_mean_and_interval(llama: Any) -> None:
    model, tokenizer = llama
    clean, corrupted = ["The sea is", "The big hills are"], ["The fog is", "The old hills are"]
    positions = {"subject": [(4, 7), (4, 7)], "last": -1}
    both = sk.patch(model, tokenizer, clean, corrupted, ANSWERS, layers=1, positions=positions)
    each = [
        sk.patch(model, tokenizer, a, b, ANSWERS, layers=1, positions={"subject": (4, 7), "last": -1}).table["effect"]
        for a, b in zip(clean, corrupted, strict=True)
    ]
    assert both.table["effect"].tolist() == pytest.approx(((each[0] + each[1]) / 2).tolist())
    assert both.table["n"].tolist() == [2, 2]
    for _, row in both.table.iterrows():
        values = both.pairs[both.pairs["position"] == row["position"]]["effect"]
        interval = mean_interval(values)
        assert (row["effect_low"], row["effect_high"]) == (interval.low, interval.high)


def test_a_pair_without_an_effect_is_not_counted_as_one() -> None:
    place = {"site": "resid_post", "layer": 1, "head": pd.NA, "position": "last", "token": "x"}
    pairs = pd.DataFrame([{**place, "effect": effect} for effect in (0.5, float("nan"), 0.6, 0.7)])
    (row,) = over_pairs(pairs.astype({"head": "Int64"})).to_dict("records")
    assert (row["effect"], row["n"], row["n_missing"]) == (pytest.approx(0.6), 3, 1)


@pytest.mark.parametrize("metric", ["logprob_diff", lambda logits: logits[:, 65].nan_to_num(nan=torch.inf)])
def test_places_whose_patched_runs_are_not_finite_are_named_and_the_result_can_be_shown(metric: Any) -> None:
    model, tokenizer = tiny_model().half(), tiny_tokenizer()
    means = sk.collect_means(model, tokenizer, ["abcd", "hbcd"], layers=[1, 2])
    huge = replace(means, mean=means.mean * 1e6)
    clean, corrupted = ["abcd", "hbcd"], ["abxd", "hbxd"]
    with pytest.warns(UserWarning, match=r"in 4 of 4, of the pairs \[0, 1\], at \['resid_post 1 at -1', 'resid_post 2"):
        result = sk.patch(
            model, tokenizer, clean, corrupted, ANSWERS, layers=[1, 2], positions=-1, source=huge, metric=metric
        )
    assert result.table["effect"].isna().all() and result.pairs["effect"].isna().all()
    assert result.table[["n", "n_missing"]].to_numpy().tolist() == [[0, 2], [0, 2]]
    assert "largest effect none is finite" in repr(result) and "none is finite" in result._repr_html_()


def test_a_result_names_its_answers_and_a_hash_of_its_prompts_and_answers(llama: Any) -> None:
    def meta(clean: Any, answers: Any) -> Any:
        return sk.patch(*llama, clean, CORRUPTED, answers, layers=1, positions=-1, metric="kl").meta

    first = meta(CLEAN, ANSWERS)
    assert first["answers"] == [list(ANSWERS)] and meta(CLEAN, None)["answers"] is None
    hashes = [meta(*given)["data_sha256"] for given in ((CLEAN, ANSWERS), (CLEAN, (" A", " C")), ("The lea is", ANSWERS))]
    assert hashes[0] == first["data_sha256"] and len(set(hashes)) == 3


def test_kl_and_functions_of_the_logits_are_metrics(llama: Any) -> None:
    model, tokenizer = llama
    ids = [torch.tensor([encode_prompt(tokenizer, text)]) for text in (CLEAN, CORRUPTED)]
    with torch.no_grad():
        clean, corrupted = (model(input_ids=one).logits[0, -1].log_softmax(-1) for one in ids)
    result = sk.patch(model, tokenizer, CLEAN, CORRUPTED, layers=3, positions=[-1], metric="kl")
    row = result.pairs.iloc[0]
    divergence = float((clean.exp() * (clean - corrupted)).sum())
    assert (row["base"], row["other"]) == pytest.approx((divergence, 0), abs=1e-5)
    assert row["effect"] == pytest.approx(1, abs=1e-4)
    noising = sk.patch(model, tokenizer, CLEAN, CORRUPTED, layers=3, positions=[-1], metric="kl", mode="noising")
    assert noising.pairs.iloc[0]["other"] == pytest.approx(divergence, abs=1e-5)

    def logit_of_65(logits: Tensor) -> Tensor:
        return logits[:, 65]

    own = sk.patch(model, tokenizer, CLEAN, CORRUPTED, layers=3, positions=[-1], metric=logit_of_65)
    assert own.pairs.iloc[0]["effect"] == pytest.approx(1, abs=1e-4) and own.meta["metric"] == "logit_of_65"


def test_pairs_that_cannot_be_compared_are_found_before_the_first_patch(llama: Any, monkeypatch: Any) -> None:
    model, tokenizer = llama
    monkeypatch.setattr(Runs, "patched", lambda *_: pytest.fail("patched"))
    clean, corrupted = [CLEAN, "The big hills are"], [CORRUPTED, "The old hills are"]
    equal = lambda logits: logits[:, 0] * (logits[:, 1] > 9)  # noqa: E731  0 in both runs
    with pytest.raises(ValueError, match="different metrics"):
        sk.patch(model, tokenizer, clean, corrupted, ANSWERS, layers=1, positions=-1, metric=equal)
    with counted_forwards(model) as count, pytest.raises(ValueError, match="those of pair 1 have the same"):
        sk.patch(model, tokenizer, [CLEAN] * 2, [CORRUPTED, CLEAN], ANSWERS, layers=1, positions=-1)
    assert count == [0]


@pytest.mark.parametrize(("metric", "method", "forwards"), [("kl", "exact", 5), ("logprob_diff", "attribution", 4)])
def test_a_place_costs_both_runs_their_values_and_the_patch_alone(
    metric: Any, method: Any, forwards: int, llama: Any
) -> None:
    """The cached prefix is the fifth forward; attribution has one forward with a gradient and no prefix."""
    model, tokenizer = llama
    sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, layers=1)  # what is verified once per model
    with counted_forwards(model) as count:
        sk.patch(model, tokenizer, CLEAN, CORRUPTED, ("A", "B"), layers=1, positions=-1, metric=metric, method=method)
    assert count == [forwards]


def test_a_value_that_16_bits_do_not_let_arrive_at_resid_mid_is_warned_of() -> None:
    model, tokenizer = tiny_model("llama").bfloat16(), tiny_tokenizer()
    options: dict[str, Any] = {"layers": 1, "positions": -1}
    model.get_input_embeddings().weight.data[encode_prompt(tokenizer, CLEAN)[-1]] *= 1000  # the stream that is patched
    means = sk.collect_means(model, tokenizer, ["one", "six"], layers=[1], labels=["m"] * 2, site="resid_mid")
    with pytest.warns(UserWarning, match="resid_mid arrives with an error of .*bfloat16"):
        sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, sites="resid_mid", source=means, **options)
    wide = tiny_model("llama")
    wide.load_state_dict(model.float().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = sk.collect_means(wide, tokenizer, ["one", "six"], layers=[1], labels=["m"] * 2, site="resid_mid")
        sk.patch(wide, tokenizer, CLEAN, CORRUPTED, ANSWERS, sites="resid_mid", source=exact, **options)


def test_a_stored_mean_is_put_in_at_every_position(llama: Any) -> None:
    model, tokenizer = llama
    means = sk.collect_means(
        model, tokenizer, ["one two", "six ten", "sun"], layers=[1], site="mlp_out", labels=["m"] * 3
    )
    result = sk.patch(
        model, tokenizer, CLEAN, CORRUPTED, ANSWERS, sites="mlp_out", layers=1, source=means, mode="noising"
    )
    ids = encode_prompt(tokenizer, CLEAN)
    right = [encode(tokenizer, text) for text in ANSWERS]
    new = means.mean[0, 0].float().expand(10, -1)
    base, other = difference(model, ids, right), difference(model, encode_prompt(tokenizer, CORRUPTED), right)
    for _, row in result.table.iterrows():
        with put_in(model.model.layers[1], "mlp_out", new, row["position"], row["position"] + 1, slice(None)):
            patched = difference(model, ids, right)
        assert row["effect"] == pytest.approx((patched - base) / (other - base), abs=2e-3)
    with pytest.raises(ValueError, match="expected means of one label at"):
        sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, sites="attn_out", layers=1, source=means)


@pytest.mark.parametrize("site", SITES)
def test_attribution_is_the_derivative_of_the_exact_effect(site: str) -> None:
    """Along the line from the base to the other activation, at its start, by central differences."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options: dict[str, Any] = {"sites": site, "layers": [1], "positions": [4, 9]}
    fast = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, method="attribution", **options)
    clean, corrupted = (encode_prompt(tokenizer, text) for text in (CLEAN, CORRUPTED))
    right = [encode(tokenizer, text) for text in ANSWERS]
    streams = []
    for ids in (corrupted, clean):
        with torch.no_grad(), sk.capture_resid(model, 1, site=site) as read:
            model(input_ids=torch.tensor([ids]))
        streams.append(read[1][0])
    base, other = difference(model, corrupted, right), difference(model, clean, right)
    for _, row in fast.table.iterrows():
        columns = slice(None) if pd.isna(row["head"]) else slice(8 * row["head"], 8 * row["head"] + 8)
        ends = []
        for step in (0.02, -0.02):
            new = streams[0] + step * (streams[1] - streams[0])
            with put_in(model.model.layers[1], site, new, row["position"], row["position"] + 1, columns):
                ends.append(difference(model, corrupted, right))
        slope = (ends[0] - ends[1]) / 0.04
        assert row["effect"] == pytest.approx(slope / (other - base), rel=0.05, abs=5e-3)


@pytest.mark.parametrize("mode", MODES)
def test_effects_of_every_site_and_head_equal_those_of_transformer_lens(mode: Any) -> None:
    pytest.importorskip("transformer_lens")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    clean, corrupted = (encode_prompt(tokenizer, text) for text in (CLEAN, CORRUPTED))
    right, wrong = (encode(tokenizer, text)[0] for text in ("A", "B"))
    theirs = lens_effects(model, clean, corrupted, (right, wrong), mode, [0, 2], range(10))
    result = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ("A", "B"), sites=SITES, layers=[0, 2], mode=mode)
    assert effects_of(result.table) == pytest.approx(theirs, abs=2e-3)


def constant(logits: Tensor) -> Tensor:
    return 0 * logits[:, 65] + logits[:, 65].round()


def test_attribution_of_a_metric_without_a_slope_is_refused_and_of_kl_in_the_other_mode_is_the_derivative(
    llama: Any,
) -> None:
    model, tokenizer = llama
    options: dict[str, Any] = {"layers": 1, "positions": [4, 9], "method": "attribution"}
    with pytest.raises(ValueError, match="got 'kl', the divergence from this very run"):
        sk.patch(model, tokenizer, CLEAN, CORRUPTED, metric="kl", mode="noising", **options)
    for metric, reason in ((constant, "its gradient is 0"), (lambda logits: logits[:, 65].detach(), "is none")):
        with pytest.raises(ValueError, match=f"expected a metric with a slope .* {reason}"):
            sk.patch(model, tokenizer, CLEAN, CORRUPTED, metric=metric, **options)
    slopes = sk.patch(model, tokenizer, CLEAN, CORRUPTED, metric="kl", **options).pairs
    assert slopes["effect"].abs().gt(1e-3).all()


def test_means_of_another_model_or_width_are_refused_and_the_result_names_what_was_put_in(llama: Any) -> None:
    model, tokenizer = llama
    options: dict[str, Any] = {"layers": 1, "positions": -1}

    def means(of: Any, **more: Any) -> sk.ActivationMeans:
        return sk.collect_means(of, tokenizer, ["one two", "six ten"], layers=[1], labels=["m"] * 2, **more)

    result = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, source=means(model, position="first"), **options)
    put_in = result.meta["means"]
    assert (put_in["label"], put_in["n"], put_in["read_position"]) == ("m", 2, "first") and put_in["data_sha256"]
    for other, reason in (
        (tiny_model("llama", seed=5), "expected means of this model, .*'model_fingerprint'"),
        (tiny_model("gpt2"), "'model_type': 'gpt2'"),
    ):
        with pytest.raises(ValueError, match=reason):
            sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, source=means(other), **options)
    unknown = sk.ActivationMeans(torch.zeros(1, 1, 8).double(), (1,), ("m",), (1,))
    with pytest.raises(ValueError, match="expected means of width 32, the model's at resid_post; got 8"):
        sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, source=unknown, **options)


def test_what_cannot_be_patched_is_refused(llama: Any) -> None:
    model, tokenizer = llama

    def refused(
        message: str, clean: Any = CLEAN, corrupted: Any = CORRUPTED, answers: Any = ANSWERS, **more: Any
    ) -> None:
        with pytest.raises(ValueError, match=message):
            sk.patch(model, tokenizer, clean, corrupted, answers, **more)

    refused("equal length in tokens; those of pair 0 have 10 and 11", corrupted="The fogs is")
    refused("a corrupted prompt for each of 2 clean ones; got 1", clean=[CLEAN, CLEAN])
    refused("two different prompts in each pair; those of pair 0", corrupted=CLEAN)
    refused("both prompts of .* give", metric=lambda logits: logits[:, 0] * 0)
    refused("expected mode", mode="patch")
    refused("expected method", method="fast")
    refused("expected a metric among", metric="logit")
    refused("expected answers", answers=None)
    refused("two texts; got", answers=(" A", " B", " C"))
    refused("different tokens", answers=(" A", " A"))
    refused(r"expected answers as \(right, wrong\), two texts; got 'AB'", answers="AB")
    refused("expected integers as positions, each once; got 1.5", positions=1.5)
    refused("inside a prompt of 10 tokens; got 10", positions=[10])
    refused(r"as position 'a'; got '4'", positions={"a": "4"})
    refused("got 'embed'", layers=["embed"])
    refused("expected a layer from 0 to 3", layers=[7])
    refused("each once; got", sites=["z", "z"])
    refused("one length for positions='all'", clean=[CLEAN, "a b"], corrupted=[CORRUPTED, "a c"])
    refused(r"shape \[1\]", metric=lambda logits: logits)
    with pytest.raises(ValueError, match="no active steering"), Steering(SteeringVector({1: torch.ones(32)})).on(model):
        sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS)
    with pytest.raises(NoSite, match="resid_mid is refused"):
        sk.patch(tiny_model("gpt_neox"), tokenizer, CLEAN, CORRUPTED, ANSWERS, sites="resid_mid", layers=1)


def test_attribution_has_its_gradients_inside_inference_mode_and_leaves_none(llama: Any) -> None:
    model, tokenizer = llama
    options: dict[str, Any] = {"layers": 1, "method": "attribution"}
    outside = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, **options).table["effect"]
    with torch.inference_mode():
        inside = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, **options).table["effect"]
    assert inside.tolist() == pytest.approx(outside.tolist())
    assert all(parameter.grad is None for parameter in model.parameters())
