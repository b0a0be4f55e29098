"""Cases: vectors, their files, and the activations that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from steerkit.capture.activations import Activations
from steerkit.vectors.extract import difference_in_means, one_against_others, pca
from steerkit.vectors.vector import SteeringVector
from tests.bad_input.cases import LABELS, PAIR, Case, acts, push

FINITE = ("expected a finite vector at layer 0", "got NaN or infinity", "Scale it down")
REAL = "expected a real tensor [d_model] at layer 0"
INDEX = "expected layers to be block indices from 0"
VECTORS: dict[str, tuple[Any, str, str, str]] = {
    "without layers": ({}, "expected a vector at one layer at least", "got none", "Pass {layer: tensor}"),
    "that is a tensor": (torch.ones(3), "a vector at one layer at least", "got Tensor", "Pass {layer: tensor}"),
    "at layer -1": ({-1: torch.ones(2)}, INDEX, "got -1", "Count the blocks from 0"),
    "at layer True": ({True: torch.ones(2)}, INDEX, "got True", "Count the blocks from 0"),
    "at a layer in quotes": ({"0": torch.ones(2)}, INDEX, "got '0'", "Count the blocks from 0"),
    "at layers of several kinds": ({0: torch.ones(2), "1": torch.ones(2)}, INDEX, "got '1'", "Count the blocks"),
    "at layer 1.0": ({1.0: torch.ones(2)}, INDEX, "got 1.0", "Count the blocks from 0"),
    "of a list": ({0: [1.0, 2.0]}, REAL, "got list", "Convert or reshape it"),
    "of a numpy array": ({0: np.ones(2)}, REAL, "got ndarray", "Convert or reshape it"),
    "of a matrix": ({0: torch.ones(2, 2)}, REAL, "got torch.float32 [2, 2]", "Convert or reshape it"),
    "of no numbers": ({0: torch.ones(0)}, REAL, "got torch.float32 [0]", "Convert or reshape it"),
    "of complex numbers": (
        {0: torch.ones(2, dtype=torch.complex64)},
        REAL,
        "got torch.complex64 [2]",
        "Convert or reshape it",
    ),
    "with NaN": ({0: torch.tensor([1.0, float("nan")])}, *FINITE),
    "with infinity": ({0: torch.tensor([1.0, float("-inf")])}, *FINITE),
    "too large for float32": ({0: torch.tensor([1e300], dtype=torch.float64)}, *FINITE),
    "of two widths": ({0: torch.ones(2), 1: torch.ones(3)}, "expected equal widths", "got [2, 3]", "of one model"),
}
ARITHMETIC: dict[str, tuple[Callable[[SteeringVector], object], str, str, str, type[Exception]]] = {
    "added to a number": (lambda v: v + 3, "expected a vector to add", "got int", "Make a SteeringVector", TypeError),
    "times a text": (lambda v: v * "2", "expected a number to multiply", "got str", "Pass a float", TypeError),
    "times a tensor": (lambda v: v * torch.ones(32), "expected a number to multiply", "Tensor", "Pass a", TypeError),
    "times NaN": (lambda v: v * float("nan"), "expected a finite vector", "got NaN", "Scale it down", ValueError),
    "times infinity": (lambda v: v * float("inf"), "expected a finite vector", "got NaN", "Scale it", ValueError),
    "divided by 0": (lambda v: v / 0, "expected a number other than 0", "got 0", "another", ValueError),
    "added at another layer": (lambda v: v + push(2), "expected equal layers", "of 32 and [2]", "Pass .at", ValueError),
    "added in another width": (lambda v: v + push(width=5), "equal layers", "and [1] of 5", "Pass .at", ValueError),
    "added to another model's": (
        lambda v: v + push(model_fingerprint="b"), "vectors of one model", "is None and b", "Extract", ValueError
    ),
    "of norm 0 as a direction": (
        lambda v: (v * 0).unit(), "vectors of norm above 0", "got norm 0 at layers [1]", "Leave these", ValueError
    ),
    "at a layer it has not": (lambda v: v.at(3), "expected layers among [1]", "got [3]", "Pass layers", ValueError),
    "at no layer": (lambda v: v.at(), "expected layers among [1]", "got []", "Pass layers that", ValueError),
    "at a layer twice": (lambda v: v.at(1, 1), "each once", "got [1, 1]", "Pass layers that", ValueError),
    "at True for 1": (lambda v: v.at(True), "expected layers among [1]", "got [True]", "Pass layers that", ValueError),
    "at 1.0 for 1": (lambda v: v.at(1.0), "expected layers among [1]", "got [1.0]", "Pass layers that", ValueError),
}  # fmt: skip


def vector_cases() -> Iterator[Case]:
    for name, (layers, *says) in VECTORS.items():
        yield Case(f"a vector {name}", lambda _, layers=layers: SteeringVector(layers), *says)
    for name, (do, *says) in ARITHMETIC.items():
        yield Case(f"a vector {name}", lambda _, do=do: do(push()), *says)
    load = {
        "a vector file that is not there": ({}, "there is no such file", "Check the path", FileNotFoundError),
        "a folder for a vector file": ({"v": None}, "there is no such file", "Check the path", FileNotFoundError),
        "a vector file that is empty": ({"v": b""}, "; got", "download it again", ValueError),
        "a vector file of text": ({"v": PAIR}, "; got", "download it again", ValueError),
        "a vector file that announces too much": ({"v": b"\xff" * 8 + b"{}"}, "; got", "download it again", ValueError),
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
        "expected two different labels", "got 'negative' on both sides", "Pass another",
    )  # fmt: skip
    yield Case(
        "one label against no other", lambda _: one_against_others(acts(["a", "a"])),
        "expected two labels at least", "got ['a']", "Collect another label",
    )  # fmt: skip
    yield Case(
        "principal components of unequal sides", lambda _: pca(acts([*LABELS, "positive"])),
        "expected as many 'positive' as 'negative'", "got 2 and 1", "Pass pairs",
    )  # fmt: skip
    items = pd.DataFrame({"label": ["a", "b"]})
    shape = "expected resid of shape [2 items, 1 layers, d_model]"
    shapes = {"of items": torch.ones(3, 1, 4), "of layers": torch.ones(2, 2, 4), "[item, layer]": torch.ones(2, 1)}
    for name, resid in shapes.items():
        yield Case(f"activations {name}", lambda _, r=resid: Activations(r, (0,), items), shape, "; got [", "Pass one")
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
