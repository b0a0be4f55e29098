"""Cases: files of all kinds, and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

import steerkit as sk
from steerkit.io.files import file_name, sha256, write_text
from steerkit.io.json import write_json
from steerkit.io.rows import append_rows
from steerkit.io.tables import read_table, write_table
from steerkit.models.adapters import with_adapter
from steerkit.text.pairs import ContrastPair, write_pairs
from tests.bad_input.cases import PAIR, Case, push
from tests.tiny import tiny_model


def file_cases() -> Iterator[Case]:
    kind = "expected a table path that ends in .parquet or .csv"
    table = pd.DataFrame({"a": [1]})
    yield Case("a table as a pickle", lambda f: write_table(f / "t.pkl", table, {}), kind, "got 't.pkl'", "Rename it")
    yield Case(
        "a pickle as a table", lambda f: read_table(f / "t.pkl"), kind, "got 't.pkl'", "Rename it",
        files={"t.pkl": b"\x80\x04."},
    )  # fmt: skip
    meta = {"file": "t.csv", "sha256": sha256(b"a\n1\n12\n"), "columns": ["a"], "text_columns": []}
    torn = {"t.csv": b"a\n1\n1", "t.meta.json": json.dumps(meta).encode()}
    yield Case(
        "a table that is cut off", lambda f: read_table(f / "t.csv"),
        "as it was when t.meta.json was written", "cut off or changed", "delete t.meta.json", files=torn,
    )  # fmt: skip
    yield Case(
        "a table with a list for its meta", lambda f: read_table(f / "t.csv"),
        "expected a JSON object", "got list", "Delete it", files={"t.csv": b"a\n1\n", "t.meta.json": b"[]"},
    )  # fmt: skip
    yield Case(
        "an empty table", lambda f: read_table(f / "t.csv"),
        "expected a table in", "got something else", "Write it again", files={"t.csv": b""},
    )  # fmt: skip
    name = "expected a name that can be part of a file name"
    for bad in ("../x", "a/b", "/etc/passwd", "..", ".hidden", "", "a\nb", "a\x00b", "x/"):
        yield Case(f"{bad!r} as part of a file's name", lambda _, bad=bad: file_name(bad), name, repr(bad), "Take")
    says = "expected a file to write at", "got a folder", "Name a file in it", IsADirectoryError
    yield Case("a text onto a folder", lambda f: write_text(f / "d", "a"), *says, files={"d": None})
    yield Case("a vector onto a folder", lambda f: push().save(f / "d"), *says, files={"d": None})
    surrogate = "expected text that UTF-8 can hold", "half a surrogate pair, '\\ud83d'", "Take it out"
    bad = "half \ud83d a pair"
    writes: dict[str, Callable[[Path], object]] = {
        "text": lambda f: write_text(f / "t", bad),
        "JSON": lambda f: write_json(f / "t", {"a": bad}),
        "rows": lambda f: append_rows(f / "t", [{"a": 1}, {"a": bad}]),
        "pairs": lambda f: write_pairs(f / "t", [ContrastPair("p", "yes", bad)]),
        "a vector": lambda f: push(note=bad).save(f / "t"),
    }
    for what, write in writes.items():
        yield Case(f"half a surrogate pair written as {what}", write, *surrogate, files={"t": b'{"old": 1}\n'})


def checkpoint_cases() -> Iterator[Case]:
    again = "Fetch it again"
    yield Case(
        "a GGUF file that is not there", lambda f: sk.load(f / "m.gguf"),
        "expected a GGUF file", "there is none", "Check the path", FileNotFoundError,
    )  # fmt: skip
    for name, content in {"empty": b"", "text": PAIR, "cut off": b"GGUF\x03\x00\x00\x00" + b"\x01" + bytes(15)}.items():
        yield Case(
            f"a GGUF file that is {name}", lambda f: sk.load(f / "m.gguf"),
            "expected", "; got", again, files={"m.gguf": content},
        )  # fmt: skip
    yield Case(
        "a checkpoint in a dtype that is none", lambda _: sk.load("m", dtype="float31"),
        "expected a dtype such as 'float32'", "got 'float31'", "Choose one",
    )  # fmt: skip
    if not torch.cuda.is_available():
        yield Case(
            "a checkpoint on a device that is not there", lambda _: sk.load("m", device="cuda:1"),
            "expected an available device", "got 'cuda:1' without a GPU", "Pass device='cpu'",
        )  # fmt: skip
    yield Case(
        "an adapter that is not there", lambda f: with_adapter(tiny_model(), f / "adapter", False),
        "expected an adapter with safetensors", "got none", "Check the path",
    )  # fmt: skip
    yield Case(
        "an adapter with its weights cut off", lambda f: with_adapter(tiny_model(), f / "adapter", False),
        "expected a whole adapter", "; got", "Fetch it again",
        files={
            "adapter/adapter_model.safetensors": b"\x10",
            "adapter/adapter_config.json": json.dumps(
                {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
            ).encode(),
        },
    )  # fmt: skip
