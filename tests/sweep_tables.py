"""Tables of sweeps that nobody ran, projections of their tokens, and what a page holds of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.sweeps.result import KEYS

ARABIC, EMOJI = "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643", "caf\u00e9 \U0001f469\u200d\U0001f680 \u65e5\u672c\u8a9e"
COEFFICIENTS = (-2.0, -0.5, 0.0, 0.5, 2.0)
CONTROLS = ("random-0", "random-1", "random-2", "formal/shuffled")


def role_of(vector: str) -> tuple[str, str | None]:
    """The role of these tables' vectors, by their names here, and the vector that a control is of."""
    of, _, last = vector.rpartition("/")
    role = last.partition("-")[0]
    return (role, of or None) if role in ("random", "shuffled") else ("vector", None)


def table(
    vectors: tuple[str, ...] = ("formal", "terse", *CONTROLS),
    layers: tuple[int, ...] = (8, 12),
    coefficients: tuple[float, ...] = COEFFICIENTS,
    prompts: int = 4,
    samples: int = 2,
    text: Callable[[str, float, int, int], str] = lambda v, c, i, s: f"plain words {i} {s} and {v} {c:g} at the end",
) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [
        {"vector": v, "role": role_of(v)[0], "control_of": role_of(v)[1], "layer": layer,
         "coefficient": c, "prompt_id": f"q{i}", "sample": s, "group": f"q{i}",
         "prompt": f"<|user|>\nQuestion {i}?<|end|>\n<|assistant|>", "reference": f"Answer {i}.",
         "text": text(v, c, i, s) if c else f"plain words {i} {s} of no vector at the end", "n_tokens": 9,
         "finished": c < 2, "relative_dose": abs(c) / 10, "trait": (c if v == "formal" else 0) + generator.normal()}
        for v in vectors for layer in layers for c in coefficients for i in range(prompts) for s in range(samples)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def tokens(frame: pd.DataFrame, width: int = 4) -> pd.DataFrame:
    """Projections as `sweep_projections` gives them: tokens of `width` characters, values from a generator."""
    generator = np.random.default_rng(1)
    rows = []
    for *key, text in frame[[*KEYS, "text"]].itertuples(index=False, name=None):
        for position, start in enumerate(range(0, len(text), width)):
            rows.append((*key, position, 0, start, min(len(text), start + width), generator.normal(3.0, 2.0)))
    return pd.DataFrame(rows, columns=[*KEYS, "position", "token_id", "start", "stop", "projection"])


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)[0])
