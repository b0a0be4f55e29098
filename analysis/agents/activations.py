"""Activations of debates: the residual stream at every turn, or where an agent's answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import steerkit as sk
from analysis.agents.contexts import Context, first_texts
from steerkit.capture.activations import EMBED, Activations
from steerkit.models.blocks import find_blocks
from steerkit.text.spans import SpannedText
from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace

Source = Literal["asked", "trace", "untagged", "plain"]
READ: Mapping[str, tuple[str, ...]] = {
    "asked": ("last",),
    "trace": ("last", "mean", "first", "tag"),
    "untagged": ("last", "mean", "first"),
    "plain": ("last", "mean", "first"),
}
"""Source -> its read positions."""


def activations_of(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    sources: Sequence[Source],
    context: Context,
    layers: Sequence[int] | None = None,
) -> dict[tuple[str, str], Activations]:
    """Activations by (source, read position): those of `turn_activations`, and the source `"asked"`.

    `("asked", "last")` is read at the last token of the first prompt that names an agent, before any agent answers. The
    answer begins there: it is the read position of the paper's contrast of system prompts.

    Args:
        model: the checkpoint.
        tokenizer: its tokenizer.
        traces: the debates.
        sources: what is read.
        context: the prompt that names an agent, for the source `"asked"`.
        layers: that are read; None for all.
    """
    read_at: Any = "all" if layers is None else list(layers)
    activations = {}
    for source in sources:
        if source == "asked":
            agents = [(trace, agent) for trace in traces for agent in first_texts(trace)]
            asked = [(trace.question, agent, context(tokenizer, trace, agent)) for trace, agent in agents]
            acts = sk.collect(model, tokenizer, [prompt for _, _, prompt in asked], position="last", layers=read_at)
            items = acts.items.assign(label=[agent for _, agent, _ in asked], group=[group for group, _, _ in asked])
            activations["asked", "last"] = replace(acts, items=items)
        else:
            by_position = turn_activations(model, tokenizer, traces, source, layers=layers)
            activations |= {(source, position): acts for position, acts in by_position.items()}
    return activations


def turn_activations(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    source: Source = "trace",
    embed: bool = False,
    layers: Sequence[int] | None = None,
) -> dict[str, Activations]:
    """The stream of every turn, by read position; labels are the agents, groups the questions.

    Read positions: the `last` token of the response (as in the paper), the `mean` over it, its `first` token, and the
    agent's `tag` (its last token, which follows the agent's name and precedes its text).

    Args:
        model: the checkpoint.
        tokenizer: its tokenizer.
        traces: the debates.
        source: `"trace"`: whole traces with their tags, one forward each; `"untagged"`: the same without tags;
            `"plain"`: each turn alone, right after its question. Only `"trace"` has the position `tag`.
        embed: read the input of block 0, too.
        layers: that are read; None for all.

    Raises:
        ValueError: another source.
    """
    read_at: Any = [*([EMBED] if embed else []), *(find_blocks(model).modules if layers is None else layers)]
    if source not in ("trace", "untagged", "plain"):
        raise ValueError(f"expected a source 'trace', 'untagged' or 'plain'; got {source!r}. Pass one of the three.")
    if source == "plain":
        texts = [text for trace in traces for text in trace.alone()]
    else:
        texts = [trace.spans() if source == "trace" else trace.untagged() for trace in traces]
    read = sk.collect_each(model, tokenizer, texts, layers=read_at, positions=["last", "mean", "first"])
    activations: dict[str, Activations] = {str(position): acts for position, acts in read.items()}
    if source == "trace":
        tags = [_tag_spans(trace) for trace in traces]
        activations["tag"] = sk.collect(model, tokenizer, tags, layers=read_at, position="last")
    return activations


def _tag_spans(trace: DebateTrace) -> SpannedText:
    """A trace's text with a span per agent's tag."""
    text = trace.body
    spans, labels = [], []
    for turn in trace.turns:
        opened = text.index(round_tag(turn.round))
        tag = agent_tag(turn.agent, turn.round)
        start = text.index(tag, opened)
        spans.append((start, start + len(tag)))
        labels.append(str(turn.agent))
    return SpannedText(text, tuple(spans), tuple(labels), trace.question, "whole", trace.prompt)
