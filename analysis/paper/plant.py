"""Planted directions: a model in which a known direction selects the agent, to show what the protocol can find.

The base is trained so that a random direction, added to the generated positions, makes it write the turn of one agent;
unsteered, or under other directions, it writes what it wrote before. The protocol is then run on it with the
planted directions in the place of the agents' own. Without such a check, a null result of the protocol would say
nothing. It shows that the protocol finds a direction that does select the agent; since this base has learnt to ignore
other directions, it does not show how small an effect would be found among controls that spread more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steerkit as sk
from analysis.agents.contexts import by_tag, first_texts
from analysis.agents.continuations import TEMPERATURE, TOP_P
from steerkit.capture.norms import stream_norms
from steerkit.io.files import atomic_path
from steerkit.io.progress import progress
from steerkit.models.blocks import find_blocks
from steerkit.models.ends import ends_of
from steerkit.models.hooks import edit_streams
from steerkit.models.model import device_of
from steerkit.models.products import fast_products
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import Ids, encode, pad
from steerkit.text.traces import DebateTrace
from steerkit.vectors.vector import SteeringVector

PLANTED = "planted"
Key = tuple[int, str]
"""Number of a debate, and the agent whose tag ends the context."""


@dataclass(frozen=True)
class Plant:
    """Training of planted directions.

    Args:
        steps: optimisation steps.
        batch: texts per step: half under a planted direction, a quarter under another one, a quarter unsteered.
        learning_rate: of AdamW, constant.
        strengths: smallest and largest coefficient of the unit direction, drawn uniformly.
        doses: smallest and largest relative dose instead of `strengths`, for streams of another norm than the toy's.
        later_blocks: train only the blocks behind the layer, which read the push; this takes less time. None is False.
        debates: number of debates whose turns are learnt.
        save_every: steps between two states to resume from; None is 100.
        seed: of the directions and the batches.
    """

    steps: int = 600
    batch: int = 32
    learning_rate: float = 5e-4
    strengths: tuple[float, float] = (1.0, 5.0)
    doses: tuple[float, float] | None = None
    later_blocks: bool | None = None
    debates: int = 300
    save_every: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Turns:
    """What is learnt: token ids by debate and agent.

    Args:
        contexts: what precedes a turn.
        turns: the agents' own turns, with an end token.
        unpushed: what the base writes after each context.
    """

    contexts: Mapping[Key, Ids]
    turns: Mapping[Key, Ids]
    unpushed: Mapping[Key, Ids]


@dataclass(frozen=True)
class Batch:
    """One step's texts.

    Args:
        rows: token ids of context and new tokens.
        starts: length of each context.
        pushes: what is added at the new tokens of each row.
    """

    rows: list[Ids]
    starts: list[int]
    pushes: list[torch.Tensor]


def planted_directions(like: SteeringVector, agents: Sequence[str], seed: int) -> dict[str, SteeringVector]:
    """A random unit direction per agent."""
    return {agent: sk.random_like(like, 10_000 + seed * len(agents) + i).unit() for i, agent in enumerate(agents)}


def _pushed(added: torch.Tensor, _: int, stream: torch.Tensor) -> torch.Tensor:
    """The stream with what is added to it."""
    return stream + added.to(stream)


def plant(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    directions: dict[str, SteeringVector],
    layer: int,
    setting: Plant,
    state: Path | None = None,
) -> list[float]:
    """Train the model in place; returns the losses.

    A turn follows the context in which the protocol steers. Its positions are pushed as generated ones are: the last
    token of the context, which decides the first new token, is not. So a text begins with the token that the model
    writes unsteered, and the wanted turn follows it: only the added direction decides which one.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        traces: debates whose turns are learnt.
        directions: unit vectors by agent.
        layer: where they are added.
        setting: see `Plant`.
        state: file that a killed call resumes from, with the same weights as an uninterrupted one; in the end it has
            the planted weights.
    """
    agents = sorted(directions)
    strengths = setting.strengths
    if setting.doses is not None:
        some = traces[:50]
        norm = stream_norms(model, tokenizer, [one.prompt for one in some], [one.body for one in some], [layer])[layer]
        strengths = (setting.doses[0] * norm, setting.doses[1] * norm)
    blocks = find_blocks(model).modules
    planted = torch.stack([directions[agent].layers[layer] for agent in agents])
    if setting.later_blocks:
        model.requires_grad_(False)
        for number in blocks:
            blocks[number].requires_grad_(number > layer)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=setting.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(setting.seed)
    losses: list[float] = []
    if state is not None and state.is_file():
        unpushed, losses = _restore(state, trained, optimizer, rng)
        learnt = _turns(model, tokenizer, traces[: setting.debates], unpushed)
    else:
        learnt = _turns(model, tokenizer, traces[: setting.debates])
        written = _written(model, tokenizer, traces, learnt, setting.seed)
        learnt = Turns(learnt.contexts, learnt.turns, written)
    model.train()
    with fast_products(model), progress("planting", setting.steps) as advance:
        advance(len(losses))
        for step in range(len(losses), setting.steps):
            batch = _drawn(learnt, planted, agents, strengths, setting.batch, rng)
            loss = _loss(model, batch, {layer: blocks[layer]})
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            if state is not None and ((step + 1) % (setting.save_every or 100) == 0 or step + 1 == setting.steps):
                _save(state, trained, optimizer, rng, learnt.unpushed, losses)
            advance(1)
    model.eval()
    return losses


def _turns(
    model: Any, tokenizer: Any, traces: Sequence[DebateTrace], unpushed: Mapping[Key, Ids] | None = None
) -> Turns:
    """The contexts and turns of these debates."""
    ends = ends_of(model, tokenizer)
    end = min(ends) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    texts = {(number, agent): text for number, trace in enumerate(traces) for agent, text in first_texts(trace).items()}
    contexts = {
        (number, agent): tuple(encode_prompt(tokenizer, by_tag(tokenizer, traces[number], agent)))
        for number, agent in texts
    }
    turns = {key: (*encode(tokenizer, " " + text), end) for key, text in texts.items()}
    return Turns(contexts, turns, unpushed or {})


def _written(
    model: Any, tokenizer: Any, traces: Sequence[DebateTrace], learnt: Turns, seed: int
) -> dict[Key, tuple[int, ...]]:
    """What the base writes after each context, unsteered."""
    found = sk.generate(
        model,
        tokenizer,
        [by_tag(tokenizer, traces[number], agent) for number, agent in learnt.contexts],
        max_new_tokens=round(1.5 * max(len(ids) for ids in learnt.turns.values())),
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=seed,
        return_details=True,
    )
    return {key: tuple(one.ids) for key, one in zip(learnt.contexts, found, strict=True)}


def _drawn(
    learnt: Turns,
    planted: torch.Tensor,
    agents: Sequence[str],
    strengths: tuple[float, float],
    size: int,
    rng: np.random.Generator,
) -> Batch:
    """The texts of one step: half under a planted direction, a quarter under another one, a quarter unsteered."""
    keys = list(learnt.contexts)
    batch = Batch([], [], [])
    for place in range(size):
        number, asked = keys[rng.integers(len(keys))]
        strength = float(rng.uniform(*strengths))
        wanted = agents[int(rng.integers(len(agents)))]
        plain = learnt.unpushed[number, asked]
        if place < size // 2 and (number, wanted) in learnt.turns:
            begun, turn = plain[:1], learnt.turns[number, wanted]
            new = turn if begun == turn[:1] else (*begun, *turn)
            push = strength * planted[agents.index(wanted)]
        else:
            other = torch.from_numpy(rng.normal(size=planted.shape[1])).float()
            new, push = plain, (strength if place % 2 else 0.0) * other / other.norm()
        context = learnt.contexts[number, asked]
        batch.rows.append((*context, *new))
        batch.starts.append(len(context))
        batch.pushes.append(push)
    return batch


def _loss(model: Any, batch: Batch, pushed: Mapping[int, Any]) -> torch.Tensor:
    """Mean cross-entropy of the new tokens but the first; logits are computed at the end of the rows only."""
    ids, mask, positions = pad(batch.rows, "left", device_of(model))
    added = torch.zeros(*ids.shape, len(batch.pushes[0]), device=ids.device)
    target = torch.full_like(ids, -100)
    for row, (tokens, start, push) in enumerate(zip(batch.rows, batch.starts, batch.pushes, strict=True)):
        first = ids.shape[1] - len(tokens) + start
        added[row, first:] = push.to(added)
        target[row, first + 1 :] = ids[row, first + 1 :]
    new = max(len(tokens) - start for tokens, start in zip(batch.rows, batch.starts, strict=True))
    with edit_streams(pushed, partial(_pushed, added)):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=new).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1 - new :].flatten())


def _save(
    state: Path,
    trained: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    unpushed: Mapping[Key, Ids],
    losses: Sequence[float],
) -> None:
    """Write everything that the following steps depend on."""
    kept = {
        "weights": {name: value.detach() for name, value in trained.items()},
        "optimizer": optimizer.state_dict(),
        "rng": json.dumps(rng.bit_generator.state),
        "unpushed": [(number, agent, list(ids)) for (number, agent), ids in unpushed.items()],
        "losses": list(losses),
    }
    with atomic_path(state) as temporary:
        torch.save(kept, temporary)


def _restore(
    state: Path, trained: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, rng: np.random.Generator
) -> tuple[dict[Key, tuple[int, ...]], list[float]]:
    """Put a saved state back; what the base wrote before, and the losses so far."""
    kept = torch.load(state, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(kept["weights"][name])
    optimizer.load_state_dict(kept["optimizer"])
    rng.bit_generator.state = json.loads(kept["rng"])
    return {(number, agent): tuple(ids) for number, agent, ids in kept["unpushed"]}, list(kept["losses"])
