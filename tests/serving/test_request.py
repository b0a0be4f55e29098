"""Specifications of requests: what is accepted or refused, which positions are steered, what the cache shares."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerkit.serving.folder import Model, VectorFolder
from steerkit.serving.request import (
    DRAW,
    KEY,
    PROMPT,
    READ,
    STREAM_NORM,
    Asked,
    BadRequest,
    Draw,
    Push,
    Served,
    cache_keys,
    from_wire,
    largest_stream,
    parse,
    parse_all,
    spans,
    to_wire,
)
from steerkit.steering.positions import POSITIONS
from steerkit.vectors.vector import SteeringVector

SERVED = {"one": Served("one", "c1", (16,)), "many": Served("many", "c2", (0, 8, 29), zero=(8,))}


def test_a_specification_has_the_defaults_of_a_steering() -> None:
    (push,) = parse({"vector": "one"}, SERVED)
    assert push == Push("c1", (16,), 1.0, "from_last_prompt_token", "add")
    assert parse('{"vector": "one"}', SERVED) == (push,) == parse([{"vector": "one"}], SERVED)
    full = {"vector": "many", "layer": [29, 0], "coefficient": -2, "positions": "all:5", "operation": "ablate"}
    assert parse(json.dumps([full]), SERVED) == (Push("c2", (0, 29), -2.0, "all:5", "ablate"),)
    assert parse({"vector": "many", "layer": "all"}, SERVED)[0].layers == (0, 8, 29)
    assert parse({"vector": "one", "coefficient": 0}, SERVED) == ()


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("{", "expected JSON"),
        ('{"vector": "one", "coefficient": NaN}', "expected JSON"),
        ([], "empty list"),
        ("one", "expected JSON"),
        (7, "expected an object"),
        ([["one"]], "expected an object"),
        ({}, "expected a served vector"),
        ({"vector": "../one"}, "expected a served vector"),
        ({"vector": ["one"]}, "expected a served vector"),
        ({"vector": "one", "coeficient": 2}, "coeficient"),
        ({"vector": "one", "layer": 15}, "layers \\[16\\]"),
        ({"vector": "one", "layer": -1}, "'layer'"),
        ({"vector": "one", "layer": True}, "'layer'"),
        ({"vector": "many"}, "'layer'"),
        ({"vector": "many", "layer": []}, "'layer'"),
        ({"vector": "many", "layer": [0, 0]}, "without repeats"),
        ({"vector": "many", "layer": 8, "operation": "ablate"}, "zero at layers \\[8\\]"),
        ({"vector": "one", "coefficient": "2"}, "finite number"),
        ({"vector": "one", "coefficient": True}, "finite number"),
        ({"vector": "one", "coefficient": float("inf")}, "finite number"),
        ({"vector": "one", "positions": "sometimes"}, "expected positions"),
        ({"vector": "one", "positions": "all:0"}, "expected positions"),
        ({"vector": "one", "positions": None}, "expected positions"),
        ({"vector": "one", "operation": "scale"}, "expected an operation"),
        ([{"vector": "one"}] * 5, "at most 4 vectors at one layer; got 5"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(specification, message) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(specification, SERVED)


def everything(extra: dict) -> Asked:
    return parse_all(extra, SERVED, slots=4, n_prompt=9, n_new=5, n_layers=30)


DRAWN = {"name": "row", "stream": [0, "p", [1]], "temperature": 0.7, "top_p": 0.9}
READING = {"key": "job/x", "layers": [0, 29], "start": 2, "stop": 9, "weight": 0.5, "each": False}


def test_what_is_asked_for_travels_as_plain_data() -> None:
    pushes = [{"vector": "one"}, {"vector": "many", "layer": 0, "operation": "ablate"}]
    for extra in ({KEY: pushes, PROMPT: 4, DRAW: DRAWN}, {READ: READING}, {DRAW: json.dumps(DRAWN)}, {}, {"other": 1}):
        asked = everything(extra)
        assert from_wire(json.loads(json.dumps(to_wire(asked)))) == asked
    assert everything({DRAW: DRAWN}).draw == Draw("row", (0, "p", (1,)), 0.7, 0.9, 5)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"steering": {"vector": "one"}}, "steering"),
        ({"Steerkit": {"vector": "one"}}, "Steerkit"),
        ({"steerkit-draw": DRAWN}, "steerkit-draw"),
        ({PROMPT: 0}, "from 1 to the prompt's 9"),
        ({PROMPT: 10}, "from 1 to the prompt's 9"),
        ({PROMPT: True}, "from 1 to the prompt's 9"),
        ({DRAW: {**DRAWN, "temperature": -1}}, "temperature"),
        ({DRAW: {**DRAWN, "top_p": 0}}, "top_p"),
        ({DRAW: {**DRAWN, "stream": "p"}}, "a list as 'stream'"),
        ({DRAW: {**DRAWN, "count": 5}}, "expected an object with"),
        ({DRAW: {"name": "row"}}, "expected an object with"),
        ({DRAW: "{"}, "expected JSON"),
        ({READ: {**READING, "stop": 10}}, "stop <= 9"),
        ({READ: {**READING, "start": 9}}, "stop <= 9"),
        ({READ: {**READING, "start": -1}}, "stop <= 9"),
        ({READ: {**READING, "layers": [30]}}, "from 0 to 29"),
        ({READ: {**READING, "layers": []}}, "from 0 to 29"),
        ({READ: {**READING, "layers": [1, 1]}}, "each once"),
        ({READ: {**READING, "layers": "all"}}, "layers as a list"),
        ({READ: {**READING, "weight": float("nan")}}, "a number as 'weight'"),
        ({READ: {**READING, "each": 1}}, "a boolean as 'each'"),
        ({READ: READING, KEY: {"vector": "one"}}, "got both"),
    ],
)
def test_what_else_cannot_be_served_is_refused_with_the_reason(extra, message) -> None:
    with pytest.raises(BadRequest, match=message):
        everything(extra)


NAMES = st.sampled_from([*POSITIONS, "prompt+0", "all+0"])
POSITION = st.one_of(NAMES, st.builds("{}:{}".format, NAMES, st.integers(1, 12)))


def steered(positions: str, prompt: int, position: int, operation: str) -> bool:
    """Whether a position is steered, said slowly."""
    name, _, k = positions.partition(":")
    spared = operation == "ablate" and not name.endswith("+0")
    name = name.removesuffix("+0")
    first = {"generated": prompt, "from_last_prompt_token": prompt - 1, "prompt": spared, "all": spared}[name]
    inside = first <= position and (name != "prompt" or position < prompt)
    return inside and (not k or position < first + int(k))


OPERATION = st.sampled_from(["add", "ablate"])


@given(POSITION, st.integers(1, 10), st.lists(st.integers(1, 5), min_size=1, max_size=8), OPERATION)
def test_chunks_of_any_size_steer_the_positions_that_the_whole_steers(positions, prompt, chunks, operation) -> None:
    push = Push("c", (3,), 1.0, positions, operation)
    found, computed = [], 0
    for scheduled in chunks:
        found += [computed + i for _, a, b in spans([push], prompt, computed, scheduled) for i in range(a, b)]
        computed += scheduled
    assert found == [position for position in range(computed) if steered(positions, prompt, position, operation)]


PUSH = st.builds(
    Push,
    st.sampled_from(["a", "b"]),
    st.sampled_from([(1,), (3,), (1, 3)]),
    st.sampled_from([1.0, 2.0]),
    POSITION,
    OPERATION,
)


@given(st.lists(PUSH, max_size=2), st.integers(1, 8), st.lists(PUSH, max_size=2), st.integers(1, 8), st.integers(1, 12))
def test_equal_keys_mean_equal_pushes_on_every_position_before_the_end_of_a_block(ours, n, theirs, m, stop) -> None:
    """Model of 4 layers: a push at layer 3, the last, changes no key or value."""

    def acts(pushes: list[Push], prompt: int) -> list[list[tuple]]:
        return [
            [
                (push.content, layer, push.coefficient, push.operation)
                for push in pushes
                for layer in push.layers
                if layer < 3 and steered(push.positions, prompt, position, push.operation)
            ]
            for position in range(stop)
        ]

    equal_keys = cache_keys(ours, n, stop, 4) == cache_keys(theirs, m, stop, 4)
    if equal_keys:
        assert acts(ours, n) == acts(theirs, m)
    if len(ours) == len(theirs) == 1 and acts(ours, n) == acts(theirs, m):
        assert equal_keys  # nothing that is equal is kept apart
    assert cache_keys(ours, n, stop, 4) or not any(acts(ours, n))


@pytest.mark.parametrize(
    ("dtype", "coefficient", "refused"),
    [
        ("float32", 1e27, False),
        ("float32", 1e37, True),
        ("bfloat16", -1e37, True),
        ("float16", 3e4, True),
        ("float16", 1e3, False),
    ],
)
def test_a_push_that_could_overflow_the_stream_is_refused(dtype, coefficient, refused, tmp_path) -> None:
    """A stream that overflows leaves NaN in blocks of the cache that other requests read next."""
    SteeringVector({1: torch.ones(8)}).save(tmp_path / "one.safetensors")
    served = VectorFolder(tmp_path, Model("llama", 2, 8, dtype=dtype)).served()
    for operation in ("add", "ablate"):
        asked = {"vector": "one", "coefficient": coefficient, "operation": operation}
        if refused:
            with pytest.raises(BadRequest, match="could overflow"):
                parse(asked, served)
        elif operation == "add":
            assert parse(asked, served)[0].coefficient == coefficient


@given(st.lists(st.tuples(st.sampled_from([(0,), (2,), (0, 1, 2)]), st.floats(-1e3, 1e3), st.booleans()), max_size=4))
def test_no_stream_is_longer_than_its_bound(given: list) -> None:
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(len(given)), dtype=torch.float64)
    for start in vectors:  # along a vector an ablation with a negative coefficient multiplies all of the stream
        stream = start / start.norm() * STREAM_NORM
        for layer in range(3):
            for (layers, coefficient, add), vector in zip(given, vectors, strict=False):
                if layer in layers:
                    unit = vector / vector.norm()
                    stream = stream + coefficient * vector if add else stream - coefficient * (stream @ unit) * unit
        strengths = [
            (layers, coefficient, "add" if add else "ablate", float(vector.norm()))
            for (layers, coefficient, add), vector in zip(given, vectors, strict=False)
        ]
        assert stream.norm() <= largest_stream(strengths) * (1 + 1e-9)


def test_ablations_that_amplify_from_layer_to_layer_are_refused() -> None:
    served = {"deep": Served("deep", "c", tuple(range(30)), norm=1.0)}
    asked = {"vector": "deep", "layer": "all", "operation": "ablate"}
    assert len(parse({**asked, "coefficient": -2}, served)) == 1
    for bad in (
        {**asked, "coefficient": -1000},
        [{"vector": "deep", "layer": 3, "coefficient": 1e29}, {**asked, "layer": 4, "coefficient": 1e3}],
    ):
        with pytest.raises(BadRequest, match="could overflow"):
            parse(bad, served)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"vector": "one", "coefficient": 1' + 400 * "0" + "}", "finite number"),
        ('{"vector": "one", "coefficient": 1e39}', "finite number"),
        ('{"vector": "one", "coefficient": 1' + 5000 * "0" + "}", "expected JSON"),
        ('{"vector": "one", "coefficient": 1, "coefficient": 2}', "a key twice"),
        (100_000 * "[", "expected JSON"),
    ],
)
def test_json_that_python_reads_in_its_own_way_is_refused(text, message) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(text, SERVED)
