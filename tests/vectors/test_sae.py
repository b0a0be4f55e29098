"""Rows of sae-lens files are vectors at the file's layer and site; their thresholds are where the feature is active."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import steerkit as sk
from tests.tiny import tiny_model, tiny_tokenizer

D_IN, D_SAE = 32, 12
OLD = {  # as sae-lens before version 6 writes it
    "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
    "model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2, "hook_head_index": None,
    "activation_fn_str": "relu", "apply_b_dec_to_input": True, "normalize_activations": "none",
    "finetuning_scaling_factor": False, "context_size": 128, "prepend_bos": True, "neuronpedia_id": "gpt2-small/2-res",
}  # fmt: skip
NEW = {  # as version 6 writes it
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
    "normalize_activations": "none", "reshape_activations": "none", "architecture": "jumprelu",
    "metadata": {
        "model_name": "tiny", "hook_name": "blocks.1.hook_mlp_out", "hook_head_index": None, "prepend_bos": True,
        "sae_lens_version": "6.12.1", "sae_lens_training_version": "6.12.1",
    },
}  # fmt: skip


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,), "threshold": (D_SAE,),
        "b_gate": (D_SAE,), "b_mag": (D_SAE,), "r_mag": (D_SAE,),
    }  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "threshold": made["threshold"].abs()}


def write(folder: Path, config: Any, without: tuple[str, ...] = (), **changes: torch.Tensor) -> Path:
    """Write an autoencoder as `sae.save_model(folder)` does."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in {**tensors(), **changes}.items() if name not in without}
    if "threshold" not in without and config.get("architecture") != "jumprelu":
        kept.pop("threshold")
    save_file(kept, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def encode(x: torch.Tensor, config: Any) -> torch.Tensor:
    """The features of activations, written out."""
    w = tensors()
    given = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    if config["architecture"] == "gated":
        magnitude = (given @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        return magnitude * (given @ w["W_enc"] + w["b_gate"] > 0)
    before = given @ w["W_enc"] + w["b_enc"]
    level = w["threshold"] if config["architecture"] == "jumprelu" else torch.zeros(D_SAE)
    return before.relu() * (before > level)


GATED = {**OLD, "architecture": "gated"}


@pytest.mark.parametrize(
    ("config", "place"), [(OLD, (2, "resid_pre")), (NEW, (1, "mlp_out")), (GATED, (2, "resid_pre"))]
)
def test_a_row_is_the_decoder_s_at_layer_and_site_and_the_feature_is_active_above_the_threshold(
    config: Any, place: tuple[int, str], tmp_path: Path
) -> None:
    read = sk.read_sae(write(tmp_path, config), [3, 0, 11])
    assert list(read) == [3, 0, 11]
    x = 2 * torch.randn(500, D_IN, generator=torch.Generator().manual_seed(1))
    active = encode(x, config) > 0
    for index, row in read.items():
        assert row.index == index
        assert (list(row.decoder.layers), row.decoder.site) == ([place[0]], place[1])
        assert torch.equal(row.decoder.layers[place[0]], tensors()["W_dec"][index])
        reads = (
            (1, "resid_post") if config is not NEW else place
        )  # resid_pre of a layer is resid_post of the one before
        assert (list(row.encoder.layers), row.encoder.site) == ([reads[0]], reads[1])
        assert torch.equal(row.encoder.layers[reads[0]], tensors()["W_enc"][:, index])
        along = x @ row.encoder.unit().layers[reads[0]]
        assert torch.equal(along > row.above, active[:, index]) and 0 < int(active[:, index].sum()) < 500
    assert read[3].decoder.meta["source"]["row"] == 3 and read[3].decoder.meta["checkpoint"] == (
        "tiny" if config is NEW else "gpt2-small"
    )


def test_a_row_steers_at_its_site_and_survives_a_vector_file(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    row = sk.read_sae(write(tmp_path / "sae", NEW) / "sae_weights.safetensors", 5)[5]
    row.decoder.save(tmp_path / "row.safetensors")
    again = sk.SteeringVector.load(tmp_path / "row.safetensors")
    assert again == row.decoder and again.meta["source"] == row.decoder.meta["source"]
    prompts = ["The sea is", "x = 1"]
    plain = sk.generate(model, tokenizer, prompts, max_new_tokens=6)
    assert sk.generate(model, tokenizer, prompts, max_new_tokens=6, steering=sk.Steering(again, 8.0)) != plain


def test_a_condition_on_a_row_of_resid_pre_holds_at_the_tokens_where_the_feature_is_active(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = sk.read_sae(write(tmp_path, OLD), range(D_SAE))
    for several in (np.arange(D_SAE), torch.arange(D_SAE)):
        assert list(sk.read_sae(tmp_path, several)) == list(rows)
    ids = torch.tensor([sk.render(tokenizer, "The sea is calm today").ids])
    with sk.capture_resid(model, [1, 2]) as plain, torch.no_grad():
        model(ids)
    active = encode(plain[1][0], OLD) > 0
    row = next(row for row in rows.values() if 0 < int(active[1:, row.index].sum()) < len(active) - 1)
    condition = sk.Condition(row.encoder, above=row.above, decide="token")
    push = sk.SteeringVector({2: torch.ones(D_IN)})
    with (
        sk.Steering(push, 1.0, "all", when=condition).on(model),
        sk.capture_resid(model, 2) as steered,
        torch.no_grad(),
    ):
        model(ids)
    moved = (steered[2][0] - plain[2][0]).abs().amax(1) > 0.5
    assert torch.equal(moved, active[:, row.index])


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.1.hook_resid_post", (1, "resid_post")),
        ("blocks.0.hook_resid_mid", (0, "resid_mid")),
        ("blocks.3.hook_attn_out", (3, "attn_out")),
        ("blocks.3.attn.hook_z", (3, "z")),
        ("model.layers.2", (2, "resid_post")),
    ],
)
def test_hook_names_give_layer_and_site(hook: str, place: tuple[int, str], tmp_path: Path) -> None:
    decoder = sk.read_sae(write(tmp_path, {**NEW, "metadata": {"hook_name": hook}}), 0)[0].decoder
    assert (next(iter(decoder.layers)), decoder.site) == place


@pytest.mark.parametrize(
    ("config", "without", "reason"),
    [
        ({"architecture": "topk"}, (), "compares features with each other"),
        ({"architecture": "standard", "activation_fn_str": "topk"}, (), "a topk autoencoder compares features"),
        ({"architecture": "standard", "activation_fn": "topk"}, (), "a topk autoencoder compares features"),
        (
            {"activation_fn_str": "identity"},
            (),
            r"its activation function is 'identity', none of \('relu', 'tanh-relu'",
        ),
        ({"architecture": "gated"}, ("b_mag",), "the file lacks b_mag"),
        ({"normalize_activations": "layer_norm"}, (), r"normalised \(layer_norm\)"),
        ({}, ("threshold",), "the file lacks threshold"),
        ({"architecture": "standard"}, ("b_enc",), "the file lacks b_enc"),
    ],
)
def test_a_row_without_a_fixed_threshold_is_read_and_its_threshold_refused_with_the_reason(
    config: Any, without: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    row = sk.read_sae(write(tmp_path, {**NEW, **config}, without), 1)[1]
    assert row.threshold is None and row.decoder.d_model == D_IN
    with pytest.raises(ValueError, match=reason):
        _ = row.above


BAD: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "no hook name": ({"metadata": {}}, {}, 0, "it lacks one"),
    "a hook that is no site": ({"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}}, {}, 0, "no site that can"),
    "one head": ({"metadata": {**NEW["metadata"], "hook_head_index": 3}}, {}, 0, "one head"),  # type: ignore[dict-item]
    "two layers": ({"hook_layer": 7}, {}, 0, "hook_layer 7"),
    "a transcoder": ({"architecture": "transcoder"}, {}, 0, "decoder may write elsewhere"),
    "no decoder": ({}, {"without": ("W_dec",)}, 0, "it lacks W_dec"),
    "no encoder": ({}, {"without": ("W_enc",)}, 0, "it lacks W_enc"),
    "another width": ({"d_in": 64}, {}, 0, "different autoencoders"),
    "a row outside": ({}, {}, 12, "a row below 12"),
    "a negative row": ({}, {}, -1, "indices from 0"),
    "a row by name": ({}, {}, "first", "indices from 0"),
    "no rows": ({}, {}, [], "indices from 0"),
    "a decoder of one dimension": ({}, {"W_dec": torch.ones(D_SAE)}, 0, r"of one shape; got \[12\]"),
    "an encoder of one dimension": ({}, {"W_enc": torch.ones(D_SAE)}, 0, r"of one shape; .* \[12\] and"),
    "a short encoder bias": ({}, {"b_enc": torch.ones(3)}, 7, r"expected b_enc of shape \[12\]; got \[3\]"),
    "a short decoder bias": (
        {"apply_b_dec_to_input": True},
        {"b_dec": torch.ones(3)},
        7,
        r"expected b_dec of shape \[32\]; got \[3\]",
    ),
    "a row that is not finite": ({}, {"W_dec": torch.full((D_SAE, D_IN), float("nan"))}, 0, "finite vector"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_names_what_a_file_lacks(name: str, tmp_path: Path) -> None:
    config, given, rows, message = BAD[name]
    folder = write(tmp_path, {**NEW, **config}, **given)
    with pytest.raises(ValueError, match=message):
        sk.read_sae(folder, rows)


@pytest.mark.parametrize(("config", "name"), [(OLD, "b_enc"), (OLD, "b_dec"), (NEW, "threshold"), (GATED, "r_mag")])
def test_a_threshold_that_is_not_finite_is_none_with_the_reason(config: Any, name: str, tmp_path: Path) -> None:
    row = sk.read_sae(write(tmp_path, config, **{name: tensors()[name] * float("nan")}), 1)[1]
    assert row.threshold is None and name in row.reason and row.reason.endswith("not all finite numbers")


def test_the_hook_point_of_the_first_versions_is_read(tmp_path: Path) -> None:
    config = {name: value for name, value in OLD.items() if not name.startswith("hook_")}
    row = sk.read_sae(write(tmp_path, {**config, "hook_point": "blocks.2.hook_mlp_out", "hook_point_layer": 2}), 0)[0]
    assert (list(row.decoder.layers), row.decoder.site) == ([2], "mlp_out")


def test_numpy_arrays_of_gemma_scope_are_refused_by_their_format(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "params.npz"):
        with pytest.raises(ValueError, match=r"got .*params\.npz, numpy arrays, as Gemma Scope"):
            sk.read_sae(path, 0)
    assert sk.read_sae(write(tmp_path, NEW), 0)[0].index == 0


@pytest.mark.parametrize("hook", ["attn_out", "resid_mid"])
def test_a_row_of_another_site_conditions_a_steering_there_at_the_tokens_where_it_is_active(
    hook: str, tmp_path: Path
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    config = {**NEW, "metadata": {"hook_name": f"blocks.1.hook_{hook}"}}
    rows = sk.read_sae(write(tmp_path, config, threshold=torch.zeros(D_SAE), b_enc=torch.zeros(D_SAE)), range(D_SAE))
    ids = torch.tensor([sk.render(tokenizer, "The sea is calm today").ids])
    with sk.capture_resid(model, 1, site=hook) as plain, torch.no_grad():
        model(ids)
    for row in rows.values():
        active = plain[1][0] @ tensors()["W_enc"][:, row.index] > 0
        condition = sk.Condition(row.encoder, above=row.above, decide="token")
        with (
            sk.Steering(row.decoder, 3.0, "all", when=condition).on(model),
            sk.capture_resid(model, 1, site=hook) as steered,
            torch.no_grad(),
        ):
            model(ids)
        moved = (steered[1][0] - plain[1][0]).abs().amax(1) > 0.5
        assert torch.equal(moved, active)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected weights of sae-lens"):
        sk.read_sae(tmp_path / "none", 0)
    folder = write(tmp_path / "sae", NEW)
    (folder / "sae_weights.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        sk.read_sae(folder, 0)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        sk.read_sae(folder, 0)
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        sk.read_sae(folder, 0)
