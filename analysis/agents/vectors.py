"""One vector per agent, and control directions of the agents' mean norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

import steerkit as sk
from analysis.agents.activations import turn_activations
from analysis.inputs import Inputs
from steerkit.capture.activations import Activations
from steerkit.vectors.controls import shuffle_labels, with_role


def agent_vectors(acts: Activations) -> dict[str, sk.SteeringVector]:
    """Per agent i, `v_i = m_i - mean of m_j over j != i` (Yi et al. 2026, arXiv 2604.24881, section 4)."""
    return sk.one_against_others(acts)


def agent_controls(
    acts: Activations, vectors: Mapping[str, sk.SteeringVector], n: int, seed: int
) -> dict[str, sk.SteeringVector]:
    """Control directions: `random k` (isotropic), `matched k` (covariance of the stream), `shuffled k` (labels).

    `random` and `matched` are those of `sk.controls`, the latter with the covariance within agents: that of all items
    has the agents' own directions in it. Each control has the agents' mean norm per layer, so that a coefficient is the
    same dose, and is a control of every agent. `shuffled k` is the vector of agent `k mod agents` after the agents'
    names were shuffled within each question, balanced (`shuffle_labels`), so that nothing is left of the agents' means.

    Args:
        acts: what the agents' vectors were extracted from.
        vectors: the agents' vectors.
        n: number of directions of each kind.
        seed: direction k uses `seed + k`.
    """
    agents = sorted(vectors)
    first = vectors[agents[0]]
    norms = {
        layer: sum(float(vectors[agent].layers[layer].norm()) for agent in agents) / len(agents)
        for layer in first.layers
    }
    mean_norm = sk.SteeringVector(
        {layer: value / value.norm() * norms[layer] for layer, value in first.layers.items()}, first.meta
    )
    named, within = {}, within_labels(acts)
    for number in range(n):
        agent = agents[number % len(agents)]
        (matched,) = sk.controls.matched(mean_norm, within, 1, seed + number).values()
        permuted = agent_vectors(shuffle_labels(acts, seed + number, balanced=True))[agent]
        drawn = {
            "random": sk.random_like(mean_norm, seed + number),
            "matched": matched,
            "shuffled": replace(permuted.scaled_to(mean_norm), meta={**mean_norm.meta, "seed": seed + number}),
        }
        for role, control in drawn.items():
            named[f"{role} {number}"] = with_role(control, role)
    return named


def within_labels(acts: Activations, label: str = "label") -> Activations:
    """The activations with every label's mean moved to the mean of all: what is left varies within labels."""
    labels = acts.items[label].astype(str).to_numpy()
    resid = acts.resid.clone()
    for one in sorted(set(labels)):
        members = torch.from_numpy(labels == one)
        resid[members] -= resid[members].mean(0) - acts.resid.mean(0)
    return replace(acts, resid=resid)


def published_vectors(inputs: Inputs, stage: str, n: int, out: Path) -> dict[str, sk.SteeringVector]:
    """The agents' vectors as in the paper, from the last token of each response in `n` debates; stored in `out`.

    At each layer: the agent's mean minus the others'. The paper scales them to unit length; these are not scaled.
    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 4.
    """
    agents = sorted({str(turn.agent) for trace in inputs.train[:n] for turn in trace.turns})
    files = [out / f"published-{agent}.safetensors" for agent in agents]
    if not all(path.is_file() for path in files):
        acts = turn_activations(*inputs.load(stage), inputs.train[:n], layers=inputs.read)["last"]
        for agent, vector in agent_vectors(acts).items():
            vector.save(out / f"published-{agent}.safetensors")
    return {path.stem.removeprefix("published-"): sk.SteeringVector.load(path) for path in files}
