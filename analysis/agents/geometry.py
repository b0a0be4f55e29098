"""Geometry of the agents' vectors: cosines within and between checkpoints, and the plane that they span."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pandas as pd
import torch

import steerkit as sk
from steerkit.capture.activations import Activations


def agent_cosines(vectors: Mapping[str, sk.SteeringVector]) -> pd.DataFrame:
    """Cosines between the agents' vectors of one checkpoint: layer, agent, other, cosine."""
    agents = sorted(vectors)
    rows = [
        (layer, agent, other, vectors[agent].cosine(vectors[other])[layer])
        for layer in vectors[agents[0]].layers
        for agent in agents
        for other in agents
    ]
    return pd.DataFrame(rows, columns=["layer", "agent", "other", "cosine"])


def checkpoint_cosines(vectors: Mapping[str, Mapping[str, sk.SteeringVector]]) -> pd.DataFrame:
    """Cosine of an agent's vector at one checkpoint with the same agent's at another: agent, layer, stage, other."""
    rows = [
        (agent, layer, stage, other, cosine)
        for stage, other in product(vectors, repeat=2)
        for agent in vectors[stage]
        for layer, cosine in vectors[stage][agent].cosine(vectors[other][agent]).items()
    ]
    return pd.DataFrame(rows, columns=["agent", "layer", "stage", "other", "cosine"])


def plane(vectors: Mapping[str, sk.SteeringVector], acts: Activations, layer: int) -> pd.DataFrame:
    """Turns, centred on their mean, and the agents' vectors, projected on the plane that the vectors span.

    The axes are the first two right singular vectors of the agents' vectors: orthonormal, so that lengths are those of
    the stream. Vectors of two agents are opposite and span a line: the second axis is then the first principal
    component of what the turns vary by besides.

    Args:
        vectors: the agents' vectors.
        acts: turns of the same checkpoint.
        layer: where both are compared.

    Returns:
        Columns kind (`turn` or `vector`), agent, x, y, n (questions).
    """
    agents = sorted(vectors)
    rows = torch.stack([vectors[agent].layers[layer] for agent in agents]).double()
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:2]
    stream = acts.at(layer).double()
    centred = stream - stream.mean(0)
    if len(agents) == 2:
        rest = centred - (centred @ axes[0])[:, None] * axes[0]
        axes = torch.stack([axes[0], torch.linalg.svd(rest, full_matrices=False).Vh[0]])
    n = acts.items["group"].nunique()
    points = [("vector", agent, *map(float, axes @ row), n) for agent, row in zip(agents, rows, strict=True)]
    turns = (centred @ axes.T).tolist()
    points += [("turn", label, *point, n) for label, point in zip(acts.items["label"], turns, strict=True)]
    return pd.DataFrame(points, columns=["kind", "agent", "x", "y", "n"])
