"""One direction per agent, from the debates' turns, and the controls that any direction is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

import steerkit as sk
from analysis.agents.fidelity import Named, first_texts
from steerkit.capture.activations import EMBED, Activations
from steerkit.models.blocks import find_blocks
from steerkit.text.prompt import render
from steerkit.text.spans import SpannedText
from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace

POSITIONS = ("last", "mean", "first", "tag")
Source = Literal["asked", "trace", "untagged", "plain"]


def streams_of(
    model: Any, tokenizer: Any, traces: Sequence[DebateTrace], sources: Sequence[Source], named: Named
) -> dict[tuple[str, str], Activations]:
    """(source, position) -> the stream, of `turn_streams` and of what is `"asked"`.

    `asked`, `last`: the last token of the first prompt that says who is to speak, where nothing has been said yet. That
    is where the answer begins: the read position of the paper's contrast of system prompts.
    """
    found = {}
    for source in sources:
        if source == "asked":
            asked = [(trace.question, agent, named(trace, agent)) for trace in traces for agent in first_texts(trace)]
            acts = sk.collect(model, tokenizer, [render(tokenizer, prompt) for _, _, prompt in asked], position="last")
            items = acts.items.assign(label=[agent for _, agent, _ in asked], group=[group for group, _, _ in asked])
            found["asked", "last"] = replace(acts, items=items)
        else:
            found |= {(source, at): acts for at, acts in turn_streams(model, tokenizer, traces, source).items()}
    return found


def turn_streams(
    model: Any, tokenizer: Any, traces: Sequence[DebateTrace], source: Source = "trace", embed: bool = False
) -> dict[str, Activations]:
    """The stream of every turn at all layers, by read position; labels are the agents, groups the questions.

    Positions: `last` token of the response (the paper's), `mean` over it, `first` token, and the agent's `tag` itself
    (its last token, the only one that knows the agent and nothing of what it says).

    Args:
        source: read whole traces, one forward each, as a `"trace"` with its tags or `"untagged"`; or, `"plain"`, each
            turn right after its question, without the others. Where there are no tags there is no position `tag`.
        embed: read what enters block 0, too.
    """
    layers: Any = [EMBED, *find_blocks(model).modules] if embed else "all"
    if source not in ("trace", "untagged", "plain"):
        raise ValueError(f"expected a source 'trace', 'untagged' or 'plain'; got {source!r}.")
    if source == "plain":
        texts = [text for trace in traces for text in trace.alone()]
    else:
        texts = [trace.spans() if source == "trace" else trace.untagged() for trace in traces]
    found: dict[str, Activations] = {
        str(position): acts
        for position, acts in sk.collect_each(
            model, tokenizer, texts, layers=layers, positions=["last", "mean", "first"]
        ).items()
    }
    if source == "trace":
        tags = [_tag_spans(trace) for trace in traces]
        found["tag"] = sk.collect(model, tokenizer, tags, layers=layers, position="last")
    return found


def _tag_spans(trace: DebateTrace) -> SpannedText:
    """A trace's text with a span per agent's tag."""
    text = trace.prompt + trace.body
    spans, labels, at = [], [], len(trace.prompt)
    for turn in trace.turns:
        at = text.index(round_tag(turn.round), len(trace.prompt))
        tag = agent_tag(turn.agent, turn.round)
        at = text.index(tag, at)
        spans.append((at, at + len(tag)))
        labels.append(str(turn.agent))
    return SpannedText(text, tuple(spans), tuple(labels), trace.question)


def agent_vectors(acts: Activations) -> dict[str, sk.SteeringVector]:
    """Per agent i, `v_i = m_i - mean of m_j over j != i` (Yi et al. 2026, arXiv 2604.24881, section 4)."""
    return sk.one_against_others(acts)


def shuffled(acts: Activations, seed: int) -> Activations:
    """The same turns with the agents' names permuted within each question: what labels without meaning give."""
    rng = np.random.default_rng(seed)
    labels = acts.items["label"].copy()
    for _, rows in acts.items.groupby("group", sort=False):
        labels.loc[rows.index] = rng.permutation(rows["label"].to_numpy())
    return replace(acts, items=acts.items.assign(label=labels))


def matched_like(vector: sk.SteeringVector, acts: Activations, seed: int) -> sk.SteeringVector:
    """A random direction with the covariance of the stream, and the norms of `vector`: `v ~ N(0, cov(h))`.

    An isotropic direction mostly points where the stream never goes; this one points where it varies.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = {}
    for layer in vector.layers:
        rows = acts.at(layer).double()
        noise[layer] = (rows - rows.mean(0)).T @ torch.randn(len(rows), generator=generator, dtype=torch.float64)
    made = sk.SteeringVector(noise, {**vector.meta, "method": "random, the stream's covariance", "seed": seed})
    return made.scaled_to(vector)


def controls(
    acts: Activations, vectors: Mapping[str, sk.SteeringVector], n: int, seed: int
) -> dict[str, sk.SteeringVector]:
    """By name: `random k` (isotropic), `matched k` (the stream's covariance), `shuffled k` (labels permuted).

    Each has the agents' mean norm per layer, so that a coefficient means the same dose.
    """
    names = sorted(vectors)
    some = vectors[names[0]]
    norms = {layer: sum(float(vectors[a].layers[layer].norm()) for a in names) / len(names) for layer in some.layers}
    scale = sk.SteeringVector({layer: some.layers[layer] / some.layers[layer].norm() * norms[layer] for layer in norms})
    found = {}
    for k in range(n):
        found[f"random {k}"] = replace(sk.random_like(scale, seed + k), meta={**some.meta, "method": "random"})
        found[f"matched {k}"] = replace(matched_like(scale, acts, seed + k), meta={**some.meta, "method": "matched"})
        label = agent_vectors(shuffled(acts, seed + k))[names[k % len(names)]]
        found[f"shuffled {k}"] = replace(label.scaled_to(scale), meta={**some.meta, "method": "shuffled"})
    return found
