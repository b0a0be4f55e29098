"""Conditions against a slow reference: one prompt, no cache, one position at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import steerkit as sk
from steerkit.generation.engine import Engine, Row
from steerkit.generation.generate import decode
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.models.blocks import find_blocks
from steerkit.models.model import evaluating
from steerkit.probes.probe import Probe
from steerkit.scores.fluency import kl
from steerkit.serving.remote import specification
from steerkit.steering.conditions import Condition
from steerkit.steering.rows import RowSteering
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import encode
from steerkit.vectors.vector import SteeringVector
from tests.small_models import build
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer
from tests.verified import verifies

PROMPTS = ["Hello", "A rather longer prompt than that", "x = 1; y = 2", "?"]
PLACE = ("resid_post", 1)
NEW = 8


def blocks_of(model: Any) -> Sequence[Any]:
    return find_blocks(model).modules


def stream_after(model: Any, layer: int, ids: Sequence[int], push: Any = None) -> Tensor:
    """The stream after a block, `[pos, d_model]`, by a plain forward."""
    found: list[Tensor] = []

    def hook(_: Any, __: Any, out: Any) -> None:
        found.append(out if isinstance(out, Tensor) else out[0])

    handle = blocks_of(model)[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        handle.remove()
    return found[0][0]


def slow(model: Any, ids: Sequence[int], new: int, steering: sk.Steering) -> tuple[list[int], int]:
    """Greedy tokens of one prompt without a cache, and at how many of the positions that decided them it was steered.

    The condition is read by a hook of its own on every forward; `add` at one layer from the last prompt position on.
    """
    ids, end = list(ids), len(ids) - 1
    when = steering.when
    assert when is not None and isinstance(when.direction, sk.SteeringVector) and when.layer is not None
    read = when.direction.layers[when.layer].double()
    ((layer, push),) = steering.vector.layers.items()
    low, high = when.bounds
    acts: dict[int, bool] = {}

    def look(_: Any, __: Any, out: Any) -> None:
        stream = (out if isinstance(out, Tensor) else out[0])[0].double()
        for column in range(stream.shape[0]):
            score = float(stream[column] @ read / read.norm())
            acts[column] = low < score < high

    def steer(_: Any, __: Any, out: Any) -> Any:
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        for column in range(end, stream.shape[1]):
            if acts[end if when.decide == "prompt" else column]:
                stream[0, column] += float(steering.coefficient) * push
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    handles = [
        blocks_of(model)[when.layer].register_forward_hook(look),
        blocks_of(model)[layer].register_forward_hook(steer),
    ]
    try:
        for _ in range(new):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    finally:
        for handle in handles:
            handle.remove()
    return ids[end + 1 :], sum(acts[end if when.decide == "prompt" else column] for column in range(end, len(ids) - 1))


def threshold(model: Any, tokenizer: Any, read: sk.SteeringVector, layer: int, decide: str) -> float:
    """A threshold that some prompts, or some positions, exceed: in the middle of the two scores beside the median."""
    unit = read.layers[layer] / read.layers[layer].norm()
    streams = [stream_after(model, layer, encode_prompt(tokenizer, one)) for one in PROMPTS]
    scores = torch.cat([one[-1:] if decide == "prompt" else one for one in streams]) @ unit
    ordered = scores.sort().values
    return float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())


def without_end(kind: str = "llama") -> tuple[Any, Any]:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    tokenizer.eos_token_id = None
    model.generation_config.eos_token_id = None
    return model, tokenizer


def ids_of(model: Any, tokenizer: Any, prompts: Sequence[str], steerings: Sequence[Any]) -> list[tuple[Any, Any]]:
    rows = [Row(encode_prompt(tokenizer, one), some) for one, some in zip(prompts, steerings, strict=True)]
    found = dict(p for batch in decode(model, tokenizer, rows, [], max_new_tokens=NEW) for p in batch)
    return [(list(found[i].all_ids), found[i].steered) for i in range(len(rows))]


@verifies("formula", "batch", "mixed", operations=["condition"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("decide", ["prompt", "token"])
@pytest.mark.parametrize("layer", [0, 2])
def test_mixed_padded_cached_batches_and_single_rows_are_the_slow_ones(kind: str, decide: Any, layer: int) -> None:
    model, tokenizer = without_end(kind)
    push, read = vector(model, 2), vector(model, 0, 2, seed=7).at(layer)
    above = threshold(model, tokenizer, read, layer, decide)
    steering = sk.Steering(push, 2.0, when=Condition(read, above=above, decide=decide))
    truth = [slow(model, encode_prompt(tokenizer, one), NEW, steering) for one in PROMPTS]
    mixed = [(steering,), (), (sk.Steering(push, 2.0),)]
    prompts = [one for one in PROMPTS for _ in mixed]
    together = ids_of(model, tokenizer, prompts, mixed * len(PROMPTS))
    alone = [ids_of(model, tokenizer, [one], [(steering,)])[0] for one in PROMPTS]
    assert together[::3] == alone == truth
    assert [n for _, n in together[1::3]] == [0] * len(PROMPTS) and [n for _, n in together[2::3]] == [NEW] * len(
        PROMPTS
    )
    counts = {n for _, n in truth}
    assert len(counts) > 1 and (decide == "token" or counts == {0, NEW})
    always = [ids for ids, _ in together[2::3]]
    assert any(a != b for (a, _), b in zip(truth, always, strict=True))


@pytest.mark.parametrize("decide", ["prompt", "token"])
def test_generate_of_transformers_and_forwards_in_chunks_are_the_slow_ones(decide: Any) -> None:
    model, tokenizer = without_end()
    push, read = vector(model, 2), vector(model, 1, seed=7)
    above = threshold(model, tokenizer, read, 1, decide)
    steering = sk.Steering(push, 2.0, when=Condition(read, above=above, decide=decide))
    for prompt in PROMPTS:
        ids = encode_prompt(tokenizer, prompt)
        truth, _ = slow(model, ids, NEW, steering)
        given = torch.tensor([ids])
        with steering.on(model):
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        assert found[0, len(ids) :].tolist() == truth
        with steering.on(model, prompt_length=len(ids)), torch.no_grad():
            cache, token = None, None
            for part in [ids] if len(ids) == 1 else [ids[:-1], ids[-1:]]:
                out = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
            tokens = []
            for _ in range(NEW):
                token = int(out.logits[0, -1].argmax())
                tokens.append(token)
                out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        assert tokens == truth


def test_a_cache_that_was_filled_outside_is_refused_where_the_prompt_decides() -> None:
    model, tokenizer = without_end()
    steering = sk.Steering(vector(model, 2), 2.0, when=Condition(vector(model, 1, seed=7), above=0.0))
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[1])])
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with (
        pytest.raises(RuntimeError, match="Read the prompt inside"),
        steering.on(model, prompt_length=ids.shape[1]),
        torch.no_grad(),
    ):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)


def test_a_batch_that_loses_rows_keeps_the_decisions_of_the_others() -> None:
    model, tokenizer = without_end()
    push, read = vector(model, 2), vector(model, 1, seed=7)
    above = threshold(model, tokenizer, read, 1, "prompt")
    steering = sk.Steering(push, 2.0, when=Condition(read, above=above))
    prompts = [encode_prompt(tokenizer, one) for one in PROMPTS]
    with torch.no_grad(), evaluating(model):
        engine = Engine(model, [Row(ids, (steering,)) for ids in prompts], NEW)
        engine.forward(engine.last_tokens(), engine.width - 1)
        before = engine.compiled.decisions()[:, 0].tolist()
        engine.keep([3, 1, 0])
        token = torch.tensor([[7], [8], [9]])
        after = engine.forward(token, engine.width)[:, -1]
        for row, number in enumerate((3, 1, 0)):
            alone = Engine(model, [Row(prompts[number], (steering,))], NEW)
            alone.forward(alone.last_tokens(), alone.width - 1)
            torch.testing.assert_close(alone.forward(token[row : row + 1], alone.width)[0, -1], after[row])
    assert set(before) == {True, False}
    assert engine.compiled.decisions()[:, 0].tolist() == [before[i] for i in (3, 1, 0)]


@verifies("zero", operations=["condition"])
def test_coefficient_zero_and_positions_where_the_condition_does_not_hold_change_no_bit() -> None:
    push, read = vector(tiny_model(), 1), vector(tiny_model(), 1, seed=7)
    stream = torch.randn(2, 5, push.d_model, generator=torch.Generator().manual_seed(3))
    when = Condition(read, above=0.0, decide="token")
    zero, some = sk.Steering(push, 0.0, "all", when=when), sk.Steering(push, 2.0, "all", when=when)
    assert RowSteering([[zero], [zero]], [(0, 5)] * 2).edit(PLACE, stream) is None
    edited = RowSteering([[some], [zero]], [(0, 5)] * 2).edit(PLACE, stream)
    holds = stream[0] @ read.layers[1] > 0
    assert edited is not None and 0 < holds.sum() < 5
    assert torch.equal(edited[0, ~holds], stream[0, ~holds]) and torch.equal(edited[1], stream[1])
    assert not (edited[0, holds] == stream[0, holds]).all(-1).any()


def test_a_second_steering_reads_the_stream_that_the_first_one_changed() -> None:
    model, tokenizer = without_end()
    read = vector(model, 1, seed=7)
    ids = encode_prompt(tokenizer, PROMPTS[0])
    plain = float(stream_after(model, 1, ids)[-1] @ read.layers[1] / read.layers[1].norm())
    raise_it = sk.Steering(read.unit(), 5.0)
    above = plain + 2.5
    second = sk.Steering(vector(model, 2), 2.0, when=Condition(read, above=above))
    found = ids_of(
        model,
        tokenizer,
        [PROMPTS[0]] * 3,
        [(second,), (raise_it, second), (raise_it, sk.Steering(vector(model, 2), 2.0))],
    )
    assert found[0][1] == 0 and found[1][0] == found[2][0]


def test_kl_of_texts_is_zero_where_the_condition_does_not_hold() -> None:
    model, tokenizer = without_end()
    push, read = vector(model, 2), vector(model, 1, seed=7)
    above = threshold(model, tokenizer, read, 1, "prompt")
    when = Condition(read, above=above)
    steering, always = sk.Steering(push, 2.0, when=when), sk.Steering(push, 2.0)
    acts = sk.collect(model, tokenizer, PROMPTS, layers=1, position="last").at(1)
    conditional = kl(model, tokenizer, PROMPTS, ["abc"] * 4, [steering] * 4)
    plain = kl(model, tokenizer, PROMPTS, ["abc"] * 4, [always] * 4)
    holds = when.holds(acts)
    assert 0 < holds.sum() < 4
    for found, truth, acted in zip(conditional, plain, holds, strict=True):
        assert found == (pytest.approx(truth, rel=1e-4) if acted else pytest.approx(0, abs=1e-9))


def test_a_probes_score_is_its_log_odds() -> None:
    generator = torch.Generator().manual_seed(0)
    probe = Probe(("no", "yes"), torch.randn(2, 16, generator=generator).double(), torch.tensor([0.2, -0.4]).double())
    x = torch.randn(5, 16, generator=generator)
    p = probe.scores(x)[:, 1]
    torch.testing.assert_close(
        Condition(probe, 1, above=0.0).scores(x), (p / (1 - p)).log().float(), rtol=1e-4, atol=1e-4
    )
    assert Condition(probe, 1, above=0.0).holds(x).tolist() == [one == "yes" for one in probe.predict(x)]


def labelled(model: Any, site: str = "resid_post", layers: Any = 1) -> sk.Activations:
    texts = [f"{word} {i}" for i in range(6) for word in ("glad", "grey")]
    return sk.collect(model, tiny_tokenizer(), texts, labels=[text[:4] for text in texts], layers=layers, site=site)


def test_a_probe_is_read_at_the_layer_and_site_where_it_was_fitted_and_of_its_model_alone() -> None:
    model, tokenizer = without_end()
    probe = sk.fit_probe(labelled(model, "mlp_out"), "label")
    when = Condition(probe, above=0.0, decide="token")
    assert when.place == ("mlp_out", 1) and "@mlp_out 1 " not in str(Condition(vector(model, 1), above=0.0))
    assert "@mlp_out 1, token" in str(when)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[1])])
    push = sk.Steering(sk.SteeringVector({2: torch.ones(32)}), 1.0, "all", when=when)
    with torch.no_grad(), sk.capture_resid(model, 1, site="mlp_out") as read, sk.capture_resid(model, 2) as plain:
        model(input_ids=ids)
    with push.on(model), sk.capture_resid(model, 2) as steered, torch.no_grad():
        model(input_ids=ids)
    moved = (steered[2][0] - plain[2][0]).abs().amax(1) > 0.5
    assert moved.tolist() == [one == "grey" for one in probe.predict(read[1][0])] and 0 < int(moved.sum()) < len(moved)
    other = tiny_model(seed=5)
    with pytest.raises(ValueError, match="expected a condition read from this model"), push.on(other):
        pass
    with pytest.raises(ValueError, match="expected the layer 1, at which the probe was fitted, a block's; got 2"):
        Condition(probe, 2, above=0.0)
    with pytest.raises(ValueError, match="a block's; got 'embed'"):
        Condition(sk.fit_probe(labelled(model, layers=["embed"]), "label"), above=0.0)
    foreign = sk.Steering(push.vector, 1.0, "all", foreign=True, when=when)
    with torch.no_grad(), foreign.on(other):
        other(input_ids=ids)
    calibrated = Condition(vector(model, 1), above=0.0, meta={"model_fingerprint": "0" * 16})
    with pytest.raises(ValueError, match="expected a condition with a threshold read from this model"):
        sk.generate(model, tokenizer, ["a"], max_new_tokens=1, steering=sk.Steering(push.vector, when=calibrated))


def test_conditions_are_equal_by_what_they_decide() -> None:
    read = vector(tiny_model(), 1)
    one = Condition(read, above=1.0, meta={"n": 3})
    assert one == Condition(read * 2.0, above=1) and hash(one) == hash(Condition(read, above=1.0))
    others = [
        Condition(read, above=1.5),
        Condition(read, below=1.0),
        Condition(read, above=1.0, decide="token"),
        Condition(-read, above=1.0),
    ]
    assert all(one != other and str(one) != str(other) for other in others)
    steering = sk.Steering(vector(tiny_model(), 2), when=one)
    assert steering != sk.Steering(steering.vector) and steering.scaled(2.0).when is one


def test_conditions_that_cannot_be_decided_are_refused() -> None:
    model = tiny_model()
    read, push = vector(model, 1), vector(model, 1)
    three = Probe(("a", "b", "c"), torch.randn(3, 16).double(), torch.zeros(3).double())
    for arguments, message in (
        ({"direction": read}, "finite number"),
        ({"direction": read, "above": float("nan")}, "finite number"),
        ({"direction": read, "above": True}, "finite number"),
        ({"direction": read, "above": 2.0, "below": 1.0}, "above < below"),
        ({"direction": read, "above": 1.0, "layer": 2}, "vector's layers"),
        ({"direction": vector(model, 1, 2), "above": 1.0}, "vector's layers"),
        ({"direction": read * 0.0, "above": 1.0}, "zero at layer 1"),
        ({"direction": three, "layer": 1, "above": 1.0}, "two classes"),
        ({"direction": read, "above": 1.0, "decide": "row"}, "decide"),
    ):
        with pytest.raises(ValueError, match=message):
            Condition(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SteeringVector or a Probe"):
        Condition(torch.ones(16), 1, above=0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Condition as when="):
        sk.Steering(push, when=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="begins at resid_post of layer 1; got one at resid_post of layer 2"):
        sk.Steering(push, when=Condition(vector(model, 2), above=0.0))
    with pytest.raises(ValueError, match="decide='token'"):
        sk.Steering(push, positions="all", when=Condition(read, above=0.0))
    narrow = sk.Steering(push, when=Condition(sk.SteeringVector({1: torch.ones(8)}), above=0.0))
    with pytest.raises(ValueError, match="condition of width 32"), narrow.on(model):
        pass


def test_vllm_refuses_conditions_by_name() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="without a condition through vLLM"):
        specification(sk.Steering(vector(model, 1), when=Condition(vector(model, 0), above=0.0)))


@verifies("resume", operations=["condition"])
def test_a_sweep_reports_the_share_of_positions_that_were_steered_and_resumes(tmp_path: Path) -> None:
    model, tokenizer = without_end()
    push, read = vector(model, 2), vector(model, 1, seed=7)
    for decide in ("prompt", "token"):
        above = threshold(model, tokenizer, read, 1, decide)
        when = Condition(read, above=above, decide=decide, meta={"true_rate": 0.9})  # type: ignore[arg-type]
        options: dict[str, Any] = {"coefficients": [0, 2], "when": when, "max_new_tokens": NEW}
        out = tmp_path / decide
        first = sk.sweep(model, tokenizer, push, PROMPTS[:2], out=out, **options)
        rows = (out / "rows.jsonl").read_text().splitlines(keepends=True)
        (out / "rows.jsonl").write_text("".join(rows[:2]))  # as if it had been interrupted
        (out / "table.parquet").unlink()
        resumed = sk.sweep(model, tokenizer, push, PROMPTS[:2], out=out, **options)
        pd.testing.assert_frame_equal(resumed.table, first.table)
        assert set(first.table["when"]) == {str(when)}
        assert first.meta["when"]["meta"] == {"true_rate": 0.9} and first.meta["when"]["above"] == above
        steered = first.table[first.table["coefficient"] == 2]
        truth = [slow(model, ids, NEW, sk.Steering(push, 2.0, when=when)) for ids in steered["prompt_ids"]]
        assert steered["share_steered"].tolist() == [count / NEW for _, count in truth]
        assert [list(ids) for ids in steered["ids"]] == [ids for ids, _ in truth]
        scored = first.score("kl", model=model, tokenizer=tokenizer, vectors=push, when=when).table
        assert ((scored["kl"] > 1e-6) >= (scored["share_steered"] == 1)).all()
        with pytest.raises(ValueError, match="Pass it as when="):
            first.score("kl", model=model, tokenizer=tokenizer, vectors=push)
        with pytest.raises(ConfigurationChanged):
            sk.sweep(model, tokenizer, push, PROMPTS[:2], out=out, **{**options, "when": None})


@pytest.mark.parametrize("kind", ["llama", "jamba"])  # jamba is scored token by token
@pytest.mark.parametrize("decide", ["prompt", "token"])
def test_a_sweep_of_choices_reports_the_share_of_the_positions_that_decide_them(
    kind: str, decide: Any, tmp_path: Path
) -> None:
    model, tokenizer = without_end(kind) if kind == "llama" else (build(kind), tiny_tokenizer())
    push, read = vector(model, 2), vector(model, 1, seed=7)
    choices = [" A", " B", " wet sand", "!"]
    scores = [
        stream_after(model, 1, (*encode_prompt(tokenizer, one), *encode(tokenizer, choice)))[-3:] @ read.layers[1]
        for one in PROMPTS
        for choice in choices
    ]
    above = float(torch.cat(scores).median() / read.layers[1].norm()) + 1e-4
    when = Condition(read, above=above, decide=decide)
    options: dict[str, Any] = {"coefficients": [0, 2], "when": when, "choices": choices, "out": tmp_path / "run"}
    table = sk.sweep(model, tokenizer, push, PROMPTS, **options).table
    for row in table.itertuples():
        end = len(row.prompt_ids) - 1
        stream = stream_after(model, 1, (*row.prompt_ids, *row.ids))
        columns = [end] * row.n_tokens if decide == "prompt" else range(end, end + row.n_tokens)
        acted = [bool(when.holds(stream[column : column + 1])) for column in columns]
        assert row.share_steered == (sum(acted) / row.n_tokens if row.coefficient else 0)
    assert table["share_steered"].nunique() > 1
    again = sk.sweep(model, tokenizer, push, PROMPTS, **options).table
    pd.testing.assert_frame_equal(again, table)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    for row in rows:  # as an earlier version wrote them
        row.pop("steered", None)
    (tmp_path / "run" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    old = sk.sweep(model, tokenizer, push, PROMPTS, **options).table
    assert old[old["coefficient"] == 2]["share_steered"].isna().all()
    assert old[old["coefficient"] == 0]["share_steered"].eq(0).all()


def test_a_condition_may_be_read_on_another_device_than_its_steering_acts_on() -> None:
    push = SteeringVector({1: torch.randn(8)})
    when = sk.Condition(SteeringVector({0: torch.randn(8)}), above=-100.0, decide="token")
    compiled = RowSteering([(sk.Steering(push, 1.0, "all", layer=1, when=when),)], [(0, 3)])
    compiled.edit(("resid_post", 0), torch.randn(1, 3, 8))
    moved = compiled.edit(("resid_post", 1), torch.randn(1, 3, 8).to("meta"))
    assert moved is not None and moved.device.type == "meta"
