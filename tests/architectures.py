"""Every causal language model of the installed transformers, small and random, put before the doctor.

`make architectures` (`python -m tests.architectures`) writes docs/architectures.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.utils import logging

from steerkit.artifacts import versions, write_text
from steerkit.blocks import NoResidualStream, find_blocks
from steerkit.doctor import Finding, examine
from tests.tiny import VOCABULARY, tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SECONDS = 180
LAYERS, WIDTH, HEADS, HEAD, INNER, EXPERTS = 4, 64, 4, 16, 96, 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "decoder_hidden_size", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), INNER),
    **dict.fromkeys(("d_ff", "ffn_hidden_size", "dff", "feed_forward_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 256,
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "state_size": 16,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "use_mamba_kernels": False,
    "is_decoder": True,
    "image_size": 32,
    "patch_size": 8,
    "type_vocab_size": 2,
}
"""What one rule makes small; a configuration takes what it has a field for."""
PARTICULAR: dict[str, dict[str, Any]] = {}
"""Per model type, what the rule does not know."""


@dataclass(frozen=True)
class Verdict:
    """What became of one architecture.

    Args:
        name: the model type.
        made: the class that was built, or that the mapping names.
        state: `works`; `refused`, by name and with the reason; `wrong`, a check failed; `not built`.
        said: where its blocks are and what one has to know, or why not.
    """

    name: str
    made: str
    state: str
    said: str


def small_config(name: str) -> Any:
    """The configuration of a model type, made small."""
    kind = CONFIG_MAPPING[name]
    return kind(**_small(kind))


def _small(kind: Any) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {name: value for name, value in SIZES.items() if name in fields}
    for name, part in kind.sub_configs.items():
        if part is not AutoConfig and dataclasses.is_dataclass(part):
            found[name] = _small(part)
    return found | PARTICULAR.get(kind.model_type, {})


def build(name: str) -> Any:
    """A small random model of a type; of a composite one that has no causal class of its own, its text part."""
    config = small_config(name)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception:
        text = config.get_text_config(decoder=True)
        if text is config:
            raise
        model = AutoModelForCausalLM.from_config(text, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    return model.eval()


def judge(name: str) -> Verdict:
    """Build it and put it before the doctor."""
    made = CLASSES[name]
    try:
        with _limit(SECONDS):
            model = build(name)
    except Exception as error:  # whatever a third party's class raises is the reason to be written down
        return Verdict(name, str(made), "not built", _line(error))
    made = type(model).__name__
    try:
        with _limit(SECONDS):
            blocks = find_blocks(model)
            findings = examine(model, tiny_tokenizer())
    except NoResidualStream as error:
        return Verdict(name, made, "refused", _reason(error))
    except TimeoutError as error:
        return Verdict(name, made, "wrong", _line(error))
    return _verdict(name, made, blocks.path, findings)


def _verdict(name: str, made: str, path: str, findings: Sequence[Finding]) -> Verdict:
    failed = [finding for finding in findings if finding.state == "failed"]
    said = {finding.check: finding.said for finding in findings}
    if not failed:
        notes = [f"blocks at `{path}`"]
        if "token by token" in said["cache"]:
            notes.append("scored token by token")
        if "equal output_hidden_states;" not in said["hidden states"] and "all layers" not in said["hidden states"]:
            notes.append(said["hidden states"])
        return Verdict(name, made, "works", "; ".join(notes))
    if all(finding.said.startswith("expected a model that forwards") or _refuses(finding) for finding in failed):
        return Verdict(
            name, made, "refused", "read, and steered in plain forwards; not generated with: " + _first(failed)
        )
    return Verdict(name, made, "wrong", "; ".join(f"{finding.check}: {finding.said}" for finding in failed))


def _refuses(finding: Finding) -> bool:
    return finding.said.startswith("expected a cached, left-padded batch")


def _first(failed: Sequence[Finding]) -> str:
    return _line(failed[0].said)


def _reason(error: Exception) -> str:
    """The reasons of the candidates, without the advice around them."""
    lines = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    return _line("; ".join(lines) or str(error))


def _line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) < 240 else text[:237] + "...").replace("|", "\\|")


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def page(verdicts: Sequence[Verdict]) -> str:
    """docs/architectures.md."""
    count = Counter(verdict.state for verdict in verdicts)
    about = versions()
    lines = [
        "# Architectures",
        "",
        f"Written by `make architectures` with transformers {about['transformers']} and torch {about['torch']}: a "
        f"small random model of each of the {len(verdicts)} entries of its causal language model mapping, put before "
        "`steerkit doctor`. **Works** means that its blocks were found by the rule and verified, that a text alone and "
        "in a padded batch read alike, that coefficient 0 changes nothing bit for bit, and that steered texts from a "
        "cached, left-padded batch are those of one prompt at a time without a cache. **Refused** models raise an "
        "error that names the reason; none is read silently wrong.",
        "",
        ", ".join(f"{count[state]} {state}" for state in ("works", "refused", "wrong", "not built")) + ".",
    ]
    for state in ("wrong", "not built", "refused", "works"):
        rows = [verdict for verdict in verdicts if verdict.state == state]
        if rows:
            lines += ["", f"## {state.capitalize()} ({len(rows)})", "", "| model type | class | |", "|---|---|---|"]
            lines += [f"| {row.name} | {row.made} | {row.said} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    verdicts = []
    for name in names or sorted(CLASSES):
        verdicts.append(judge(name))
        print(" | ".join(dataclasses.astuple(verdicts[-1])), flush=True)
    if not names:
        write_text(PAGE, page(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
