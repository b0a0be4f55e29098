"""Sites: what is read there equals the block computed by hand, and what is written there arrives."""

from __future__ import annotations

import contextlib
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit as sk
from steerkit.capture.resid import capture_resid
from steerkit.models.blocks import find_blocks
from steerkit.models.hooks import HookPoint, edit_points, observe_points
from steerkit.models.site_names import SITES
from steerkit.models.sites import NoSite, find_sites, points_at
from tests.small_models import build
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 17, 200, 33, 8, 91, 4]])
TEXTS = ["a", "Two words", "A longer text, with a comma.", "the end"]


def by_hand(kind: str, model: Any, ids: Tensor) -> list[dict[str, Tensor]]:
    """The sites of every block of a tiny model, from its formula, `[1, pos, width]` each."""
    width = ids.shape[1]
    mask = torch.full((width, width), -torch.inf).triu(1)
    base = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(kind, "model")
    owner = getattr(model, base)
    blocks = list(find_blocks(model).modules.values())
    positions = torch.arange(width)[None]
    with torch.no_grad():
        if kind == "gpt2":
            stream = owner.wte(ids) + owner.wpe(positions)
        elif kind == "gpt_neox":
            stream = owner.embed_in(ids)
        else:
            stream = owner.embed_tokens(ids)
        found = []
        for block in blocks:
            sites = {"resid_pre": stream}
            if kind == "gpt2":
                sites |= attention(model, block.ln_1(stream), mask, *gpt2_heads(block.attn, block.ln_1(stream)))
                sites["attn_out"] = block.attn.c_proj(sites["z"])
                sites["resid_mid"] = stream + sites["attn_out"]
                sites["mlp_out"] = block.mlp(block.ln_2(sites["resid_mid"]))
            elif kind == "gpt_neox":
                given = block.input_layernorm(stream)
                cos, sin = owner.rotary_emb(given, positions)
                sites["attn_out"] = block.attention(given, mask[None, None], position_embeddings=(cos, sin))[0]
                sites["mlp_out"] = block.mlp(block.post_attention_layernorm(stream))
            else:
                given = block.input_layernorm(stream)
                cos, sin = owner.rotary_emb(given, positions)
                out = block.self_attn(given, position_embeddings=(cos, sin), attention_mask=mask[None, None])[0]
                if kind == "gemma2":
                    sites["attn_out"] = block.post_attention_layernorm(out)
                    sites["resid_mid"] = stream + sites["attn_out"]
                    inner = block.mlp(block.pre_feedforward_layernorm(sites["resid_mid"]))
                    sites["mlp_out"] = block.post_feedforward_layernorm(inner)
                else:
                    sites["attn_out"] = out
                    sites["resid_mid"] = stream + out
                    sites["mlp_out"] = block.mlp(block.post_attention_layernorm(sites["resid_mid"]))
            stream = stream + sites["attn_out"] + sites["mlp_out"]
            found.append({**sites, "resid_post": stream})
    return found


def gpt2_heads(attn: Any, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attn.c_attn(given).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    return q, k, v


def attention(model: Any, given: Tensor, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
    return {"z": (weights @ v).transpose(1, 2).flatten(-2)}


def read_all(model: Any, ids: Tensor, sites: list[str]) -> dict[str, dict[Any, Tensor]]:
    found = {}
    for site in sites:
        with torch.no_grad(), capture_resid(model, site=site) as read:
            model(input_ids=ids, use_cache=False)
        found[site] = read
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox"])
def test_every_site_equals_the_block_computed_by_hand(kind: str) -> None:
    model = tiny_model(kind)
    truth = by_hand(kind, model, IDS)
    read = read_all(model, IDS, [site for site in SITES if site in truth[0]])
    for layer, sites in enumerate(truth):
        for site, value in sites.items():
            torch.testing.assert_close(read[site][layer], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "gpt2", "gpt_neox", "bloom", "opt", "falcon", "granite", "mixtral"]
)
def test_the_sites_of_a_block_add_up_to_its_output_in_a_padded_batch(kind: str) -> None:
    """Norms after a sublayer, outputs inside the residual's module, flattened tokens, in-place sums, a multiplier."""
    model = build(kind)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    sites = [site for site in SITES if find_sites(model).layers(site) or site == "resid_post"]
    assert set(sites) >= {"resid_pre", "z", "attn_out", "mlp_out", "resid_post"}
    read = {}
    for site in sites:
        with torch.no_grad(), capture_resid(model, site=site) as read[site]:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    for layer in range(len(find_blocks(model))):
        pre, attn, mlp = (read[site][layer] for site in ("resid_pre", "attn_out", "mlp_out"))
        torch.testing.assert_close(pre + attn + mlp, read["resid_post"][layer], rtol=1e-4, atol=1e-4)
        if "resid_mid" in sites:
            torch.testing.assert_close(pre + attn, read["resid_mid"][layer], rtol=1e-4, atol=1e-4)


def test_heads_projected_one_by_one_add_up_to_the_attention_output() -> None:
    model = tiny_model("llama")
    read = read_all(model, IDS, ["z", "attn_out"])
    sites = find_sites(model)
    assert sites.heads == dict.fromkeys(range(4), (4, 8))
    for layer, z in read["z"].items():
        weight = model.model.layers[layer].self_attn.o_proj.weight
        slices = zip(z.split(8, -1), weight.split(8, -1), strict=True)
        torch.testing.assert_close(sum(a @ w.T for a, w in slices), read["attn_out"][layer])


def test_the_heads_of_one_layer_read_their_own_values_only() -> None:
    """At position 0 a head returns its value vector, so `z` there is the value of the head's group."""
    model = tiny_model("llama")
    z = read_all(model, IDS, ["z"])["z"][0][0, 0]
    with torch.no_grad(), capture_resid(model, 0, site="resid_pre") as read:
        model(input_ids=IDS)
    block = model.model.layers[0]
    values = block.self_attn.v_proj(block.input_layernorm(read[0][0, 0])).detach()
    torch.testing.assert_close(z.view(4, 8), values.view(2, 8).repeat_interleave(2, 0))


@pytest.mark.parametrize("kind", ["gpt_neox", "gptj", "phi", "falcon"])
def test_parallel_blocks_have_no_resid_mid(kind: str) -> None:
    model = build(kind)
    with pytest.raises(NoSite, match=r"resid_mid is refused: the MLP does not read it.*attn_out, mlp_out, resid_post"):
        sk.collect(model, tiny_tokenizer(), TEXTS, site="resid_mid", layers=1)


def test_recurrent_layers_have_no_heads_and_keep_their_output() -> None:
    model = build("jamba")
    sites = find_sites(model)
    assert sites.layers("z") == [1, 3] and sites.layers("attn_out") == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match=r"z was verified at 2 of 4 layers; .* leaves out \[0, 2\] \(z of layer 0: no"):
        acts = sk.collect(model, tiny_tokenizer(), TEXTS, site="z")
    assert acts.layers == (1, 3)
    with pytest.raises(NoSite, match="z is refused"):
        sk.collect(model, tiny_tokenizer(), TEXTS, site="z", layers=0)


def real_like(kind: str, change: str, dtype: torch.dtype) -> Any:
    """A tiny model with a property of real checkpoints."""
    model = build(kind) if kind in ("granite", "mixtral") else tiny_model(kind)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        if change == "a large stream":
            embedding *= 20
        if change == "a token with a large embedding":
            embedding[3] *= 3e4 if dtype == torch.float32 else 100
        if change == "small attention":
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "attn.c_proj.weight", "attention.dense.weight")):
                    parameter *= 1e-4
    return model.to(dtype)


@pytest.mark.parametrize("change", ["a large stream", "a token with a large embedding", "small attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "granite", "mixtral"])
def test_every_site_is_verified_in_every_dtype_however_small_beside_the_stream(
    kind: str, dtype: torch.dtype, change: str
) -> None:
    model = real_like(kind, change, dtype)
    found = find_sites(model)
    layers = list(range(len(find_blocks(model))))
    for site in SITES[:-1]:
        refused = site == "resid_mid" and kind == "gpt_neox"
        assert found.layers(site) == ([] if refused else layers), (site, found.reasons)
    if refused := {place: reason for place, reason in found.reasons.items() if place[0] == "resid_mid"}:
        assert all("MLP does not read it" in reason for reason in refused.values())


def test_a_model_without_attention_says_so_of_its_heads() -> None:
    with pytest.raises(NoSite, match="z is refused: the configuration names no attention heads"):
        sk.collect(build("mamba"), tiny_tokenizer(), TEXTS, site="z", layers=1)


class Scaled(nn.Module):
    """A block that multiplies its whole output, so that its parts do not add up to it."""

    def __init__(self, block: nn.Module, factor: float) -> None:
        super().__init__()
        self.block, self.factor = block, factor

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.block(hidden_states, **kwargs) * self.factor


class ReadsBefore(nn.Module):
    """A block whose MLP also reads the stream before attention."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        block = self.block
        attn = block.self_attn(block.input_layernorm(hidden_states), **kwargs)[0]
        middle = hidden_states + attn
        return middle + block.mlp(block.post_attention_layernorm(middle + 0.3 * hidden_states))


class LooksBack(nn.Module):
    """An MLP that also reads the position before."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def looking_back(block: Any) -> Any:
    block.mlp = LooksBack(block.mlp)
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_dtype_hides_a_block_whose_parts_are_none(dtype: torch.dtype) -> None:
    for change, reason in (
        (lambda block: Scaled(block, 1.05), "no two modules .* add up"),
        (ReadsBefore, "mlp_out is no function of resid_mid"),
        (looking_back, "also where attn_out is zero"),
    ):
        model = tiny_model("llama").to(dtype)
        model.model.layers[2] = change(model.model.layers[2])
        with pytest.raises(NoSite, match=f"attn_out is refused: .*{reason}"):
            sk.collect(model, tiny_tokenizer(), TEXTS, site="attn_out", layers=2)
        assert find_sites(model).layers("mlp_out") == [0, 1, 3]


def test_a_block_whose_parts_do_not_add_up_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = Scaled(model.model.layers[2], 1.5)
    for site in ("attn_out", "mlp_out", "resid_mid", "z"):
        with pytest.raises(NoSite, match=f"{site} is refused: no two modules .* add up"):
            sk.collect(model, tiny_tokenizer(), TEXTS, site=site, layers=2)
        assert find_sites(model).layers(site) == [0, 1, 3]
    assert find_sites(model).layers("resid_pre") == [0, 1, 2, 3]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_collect_reads_a_site_in_batches_as_alone(kind: str, site: str) -> None:
    model = build("opt") if kind == "opt" else tiny_model(kind)
    tokenizer = tiny_tokenizer()
    together = sk.collect(model, tokenizer, TEXTS, site=site, batch_tokens=10_000)
    assert together.site == site
    means = sk.collect_means(model, tokenizer, TEXTS, site=site)
    torch.testing.assert_close(means.mean[0], together.resid.double().mean(0))
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad(), capture_resid(model, site=site) as read:
            model(input_ids=ids, use_cache=False)
        slow = torch.stack([read[layer][0, -1] for layer in together.layers])
        torch.testing.assert_close(together.resid[row], slow, rtol=1e-4, atol=1e-5)


def test_resid_pre_is_the_stream_after_the_block_before(llama: Any) -> None:
    model, tokenizer = llama
    pre = sk.collect(model, tokenizer, TEXTS, site="resid_pre")
    post = sk.collect(model, tokenizer, TEXTS, layers=["embed", 0, 1, 2])
    assert torch.equal(pre.resid, post.resid)


def test_unknown_sites_and_embed_at_other_sites_are_refused(llama: Any) -> None:
    model, tokenizer = llama
    with pytest.raises(ValueError, match="expected a site among"):
        sk.collect(model, tokenizer, TEXTS, site="mlp")
    with pytest.raises(ValueError, match="got 'embed'"):
        sk.collect(model, tokenizer, TEXTS, site="attn_out", layers=["embed"])


def test_a_summand_is_read_without_the_edit_of_its_sum_in_any_order_of_contexts() -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    points = points_at(model, blocks, [("attn_out", 1), ("resid_mid", 1)])
    attn = {0: points["attn_out", 1]}
    mid = {0: points["resid_mid", 1]}
    plain = read_all(model, IDS, ["attn_out", "resid_mid"])

    def run(order: int) -> tuple[Tensor, Tensor]:
        read: dict[str, Tensor] = {}
        contexts = [
            edit_points(mid, lambda _, value: value + 5),
            edit_points(attn, lambda _, value: 2 * value),
            observe_points(attn, lambda _, value: read.__setitem__("attn", value.clone())),
            observe_points(mid, lambda _, value: read.__setitem__("mid", value.clone())),
        ]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for context in contexts[order:] + contexts[:order]:
                stack.enter_context(context)
            model(input_ids=IDS)
        return read["attn"], read["mid"]

    for order in range(4):
        attn_read, mid_read = run(order)
        torch.testing.assert_close(attn_read, 2 * plain["attn_out"][1])
        torch.testing.assert_close(mid_read, plain["resid_mid"][1] + plain["attn_out"][1] + 5)


def test_an_edit_that_changes_nothing_changes_no_bit_and_no_hook_is_left() -> None:
    model = build("granite")  # its sublayers' outputs are multiplied
    points = points_at(model, find_blocks(model), [(site, 1) for site in SITES])
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with edit_points(points, lambda _, value: value.clone()) as called:
            assert torch.equal(model(input_ids=IDS).logits, plain)
    assert called == set(points)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {type(point) for point in points.values()} == {HookPoint}


def test_sites_are_found_again_after_an_adapter_replaced_their_modules() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    before = find_sites(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False))
    after = find_sites(wrapped)
    assert after is not before and after.points.keys() == before.points.keys()
    read = read_all(wrapped, IDS, ["resid_pre", "attn_out", "mlp_out", "resid_post"])
    total = read["resid_pre"][1] + read["attn_out"][1] + read["mlp_out"][1]
    torch.testing.assert_close(total, read["resid_post"][1])


@pytest.mark.parametrize("first", ["while the adapter is off", "before the adapter is trained", "with the adapter"])
def test_heads_are_steered_before_an_adapter_of_the_output_projection_reads_them(first: str) -> None:
    from peft import LoraConfig, get_peft_model

    trained = first != "before the adapter is trained"
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["o_proj"], init_lora_weights=not trained)
    model = get_peft_model(tiny_model("llama"), config)
    with model.disable_adapter() if first == "while the adapter is off" else nullcontext():
        find_sites(model)
    if not trained:
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.3)
    projection = model.base_model.model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        handle = projection.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 3,))
        wanted = model(input_ids=IDS).logits
        handle.remove()
        push = sk.SteeringVector({1: torch.full((32,), 3.0)}, site="z")
        with sk.Steering(push, 1.0, "all", foreign=True).on(model):
            steered = model(input_ids=IDS).logits
    torch.testing.assert_close(steered, wanted)
    assert not torch.allclose(steered, plain, atol=0.1)


@pytest.mark.parametrize("operation", ["add", "ablate", "rotate"])
def test_sites_that_are_first_asked_for_inside_a_steering_are_those_of_the_unsteered_model(operation: str) -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    vector = sk.SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    with sk.Steering(vector, 2.0, "all", operation).on(model):
        with torch.no_grad(), capture_resid(model, [1, 2], site="mlp_out") as inside:
            model(input_ids=IDS)
        found = find_sites(model)
    assert {site: found.layers(site) for site in SITES} == {site: find_sites(plain).layers(site) for site in SITES}
    with (
        sk.Steering(vector, 2.0, "all", operation).on(plain),
        torch.no_grad(),
        capture_resid(plain, [1, 2], site="mlp_out") as known,
    ):
        plain(input_ids=IDS)
    assert all(torch.equal(inside[layer], known[layer]) for layer in (1, 2))


@pytest.mark.parametrize("heads", [4, 16])
def test_finding_the_sites_runs_a_block_equally_often_whatever_its_number_of_heads(heads: int) -> None:
    config = tiny_model("llama").config
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, heads, 32 // heads
    model = type(tiny_model("llama"))(config).eval()
    find_blocks(model)
    count = 0

    def counting(*_: Any) -> None:
        nonlocal count
        count += 1

    with contextlib.ExitStack() as stack:
        stack.callback(model.model.layers[1].register_forward_hook(counting).remove)
        sites = find_sites(model)
    assert sites.heads[1] == (heads, 32 // heads)
    assert count == 18


def test_a_dose_at_a_site_of_some_layers_warns_of_no_layers_that_nobody_named() -> None:
    model, tokenizer = build("jamba"), tiny_tokenizer()
    (layer, *_) = find_sites(model).layers("z")
    with pytest.warns(UserWarning, match="layers='all' leaves out"):
        acts = sk.collect(model, tokenizer, TEXTS, site="z", labels=["a", "b"] * 2)
    vector = sk.difference_in_means(acts, "a", "b").at(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.generate(model, tokenizer, TEXTS[:1], max_new_tokens=2, steering=sk.Steering(vector, dose=0.2))
