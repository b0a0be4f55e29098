"""Bad input: each case is refused with what was expected, what came and what to do, and leaves every file as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit import artifacts, fluency, models
from steerkit.activations import Activations
from steerkit.blocks import find_blocks
from steerkit.pairs import ContrastPair, read_pairs, write_pairs
from steerkit.probes import fit_probe, probe_layers
from steerkit.results import SweepResult
from steerkit.steering import Steering
from steerkit.traces import CONSENSUS, END, DebateTrace, Turn, agent_tag, read_contrasts, read_traces, round_tag
from steerkit.vectors import SteeringVector, difference_in_means, one_against_others, pca
from tests.tiny import tiny_model, tiny_tokenizer

Files = Mapping[str, bytes | None]  # None: a folder


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


# Files of pairs

PAIR = b'{"prompt": "p", "positive": "yes", "negative": "no"}\n'
LINE = "Mend or delete that line"
KEYS = ("expected keys", "Rename, add or drop keys")
MESSAGES = ("expected a prompt string or a list of", "in a list of its own")


def row(**changes: object) -> bytes:
    return json.dumps({"prompt": "p", "positive": "yes", "negative": "no", **changes}).encode() + b"\n"


PAIRS: dict[str, tuple[bytes, str, str, str]] = {
    "is empty": (b"", "expected at least one pair", "it is empty", "Write one object a line"),
    "has blank lines only": (b"\n \n\n", "expected at least one pair", "it is empty", "Write one object a line"),
    "is binary": (bytes(range(256)) * 8, "expected a JSON object", "line 1; got b'", LINE),
    "is all zeros": (bytes(1000) + b"\n", "expected a JSON object", "line 1; got b'", LINE),
    "is in UTF-16": (PAIR.decode().encode("utf-16"), "expected a JSON object", "line 1; got b'", LINE),
    "is in Latin-1": (PAIR + '{"prompt": "é"}\n'.encode("latin-1"), "expected a JSON object", "line 2; got b'", LINE),
    "is cut off in its last line": (PAIR * 2 + PAIR[:30], "expected a JSON object", "line 3; got b'", LINE),
    "is one line of a megabyte": (b"x" * 2**20 + b"\n", "expected a JSON object", "line 1; got b'xxx", LINE),
    "is nested too deeply": (b"[" * 200_000 + b"\n", "expected a JSON object", "nested too deeply", LINE),
    "has a key twice": (b'{"prompt": "a", ' + PAIR[1:], "expected a JSON object", "'prompt' stands twice", LINE),
    "has a list for an object": (b"[1, 2]\n", "expected a JSON object", "got b'[1, 2]'", LINE),
    "has a list around the pairs": (b"[" + PAIR.strip() + b"]\n", "expected a JSON object", "got b'[{", LINE),
    "has a text for an object": (b'"pair"\n', "expected a JSON object", "got b'\"pair\"'", LINE),
    "has a number for an object": (PAIR + b"3\n", "expected a JSON object", "line 2; got b'3'", LINE),
    "has null for an object": (b"null\n", "expected a JSON object", "got b'null'", LINE),
    "lacks a key": (b'{"prompt": "p", "positive": "yes"}\n', KEYS[0], "got ['positive', 'prompt']", KEYS[1]),
    "has another key": (row(Negative="no"), KEYS[0], "'Negative'", KEYS[1]),
    "has nested pairs": (b'{"pairs": [' + PAIR.strip() + b"]}\n", KEYS[0], "got ['pairs']", KEYS[1]),
    "has a number as prompt": (row(prompt=3), MESSAGES[0], "got 3", MESSAGES[1]),
    "has null as prompt": (row(prompt=None), MESSAGES[0], "got None", MESSAGES[1]),
    "has one message as prompt": (row(prompt={"role": "user", "content": "a"}), MESSAGES[0], "got {", MESSAGES[1]),
    "has texts as messages": (row(prompt=["hi"]), MESSAGES[0], "got ['hi']", MESSAGES[1]),
    "has no messages": (row(prompt=[]), MESSAGES[0], "got []", MESSAGES[1]),
    "has a message without content": (row(prompt=[{"role": "user"}]), MESSAGES[0], "got [{'role'", MESSAGES[1]),
    "has a message of null": (row(prompt=[{"role": "user", "content": None}]), MESSAGES[0], "None}]", MESSAGES[1]),
    "has an empty positive": (row(positive=""), "non-empty string as the pair's positive", "got ''", "Write one"),
    "has a number as negative": (row(negative=3), "non-empty string as the pair's negative", "got 3", "Write one"),
    "has a list as negative": (row(negative=["no"]), "non-empty string as the pair's negative", "['no']", "Write one"),
}


def pairs_cases() -> Iterator[Case]:
    for name, (content, *says) in PAIRS.items():
        files = {"in.jsonl": content}
        yield Case(f"a pairs file that {name}", lambda f: read_pairs(f / "in.jsonl"), *says, files=files)
    for what, read in {"pairs": read_pairs, "traces": read_traces, "JSON": artifacts.read_json}.items():
        says = "expected a file at", "there is none", "Check the path", FileNotFoundError
        yield Case(f"a file of {what} that is not there", lambda f, read=read: read(f / "in.json"), *says)
        says = "expected a file at", "got a folder", "Name a file in it", IsADirectoryError
        yield Case(
            f"a folder for a file of {what}", lambda f, read=read: read(f / "in.json"), *says, files={"in.json": None}
        )


# Traces

R1, R2 = round_tag(1), round_tag(2)
A1, A2, B1, B2 = agent_tag(1, 1), agent_tag(2, 1), agent_tag(1, 2), agent_tag(2, 2)
WHOLE, ONCE, NOBODY = "expected a trace from", "expected each agent once per round", "expected the agents"
MALFORMED = {  # what is wrong -> the text, and what was expected
    "no tag": ("hello", WHOLE),
    "nothing in it": ("", WHOLE),
    "no first round": (f"{A1}: x\n\n{END}", WHOLE),
    "no end": (f"{R1}\n\n{A1}: x", WHOLE),
    "its end twice": (f"{R1} {A1}: x {END} {END}", "expected <|endofdebate|> once"),
    "a round without agents": (f"{R1}\n\n{END}", NOBODY),
    "an agent twice": (f"{R1} {A1}: x {A1}: y {END}", ONCE),
    "an agent missing in round 2": (f"{R1} {A1}: x {A2}: y {R2} {B1}: z {END}", NOBODY),
    "a new agent in round 2": (f"{R1} {A1}: x {R2} {B1}: y {B2}: z {END}", NOBODY),
    "a revision in round 1": (f"{R1} {B1}: x {END}", ONCE),
    "a solution in round 2": (f"{R1} {A1}: x {R2} {A1}: y {END}", ONCE),
    "a round skipped": (f"{R1} {A1}: x {round_tag(3)} {B1}: y {END}", "expected <|Round 2 - Revision|> next"),
    "a round twice": (f"{R1} {A1}: x {R1} {A1}: y {END}", "expected <|Round 2 - Revision|> next"),
    "an agent after the consensus": (f"{R1} {A1}: x {CONSENSUS} c {A2}: y {END}", ONCE),
    "a round after the consensus": (f"{R1} {A1}: x {CONSENSUS} c {R2} {B1}: y {END}", "expected <|Round 2"),
    "its consensus twice": (f"{R1} {A1}: x {CONSENSUS} c {CONSENSUS} d {END}", "expected <|Consensus|> once"),
    "its consensus before the agents": (f"{R1} {CONSENSUS} c {END}", NOBODY),
    "a tag that is not closed": (f"{R1} <|Agent 1 Solution: x {END}", NOBODY),
    "a tag that is cut off at its end": (f"{R1} {A1}: x {END[:-1]}", WHOLE),
    "tags interleaved": (f"{R1} {A1}: x {R2} {A2}: y {B1}: z {END}", ONCE),
    "tags of full-width bars": (f"{R1} {A1}: x {END}".replace("|", "\uff5c"), WHOLE),
    "tags in another case": (f"{R1} {A1}: x {END}".lower(), WHOLE),
    "an agent 0": (f"{R1} <|Agent 0 Solution|>: x {END}", NOBODY),
}
TRACE = f"{R1}\n\n{A1}: x\n\n{END}"


def trace_file(*records: object, name: str = "in.json") -> Files:
    return {name: json.dumps(list(records)).encode()}


def record(**changes: object) -> dict[str, object]:
    return {"question": "q", "debate_trace": TRACE, **changes}


def trace_cases() -> Iterator[Case]:
    for name, (text, expected) in MALFORMED.items():
        yield Case(f"a trace with {name}", lambda _, t=text: DebateTrace("q", t), expected, "; ", "Mend the tags")
    quotes = "Put it in quotes"
    records: dict[str, tuple[Files, str, str, str]] = {
        "is cut off": ({"in.json": b'[{"question": "q"'}, "expected JSON in", "got something else", "Mend or delete"),
        "has a key twice": ({"in.json": b'[{"question": 1, "question": 2}]'}, "expected JSON", "stands twice", "Mend"),
        "holds one object": ({"in.json": b"{}"}, "expected a JSON list of objects", "got '{}'", "Put the records in ["),
        "holds numbers": ({"in.json": b"[1]"}, "expected a JSON list of objects", "got '[1]'", "Put the records in ["),
        "lacks the trace": (trace_file({"question": "q"}), "expected the keys", "got ['question']", "Add ["),
        "has null as trace": (trace_file(record(debate_trace=None)), "expected the text", "got None", quotes),
        "has a number as question": (trace_file(record(question=7)), "expected the question", "got 7", quotes),
        "has a number as answer": (trace_file(record(gold_answer=14)), "expected the gold", "got 14", quotes),
        "has a list as answer": (trace_file(record(gold_answer=["14"])), "expected the gold", "got ['14']", quotes),
        "has no trace in record 2": (trace_file(record(), record(debate_trace="x")), "record 2: e", "; ", "Mend"),
    }
    for name, (files, *says) in records.items():
        yield Case(f"a file of traces that {name}", lambda f: read_traces(f / "in.json"), *says, files=files)
    torn = {"in.jsonl": json.dumps(record()).encode()[:-5]}
    yield Case(
        "traces, one a line, that are cut off", lambda f: read_traces(f / "in.jsonl"),
        "expected a JSON object", "line 1; got b'", LINE, files=torn,
    )  # fmt: skip
    tagged = [Turn(1, 1, f"x {A2}: y")]
    yield Case(
        "a turn with a tag in its text", lambda _: DebateTrace.of("q", tagged, None),
        "expected turns without tags", "got 'x <|Agent 2", "Take them out",
    )  # fmt: skip
    pair = {"turn_identifier": "t", "context": "c", "positive_agent_id": "1", "positive_response": "r"}
    twice = [{"negative_agent_id": "2", "negative_response": text} for text in "ab"]
    yield Case(
        "a steering pair without its negatives", lambda f: read_contrasts(f / "in.json"),
        "expected the released keys", "got ['context'", "`write_contrasts`", files=trace_file(pair),
    )  # fmt: skip
    yield Case(
        "a steering pair with a negative agent twice", lambda f: read_contrasts(f / "in.json"),
        "negative agent once", "got ['2'] for 2", "Take out", files=trace_file({**pair, "negative_pairs": twice}),
    )  # fmt: skip


# Vectors

FINITE = ("expected a finite vector at layer 0", "got NaN or infinity", "Scale or mend it")
REAL = "expected a real tensor [d_model] at layer 0"
INDEX = "expected layers to be block indices from 0"
VECTORS: dict[str, tuple[Any, str, str, str]] = {
    "without layers": ({}, "expected a vector at one layer at least", "got none", "Give {layer: tensor}"),
    "that is a tensor": (torch.ones(3), "a vector at one layer at least", "got Tensor", "Give {layer: tensor}"),
    "at layer -1": ({-1: torch.ones(2)}, INDEX, "got -1", "Count the blocks from 0"),
    "at layer True": ({True: torch.ones(2)}, INDEX, "got True", "Count the blocks from 0"),
    "at a layer in quotes": ({"0": torch.ones(2)}, INDEX, "got '0'", "Count the blocks from 0"),
    "at layers of several kinds": ({0: torch.ones(2), "1": torch.ones(2)}, INDEX, "got '1'", "Count the blocks"),
    "at layer 1.0": ({1.0: torch.ones(2)}, INDEX, "got 1.0", "Count the blocks from 0"),
    "of a list": ({0: [1.0, 2.0]}, REAL, "got list", "Reshape it"),
    "of a numpy array": ({0: np.ones(2)}, REAL, "got ndarray", "Reshape it"),
    "of a matrix": ({0: torch.ones(2, 2)}, REAL, "got torch.float32 [2, 2]", "Reshape it"),
    "of no numbers": ({0: torch.ones(0)}, REAL, "got torch.float32 [0]", "Reshape it"),
    "of complex numbers": ({0: torch.ones(2, dtype=torch.complex64)}, REAL, "got torch.complex64 [2]", "Reshape it"),
    "with NaN": ({0: torch.tensor([1.0, float("nan")])}, *FINITE),
    "with infinity": ({0: torch.tensor([1.0, float("-inf")])}, *FINITE),
    "too large for float32": ({0: torch.tensor([1e300], dtype=torch.float64)}, *FINITE),
    "of two widths": ({0: torch.ones(2), 1: torch.ones(3)}, "expected equal widths", "got [2, 3]", "of one model"),
}
ARITHMETIC: dict[str, tuple[Callable[[SteeringVector], object], str, str, str, type[Exception]]] = {
    "added to a number": (lambda v: v + 3, "expected a vector to add", "got int", "Make a SteeringVector", TypeError),
    "times a text": (lambda v: v * "2", "expected a number to multiply", "got str", "Give a float", TypeError),
    "times a tensor": (lambda v: v * torch.ones(32), "expected a number to multiply", "Tensor", "Give a", TypeError),
    "times NaN": (lambda v: v * float("nan"), "expected a finite vector", "got NaN", "Scale or mend it", ValueError),
    "times infinity": (lambda v: v * float("inf"), "expected a finite vector", "got NaN", "Scale or mend", ValueError),
    "divided by 0": (lambda v: v / 0, "expected a number other than 0", "got 0", "another", ValueError),
    "added at another layer": (lambda v: v + push(2), "expected equal layers", "of 32 and [2]", "Take .at", ValueError),
    "added in another width": (lambda v: v + push(width=5), "equal layers", "and [1] of 5", "Take .at", ValueError),
    "added to another model's": (
        lambda v: v + push(model_fingerprint="b"), "vectors of one model", "is None and b", "Extract", ValueError
    ),
    "of norm 0 as a direction": (
        lambda v: (v * 0).unit(), "expected vectors of norm above 0", "0 at layers [1]", "Take others", ValueError
    ),
    "at a layer it has not": (lambda v: v.at(3), "expected layers among [1]", "got [3]", "Choose of these", ValueError),
    "at no layer": (lambda v: v.at(), "expected layers among [1]", "got []", "Choose of these", ValueError),
    "at a layer twice": (lambda v: v.at(1, 1), "each once", "got [1, 1]", "Choose of these", ValueError),
    "at True for 1": (lambda v: v.at(True), "expected layers among [1]", "got [True]", "Choose of these", ValueError),
    "at 1.0 for 1": (lambda v: v.at(1.0), "expected layers among [1]", "got [1.0]", "Choose of these", ValueError),
}  # fmt: skip
LABELS = ["positive", "negative"]


def vector_cases() -> Iterator[Case]:
    for name, (layers, *says) in VECTORS.items():
        yield Case(f"a vector {name}", lambda _, layers=layers: SteeringVector(layers), *says)
    for name, (do, *says) in ARITHMETIC.items():
        yield Case(f"a vector {name}", lambda _, do=do: do(push()), *says)
    load = {
        "a vector file that is not there": ({}, "there is no such file", "Check the path", FileNotFoundError),
        "a folder for a vector file": ({"v": None}, "there is no such file", "Check the path", FileNotFoundError),
        "a vector file that is empty": ({"v": b""}, "; got", "fetch it anew", ValueError),
        "a vector file of text": ({"v": PAIR}, "; got", "fetch it anew", ValueError),
        "a vector file that announces too much": ({"v": b"\xff" * 8 + b"{}"}, "; got", "fetch it anew", ValueError),
    }
    for name, (files, *says) in load.items():
        yield Case(name, lambda f: SteeringVector.load(f / "v"), "a steering vector at", *says, files=files)
    known = "expected one of the labels ['negative', 'positive']"
    yield Case(
        "a difference of a label that is not there", lambda _: difference_in_means(acts(LABELS), "agent"),
        known, "got 'agent'", "Name one of those",
    )  # fmt: skip
    yield Case(
        "a difference of a label and itself", lambda _: difference_in_means(acts(LABELS), "negative"),
        "expected two different labels", "got 'negative' on both sides", "Name another",
    )  # fmt: skip
    yield Case(
        "one label against no other", lambda _: one_against_others(acts(["a", "a"])),
        "expected two labels at least", "got ['a']", "Read texts with another one",
    )  # fmt: skip
    yield Case(
        "principal components of unequal sides", lambda _: pca(acts([*LABELS, "positive"])),
        "expected as many 'positive' as 'negative'", "got 2 and 1", "Pair them up",
    )  # fmt: skip
    items = pd.DataFrame({"label": ["a", "b"]})
    shape = "expected resid of shape [2 items, 1 layers, d_model]"
    shapes = {"of items": torch.ones(3, 1, 4), "of layers": torch.ones(2, 2, 4), "[item, layer]": torch.ones(2, 1)}
    for name, resid in shapes.items():
        yield Case(f"activations {name}", lambda _, r=resid: Activations(r, (0,), items), shape, "; got [", "Give one")
    for bad in (float("nan"), float("inf")):
        resid = torch.full((2, 1, 4), bad)
        yield Case(
            f"activations of {bad}", lambda _, r=resid: Activations(r, (7,), items),
            "expected finite activations", "in item 0 at layer 7", "Load the model in float32",
        )  # fmt: skip
    yield Case(
        "activations where too few booleans say so", lambda _: acts(LABELS).where([True]),
        "expected 2 booleans", "of shape (1,)", "Compare a column",
    )  # fmt: skip
    yield Case(
        "activations at a layer that was not read", lambda _: acts(LABELS).at(5),
        "expected one of the layers that were read, [0]", "got 5", "Read it first",
    )  # fmt: skip


# Steering and generation

STEERINGS: dict[str, tuple[Mapping[str, Any], str, str, str]] = {
    **{
        f"coefficient {value!r}": ({"coefficient": value}, "expected a finite coefficient", f"got {value!r}", "another")
        for value in (float("nan"), float("inf"), 1e39, "2", True, None, [1.0], 1j)
    },
    "a matrix of coefficients": ({"coefficient": torch.ones(2, 2)}, "finite coefficient", "got tensor(", "another"),
    "a NaN among coefficients": (
        {"coefficient": torch.tensor([1.0, float("nan")])}, "expected finite coefficients", "got [1.0, nan]", "Take out"
    ),
    **{
        f"positions {value!r}": ({"positions": value}, "expected positions among", f"got {value!r}", "Choose one")
        for value in ("response", "generated:0", "generated:x", "generated:-1", "generated:1.5", "", None)
    },
    **{
        f"operation {value!r}": ({"operation": value}, "operation 'add' or 'ablate'", f"got {value!r}", "Choose")
        for value in ("multiply", "ADD", None)
    },
    "a vector that is zero, to ablate": (
        {"vector": push() * 0, "operation": "ablate"}, "a direction to ablate", "zero at layers [1]", "Take others"
    ),
}  # fmt: skip
PROMPT = MESSAGES
BEYOND = Steering(push(), 3e38, "from_last_prompt_token")  # finite in float32, and times the vector it is not
LIST = ("expected a non-empty list of prompts", "Put them in a list")
GENERATED: dict[str, tuple[Mapping[str, Any], str, str, str, type[Exception]]] = {
    "no prompts": ({"prompts": []}, LIST[0], "got []", LIST[1], ValueError),
    "one text for a list": ({"prompts": "Hello"}, LIST[0], "got 'Hello'", LIST[1], ValueError),
    "an object for a list": ({"prompts": {"prompt": "Hello"}}, LIST[0], "got {", LIST[1], ValueError),
    "an empty prompt": ({"prompts": ["a", ""]}, "at least one character", "got an empty one", "Write one", ValueError),
    "None as a prompt": ({"prompts": [None]}, PROMPT[0], "got None", PROMPT[1], ValueError),
    "bytes as a prompt": ({"prompts": [b"hi"]}, PROMPT[0], "got b'hi'", PROMPT[1], ValueError),
    "no messages": ({"prompts": [[]]}, PROMPT[0], "got []", PROMPT[1], ValueError),
    "a conversation for a list": (
        {"prompts": [{"role": "user", "content": "hi"}]}, PROMPT[0], "got {'role'", PROMPT[1], ValueError
    ),
    "a message of a number": (
        {"prompts": [[{"role": "user", "content": 3}]]}, PROMPT[0], "'content': 3", PROMPT[1], ValueError
    ),
    "half a surrogate pair": (
        {"prompts": ["ab\ud800"]}, "text that UTF-8 can hold", "'\\ud800', at character 2", "Take it out", ValueError
    ),
    "a prompt beyond the context": (
        {"prompts": ["x" * 300]}, "within the model's context of 256", "got 300 + 2", "Cut either", ValueError
    ),
    "a vector for a steering": (
        {"steering": push()}, "expected a Steering", "got SteeringVector", "Say Steering(vector", TypeError
    ),
    "a text for a steering": ({"steering": "a"}, "expected a Steering", "got str", "Say Steering(", TypeError),
    "steerings for other prompts": (
        {"steering": [None, None]}, "expected one steering (or None) per prompt, 1", "got 2", "Pair them", ValueError
    ),
    "coefficients for other rows": (
        {"steering": Steering(push(), torch.ones(2))}, "one coefficient per row, 1", "got 2", "Pair them", ValueError
    ),
    "a vector of another width": (
        {"steering": Steering(push(width=5))}, "a vector of width 32, the model's", "got 5", "Extract it", ValueError
    ),
    "a vector of another model": (
        {"steering": Steering(push(model_fingerprint="0" * 16, checkpoint="theirs"))},
        "expected a vector read from this model", "('0000000000000000', None) (theirs)", "Say foreign=True", ValueError,
    ),
    "a vector at a layer beyond": (
        {"steering": Steering(push(4))}, "expected a layer from 0 to 3", "got 4", "the last layer is 3", ValueError
    ),
    "a push beyond all numbers": (
        {"steering": BEYOND}, "expected finite logits", "got NaN", "Lower the coefficient", ValueError
    ),
    "a sampled push beyond all numbers": (
        {"steering": BEYOND, "temperature": 1.0}, "expected finite logits", "got NaN", "Lower", ValueError
    ),
    **{
        f"{setting} {value!r}": ({setting: value}, f"expected {about}", f"got {value!r}", "another", ValueError)
        for setting, about, values in (
            ("max_new_tokens", "max_new_tokens to be an integer from 1", (0, -1, 2.5, "3", True, None)),
            ("temperature", "a finite temperature from 0", (-0.1, float("nan"), float("inf"), "hot")),
            ("top_p", "top_p above 0 and at most 1", (0, 1.5, float("nan"), "all")),
            ("batch_rows", "batch_rows to be an integer from 1, or None", (0, -1, 1.5)),
        )
        for value in values
    },
}  # fmt: skip


def broken_model() -> Any:
    broken = tiny_model(seed=5)
    find_blocks(broken)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return broken


def other_tokenizer(**changes: Any) -> Any:
    other = tiny_tokenizer()
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def grown_tokenizer() -> Any:
    grown = tiny_tokenizer()
    grown.add_tokens(["<new>"])
    return grown


def generate(**given: Any) -> object:
    given = {"prompts": ["Hello"], "max_new_tokens": 2, "tokenizer": tokenizer(), **given}
    return sk.generate(model(), given.pop("tokenizer"), given.pop("prompts"), **given)


def steering_cases() -> Iterator[Case]:
    for name, (given, *says) in STEERINGS.items():
        yield Case(f"a steering with {name}", lambda _, given=given: Steering(**{"vector": push(), **given}), *says)
    for what in (torch.ones(32), "v.safetensors", {1: torch.ones(32)}, None):
        name = type(what).__name__
        says = "expected a SteeringVector", f"got {name}", "Load or make one", TypeError
        yield Case(f"a steering with {name} for a vector", lambda _, what=what: Steering(what), *says)
    for name, (given, *says) in GENERATED.items():
        yield Case(f"generation with {name}", lambda _, given=given: generate(**given), *says)
    chat = [[{"role": "user", "content": "hi"}]]
    yield Case(
        "messages for a tokenizer without a template",
        lambda _: generate(prompts=chat, tokenizer=other_tokenizer(chat_template=None)),
        "expected a tokenizer with a chat template", "this one has none", "Pass a string",
    )  # fmt: skip
    refusing = "{{ raise_exception('roles must alternate') }}"
    yield Case(
        "messages that the template refuses",
        lambda _: generate(prompts=chat, tokenizer=other_tokenizer(chat_template=refusing)),
        "expected messages that the chat template takes", "roles must alternate", "Change their roles",
    )  # fmt: skip
    yield Case(
        "a template that is none",
        lambda _: generate(prompts=chat, tokenizer=other_tokenizer(chat_template="{% for %}")),
        "expected messages that the chat template takes", "it refuses them", "pass a string",
    )  # fmt: skip
    yield Case(
        "a token that the model has not", lambda _: generate(prompts=["<new>"], tokenizer=grown_tokenizer()),
        "expected tokens among the 260", "got token 260", "Load this model's own tokenizer",
    )  # fmt: skip
    yield Case(
        "a token to read that the model has not", lambda _: sk.collect(model(), grown_tokenizer(), ["<new>"]),
        "expected tokens among the 260", "got token 260", "Load this model's own tokenizer",
    )  # fmt: skip
    for length in (0, -3):
        yield Case(
            f"a prompt length of {length}", lambda _, length=length: told(length),
            "expected a prompt length from 1", f"got [{length}]", "Count tokens",
        )  # fmt: skip


def told(length: int) -> None:
    with torch.no_grad(), Steering(push()).on(model(), prompt_length=length):
        model()(input_ids=torch.tensor([[1, 2, 3]]))


# Reading

LAYER = "expected a layer from 0 to 3", "Give a whole number in that range; the last layer is 3"
SPAN = "expected a position inside every span"
POSITION = "expected position 'last', 'first', 'mean' or an integer"
TEXTS = ("expected a non-empty list of texts", "Put them in a list")
COLLECTED: dict[str, tuple[Mapping[str, Any], str, str, str, type[Exception]]] = {
    **{
        f"layer {value!r}": ({"layers": value}, LAYER[0], f"got {value!r}", LAYER[1], ValueError)
        for value in (-1, 4, 99, True, 1.5, "1", "middle", None)
    },
    "a list of a list of layers": ({"layers": [[1]]}, LAYER[0], "got [1]", LAYER[1], ValueError),
    "no layers": ({"layers": []}, "expected one layer at least", "got []", "Say 'all'", ValueError),
    "a layer twice": ({"layers": [1, 1]}, "each once", "got [1, 1]", "Say 'all'", ValueError),
    **{
        f"position {value!r}": ({"position": value}, POSITION, f"got {value!r}", "Choose one", ValueError)
        for value in ("middle", 1.0, True, None)
    },
    **{
        f"position {value}": ({"position": value}, SPAN, f"{value} is outside", "Take one nearer", ValueError)
        for value in (5, -6)
    },
    "no texts": ({"texts": []}, TEXTS[0], "got []", TEXTS[1], ValueError),
    "one text for a list": ({"texts": "one"}, TEXTS[0], "got 'one'", TEXTS[1], ValueError),
    "an object for a list": ({"texts": {"a": "b"}}, TEXTS[0], "got {", TEXTS[1], ValueError),
    "an empty text": ({"texts": ["a", ""]}, "at least one character", "got an empty one", "Write one", ValueError),
    "a number as a text": ({"texts": [3]}, "or ContrastPair as text 0", "got int", "Convert it", TypeError),
    "a text beyond the context": ({"texts": ["x" * 300]}, "at most 256 tokens", "got 300", "Cut it", ValueError),
    "a pair with half a surrogate": (
        {"texts": [ContrastPair("a", "b\udc00", "c")]}, "that UTF-8 can hold", "character 1", "Take it out", ValueError
    ),
}  # fmt: skip


def collect(**given: Any) -> object:
    given = {"texts": ["four"], **given}
    return sk.collect(model(), tokenizer(), given.pop("texts"), **given)


def reading_cases() -> Iterator[Case]:
    for name, (given, *says) in COLLECTED.items():
        yield Case(f"reading with {name}", lambda _, given=given: collect(**given), *says)
    for name, read in {"activations": sk.collect, "means": sk.collect_means}.items():
        yield Case(
            f"{name} of a model with NaN in its weights", lambda _, r=read: r(broken_model(), tokenizer(), ["four"]),
            "expected finite activations", "got NaN or infinity", "Load the model in float32",
        )  # fmt: skip
    pair = "expected one text (and steering) per prompt, 2"
    yield Case(
        "perplexity of fewer texts than prompts", lambda _: fluency.perplexity(model(), tokenizer(), ["a", "b"], ["c"]),
        pair, "got [1]", "Pair them up",
    )  # fmt: skip
    yield Case(
        "perplexity of None", lambda _: fluency.perplexity(model(), tokenizer(), ["a"], [None]),
        "expected a text", "got None (NoneType)", "Drop or convert it", TypeError,
    )  # fmt: skip
    yield Case(
        "KL of a push beyond all numbers",
        lambda _: fluency.kl(model(), tokenizer(), ["a"], ["bc"], [Steering(push(), 3e38)]),
        "expected finite logits", "got NaN", "Lower the coefficient",
    )  # fmt: skip
    yield Case(
        "a probe of one class", lambda _: fit_probe(torch.ones(3, 2), ["a"] * 3),
        "expected two classes at least", "got ['a']", "another class",
    )  # fmt: skip
    yield Case(
        "a probe of missing labels", lambda _: fit_probe(torch.ones(3, 2), ["a", "b", None]),
        "expected a label for every item", "item 2 has none", "Drop that item",
    )  # fmt: skip
    yield Case(
        "a probe of NaN", lambda _: fit_probe(torch.full((2, 2), float("nan")), ["a", "b"]),
        "expected finite x", "got NaN or infinity", "Drop those items",
    )  # fmt: skip
    yield Case(
        "a probe of fewer labels than items", lambda _: fit_probe(torch.ones(3, 2), ["a", "b"]),
        "expected x of shape [2 labels, d_model]", "got [3, 2]", "Give a row per label",
    )  # fmt: skip
    yield Case(
        "a probe of penalty 0", lambda _: fit_probe(torch.eye(2), ["a", "b"], c=0), "expected c above 0", "got 0", "1.0"
    )
    many = LABELS * 6
    yield Case(
        "probes of one group", lambda _: probe_layers(acts(many, ["g"] * 12)),
        "as many groups as folds", "got 5 folds and 1 groups", "Read more groups",
    )  # fmt: skip
    yield Case(
        "probes of two folds", lambda _: probe_layers(acts(many), folds=2),
        "expected 3 folds at least", "got 2 folds", "change folds",
    )  # fmt: skip
    yield Case(
        "probes of a column that is not there", lambda _: probe_layers(acts(many), label="agent"),
        "expected columns ['agent']", "got ['label'", "Add them or name others",
    )  # fmt: skip
    yield Case(
        "probes of no layer", lambda _: probe_layers(acts(many), layers=[]),
        "expected one layer at least", "got none", "Pass layers=None",
    )  # fmt: skip


# Sweeps and their results

NUMBERS = "expected coefficients that differ, one number at least", "List them"
PLACES = "expected a list of layers that differ", "List them"
SWEPT: dict[str, tuple[Mapping[str, Any], str, str, str, type[Exception]]] = {
    **{
        f"coefficients {value!r}": ({"coefficients": value}, NUMBERS[0], f"got {value!r}", NUMBERS[1], ValueError)
        for value in ([], [1, 1], "1,2", 1.0, ["1"], [True], [0, 1, None])
    },
    **{
        f"coefficient {value}": (
            {"coefficients": [1, value]}, "expected a finite coefficient", f"got {value}", "another", ValueError
        )
        for value in (float("nan"), float("inf"), 1e39)
    },
    **{
        f"layers {value!r}": ({"layers": value}, PLACES[0], f"got {value!r}", PLACES[1], ValueError)
        for value in ([], [1, 1], "all", 1, [(1,), 1])
    },
    "a layer that its vector has not": ({"layers": [2]}, "expected layers among [1]", "got [2]", "Choose", ValueError),
    "a layer in quotes": ({"layers": ["1"]}, "expected layers among [1]", "got ['1']", "Choose of these", ValueError),
    "a layer that its model has not": (
        {"vectors": push(9), "layers": [9]}, "expected a layer from 0 to 3", "got 9", "the last layer is 3", ValueError
    ),
    "no vectors": ({"vectors": {}}, "expected one vector", "got 0 vectors", "Add some", ValueError),
    "a list of vectors": ({"vectors": [push()]}, "or several by name", "got [SteeringVector", "Say {'name'", TypeError),
    "a tensor among vectors": ({"vectors": {"v": torch.ones(2)}}, "several by name", "tensor", "Say {", TypeError),
    "a vector of another width": (
        {"vectors": push(width=5)}, "a vector of width 32", "got 5", "Extract it from this model", ValueError
    ),
    "a vector of another model": (
        {"vectors": push(model_fingerprint="b")}, "read from this model", "('b', None)", "Say foreign=True", ValueError
    ),
    "no prompts": ({"prompts": []}, LIST[0], "got []", LIST[1], ValueError),
    "one prompt for a list": ({"prompts": "Hello"}, LIST[0], "got 'Hello'", LIST[1], ValueError),
    "one row for a list": ({"prompts": {"prompt": "Hello"}}, LIST[0], "got {", LIST[1], ValueError),
    "a row without a prompt": ({"prompts": [{"id": 1}]}, "expected a 'prompt' in row 0", "['id']", "Add", ValueError),
    "a prompt of a number": ({"prompts": [{"prompt": 3}]}, PROMPT[0], "got 3", PROMPT[1], ValueError),
    "two prompts of one id": (
        {"prompts": [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}]},
        "expected prompt ids that differ", "got ['1'] more than once", "Number them", ValueError,
    ),
    "a column of the sweep's own": (
        {"prompts": [{"prompt": "a", "seed": 1}]}, "expected other names", "got ['seed']", "Rename it", ValueError
    ),
    "half a surrogate pair": ({"prompts": ["\udfff"]}, "that UTF-8 can hold", "'\\udfff'", "Take it out", ValueError),
    "a prompt beyond the context": ({"prompts": ["x" * 300]}, "context of 256", "got 300 + 2", "Cut", ValueError),
    "positions of its own": ({"positions": "here"}, "expected positions among", "got 'here'", "Choose one", ValueError),
    "an operation of its own": ({"operation": "mul"}, "'add' or 'ablate'", "got 'mul'", "Choose one", ValueError),
    "samples 0": ({"samples": 0}, "one sample at least", "samples=0", "Add some", ValueError),
    "samples 2.0": ({"samples": 2.0}, "one sample at least", "samples=2.0", "Add some", ValueError),
    "samples without a temperature": (
        {"samples": 2, "temperature": 0.0}, "a temperature above 0 for 2 samples", "got 0", "Raise it", ValueError
    ),
    "temperature -1": ({"temperature": -1.0}, "a finite temperature from 0", "got -1.0", "another", ValueError),
    "top_p 2": ({"top_p": 2.0}, "top_p above 0 and at most 1", "got 2.0", "another", ValueError),
    "max_new_tokens 0": ({"max_new_tokens": 0}, "max_new_tokens to be an integer", "got 0", "another", ValueError),
    "batch_rows -1": ({"batch_rows": -1}, "batch_rows to be an integer from 1", "got -1", "another", ValueError),
}  # fmt: skip
NAMED = "expected lists of names", "Put it in a list"
COLUMNS = "expected a score among the columns"
RESULTS: dict[str, tuple[Callable[[], object], str, str, str]] = {
    "without columns": (
        lambda: SweepResult(pd.DataFrame({"a": [1]})), "the columns of a sweep", "got ['a']", "load another table"
    ),
    "scored by an unknown score": (lambda: swept(0).score("bleu"), "a score among", "got 'bleu'", "Choose one"),
    "scored without references": (
        lambda: swept(0).score("rouge_l"), "a reference for every prompt", "some have none", "Give the sweep rows"
    ),
    "scored by perplexity without a model": (
        lambda: swept(0).score("perplexity"), "expected model= and tokenizer=", "one is None", "Pass them"
    ),
    "scored by KL without its vectors": (
        lambda: swept(0, prompt="p").score("kl", model=model(), tokenizer=tokenizer(), vectors={"w": push()}),
        "expected the sweep's vectors by name", "got ['w']", "Add ['v']",
    ),
    "scored by perplexity without prompts": (
        lambda: swept(0).score("perplexity", model=model(), tokenizer=tokenizer()),
        "expected a column 'prompt'", "got ['vector'", "Load a sweep's own table",
    ),
    "scored by distance without coefficient 0": (
        lambda: swept(1).score("distance"), "expected a text at coefficient 0", "got none for ('0', 0)", "Sweep it"
    ),
    "scored into its own texts": (
        lambda: swept(0).score("distinct_2", column="text"), "that no column of a sweep has", "got 'text'", "Rename it"
    ),
    "with a curve of no score": (lambda: swept(0, 1).curve("s"), COLUMNS, "got 's'", "Add it with .score('s')"),
    "with a curve by no column": (
        lambda: swept(0, 1, s=1.0).curve("s", by=["agent"]), "expected columns to group by", "got ['agent']", "Choose"
    ),
    "with an area of one coefficient": (
        lambda: swept(1, s=1.0).curve_auc("s"), "expected at least two coefficients", "got 1", "Measure the curve"
    ),
    "with a gain of no score": (lambda: swept(0, 1).gain("s"), COLUMNS, "got 's'", "Add it with .score('s')"),
    "with a gain of no vector": (
        lambda: swept(0, 1, s=1.0).gain("s", vectors=["w"]), "vectors among ['v']", "got ['w']", "Choose of these"
    ),
    "with a gain of a name for a list": (
        lambda: swept(0, 1, s=1.0).gain("s", vectors="v"), NAMED[0], "got vectors='v'", NAMED[1]
    ),
    "with a gain over no controls": (lambda: swept(0, 1, s=1.0).gain("s", over=[]), NAMED[0], "over=[]", NAMED[1]),
    "with a gain over controls that are not there": (
        lambda: swept(0, 1, s=1.0).gain("s", over=["r"]), "the controls in the table", "[('r', 1, 1)]", "Sweep"
    ),
}  # fmt: skip


def sweep(folder: Path, **given: Any) -> object:
    given = {
        "vectors": push(), "prompts": ["Hello"], "coefficients": [1], "layers": [1], "max_new_tokens": 2,
        "out": folder / "run", **given,
    }  # fmt: skip
    return sk.sweep(model(), tokenizer(), given.pop("vectors"), given.pop("prompts"), **given)


def sweep_cases() -> Iterator[Case]:
    for name, (given, *says) in SWEPT.items():
        yield Case(f"a sweep with {name}", lambda f, given=given: sweep(f, **given), *says)
    for name, (do, *says) in RESULTS.items():
        yield Case(f"a sweep's result {name}", lambda _, do=do: do(), *says)
    says = "expected a folder for the run", "got a file", "Name another place", NotADirectoryError
    yield Case("a sweep into a file", sweep, *says, files={"run": b"mine"})
    says = "expected a JSON object in", "got list", "Use another folder"
    yield Case("a sweep into a folder with a list as configuration", sweep, *says, files={"run/config.json": b"[1]"})
    says = "expected JSON in", "got something else", "Mend or delete the file"
    yield Case("a sweep into a folder with half a configuration", sweep, *says, files={"run/config.json": b'{"a":'})
    says = "expected the configuration that", "seed: 7 -> 0", "Use another folder", artifacts.ConfigurationChanged
    yield Case("a sweep into another one's folder", sweep, *says, files={"run/config.json": b'{"seed": 7}'})
    load = {
        "that is not there": ({}, "expected a finished sweep", "there is none", "run it on", FileNotFoundError),
        "that is not sealed": (
            {"t.parquet": None},
            "expected a finished sweep",
            "there is",
            "run it",
            FileNotFoundError,
        ),
        "of junk": ({"t.parquet": PAIR}, "expected a table in", "got something else", "Write it anew", ValueError),
        "of another kind": ({"t.parquet": b"PAR1" * 9}, "a table in", "got something", "Write it anew", ValueError),
    }
    for name, (files, *says) in load.items():
        yield Case(f"a sweep's table {name}", lambda f: SweepResult.load(f / "t.parquet"), *says, files=files)


# Files of all kinds


def file_cases() -> Iterator[Case]:
    kind = "expected a table path that ends in .parquet or .csv"
    table = pd.DataFrame({"a": [1]})
    yield Case(
        "a table as a pickle", lambda f: artifacts.write_table(f / "t.pkl", table, {}), kind, "got 't.pkl'", "Name it"
    )
    yield Case(
        "a pickle as a table", lambda f: artifacts.read_table(f / "t.pkl"), kind, "got 't.pkl'", "Name it so",
        files={"t.pkl": b"\x80\x04."},
    )  # fmt: skip
    meta = {"file": "t.csv", "sha256": artifacts.sha256(b"a\n1\n12\n"), "columns": ["a"], "text_columns": []}
    torn = {"t.csv": b"a\n1\n1", "t.meta.json": json.dumps(meta).encode()}
    yield Case(
        "a table that is cut off", lambda f: artifacts.read_table(f / "t.csv"),
        "as it was when t.meta.json was written", "cut off or changed", "delete t.meta.json", files=torn,
    )  # fmt: skip
    yield Case(
        "a table with a list for its meta", lambda f: artifacts.read_table(f / "t.csv"),
        "expected a JSON object", "got list", "Delete it", files={"t.csv": b"a\n1\n", "t.meta.json": b"[]"},
    )  # fmt: skip
    yield Case(
        "an empty table", lambda f: artifacts.read_table(f / "t.csv"),
        "expected a table in", "got something else", "Write it anew", files={"t.csv": b""},
    )  # fmt: skip
    name = "expected a name that can be part of a file's"
    for bad in ("../x", "a/b", "/etc/passwd", "..", ".hidden", "", "a\nb", "a\x00b", "x/"):
        yield Case(
            f"{bad!r} as part of a file's name", lambda _, bad=bad: artifacts.file_name(bad), name, repr(bad), "Take"
        )
    says = "expected a file to write at", "got a folder", "Name a file in it", IsADirectoryError
    yield Case("a text onto a folder", lambda f: artifacts.write_text(f / "d", "a"), *says, files={"d": None})
    yield Case("a vector onto a folder", lambda f: push().save(f / "d"), *says, files={"d": None})
    surrogate = "expected text that UTF-8 can hold", "half a surrogate pair, '\\ud83d'", "Take it out"
    bad = "half \ud83d a pair"
    writes: dict[str, Callable[[Path], object]] = {
        "text": lambda f: artifacts.write_text(f / "t", bad),
        "JSON": lambda f: artifacts.write_json(f / "t", {"a": bad}),
        "rows": lambda f: artifacts.append_rows(f / "t", [{"a": 1}, {"a": bad}]),
        "pairs": lambda f: write_pairs(f / "t", [ContrastPair("p", "yes", bad)]),
        "a vector": lambda f: push(note=bad).save(f / "t"),
    }
    for what, write in writes.items():
        yield Case(f"half a surrogate pair written as {what}", write, *surrogate, files={"t": b'{"old": 1}\n'})


# Checkpoints


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
            "expected a device that is there", "got 'cuda:1' without a GPU", "Say device='cpu'",
        )  # fmt: skip
    yield Case(
        "an adapter that is not there", lambda f: models._with_adapter(tiny_model(), f / "adapter", False),
        "expected an adapter with safetensors", "got none", "Check the path",
    )  # fmt: skip
    yield Case(
        "an adapter with its weights cut off", lambda f: models._with_adapter(tiny_model(), f / "adapter", False),
        "expected a whole adapter", "; got", "Fetch it again",
        files={
            "adapter/adapter_model.safetensors": b"\x10",
            "adapter/adapter_config.json": json.dumps(
                {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
            ).encode(),
        },
    )  # fmt: skip


CASES = [
    *pairs_cases(),
    *trace_cases(),
    *vector_cases(),
    *steering_cases(),
    *reading_cases(),
    *sweep_cases(),
    *file_cases(),
    *checkpoint_cases(),
]


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


@pytest.mark.usefixtures("only_our_own_checks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_with_three_parts_and_nothing_is_written(case: Case, tmp_path: Path) -> None:
    lay(tmp_path, case.files)
    before = tree(tmp_path)
    with pytest.raises(case.error) as caught:
        case.act(tmp_path)
    message = str(caught.value)
    for part in (case.expected, case.got, case.do):
        assert part in message, message
    assert len(message) < 2000
    assert tree(tmp_path) == before


def test_the_catalogue_is_large_and_names_each_case_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100


# What looks odd and is no mistake


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + PAIR + PAIR.replace(b"\n", b"\r\n"))
    assert read_pairs(tmp_path / "p.jsonl") == [ContrastPair("p", "yes", "no")] * 2
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([record()]).encode())
    assert len(read_traces(tmp_path / "t.json")) == 1


def test_a_line_of_a_megabyte_and_a_last_line_without_its_newline_are_read(tmp_path: Path) -> None:
    long = row(positive="yes " * 2**18)
    (tmp_path / "p.jsonl").write_bytes(long + PAIR.rstrip(b"\n"))
    first, last = read_pairs(tmp_path / "p.jsonl")
    assert len(first.positive) == 2**20
    assert last == ContrastPair("p", "yes", "no")


ODD = {
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
    "control characters": "a\x00b\x07\x1b[31m\x7f\x9b",
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufe0f",
    "combining marks": "e\u0301\u0323" * 5,
    "what looks like a tag": "<|Agent 1 Solution> |> <| <|Round 0 - Revision|>",
    "line and paragraph separators": "a\u2028b\u2029c\x85d\x0be",
    "markup": "</script>{{ 7*7 }}{% raw %}<!--",
    "nothing": "",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_go_through_files_traces_and_the_model_as_they_are(name: str, tmp_path: Path) -> None:
    text = ODD[name]
    turns = [Turn(1, 1, text.strip()), Turn(2, 1, "b")]
    trace = DebateTrace.of(text, turns, text)
    assert list(trace.turns) == turns
    for file in ("t.json", "t.jsonl"):
        sk.write_traces(tmp_path / file, [trace])
        assert read_traces(tmp_path / file) == [trace]
    if text:
        pairs = [ContrastPair(text, text, "no"), ContrastPair([{"role": "user", "content": text}], "a", text)]
        write_pairs(tmp_path / "p.jsonl", pairs)
        assert read_pairs(tmp_path / "p.jsonl") == pairs
        found = sk.collect(model(), tokenizer(), pairs, layers=[1], position="mean")
        assert found.items["n_tokens"].tolist()[0] == len(text.encode())


def test_prompts_that_are_odd_are_told_apart_in_a_sweep(tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": text} for name, text in ODD.items() if text]
    made = sk.sweep(model(), tokenizer(), push(), rows, coefficients=[1], max_new_tokens=2, out=tmp_path / "run")
    back = SweepResult.load(tmp_path / "run").table
    assert back["prompt"].tolist() == made.table["prompt"].tolist()
    assert set(back["prompt"]) == {row["prompt"] for row in rows}
