"""Steered continuations: their first turn, scored by ROUGE-L against each agent's own, and who speaks in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from analysis.agents.contexts import Context, first_texts, unnamed
from analysis.agents.speaker import by_format, first_turn
from steerkit.scores.text import rouge_l
from steerkit.sweeps.result import SweepResult
from steerkit.text.tags import TAG
from steerkit.text.tokens import decode
from steerkit.text.traces import DebateTrace

TEMPERATURE, TOP_P = 0.7, 0.9


def length_of_texts(tokenizer: Any, texts: Iterable[str]) -> int:
    """One and a half times the number of tokens of the longest text: the length of continuations compared with them."""
    return round(1.5 * max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts))


def texts_with_tags(tokenizer: Any, table: pd.DataFrame) -> list[str | None]:
    """The texts of a sweep's table, with the tags that its tokenizer has as special tokens.

    A sweep leaves special tokens out of its texts. Without its tags a debate cannot be cut into turns.
    """
    tags = {
        number: token.content
        for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special and TAG.fullmatch(token.content)
    }
    texts = [text if isinstance(text, str) else None for text in table["text"]]
    if not tags:
        return texts
    return [
        None if text is None else "".join(_pieces(tokenizer, ids, tags))
        for text, ids in zip(texts, table["ids"], strict=True)
    ]


def _pieces(tokenizer: Any, ids: Iterable[int], tags: Mapping[int, str]) -> Iterator[str]:
    """The texts between the tags, and the tags."""
    for is_tag, some in groupby(map(int, ids), key=tags.__contains__):
        run = list(some)
        yield "".join(tags[token] for token in run) if is_tag else decode(tokenizer, run)


def continuations(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    vectors: Mapping[str, sk.SteeringVector],
    layers: Sequence[int],
    coefficients: Sequence[float],
    context: Context,
    positions: str,
    max_new_tokens: int | None,
    seed: int = 0,
    out: Path | None = None,
    openings: Sequence[str] = (),
    rouge_tokenizer: str | None = None,
) -> SweepResult:
    """Steered continuations up to the next agent's tag, scored by ROUGE-L against each agent's own first text.

    What follows the first turn is not scored: it says nothing about the agent, and a model that goes on with the debate
    would score less than one that stops.

    One text per context is sampled as in the paper (arXiv 2604.24881, section 4); all coefficients share their random
    numbers. Greedy texts would show only the agent that the model plays anyway, whose score cannot rise.

    Args:
        model: the checkpoint.
        tokenizer: its tokenizer.
        traces: the debates.
        vectors: by name; the agents' vectors and their controls.
        layers: where they are steered, one at a time.
        coefficients: 0 is always added.
        context: see `analysis.agents.contexts`. With `unnamed` all agents share a context: it is continued once, and
            its text is scored against each agent's.
        positions: where vectors are added, see `steerkit.Steering`.
        max_new_tokens: length of a continuation; None is one and a half times the longest first text.
        seed: sampling seed.
        out: the sweep's folder, see `steerkit.sweep`. Its rows keep the whole texts.
        openings: for each agent what its texts begin with, see `analysis.agents.speaker`.
        rouge_tokenizer: tokenizer of ROUGE-L, see `steerkit.scores.text.tokenize`; None is `rouge_score`.

    Returns:
        A sweep's result with the columns `agent`, `rouge_l`, `speaks` (1 where the first turn is the agent's own, by
        its tag or, without one, by its opening, else 0; NaN where the context names the agent and there are no
        openings: such a text begins without a tag), `style` (the same by its opening alone: a model can write one
        agent's tag and another agent's text) and `whole`, the text with its tags.
    """
    references = {trace.question: first_texts(trace) for trace in traces}
    identity = context is not unnamed
    if identity:
        prompts = [
            {"prompt": context(tokenizer, trace, agent), "id": f"{trace.question}/{agent}", "group": trace.question}
            for trace in traces
            for agent in references[trace.question]
        ]
    else:
        prompts = [{"prompt": trace.prompt, "id": trace.question} for trace in traces]
    if max_new_tokens is None:
        max_new_tokens = length_of_texts(tokenizer, [text for texts in references.values() for text in texts.values()])
    result = sk.sweep(
        model,
        tokenizer,
        vectors,
        prompts,
        coefficients=[0.0, *coefficients],
        layers=list(layers),
        positions=positions,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        max_new_tokens=max_new_tokens,
        seed=seed,
        foreign=True,
        out=out,
    )
    table = result.table
    if identity:
        table = table.assign(agent=[key.rpartition("/")[2] for key in table["prompt_id"]])
    else:
        agents = sorted({agent for texts in references.values() for agent in texts})
        table = pd.concat([table.assign(agent=agent) for agent in agents], ignore_index=True)
        table["prompt_id"] = table["prompt_id"] + "/" + table["agent"]
    keys = zip(table["group"], table["agent"], strict=True)
    texts = texts_with_tags(tokenizer, table)
    turns = [first_turn(text, openings) if text is not None else None for text in texts]
    knows_speaker = bool(openings) or not identity
    table = table.assign(
        whole=texts,
        text=[turn.text if turn is not None else None for turn in turns],
        reference=[references[question].get(agent) for question, agent in keys],
        speaks=[
            float(str(turn.agent) == agent) if turn is not None and knows_speaker else float("nan")
            for turn, agent in zip(turns, table["agent"], strict=True)
        ],
        style=[
            float("nan") if turn is None or not openings else float(str(by_format(turn.text, openings)) == agent)
            for turn, agent in zip(turns, table["agent"], strict=True)
        ],
    )
    words: Any = rouge_tokenizer or "rouge_score"
    table = table.assign(rouge_l=rouge_l(table["text"].tolist(), table["reference"].tolist(), words))
    return SweepResult(table, {**result.meta, "identity": identity})
