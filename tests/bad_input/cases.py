"""What a case of bad input is, what the cases are made from, and the parts of messages that several share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from steerkit.capture.activations import Activations
from steerkit.sweeps.result import SweepResult
from steerkit.vectors.vector import SteeringVector
from tests.tiny import tiny_model, tiny_tokenizer

Files = Mapping[str, bytes | None]  # None: a folder
PAIR = b'{"prompt": "p", "positive": "yes", "negative": "no"}\n'
LABELS = ["positive", "negative"]

# Parts of messages

LINE = "Correct or delete that line"
MESSAGES = PROMPT = "expected a prompt string or a list of", "in a list of its own"
LIST = ("expected a non-empty list of prompts", "Put them in a list")
TABLE = pd.DataFrame({"prompt": ["Hello"]})
NO_TABLE = "a table with the columns ['prompt']", "table['prompt'].tolist()"
LAYER = "expected a layer from 0 to 3", "Pass an integer in that range; the last layer is 3"
POSITION = "expected position 'last', 'first', 'mean', 'letter' or an integer"
NUMBERS = "expected at least one coefficient", "List them"


@dataclass(frozen=True)
class Case:
    """Something that is refused, and the three parts of its message."""

    name: str
    act: Callable[[Path], object]
    expected: str
    got: str
    do: str
    error: type[Exception] = ValueError
    files: Files = field(default_factory=dict)


@cache
def model() -> Any:
    return tiny_model()


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def push(layer: int = 1, width: int = 32, **meta: Any) -> SteeringVector:
    return SteeringVector({layer: torch.arange(1.0, width + 1)}, meta)


def acts(labels: Sequence[object], groups: Sequence[object] | None = None) -> Activations:
    x = torch.randn(len(labels), 1, 3, generator=torch.Generator().manual_seed(0))
    groups = range(len(labels)) if groups is None else groups
    items = {"label": labels, "group": list(groups), "start": 0, "n_tokens": range(len(labels))}
    return Activations(x, (0,), pd.DataFrame(items))


def swept(*coefficients: float, **columns: Any) -> SweepResult:
    rows = [
        {"vector": "v", "layer": 1, "coefficient": c, "prompt_id": str(p), "group": str(p), "sample": 0, "text": "a"}
        for c in coefficients
        for p in range(3)
    ]
    return SweepResult(pd.DataFrame(rows).assign(**columns))


def row(**changes: object) -> bytes:
    return json.dumps({"prompt": "p", "positive": "yes", "negative": "no", **changes}).encode() + b"\n"


def lay(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder but the empty files that runs lock."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}
