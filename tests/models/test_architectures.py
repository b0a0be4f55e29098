"""Architectures of every kind: read where transformers says the stream is, and steered in a batch as alone.

`make architectures` does the same, by the doctor, for every causal language model of transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import steerkit as sk
from steerkit.doctor.report import examine
from steerkit.generation.batches import exact
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.models.blocks import NoResidualStream, find_blocks
from steerkit.steering.steering import Steering
from steerkit.text.tokens import pad
from steerkit.vectors.vector import SteeringVector
from tests import reference
from tests.architectures import ABSENT, NEED_GENERATION, Verdict, judge, page
from tests.small_models import build
from tests.tiny import tiny_tokenizer

KINDS = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "olmo2": "model.layers",  # norms after the sublayers
    "gpt2": "transformer.h",  # learnt positions
    "opt": "model.decoder.layers",  # learnt positions, counted off the mask
    "gpt_neox": "gpt_neox.layers",  # attention and MLP in parallel
    "gptj": "transformer.h",
    "cohere": "model.layers",
    "bloom": "transformer.h",  # ALiBi
    "mpt": "transformer.blocks",
    "mistral": "model.layers",  # a sliding window, narrower than the prompts here
    "gemma2": "model.layers",
    "llama4_text": "model.layers",  # attention in chunks
    "mixtral": "model.layers",  # experts
    "gpt_oss": "model.layers",
    "deepseek_v3": "model.layers",  # latent attention
    "deepseek_v32": "model.layers",  # and a choice of tokens
    "gemma3": "model.language_model.layers",  # text part of a composite model
    "bart": "model.decoder.layers",  # decoder of an encoder-decoder model
    "roberta": "roberta.encoder.layer",  # positions that do not begin at 0
    "qwen3_next": "model.layers",  # attention and recurrent layers in turns
    "bamba": "model.layers",
    "jamba": "model.layers",
    "zamba2": "model.layers",
    "falcon_h1": "model.layers",  # both in every layer
    "lfm2": "model.layers",
    "granitemoehybrid": "model.layers",
    "nemotron_h": "model.layers",
    "mamba": "backbone.layers",  # recurrent layers only
}
FROM_BLOCK_0 = {"mamba"}  # their hidden states begin after block 0, not with the embedding
BY_LENGTH = {"bart", "roberta"}  # prompts of unequal lengths never share a batch
HYBRID = ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "nemotron_h", "qwen3_next", "zamba2")
TEXTS = ("The sea is calm today, isn't it?", "Yes.", "One two three four")
NEW = 8


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request) -> Any:
    return build(request.param)


def states(model: Any, ids: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """transformers' hidden states, entry l + 1 after block l."""
    found = reference.hidden_states(model, ids)
    return found if model.config.model_type not in FROM_BLOCK_0 else (found[0], *found)


def prompts() -> list[tuple[int, ...]]:
    return [tuple(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS]


def push(model: Any) -> SteeringVector:
    """Three times as long as the stream is, at two neighbouring blocks: of an alternating model one of each kind."""
    generator = torch.Generator().manual_seed(0)
    after = states(model, prompts()[0])
    directions = {layer: torch.randn(after[layer + 1].shape[-1], generator=generator) for layer in (1, 2)}
    return SteeringVector({at: 3 * after[at + 1].norm(dim=-1).mean() * d / d.norm() for at, d in directions.items()})


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
def test_inner_layers_read_in_a_padded_batch_are_the_hidden_states_of_each_text_alone(request, model) -> None:
    name = request.node.callspec.params["model"]
    blocks = find_blocks(model)
    assert (blocks.path, type(model).__name__) == (KINDS[name], CLASSES[name])
    acts = sk.collect(model, tiny_tokenizer(), TEXTS, position="mean")
    for item, ids in enumerate(prompts()):
        truth = states(model, ids)
        for layer in range(len(blocks) - 1):
            mean = truth[layer + 1].mean(0)
            assert (acts.resid[item, layer] - mean).norm() < 1e-4 * mean.norm(), (layer, ids)


def test_a_steered_cached_batch_says_what_each_prompt_says_alone_without_a_cache(request, model) -> None:
    vector = push(model)
    rows = [Row(ids, (Steering(vector, 1.0, "from_last_prompt_token", layer="all"),)) for ids in prompts()]
    found = list(decode(model, tiny_tokenizer(), rows, range(len(rows)), max_new_tokens=NEW))
    fast = {number: list(continuation.ids) for batch in found for number, continuation in batch}
    slow = {
        number: reference.greedy(model, row.prompt, NEW, (256,), dict(vector.layers), 1.0, len(row.prompt) - 1)
        for number, row in enumerate(rows)
    }
    assert fast == slow
    bare = [reference.greedy(model, row.prompt, NEW, (256,)) for row in rows]
    assert all(bare[number] != slow[number] for number in slow)
    by_length = request.node.callspec.params["model"] in BY_LENGTH
    assert exact(model).padded is not by_length
    assert len(found) == (len(rows) if by_length else 1)


@pytest.mark.parametrize("name", HYBRID)
def test_the_model_s_own_generate_is_steered_at_the_same_positions_over_a_hybrid_cache(name: str) -> None:
    model = build(name)
    vector = push(model)
    ids, mask, _ = pad(prompts(), "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 256, "pad_token_id": 256}
    with Steering(vector, 1.0, "from_last_prompt_token", layer="all").on(model):
        found = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()
    for prompt, row in zip(prompts(), found, strict=True):
        own = row[: row.index(256)] if 256 in row else row
        assert own == reference.greedy(model, prompt, NEW, (256,), dict(vector.layers), 1.0, len(prompt) - 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v4", r"block 0 returns \[1, 5, 4, 64\]"),  # four streams
        ("gemma3n_text", r"block 0 returns \[4, 1, 5, 64\]"),
        ("prophetnet", r"block 0 returns \[1, 15, 64\] for 5 tokens"),  # three positions in one
        ("xlnet", r"block 0 returns \[5, 1, 64\]"),  # positions first
        ("reformer", "block 0 returns no single stream"),  # two streams
        ("xlm", "does not receive what block 0 returned"),  # no list of blocks: lists of their parts
        ("hrm_text", "no list of modules is as long"),  # blocks that run several times
        ("mllama", r"they ran as \[0, 1, 2\]"),  # blocks that run for pictures alone
        ("musicgen", "forwards ids and nothing else"),  # four ids per position
    ],
)
def test_a_model_without_one_stream_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(NoResidualStream, match=reason):
        find_blocks(build(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rwkv", "takes none of"),
        ("openai-gpt", "takes none of"),
        ("xlstm", "has no attribute 'rnn_state'"),
        ("minimax", "uses cache of its own"),
    ],
)
def test_a_model_whose_cache_is_its_own_is_read_and_not_generated_with(name: str, reason: str) -> None:
    model = build(name)
    findings = {finding.check: finding for finding in examine(model, tiny_tokenizer())}
    assert {check for check, finding in findings.items() if finding.state == "failed"} == NEED_GENERATION
    with pytest.raises(ValueError, match=reason):
        sk.generate(model, tiny_tokenizer(), ["ab"], max_new_tokens=1)
    assert judge(name).state == "refused"


def test_the_page_counts_every_state_and_names_the_worst_first() -> None:
    sites = {"resid_pre": [0, 1], "attn_out": [0, 1], "mlp_out": [0, 1], "z": [1]}
    written = page([Verdict("a", "A", "works", "fine", sites, {}, 2), Verdict("b", "B", "wrong", "cache: no")])
    assert "| a | A | resid_pre; z in 1; attn_out; mlp_out | fine |" in written
    assert "0 of 1. 1 more have each part verified" in " ".join(written.split())
    assert "1 works, 0 refused, 1 wrong, 0 not built." in written
    assert written.index("## Wrong (1)") < written.index("| b | B | cache: no |") < written.index("## Works (1)")


def test_a_type_is_complete_if_every_part_that_a_block_has_was_verified_in_every_block() -> None:
    both = {"attn_out": [0, 1], "mlp_out": [0, 1], "z": [0, 1]}
    no_attention = {("attn_out", 1): ABSENT[0], ("z", 1): ABSENT[0]}
    for sites, reasons, added, complete in (
        (both, {}, True, True),
        ({**both, "z": [0]}, {("z", 1): "attn_out does not depend on head 1"}, True, False),
        ({**both, "mlp_out": [0]}, {("mlp_out", 1): "another mlp_out does not arrive in the sum"}, False, False),
        ({"attn_out": [0], "mlp_out": [0, 1], "z": [0]}, no_attention, True, True),
        ({**both, "mlp_out": []}, {("mlp_out", layer): ABSENT[1] for layer in (0, 1)}, True, True),
    ):
        verdict = Verdict("a", "A", "works", "fine", sites, reasons, 2)
        assert (verdict.added, verdict.complete) == (added, complete), (sites, reasons)
