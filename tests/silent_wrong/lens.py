"""Wrong logit lenses: without the final norm, without the softcap, of the stream one block earlier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from tests.generation.test_logit_lens import check_rows, read, slow
from tests.tiny import tiny_model, tiny_tokenizer

Lens = Callable[[Any, Any, str], pd.DataFrame]
TEXT = "The sea is calm"


def check_a_lens_has_norm_and_softcap_and_the_layer_s_own_stream(lens: Lens, _: Path) -> None:
    """`lens` returns the rows of token "a" at the last position of a text, layer by layer."""
    model, tokenizer = tiny_model("gemma2"), tiny_tokenizer()
    model.config.final_logit_softcapping = 2.0
    ids = sk.render(tokenizer, TEXT).ids
    table = lens(model, tokenizer, TEXT)
    for layer in range(4):
        check_rows(table[table["layer"] == layer], slow(model, read(model, ids, layer)), ids)


def ours(model: Any, tokenizer: Any, text: str) -> pd.DataFrame:
    return sk.logit_lens(model, tokenizer, [text], ["a"])


def _by_hand(model: Any, tokenizer: Any, text: str, logits: Callable[[Any, torch.Tensor], torch.Tensor]) -> Any:
    """Our table with log-probabilities and ranks from `logits(model, stream)`."""
    table, ids, token = ours(model, tokenizer, text), sk.render(tokenizer, text).ids, tokenizer("a")["input_ids"][0]
    for layer in range(4):
        at = logits(model, read(model, ids, layer))[-1]
        table.loc[layer, "log_prob"] = float(at.log_softmax(0)[token])
        table.loc[layer, "rank"] = int((at > at[token]).sum()) + 1
    return table.assign(prob=table["log_prob"].map(torch.tensor).map(torch.exp).map(float))


def without_norm(model: Any, tokenizer: Any, text: str) -> pd.DataFrame:
    return _by_hand(model, tokenizer, text, lambda model, stream: model.lm_head(stream).detach())  # type: ignore[no-any-return]


def without_softcap(model: Any, tokenizer: Any, text: str) -> pd.DataFrame:
    return _by_hand(  # type: ignore[no-any-return]
        model, tokenizer, text, lambda model, stream: model.lm_head(model.model.norm(stream)).detach()
    )


def one_block_early(model: Any, tokenizer: Any, text: str) -> pd.DataFrame:
    """hidden_states[l] of transformers, which enters block l."""
    table = ours(model, tokenizer, text)
    return table.assign(**{column: table[column].shift(1).fillna(table[column]) for column in ("rank", "log_prob")})


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    f"logit lens {mutant.__name__.replace('_', ' ')}": (
        check_a_lens_has_norm_and_softcap_and_the_layer_s_own_stream, ours, mutant
    )
    for mutant in (without_norm, without_softcap, one_block_early)
}  # fmt: skip
