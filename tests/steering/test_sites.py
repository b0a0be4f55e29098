"""Steering at other sites than `resid_post`: equal to a slow loop, per row in mixed batches, with and without cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit as sk
from steerkit.capture.resid import capture_resid
from steerkit.models.sites import NoSite, find_sites
from steerkit.serving.remote import specification
from steerkit.steering.steering import Steering
from steerkit.text.prompt import encode_prompt
from steerkit.vectors.vector import SteeringVector
from tests.small_models import build
from tests.steering.test_steering import PROMPTS, plain_generate
from tests.tiny import tiny_model, tiny_tokenizer

NEW = 6
SERIAL = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z")


def vector(site: str, *layers: int, width: int = 32, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: 4 * torch.randn(width, generator=generator) for layer in layers or (1,)}, site=site)


@contextlib.contextmanager
def rewritten(model: Any, steering: Steering, first: int) -> Iterator[None]:
    """Change one row's tokens from `first` on in the modules of a tiny Llama, by plain hooks: the slow truth."""
    block = model.model.layers[next(iter(steering.vector.layers))]
    value = next(iter(steering.vector.layers.values()))
    entered: list[Tensor] = []

    def change(h: Tensor) -> Tensor:
        h = h.clone()
        for column in range(first, h.shape[1]):
            if steering.operation == "ablate":
                unit = value / value.norm()
                h[0, column] -= float(steering.coefficient) * (h[0, column] @ unit) * unit
            else:
                h[0, column] += float(steering.coefficient) * value
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
    }
    keep = block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    handle = handles[str(steering.site)]()
    try:
        yield
    finally:
        handle.remove()
        keep.remove()


def slowly(model: Any, prompt: tuple[int, ...], steering: Steering, new: int = NEW) -> list[int]:
    """Greedy tokens of one row, the whole text forwarded anew for each; steered from the last prompt token on."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad(), rewritten(model, steering, len(prompt) - 1):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def no_end(tokenizer: Any) -> Any:
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("operation", ["add", "ablate"])
@pytest.mark.parametrize("site", SERIAL)
def test_a_mixed_batch_with_a_cache_equals_each_row_alone_without_one(site: str, operation: str) -> None:
    model, tokenizer = tiny_model("llama"), no_end(tiny_tokenizer())
    model.generation_config.eos_token_id = None
    first = Steering(vector(site), 1.5, operation=operation)
    second = Steering(vector("mlp_out", 2, seed=1), -1.0)
    row_steerings = [first, second, first.scaled(-2.0), first.scaled(0.0)]
    found = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, steering=row_steerings, return_details=True)
    slow = [
        slowly(model, encode_prompt(tokenizer, prompt), steering)
        for prompt, steering in zip(PROMPTS, row_steerings, strict=True)
    ]
    assert [list(one.ids) for one in found] == slow
    plain = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, return_details=True)
    assert found[3].ids == plain[3].ids and found[2].log_probs != plain[2].log_probs
    hf = plain_generate(model, tokenizer, first, NEW, eos_token_id=None)
    assert hf[0] == slow[0]


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
    with pytest.raises(ValueError, match="width 64, the model's at z; got 32"):
        sk.generate(build("llama"), tokenizer, ["a"], max_new_tokens=1, steering=Steering(vector("z")))
    assert not list(tmp_path.iterdir())


def test_a_sweep_at_a_site_equals_generate_and_resumes(tmp_path: Path, llama: Any) -> None:
    model, tokenizer = llama
    v = vector("mlp_out")
    options: dict[str, Any] = {"coefficients": [-1, 1], "max_new_tokens": 4, "out": tmp_path / "run", "foreign": True}
    result = sk.sweep(model, tokenizer, v, PROMPTS[:2], **options)
    steered = result.table[result.table["coefficient"] == 1]
    assert steered["text"].tolist() == sk.generate(
        model, tokenizer, PROMPTS[:2], max_new_tokens=4, steering=Steering(v, 1.0)
    )
    assert set(result.table["site"]) == {"mlp_out"}
    assert steered["relative_dose"].gt(0).all()
    again = sk.sweep(model, tokenizer, v, PROMPTS[:2], **options)
    assert again.table["text"].tolist() == result.table["text"].tolist()
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
