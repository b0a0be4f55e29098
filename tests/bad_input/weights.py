"""Cases: erasure, baking, and rows of sparse autoencoders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import steerkit as sk
from tests.bad_input.cases import LABELS, Case, Files, acts, model, push, tokenizer
from tests.tiny import tiny_model

BAKED: dict[str, tuple[Mapping[str, Any], str, str, str]] = {
    "at new positions only": ({"positions": "generated"}, "expected positions 'all'", "got 'generated'", "Steer at"),
    "of the first tokens": ({"positions": "all:3"}, "expected positions 'all'", "got 'all:3'", "Steer at"),
    "of a rotation": ({"operation": "rotate"}, "expected operation add or ablate", "got 'rotate'", "Use those"),
    "of one coefficient per row": ({"coefficient": torch.ones(2)}, "one number as coeff", "got one per row", "one at"),
    "of an ablation without position 0": (
        {"operation": "ablate"}, "position 0 included", "coefficient 1 and 'all'", "Pass those"
    ),
    "of an ablation at one layer": (
        {"operation": "ablate", "positions": "all+0"}, "of all layers", "are missing", "a Steering for each site"
    ),
}  # fmt: skip
CONFIG = {"d_in": 4, "d_sae": 3, "architecture": "standard", "hook_name": "blocks.1.hook_resid_post"}
SAES: dict[str, tuple[Mapping[str, Any], tuple[str, ...], Any, str, str, str]] = {
    "without a hook name": ({"hook_name": None}, (), 0, "expected hook_name", "it lacks one", "add it"),
    "of a hook that is no site": (
        {"hook_name": "blocks.1.hook_mlp_in"}, (), 0, "a hook_name such as", "got 'blocks.1.hook_mlp_in'", "Use"
    ),
    "of one head": ({"hook_head_index": 2}, (), 0, "of whole sites", "hook_head_index is 2", "Use one of all heads"),
    "of two layers": ({"hook_layer": 7}, (), 0, "expected one layer", "hook_layer 7", "Correct it"),
    "of a transcoder": ({"architecture": "transcoder"}, (), 0, "expected an architecture", "got 'transcoder'", "build"),
    "without a decoder": ({}, ("W_dec",), 0, "expected tensors W_dec", "it lacks W_dec", "Save it with sae-lens"),
    "of another width": ({"d_in": 9}, (), 0, "of one shape", "got [3, 4]", "belong to different autoencoders"),
    "at a row that is not there": ({}, (), 3, "expected a row below 3", "got 3", "Pass an index of a feature"),
    "at a row by name": ({}, (), "first", "expected feature indices from 0", "got 'first'", "Pass one integer"),
}  # fmt: skip


def bake(folder: Path, steering: Any, one: Any = None) -> object:
    return sk.bake(one or model(), tokenizer(), steering, folder / "out")


def sae_files(config: Mapping[str, Any], without: tuple[str, ...] = ()) -> Files:
    shapes = {"W_enc": (4, 3), "W_dec": (3, 4), "b_enc": (3,), "b_dec": (4,)}
    kept = {name: torch.ones(shape) for name, shape in shapes.items() if name not in without}
    return {"sae/cfg.json": json.dumps({**CONFIG, **config}).encode(), "sae/sae_weights.safetensors": save(kept)}


def weights_cases() -> Iterator[Case]:
    for name, (given, *says) in BAKED.items():
        steering = sk.Steering(push(), **{"positions": "all", **given})
        yield Case(f"baking {name}", lambda f, s=steering: bake(f, s), *says)
    added = sk.Steering(push(), 1.0, "all")
    yield Case(
        "baking of a vector", lambda f: bake(f, push()), "expected a Steering", "got SteeringVector", "Pass Steering(",
        TypeError,
    )  # fmt: skip
    yield Case(
        "baking into a folder that holds something", lambda f: bake(f, added), "a new or empty folder",
        "it holds something", "Name another", FileExistsError, {"out/a": b""},
    )  # fmt: skip
    yield Case(
        "baking into a norm", lambda f: bake(f, added, tiny_model("gemma2")), "expected a linear layer",
        "a norm (model.layers.1.post_feedforward_layernorm)", "Steer at run time",
    )  # fmt: skip
    yield Case(
        "baking without a bias", lambda f: bake(f, added, tiny_model("qwen2")), "expected a bias at",
        "has none there", "Steer at run time",
    )  # fmt: skip
    for name, (config, without, rows, *says) in SAES.items():
        yield Case(
            f"an autoencoder {name}", lambda f, r=rows: sk.read_sae(f / "sae", r), *says,
            files=sae_files(config, without),
        )  # fmt: skip
    yield Case(
        "an autoencoder that is not there", lambda f: sk.read_sae(f / "sae", 0), "expected weights of sae-lens",
        "there is no such file", "Check the path", FileNotFoundError,
    )  # fmt: skip
    yield Case(
        "an autoencoder without its configuration", lambda f: sk.read_sae(f / "sae", 0), "configuration of sae-lens",
        "there is none", "download it too", FileNotFoundError,
        {"sae/sae_weights.safetensors": sae_files({})["sae/sae_weights.safetensors"]},
    )  # fmt: skip
    yield Case(
        "erasure of a column that is not there", lambda _: sk.leace(acts(LABELS), label="agent"),
        "expected a column 'agent'", "got ['label'", "name another",
    )  # fmt: skip
    yield Case(
        "erasure of one class", lambda _: sk.leace(acts(["a", "a"])), "expected two classes at least", "got ['a']",
        "another class",
    )  # fmt: skip
    yield Case(
        "erasure with too much shrinkage", lambda _: sk.leace(acts(LABELS), shrinkage=2), "between 0 and 1", "got 2",
        "Pass a number such as 0.1",
    )  # fmt: skip
    yield Case(
        "erasure at a layer that was not read", lambda _: sk.erase(sk.leace(acts(LABELS * 3)), 3),
        "expected one of the layers that were read, [0]", "got 3", "Read it first",
    )  # fmt: skip
    yield Case(
        "probes after erasure of a column that is not there", lambda _: sk.probe_erased(acts(LABELS), erase="agent"),
        "expected a column 'agent'", "got ['label'", "name another",
    )  # fmt: skip
