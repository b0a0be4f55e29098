"""Wrong checkpoints: a block off, without the coefficient, with embeddings or biases that still write the direction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import steerkit as sk
from tests.steering.test_bake import ablations, close, steered
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

Bake = Callable[[Any, Any, list[sk.Steering], Path], None]


def check_a_checkpoint_has_the_logits_of_the_steered_model(bake: Bake, folder: Path, ablates: bool) -> None:
    model = tiny_model("gpt2", seed=4)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.bias.normal_()
    several = ablations(model) if ablates else [sk.Steering(vector(model, 1), 1.5, "all")]
    bake(model, tiny_tokenizer(), several, folder)
    close(steered(AutoModelForCausalLM.from_pretrained(folder).eval()), steered(model, *several))


ADDED = partial(check_a_checkpoint_has_the_logits_of_the_steered_model, ablates=False)
ABLATED = partial(check_a_checkpoint_has_the_logits_of_the_steered_model, ablates=True)


def ours(model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    sk.bake(model, tokenizer, several, folder)


def one_block_later(model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    (one,) = several
    sk.bake(model, tokenizer, sk.Steering(sk.SteeringVector({2: one.vector.layers[1]}), 1.5, "all"), folder)


def without_the_coefficient(model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    sk.bake(model, tokenizer, several[0].scaled(1.0), folder)


def _restored(part: str, model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    """Our checkpoint with some weights put back."""
    sk.bake(model, tokenizer, several, folder)
    baked = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in baked.named_parameters():
        if part in name and "lm_head" not in name:
            weight.data = model.get_parameter(name).data.clone()
    baked.save_pretrained(folder)


def without_the_embeddings(model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    _restored(".wte.", model, tokenizer, several, folder)


def without_the_position_embeddings(model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    _restored(".wpe.", model, tokenizer, several, folder)


def without_the_biases(model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    _restored("c_proj.bias", model, tokenizer, several, folder)


def with_a_projected_unembedding(model: Any, tokenizer: Any, several: list[sk.Steering], folder: Path) -> None:
    """As with embeddings that stay tied; the final norm has brought a component along the direction back."""
    sk.bake(model, tokenizer, several, folder)
    baked = AutoModelForCausalLM.from_pretrained(folder)
    baked.lm_head.weight.data = baked.transformer.wte.weight.data.clone()
    baked.save_pretrained(folder)


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    **{
        f"a baked addition {mutant.__name__.replace('_', ' ')}": (ADDED, ours, mutant)
        for mutant in (one_block_later, without_the_coefficient)
    },
    **{
        f"a baked ablation {mutant.__name__.replace('_', ' ')}": (ABLATED, ours, mutant)
        for mutant in (
            without_the_embeddings, without_the_position_embeddings, without_the_biases, with_a_projected_unembedding
        )
    },
}  # fmt: skip
