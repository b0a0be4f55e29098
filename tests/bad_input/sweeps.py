"""Cases: sweeps and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.sweeps.result import SweepResult
from tests.bad_input.cases import LIST, NO_TABLE, NUMBERS, PAIR, PROMPT, TABLE, Case, model, push, swept, tokenizer

PLACES = "expected layers that differ", "List each once"
SWEPT: dict[str, tuple[Mapping[str, Any], str, str, str, type[Exception]]] = {
    **{
        f"coefficients {value!r}": ({"coefficients": value}, NUMBERS[0], f"got {value!r}", NUMBERS[1], ValueError)
        for value in ([], [1, 1], "1,2", ["1"], [True], [0, 1, None])
    },
    **{
        f"coefficient {value}": (
            {"coefficients": [1, value]}, "expected a finite coefficient", f"got {value}", "another", ValueError
        )
        for value in (float("nan"), float("inf"), 1e39)
    },
    **{
        f"layers {value!r}": ({"layers": value}, PLACES[0], f"got {value!r}", PLACES[1], ValueError)
        for value in ([], [1, 1], [(1,), 1], range(0), ["all", "all"])
    },
    "a layer that its vector has not": ({"layers": [2]}, "expected layers among [1]", "got [2]", "Pass", ValueError),
    "a layer in quotes": ({"layers": ["1"]}, "expected a layer as a number", "got '1'", "Pass a number", ValueError),
    "a layer that is no number": ({"layers": True}, "expected a layer as a number", "got True", "Pass a", ValueError),
    "a layer that its model has not": (
        {"vectors": push(9), "layers": [9]}, "expected a layer from 0 to 3", "got 9", "the last layer is 3", ValueError
    ),
    "coefficients and doses": (
        {"doses": [1]}, "expected coefficients or doses", "got both", "Pass one of the two", ValueError
    ),
    **{
        f"doses {value!r}": (
            {"coefficients": None, "doses": value}, "expected at least one dose", f"got {value!r}", "List", ValueError
        )
        for value in ([], [1, 1], "1,2", [True])
    },
    "neither coefficients nor doses": (
        {"coefficients": None}, "expected coefficients or doses", "got neither", "Pass one of the two", ValueError
    ),
    **{
        f"norms of {value}": (
            {"stream_norms": {1: value}}, "stream_norms above 0", f"got {{1: {value}}}", "Pass e.g.", ValueError
        )
        for value in (0.0, -1.0, float("nan"), float("inf"))
    },
    "doses of an ablation": (
        {"coefficients": None, "doses": [1], "operation": "ablate"}, "expected a coefficient for 'ablate'",
        "got dose=1.0", "Pass a coefficient", ValueError,
    ),
    "no vectors": ({"vectors": {}}, "expected at least one vector", "got 0 vectors", "Add some", ValueError),
    "a list of vectors": ({"vectors": [push()]}, "or several by name", "got [SteeringVector", "Pass {", TypeError),
    "a tensor among vectors": ({"vectors": {"v": torch.ones(2)}}, "several by name", "tensor", "Pass {", TypeError),
    "a vector of another width": (
        {"vectors": push(width=5)}, "a vector of width 32", "got 5", "Extract it from this model", ValueError
    ),
    "a vector of another model": (
        {"vectors": push(model_fingerprint="b")}, "read from this model", "('b', None)", "Pass foreign=True", ValueError
    ),
    "no prompts": ({"prompts": []}, LIST[0], "got []", LIST[1], ValueError),
    "one prompt for a list": ({"prompts": "Hello"}, LIST[0], "got 'Hello'", LIST[1], ValueError),
    "a table of prompts": ({"prompts": TABLE}, "expected a list of prompts", *NO_TABLE, ValueError),
    "one row for a list": ({"prompts": {"prompt": "Hello"}}, LIST[0], "got {", LIST[1], ValueError),
    "a row without a prompt": ({"prompts": [{"id": 1}]}, "expected a 'prompt' in row 0", "['id']", "Add", ValueError),
    "a prompt of a number": ({"prompts": [{"prompt": 3}]}, PROMPT[0], "got 3", PROMPT[1], ValueError),
    "two prompts of one id": (
        {"prompts": [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}]},
        "expected prompt ids that differ", "got ['1'] more than once", "Number them", ValueError,
    ),
    "a column of the sweep's own": (
        {"prompts": [{"prompt": "a", "seed": 1}]}, "expected column names", "got ['seed']", "Rename it", ValueError
    ),
    "an empty choice": ({"choices": [""]}, "a list of choices that differ", "got ['']", "Pass e.g.", ValueError),
    "one text for choices": ({"choices": " Yes"}, "a list of choices that differ", "got ' Yes'", "Pass", ValueError),
    "a number as a choice": ({"choices": [1]}, "expected choices as texts", "got 1 (int)", "Pass texts", TypeError),
    "choices of one prompt only": (
        {"prompts": [{"prompt": "a", "choices": ["b"]}, "c"]}, "choices for every prompt or for none",
        "1 have none, the first is '1'", "Add their", ValueError,
    ),
    "a choice beyond the context": ({"choices": ["x" * 300]}, "context of 256", "got 5 + 300", "Shorten", ValueError),
    "half a surrogate pair": ({"prompts": ["\udfff"]}, "that UTF-8 can hold", "'\\udfff'", "Take it out", ValueError),
    "a prompt beyond the context": ({"prompts": ["x" * 300]}, "context of 256", "got 300 + 2", "Shorten", ValueError),
    "positions of its own": ({"positions": "here"}, "expected positions among", "got 'here'", "Choose one", ValueError),
    "an operation of its own": ({"operation": "mul"}, "('add', 'ablate'", "got 'mul'", "Choose one", ValueError),
    "samples 0": ({"samples": 0}, "at least one sample", "samples=0", "Add some", ValueError),
    "samples 2.0": ({"samples": 2.0}, "at least one sample", "samples=2.0", "Add some", ValueError),
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
        lambda: swept(0, prompt="p", prompt_ids=[(1,)] * 3, ids=[(2,)] * 3).score(
            "kl", model=model(), tokenizer=tokenizer(), vectors={"w": push()}
        ),
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
    says = "expected a folder for the run", "got a file", "Use another path", NotADirectoryError
    yield Case("a sweep into a file", sweep, *says, files={"run": b"mine"})
    says = "expected a JSON object in", "got list", "Use another folder"
    yield Case("a sweep into a folder with a list as configuration", sweep, *says, files={"run/config.json": b"[1]"})
    says = "expected JSON in", "got something else", "Correct or delete the file"
    yield Case("a sweep into a folder with half a configuration", sweep, *says, files={"run/config.json": b'{"a":'})
    says = "expected the configuration that", "seed: 7 -> 0", "Use another folder", ConfigurationChanged
    yield Case("a sweep into another one's folder", sweep, *says, files={"run/config.json": b'{"seed": 7}'})
    load = {
        "that is not there": ({}, "expected a finished sweep", "there is none", "repeat the sweep", FileNotFoundError),
        "that is not sealed": (
            {"t.parquet": None},
            "expected a finished sweep",
            "there is",
            "repeat the sweep",
            FileNotFoundError,
        ),
        "of junk": ({"t.parquet": PAIR}, "expected a table in", "got something else", "Write it again", ValueError),
        "of another kind": ({"t.parquet": b"PAR1" * 9}, "a table in", "got something", "Write it again", ValueError),
    }
    for name, (files, *says) in load.items():
        yield Case(f"a sweep's table {name}", lambda f: SweepResult.load(f / "t.parquet"), *says, files=files)
