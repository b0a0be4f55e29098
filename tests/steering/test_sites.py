"""Steering at other sites than `resid_post`: equal to a slow loop, per row in mixed batches, with and without cache."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import steerkit as sk
from steerkit.capture.resid import capture_resid
from steerkit.models.site_names import SITES
from steerkit.models.sites import NoSite, find_sites
from steerkit.serving.remote import specification
from steerkit.steering.operations import OPERATIONS
from steerkit.steering.steering import Steering
from steerkit.text.prompt import encode_prompt
from steerkit.vectors.vector import SteeringVector
from tests.small_models import build
from tests.steering.test_operations import EVERY, NAMES, reflect
from tests.steering.test_operations import slowly as one_position
from tests.steering.test_steering import PROMPTS, plain_generate
from tests.tiny import tiny_model, tiny_tokenizer
from tests.verified import verifies

NEW = 6
SERIAL = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z")


def vector(site: str, *layers: int, width: int = 32, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: 4 * torch.randn(width, generator=generator) for layer in layers or (1,)}, site=site)


@contextlib.contextmanager
def rewritten(model: Any, steering: Steering, columns: Container[int]) -> Iterator[None]:
    """Change one row's tokens in the modules of a tiny Llama, by plain hooks, position by position: the slow truth."""
    block = model.model.layers[next(iter(steering.vector.layers))]
    value = next(iter(steering.vector.layers.values()))
    entered: list[Tensor] = []

    def change(h: Tensor) -> Tensor:
        h = h.clone()
        for column in range(h.shape[1]):
            if column in columns:
                h[0, column] = one_position(str(steering.operation), h[0, column], value, float(steering.coefficient))
        return h

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((change(args[0]), *args[1:]), kwargs) if args else None

    def after_attention(module: nn.Module, args: Any, out: Any) -> Any:
        if steering.site == "attn_out":
            return (change(out[0]), *out[1:])
        return (change(entered[-1] + out[0]) - entered[-1], *out[1:])

    handles = {
        "resid_pre": lambda: block.register_forward_pre_hook(before, with_kwargs=True),
        "z": lambda: block.self_attn.o_proj.register_forward_pre_hook(before, with_kwargs=True),
        "mlp_out": lambda: block.mlp.register_forward_hook(lambda module, args, out: change(out)),
        "attn_out": lambda: block.self_attn.register_forward_hook(after_attention),
        "resid_mid": lambda: block.self_attn.register_forward_hook(after_attention),
        "resid_post": lambda: block.register_forward_hook(lambda module, args, out: change(out)),
    }
    keep = block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    handle = handles[str(steering.site)]()
    try:
        yield
    finally:
        handle.remove()
        keep.remove()


def slowly(model: Any, prompt: tuple[int, ...], steering: Steering, new: int = NEW) -> list[int]:
    """Greedy tokens of one row, the whole text forwarded anew for each; steered from the last prompt token on, where
    its condition holds: read in a forward of its own, since what a condition reads comes before its steering.
    """
    ids, end = list(prompt), len(prompt) - 1
    for _ in range(new):
        columns = range(end, len(ids))
        if steering.when is not None:
            site, layer = steering.when.place
            with torch.no_grad(), capture_resid(model, layer, site=site) as read:
                model(input_ids=torch.tensor([ids]), use_cache=False)
            holds = steering.when.holds(read[layer][0]).tolist()
            decided = [end] * len(ids) if steering.when.decide == "prompt" else range(len(ids))
            columns = [column for column in columns if holds[decided[column]]]  # type: ignore[assignment]
        with torch.no_grad(), rewritten(model, steering, columns):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def serial() -> tuple[Any, Any]:
    """A model with every site, and its tokenizer, whose texts do not end."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    return model, tokenizer


@verifies("formula", "zero", operations=EVERY, sites=SITES)
@pytest.mark.parametrize("name", [*NAMES, "reflect"])
@pytest.mark.parametrize("site", SITES)
def test_an_operation_at_a_site_is_its_formula_per_position_and_coefficient_zero_changes_no_bit(
    site: str, name: str, serial: Any
) -> None:
    sk.Operation("reflect", reflect)
    model, _ = serial
    ids = torch.tensor([[5, 17, 200, 33, 8]])
    steering = Steering(vector(site), 0.7, "all+0", name)
    with torch.no_grad(), capture_resid(model, 1, site=site) as before:
        plain = model(input_ids=ids).logits
    with torch.no_grad(), steering.on(model), capture_resid(model, 1, site=site) as after:
        model(input_ids=ids)
    for column in range(5):
        truth = one_position(name, before[1][0, column], steering.vector.layers[1], 0.7).float()
        torch.testing.assert_close(after[1][0, column], truth, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), steering.scaled(0.0).on(model):
        assert torch.equal(model(input_ids=ids).logits, plain)


@verifies("batch", "mixed", operations=EVERY, sites=SITES)
@pytest.mark.parametrize("site", SITES)
def test_a_mixed_batch_with_a_cache_equals_each_row_alone_without_one(site: str, serial: Any) -> None:
    """Every operation at a site, another site, coefficient 0 and no steering, in one left-padded batch."""
    sk.Operation("reflect", reflect)
    model, tokenizer = serial
    own = [Steering(vector(site), 0.6 if name == "rotate" else 1.5, operation=name) for name in [*NAMES, "reflect"]]
    other = [Steering(vector("mlp_out", 2, seed=1), -1.0), own[0].scaled(-2.0), own[0].scaled(0.0), None]
    each = [*own, *other]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(each))]
    found = sk.generate(model, tokenizer, prompts, max_new_tokens=NEW, steering=each, return_details=True)
    plain = sk.generate(model, tokenizer, prompts, max_new_tokens=NEW, return_details=True)
    for number, (prompt, steering) in enumerate(zip(prompts, each, strict=True)):
        if steering is None or steering.coefficient == 0:
            assert found[number].ids == plain[number].ids
        else:
            assert list(found[number].ids) == slowly(model, encode_prompt(tokenizer, prompt), steering), steering
            is_interval = steering.operation == "clamp:-0.5:0.5"  # the projection may be inside it
            assert is_interval or found[number].log_probs != plain[number].log_probs
    alone = sk.generate(model, tokenizer, PROMPTS[:1], max_new_tokens=NEW, steering=own[0], return_details=True)
    hf = plain_generate(model, tokenizer, own[0], NEW, eos_token_id=None)
    assert alone[0].ids == found[0].ids == tuple(hf[0])


@verifies("formula", "batch", "mixed", "zero", operations=["condition"], sites=SITES)
@pytest.mark.parametrize("decide", ["prompt", "token"])
@pytest.mark.parametrize("site", SITES)
def test_a_condition_read_at_a_site_steers_the_rows_and_positions_that_a_slow_loop_steers(
    site: str, decide: Any, serial: Any
) -> None:
    """Read before the steering at its own place, and at a place before it; coefficient 0 changes no text."""
    model, tokenizer = serial
    read = vector(site, seed=7)
    scores = []
    for prompt in PROMPTS:
        with torch.no_grad(), capture_resid(model, 1, site=site) as streams:
            model(input_ids=torch.tensor([encode_prompt(tokenizer, prompt)]))
        scores += (streams[1][0, -1:] if decide == "prompt" else streams[1][0]).matmul(read.unit().layers[1]).tolist()
    ordered = sorted(scores)
    above = sum(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1]) / 2
    when = sk.Condition(read, above=above, decide=decide)
    here = Steering(vector(site), 1.5, when=when)
    later = Steering(vector("resid_post", 2, seed=3), 2.0, operation="add_normed", when=when)
    texts = {}
    for steering in (here, later):
        each = [one for _ in PROMPTS for one in (steering, None, steering.scaled(0.0), Steering(vector("resid_pre")))]
        prompts = [prompt for prompt in PROMPTS for _ in range(4)]
        found = sk.generate(model, tokenizer, prompts, max_new_tokens=NEW, steering=each, return_details=True)
        truth = [slowly(model, encode_prompt(tokenizer, prompt), steering) for prompt in PROMPTS]
        assert [list(one.ids) for one in found[::4]] == truth
        assert [one.ids for one in found[1::4]] == [one.ids for one in found[2::4]]
        alone = [sk.generate(model, tokenizer, [one], max_new_tokens=NEW, steering=steering) for one in PROMPTS]
        assert [one.text for one in found[::4]] == [text for (text,) in alone]
        texts[steering] = [list(one.ids) for one in found[1::4]], truth
    if decide == "prompt":  # both outcomes occur
        unsteered, steered = texts[here]
        assert 0 < sum(a != b for a, b in zip(unsteered, steered, strict=True)) < len(PROMPTS)


def test_a_condition_is_refused_where_a_forward_does_not_reach_it_before_its_steering(serial: Any) -> None:
    model, tokenizer = serial
    for read, steered in ((("mlp_out", 1), ("attn_out", 1)), (("resid_pre", 0), ("resid_pre", 0))):
        when = sk.Condition(vector(*read), above=0.0)
        if read == steered:
            sk.generate(model, tokenizer, ["a"], max_new_tokens=1, steering=Steering(vector(*steered), when=when))
            continue
        with pytest.raises(ValueError, match="which begins at attn_out of layer 1; got one at mlp_out of layer 1"):
            Steering(vector(*steered), when=when)
    at_zero = sk.Condition(vector("resid_post", 0), above=0.0)
    with pytest.raises(ValueError, match="begins at z of layer 0; got one at resid_post of layer 0"):
        Steering(vector("z", 0), when=at_zero)
    beside = Steering(vector("mlp_out"), when=sk.Condition(vector("attn_out"), above=0.0))
    sk.generate(model, tokenizer, ["a"], max_new_tokens=1, steering=beside)
    with pytest.raises(ValueError, match="attention and MLP of this block read the same stream, in any order"):
        sk.generate(tiny_model("gpt_neox"), tokenizer, ["a"], max_new_tokens=1, steering=beside)
    with pytest.raises(NoSite, match="resid_mid is refused"):
        wrong = Steering(vector("mlp_out"), when=sk.Condition(vector("resid_mid"), above=0.0))
        sk.generate(tiny_model("gpt_neox"), tokenizer, ["a"], max_new_tokens=1, steering=wrong)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", "bloom", "opt", "granite", "qwen3_next", "zamba2"])
def test_coefficient_0_changes_no_bit_and_a_push_is_read_where_it_was_written(kind: str) -> None:
    model = build(kind)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    for site in SERIAL:
        layers = find_sites(model).layers(site)
        if not layers:
            continue
        layer = layers[-1]
        with torch.no_grad(), capture_resid(model, layer, site=site) as read:
            plain = model(input_ids=ids).logits
        pushed = Steering(vector(site, layer, width=read[layer].shape[-1]), 1.0, "all")
        with torch.no_grad(), pushed.scaled(0.0).on(model):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with torch.no_grad(), pushed.on(model), capture_resid(model, layer, site=site) as after:
            assert not torch.equal(model(input_ids=ids).logits, plain)
        value = pushed.vector.layers[layer]
        torch.testing.assert_close(after[layer] - read[layer], value.expand_as(read[layer]), rtol=1e-3, atol=1e-3)


def test_ablating_attn_out_leaves_no_component_and_other_heads_of_z_stay() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    head = torch.zeros(32)
    head[8:16] = 1.0
    one_head = Steering(SteeringVector({1: head}, site="z"), 2.0, "all")
    with torch.no_grad(), capture_resid(model, 1, site="z") as before:
        model(input_ids=ids)
    with torch.no_grad(), one_head.on(model), capture_resid(model, 1, site="z") as after:
        model(input_ids=ids)
    changed = (after[1] != before[1]).any(dim=1)[0]
    assert changed[8:16].all() and not changed[:8].any() and not changed[16:].any()
    ablated = Steering(vector("attn_out"), operation="ablate", positions="all+0")
    with torch.no_grad(), ablated.on(model), capture_resid(model, 1, site="attn_out") as found:
        model(input_ids=ids)
    unit = ablated.vector.unit().layers[1]
    assert (found[1] @ unit).abs().max() < 1e-5


def test_a_vector_carries_its_site_through_arithmetic_controls_and_files(tmp_path: Path, llama: Any) -> None:
    model, tokenizer = llama
    pairs = [sk.ContrastPair(f"Q{i}?", " yes", " no") for i in range(4)]
    acts = sk.collect(model, tokenizer, pairs, site="mlp_out", layers=[1, 2])
    v = sk.difference_in_means(acts)
    controls = {**sk.controls.random({"v": v}, n=1), **sk.controls.matched({"v": v}, acts, n=1)}
    controls |= sk.controls.shuffled({"v": v}, acts, n=1)
    made = [v.unit(), v + v, 2 * v, v.at(1), sk.pca(acts), sk.logistic(acts), sk.random_like(v, 0), *controls.values()]
    assert {one.site for one in made} == {"mlp_out"}
    v.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    assert loaded == v and loaded.site == "mlp_out" and sk.read_vectors(tmp_path / "v.safetensors")["v"] == v
    elsewhere = SteeringVector(v.layers, v.meta)
    assert elsewhere != v and elsewhere.content() != v.content()
    assert Steering(v, layer=1).site == "mlp_out" and Steering(v, layer=1, site="attn_out").site == "attn_out"
    assert Steering(v, layer=1) != Steering(v, layer=1, site="attn_out")
    z = sk.difference_in_means(sk.collect(build("gemma2"), tokenizer, pairs, site="z", layers=1))
    z.save(tmp_path / "z.safetensors")
    assert SteeringVector.load(tmp_path / "z.safetensors") == z


def test_what_does_not_fit_the_site_is_refused(tmp_path: Path, llama: Any) -> None:
    model, tokenizer = llama
    pairs = [sk.ContrastPair(f"Q{i}?", " yes", " no") for i in range(4)]
    with pytest.raises(ValueError, match="expected vectors of one site"):
        vector("attn_out") + vector("mlp_out")
    with pytest.raises(ValueError, match="expected activations at mlp_out; got resid_post"):
        sk.controls.matched({"v": vector("mlp_out")}, sk.collect(model, tokenizer, pairs))
    with pytest.raises(ValueError, match="expected a site among"):
        Steering(vector("attn_out"), site="attn")
    with pytest.raises(ValueError, match="adds; got attn_out"):
        sk.write_vector(vector("attn_out"), tmp_path / "v.gguf")
    with pytest.raises(ValueError, match="through vLLM; got attn_out"):
        specification(Steering(vector("attn_out")))
    parallel = tiny_model("gpt_neox")
    with pytest.raises(NoSite, match="resid_mid is refused"):
        sk.generate(parallel, tokenizer, ["a"], max_new_tokens=1, steering=Steering(vector("resid_mid")))
    push, when = vector("resid_post"), sk.Condition(vector("attn_out"), above=0.0)
    good, bad = (Steering(push, site=site, when=when) for site in ("resid_post", "mlp_out"))
    for each in ([good, bad], [bad, good]):  # whatever the order of the rows
        with pytest.raises(ValueError, match="attn_out"):
            sk.generate(parallel, tokenizer, ["a", "b"], max_new_tokens=1, steering=each)
    with pytest.raises(ValueError, match="width 64, the model's at z; got 32"):
        sk.generate(build("llama"), tokenizer, ["a"], max_new_tokens=1, steering=Steering(vector("z")))
    assert not list(tmp_path.iterdir())


@verifies("resume", operations=[*EVERY, "condition"], sites=SITES)
@pytest.mark.parametrize("site", SITES)
def test_a_sweep_at_a_site_equals_generate_and_resumes(site: str, tmp_path: Path, serial: Any) -> None:
    model, tokenizer = serial
    own = sk.Operation("reflect", reflect)
    when = sk.Condition(vector(site, seed=7), above=0.0, decide="token")
    for operation, condition in (*((one, None) for one in (*OPERATIONS, own.name)), ("add", when)):
        out = tmp_path / f"{operation.replace('@', '-')}{condition is not None}"
        options: dict[str, Any] = {"coefficients": [0, 1], "max_new_tokens": 3, "operation": operation, "out": out}
        options |= {"when": condition, "foreign": True}
        result = sk.sweep(model, tokenizer, vector(site), PROMPTS[:2], **options)
        steered = result.table[result.table["coefficient"] == 1]
        steering = Steering(vector(site), 1.0, operation=operation, when=condition)
        assert steered["text"].tolist() == sk.generate(
            model, tokenizer, PROMPTS[:2], max_new_tokens=3, steering=steering
        )
        assert site == "resid_post" or set(result.table["site"]) == {site}
        rows = (out / "rows.jsonl").read_text().splitlines(keepends=True)
        (out / "rows.jsonl").write_text("".join(rows[:-2]))  # as if it had been interrupted
        (out / "table.parquet").unlink()
        pd.testing.assert_frame_equal(
            sk.sweep(model, tokenizer, vector(site), PROMPTS[:2], **options).table, result.table
        )


def test_a_sweep_of_several_sites_is_refused_and_doses_are_of_the_site(serial: Any) -> None:
    model, tokenizer = serial
    v = vector("mlp_out")
    result = sk.sweep(model, tokenizer, v, PROMPTS[:2], coefficients=[1], max_new_tokens=2, foreign=True)
    assert result.table[result.table["coefficient"] == 1]["relative_dose"].gt(0).all()
    with pytest.raises(ValueError, match="expected vectors of one site"):
        sk.sweep(model, tokenizer, {"a": v, "b": vector("z")}, PROMPTS[:1], coefficients=1)


def test_a_watched_vector_is_projected_at_its_site(llama: Any) -> None:
    model, tokenizer = llama
    v = vector("mlp_out")
    table = sk.project(model, tokenizer, ["Two words"], v)
    ids = torch.tensor([encode_prompt(tokenizer, "Two words")])
    with torch.no_grad(), capture_resid(model, 1, site="mlp_out") as read:
        model(input_ids=ids)
    slow = read[1][0] @ v.unit().layers[1]
    assert table["before"].tolist() == pytest.approx(slow.tolist(), rel=1e-4, abs=1e-5)
    pushed = sk.project(model, tokenizer, ["Two words"], v, steering=Steering(v, 1.0, "all"))
    gained = pushed["after"] - pushed["before"]
    assert gained.tolist() == pytest.approx([v.norms()[1]] * len(gained), rel=1e-4)
