"""A baked checkpoint has the steered model's logits without steerkit, and what cannot be exact is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerkit as sk
from steerkit.steering import bake as baking
from steerkit.steering.bake import RECORD, NotExact, ablated_everywhere
from tests.small_models import build
from tests.steering.test_steering import vector
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 2, 7, 30, 1], [8, 8, 40, 3, 6, 200]])
ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[1])).logits, f"{folder}.pt")
assert "steerkit" not in sys.modules
"""


def made(kind: str) -> Any:
    return tiny_model(kind) if kind in CONFIGS else build(kind)


def steered(model: Any, *steerings: sk.Steering, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits under hooks, one steering in another."""
    if not steerings:
        with torch.no_grad():
            return model(ids).logits
    with steerings[0].on(model):
        return steered(model, *steerings[1:], ids=ids)


def ablations(model: Any, seed: int = 0) -> list[sk.Steering]:
    """One direction, ablated wherever the stream of a model can be read."""
    return ablated_everywhere(model, vector(model, 0, seed=seed))


def without_steerkit(folder: Path, *baked: Path, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Logits of checkpoints in a process that cannot import steerkit."""
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", ALONE, str(folder / "ids.pt"), *map(str, baked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{one}.pt") for one in baked]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_a_process_without_steerkit_computes_the_logits_of_the_steered_model(tmp_path: Path) -> None:
    wanted = {}
    for kind in ("llama", "gpt2", "gpt_neox"):
        model = made(kind)
        steering = sk.Steering(vector(model, 0, 2), 1.5, "all", layer="all")
        wanted[sk.bake(model, tiny_tokenizer(), steering, tmp_path / kind)] = steered(model, steering)
        assert float((steered(model) - steered(model, steering)).norm()) > 0.1 * float(steered(model).norm())
    for kind in ("llama", "gpt2"):
        model = made(kind)
        several = ablations(model)
        wanted[sk.bake(model, tiny_tokenizer(), several, tmp_path / f"{kind} ablated")] = steered(model, *several)
    for found, logits in zip(without_steerkit(tmp_path, *wanted), wanted.values(), strict=True):
        close(found, logits)


@pytest.mark.parametrize("kind", ["bloom", "opt", "gptj", "granite", "mamba", "starcoder2"])
def test_an_addition_goes_into_the_bias_of_what_each_architecture_writes_last(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    if kind == "granite":
        model.config.residual_multiplier = 1.0
    steering = sk.Steering(vector(model, 1), 0.5, "all")
    sk.bake(model, tiny_tokenizer(), steering, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(steered(baked), steered(model, steering))


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen2", "opt", "gptj", "granite", "mamba", "phi", "falcon", "mpt"])
def test_an_ablated_direction_is_in_nothing_that_is_read_of_the_stream_at_any_position(kind: str, tmp_path) -> None:
    model = made(kind)
    several = ablations(model)
    sk.bake(model, tiny_tokenizer(), several, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(steered(baked), steered(model, *several))
    unit = several[0].vector.unit().layers[0]
    with sk.capture_resid(baked, "all") as streams, torch.no_grad():
        baked(IDS)
    for stream in streams.values():
        assert float((stream @ unit).abs().max()) < 1e-5 * float(stream.norm(dim=-1).max())


def test_a_tied_unembedding_is_stored_apart_and_not_projected(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.5, 2, 32))  # a gain that moves the stream out of the plane
    several = ablations(model)
    folder = sk.bake(model, tiny_tokenizer(), several, tmp_path / "out")
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], model.lm_head.weight)
    unit = several[0].vector.unit().layers[0]
    assert float((written["model.embed_tokens.weight"] @ unit).abs().max()) < 1e-6
    assert (
        not AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings and model.config.tie_word_embeddings
    )
    close(steered(AutoModelForCausalLM.from_pretrained(folder).eval()), steered(model, *several))


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "olmo2", "mixtral", "bart"])
def test_an_ablation_is_refused_where_norms_or_experts_write_to_the_stream(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    with pytest.raises(NotExact, match=r"Steer at run time"):
        sk.bake(model, tiny_tokenizer(), ablations(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_ablation_of_part_of_the_stream_or_of_several_directions_is_refused_by_name(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    several = ablations(model)
    with pytest.raises(NotExact, match="resid_mid of layer 0"):
        sk.bake(model, tokenizer, [one for one in several if one.site != "resid_mid"], tmp_path / "out")
    with pytest.raises(NotExact, match="resid_pre of layer 0"):
        sk.bake(model, tokenizer, [one for one in several if one.site != "resid_pre"], tmp_path / "out")
    with pytest.raises(NotExact, match="one direction"):
        sk.bake(model, tokenizer, [*several[:2], ablations(model, seed=9)[2]], tmp_path / "out")
    with pytest.raises(NotExact, match="additions alone or ablations alone"):
        sk.bake(model, tokenizer, [*several, sk.Steering(vector(model, 1), 1.0, "all")], tmp_path / "out")
    no_need = [one for one in several if one.site != "resid_pre"]
    first = sk.SteeringVector({0: vector(model, 0).layers[0]})
    no_need.append(sk.Steering(first, 1.0, "all+0", "ablate", site="resid_pre"))
    sk.bake(model, tokenizer, no_need, tmp_path / "out")  # resid_pre of layer 1 is resid_post of layer 0


@pytest.mark.parametrize("site", ["resid_mid", "attn_out", "mlp_out", "resid_pre"])
def test_an_addition_at_another_site_goes_into_the_bias_that_is_added_there(site: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    steering = sk.Steering(vector(model, 1), 1.0, "all", site=site)
    sk.bake(model, tiny_tokenizer(), steering, tmp_path / "out")
    close(steered(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), steered(model, steering))
    with pytest.raises(NotExact, match="right after an output projection"):
        sk.bake(model, tiny_tokenizer(), sk.Steering(vector(model, 0), 1.0, "all", site="resid_pre"), tmp_path / "no")


def test_two_additions_at_one_layer_add_up_and_the_model_itself_is_unchanged(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    several = [sk.Steering(vector(model, 1), 0.5, "all"), sk.Steering(vector(model, 1, seed=5), -1.0, "all+0")]
    sk.bake(model, tiny_tokenizer(), several, tmp_path / "out")
    close(steered(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), steered(model, *several))
    assert not hasattr(model.model.layers[0].mlp.down_proj, "bias") or model.model.layers[0].mlp.down_proj.bias is None
    assert not model.config.mlp_bias
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_embeddings_stay_tied_and_tokenizer_generation_settings_and_a_record_are_saved(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert model.config.tie_word_embeddings
    steering = sk.Steering(vector(model, 1), 2.0, "all")
    folder = sk.bake(model, tokenizer, steering, tmp_path / "new" / "out")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    baked = AutoModelForCausalLM.from_pretrained(folder)
    assert baked.lm_head.weight is baked.model.embed_tokens.weight
    assert baked.generation_config.eos_token_id == 256
    read = AutoTokenizer.from_pretrained(folder)
    assert read("calm sea")["input_ids"] == tokenizer("calm sea")["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    record = json.loads((folder / RECORD).read_text())
    assert [one["vector"] for one in record["steerings"]] == [steering.vector.content()]
    wanted, plain = steered(model, steering), steered(model)
    assert record["difference"] < 1e-5 and 0.5 < record["effect"] / float((plain - wanted).norm() / wanted.norm()) < 2
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_16_bit_weights_are_baked_in_their_own_type(tmp_path: Path) -> None:
    model = tiny_model("gpt2").to(torch.bfloat16)
    steering = sk.Steering(vector(model, 1), 1.0, "all")
    sk.bake(model, tiny_tokenizer(), steering, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert baked.dtype == torch.bfloat16
    assert float((steered(baked).float() - steered(model, steering).float()).norm()) < 0.03 * float(
        steered(baked).float().norm()
    )


def test_a_difference_of_the_size_of_the_effect_is_refused(tmp_path: Path) -> None:
    """In 16 bits a weak addition is lost in the rounding of the bias."""
    model = tiny_model("gpt2").to(torch.bfloat16)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias.normal_()
    weak = sk.Steering(vector(model, 1), 1e-3, "all")
    with pytest.raises(
        NotExact, match=r"within 0.1 of the steering's effect; they differ by .* weights are rounded to bfloat16"
    ):
        sk.bake(model, tiny_tokenizer(), weak, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    sk.bake(model, tiny_tokenizer(), weak.scaled(1.0), tmp_path / "out")
    assert json.loads((tmp_path / "out" / RECORD).read_text())["difference"] > 0
    sk.bake(model, tiny_tokenizer(), weak.scaled(0.0), tmp_path / "nothing")


def test_an_ablation_of_the_heads_is_refused_and_one_of_the_parts_is_part_of_the_streams(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    several = ablations(model)
    direction = vector(model, 1).layers[1]
    heads = sk.Steering(sk.SteeringVector({1: direction}, site="z"), 1.0, "all+0", "ablate")
    with pytest.raises(NotExact, match=r"expected ablations at sites among .*; got z, which other weights write"):
        sk.bake(model, tokenizer, [*several, heads], tmp_path / "out")
    same = sk.Steering(sk.SteeringVector({1: several[0].vector.layers[0]}, site="mlp_out"), 1.0, "all+0", "ablate")
    sk.bake(model, tokenizer, [*several, same], tmp_path / "out")
    close(steered(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), steered(model, *several, same))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions of new tokens": ("llama", {"positions": "generated"}, "expected positions 'all'"),
    "the first positions": ("llama", {"positions": "all:3"}, "expected positions 'all'"),
    "a rotation": ("llama", {"operation": "rotate"}, "no linear map"),
    "a clamp": ("llama", {"operation": "clamp:1"}, "no linear map"),
    "a coefficient per row": ("llama", {"coefficient": torch.ones(2)}, "one number as coefficient"),
    "an ablation that spares position 0": ("llama", {"operation": "ablate"}, "position 0 included"),
    "half an ablation": (
        "llama", {"operation": "ablate", "positions": "all+0", "coefficient": 0.5}, "coefficient 1"
    ),
    "an architecture without a bias": ("qwen2", {}, "has none there, and its configuration has no option"),
    "a norm after the output projection": ("gemma2", {}, "post_feedforward_layernorm"),
    "a norm after it in Olmo 2": ("olmo2", {}, "a norm"),
    "experts": ("mixtral", {}, "no output of one linear layer"),
    "an output that is scaled": ("granite", {}, "unscaled"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    kind, given, reason = REFUSED[name]
    model = made(kind)
    if kind == "granite":
        model.config.residual_multiplier = 0.5
        for block in model.model.layers:
            block.residual_multiplier = 0.5
    with pytest.raises(NotExact, match=reason):
        sk.bake(model, tiny_tokenizer(), sk.Steering(vector(model, 1), **{"positions": "all", **given}), tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_logits_that_differ_after_all_are_refused_and_leave_no_folder(tmp_path: Path, monkeypatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(baking, "LIMIT", -1.0)
    with pytest.raises(NotExact, match="they differ by"):
        sk.bake(model, tiny_tokenizer(), sk.Steering(vector(model, 1), 1.0, "all"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    model, steering = tiny_model(), sk.Steering(vector(tiny_model(), 1), 1.0, "all")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for path in (tmp_path / "full", tmp_path / "full" / "a"):
        with pytest.raises(FileExistsError, match="new or empty folder"):
            sk.bake(model, tiny_tokenizer(), steering, path)
    (tmp_path / "empty").mkdir()
    sk.bake(model, tiny_tokenizer(), steering, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_an_adapter_an_active_steering_and_another_model_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    steering = sk.Steering(vector(model, 1), 1.0, "all")
    with steering.on(model), pytest.raises(NotExact, match="without an active steering"):
        sk.bake(model, tokenizer, steering, tmp_path / "out")
    adapted = peft.get_peft_model(tiny_model(seed=2), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotExact, match="merge_and_unload"):
        sk.bake(adapted, tokenizer, steering, tmp_path / "out")
    with pytest.raises(TypeError, match="expected a Steering"):
        sk.bake(model, tokenizer, [steering, vector(model, 1)], tmp_path / "out")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="width"):
        sk.bake(model, tokenizer, sk.Steering(sk.SteeringVector({1: torch.ones(8)}), 1.0, "all"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
