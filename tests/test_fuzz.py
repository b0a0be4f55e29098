"""Properties on random input. `STEERKIT_EXAMPLES=2500` runs more than the usual examples of each."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from steerkit.io.files import file_name
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.tables import read_table, write_table
from steerkit.scores.text import rouge_l, tokenize
from steerkit.stats.areas import curve_auc
from steerkit.stats.mean import mean_interval
from steerkit.text.tags import CONSENSUS, END, agent_tag, agents_in, misspelt_tag, round_tag, tags
from steerkit.text.traces import DebateTrace, Turn, read_traces, write_traces
from steerkit.vectors.vector import SteeringVector
from training.problems.answers import KINDS, canonical, majority, read_answer, same
from training.train.schedules import Anneal, linear, pass_gate, staged

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
EXAMPLES = int(os.environ.get("STEERKIT_EXAMPLES", "200"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=QUIET)
fuzz_files = settings(fuzz, max_examples=EXAMPLES // 4)  # each of these examples waits for the disk

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
SHARE = st.floats(0, 1)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder for one example; a fixture would be shared by all of them."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# Traces

ALL_TAGS = tags(9, 9)
FRAGMENTS = st.sampled_from(["<|", "|>", "<|Agent 1 Solution", "Round 1|>", ":", "|", "\n", " ", "\x1c", "\u2028"])
SAID = (
    st.lists(FRAGMENTS | TEXT, max_size=5)
    .map(lambda parts: "".join(parts).replace("\r\n", "\n").strip())
    .filter(lambda text: not any(tag in text for tag in ALL_TAGS) and misspelt_tag(text) is None)
)
SOUP = st.lists(st.sampled_from(tags(3, 3)) | FRAGMENTS | TEXT, max_size=12).map("".join)


@fuzz_files
@given(
    agents=st.integers(1, 4),
    rounds=st.integers(1, 3),
    texts=st.lists(SAID, min_size=12, max_size=12),
    consensus=st.none() | SAID,
    question=TEXT,
    gold=st.none() | TEXT,
)
def test_turns_written_as_text_are_read_back(agents, rounds, texts, consensus, question, gold) -> None:
    turns = tuple(Turn(a + 1, r + 1, texts[r * 4 + a]) for r in range(rounds) for a in range(agents))
    trace = DebateTrace.of(question, turns, consensus, gold)
    # a colon of the text's own is kept, and only the tag's is taken away
    assert trace.turns == turns
    assert trace.consensus == consensus
    assert DebateTrace(question, trace.text, gold) == trace
    with folder() as here:
        for name in ("t.json", "t.jsonl"):
            write_traces(here / name, [trace, trace])
            assert read_traces(here / name) == [trace, trace]


@fuzz
@given(text=SOUP, cut=st.integers(0, 400))
def test_any_text_is_a_trace_with_turns_of_its_own_or_is_refused(text: str, cut: int) -> None:
    whole = f"{round_tag(1)}\n\n{agent_tag(1, 1)}: {text}\n\n{CONSENSUS}\n{text}\n\n{END}"
    for candidate in (text, whole, whole[:cut], whole[cut:]):
        try:
            trace = DebateTrace("q", candidate)
        except ValueError as error:
            assert "expected" in str(error)
            continue
        assert agents_in(candidate) == {turn.agent for turn in trace.turns}
        assert all(turn.text == turn.text.strip() and turn.text in trace.text for turn in trace.turns)
        again = DebateTrace.of("q", trace.turns, trace.consensus)
        assert (again.turns, again.consensus) == (trace.turns, trace.consensus)
        spans = trace.spans() if any(turn.text for turn in trace.turns) else None
        if spans is not None:
            assert [spans.text[a:b] for a, b in spans.spans] == [turn.text for turn in trace.turns if turn.text]


# Answers

LATEX = st.sampled_from(
    [
        *(r"\boxed{", r"\fbox{", "box{", r"\frac{", r"\text{", "{", "}", r"\{", r"\}", "$", r"\(", r"\)", "**", "="),
        *("0", "1", "12", "1,000", "-", "+", ".", "/", "e9", "%", r"\,", "~", " ", "\n"),
        *("and", "or", "(A)", "B.", "yes", "no"),
    ]
)
ANSWERS = st.lists(LATEX | st.text(st.characters(), max_size=4), max_size=20).map("".join)  # lone surrogates too


@fuzz
@given(text=ANSWERS, box=st.sampled_from(["first", "last"]))
def test_whatever_stands_in_a_text_is_read_canonically_or_not_at_all(text: str, box: Any) -> None:
    for kind in KINDS:
        for candidate in (text, f"\\boxed{{{text}}}", f"\\boxed{{{text}}} and then \\boxed{{"):
            answer = read_answer(candidate, kind, box)
            if answer is None:
                continue
            assert canonical(answer, kind) == answer
            assert read_answer(f"so \\boxed{{{answer}}}.", kind) == answer
            assert same(answer, answer)
            assert majority([answer, None, answer]) == answer
        with contextlib.suppress(ValueError):
            assert canonical(canonical(text, kind), kind) == canonical(text, kind)


# Files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=4)


@fuzz_files
@given(value=JSON)
def test_json_comes_back_equal_and_equal_values_have_one_text(value: Any) -> None:
    with folder() as here:
        write_json(here / "v.json", value)
        assert read_json(here / "v.json") == value
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text


@fuzz_files
@given(rows=ROWS, more=ROWS, data=st.data())
def test_rows_that_are_cut_off_anywhere_are_a_beginning_of_what_was_written(rows, more, data) -> None:
    with folder() as here:
        path = here / "rows.jsonl"
        append_rows(path, rows)
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)), label="cut")])
        there = read_rows(path)
        assert there == rows[: len(there)]
        append_rows(path, more)
        assert read_rows(path, complete=True) == [*there, *more]


@fuzz_files
@given(
    texts=st.lists(TEXT, min_size=1, max_size=6),
    numbers=st.lists(st.floats(allow_infinity=False, allow_subnormal=False), min_size=6, max_size=6),
    suffix=st.sampled_from([".csv", ".parquet"]),
    data=st.data(),
)
def test_a_table_comes_back_equal_and_one_that_is_cut_off_is_refused(texts, numbers, suffix, data) -> None:
    table = pd.DataFrame({"text": texts, "count": range(len(texts)), "x": numbers[: len(texts)]})
    with folder() as here:
        path = here / f"t{suffix}"
        write_table(path, table, {"seed": 1})
        back, meta = read_table(path)
        assert back["text"].tolist() == texts
        assert back["count"].tolist() == list(range(len(texts)))
        np.testing.assert_array_equal(back["x"], table["x"])
        assert meta["seed"] == 1
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="cut")])
        with pytest.raises(ValueError, match="cut off or changed"):
            read_table(path)


FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
META = st.dictionaries(TEXT.map("x-{}".format), JSON, max_size=3)  # no field that a header has already


@st.composite
def vectors(draw: Any, floats: Any = FLOATS, count: int = 1) -> Any:
    """Several vectors of the same layers and width."""
    layers = draw(st.lists(st.integers(0, 999), min_size=1, max_size=3, unique=True))
    width = draw(st.integers(1, 5))
    values = st.lists(floats, min_size=width, max_size=width)
    return [SteeringVector({layer: torch.tensor(draw(values)) for layer in layers}) for _ in range(count)]


@fuzz_files
@given(made=vectors(st.floats(width=32, allow_nan=False, allow_infinity=False)), meta=META, data=st.data())
def test_a_vector_file_comes_back_bit_for_bit_and_one_that_is_damaged_is_refused(made, meta, data) -> None:
    vector = SteeringVector(made[0].layers, meta)
    with folder() as here:
        path = here / "v.safetensors"
        vector.save(path)
        back = SteeringVector.load(path)
        assert list(back.layers) == list(vector.layers)
        assert all(back.layers[layer].equal(value) for layer, value in vector.layers.items())
        assert back.meta == meta
        assert back.content() == vector.content()
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="cut")])
        with pytest.raises(ValueError, match="expected"):
            SteeringVector.load(path)
        place = data.draw(st.integers(0, len(whole) - 1), label="place")
        path.write_bytes(whole[:place] + bytes([data.draw(st.integers(0, 255), label="byte")]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):  # it may be the same byte, or one of a value
            assert isinstance(SteeringVector.load(path), SteeringVector)


@fuzz
@given(st.text(st.characters(), max_size=12) | st.lists(st.sampled_from(["..", "/", "a", "\\", "~", "."])).map("".join))
def test_a_name_never_leads_out_of_its_folder(name: str) -> None:
    base = Path("/somewhere/run")
    with contextlib.suppress(ValueError):
        found = Path(os.path.normpath(base / file_name(name)))
        assert found.parent == base


# Vectors


def close(a: SteeringVector, b: SteeringVector, size: float) -> bool:
    """Equal but for the rounding of float32 sums of numbers of that size."""
    limit = 4 * size * torch.finfo(torch.float32).eps + 1e-30
    return all(float((a.layers[layer] - b.layers[layer]).abs().max()) <= limit for layer in a.layers)


@fuzz
@given(several=vectors(count=3), factor=st.floats(-1e3, 1e3))
def test_vectors_add_and_scale_as_vectors_do(several, factor: float) -> None:
    u, v, w = several
    size = sum(float(value.abs().max()) for one in several for value in one.layers.values())
    assert close((u + v) + w, u + (v + w), size)
    assert close(u + v, v + u, 0)
    assert close((v + w) - w, v, size)
    assert close(v - v, v * 0, 0)
    assert close((u + v) * factor, u * factor + v * factor, size * abs(factor))
    assert close(factor * v, v * factor, 0)
    assert close(-v, v * -1, 0)
    assert all(a is not b for a, b in zip(u.layers.values(), (u * 1).layers.values(), strict=True))


@fuzz
@given(several=vectors(st.floats(width=32, allow_nan=False, allow_infinity=False), count=2))
def test_directions_have_length_one_and_cosines_stay_within_one(several) -> None:
    v, w = several
    assume(all(norm > 0 for one in several for norm in one.norms().values()))
    for unit in (v.unit(), w.unit()):
        assert all(abs(norm - 1) < 1e-5 for norm in unit.norms().values())
        assert close(unit.unit(), unit, 1)
    cosines = v.cosine(w)
    assert all(-1 <= cosine <= 1 for cosine in cosines.values())
    assert cosines == w.cosine(v)
    assert all(cosine > 1 - 1e-6 for cosine in v.cosine(v).values())
    if max(w.norms().values()) < 1e38:
        scaled = v.scaled_to(w).norms()
        assert all(scaled[layer] == pytest.approx(norm, rel=1e-5, abs=1e-37) for layer, norm in w.norms().items())


# Schedules

PAIR = st.tuples(SHARE, SHARE).map(lambda pair: (max(pair), min(pair)))
TOKENS = st.tuples(st.integers(1, 4000), st.integers(1, 4000)).map(lambda pair: (max(pair), min(pair)))
FALLING = st.lists(SHARE, min_size=1, max_size=5).map(lambda values: tuple(sorted(values, reverse=True)))
STAGES = st.lists(st.integers(1, 4000), min_size=1, max_size=5).map(lambda values: tuple(sorted(values, reverse=True)))


@fuzz
@given(
    kind=st.sampled_from(["linear", "staged", "gated"]),
    weight=PAIR,
    clip=TOKENS,
    weights=FALLING,
    clips=STAGES,
    moments=st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=20),
)
def test_a_falling_schedule_never_rises_and_stays_in_its_range(kind, weight, clip, weights, clips, moments) -> None:
    anneal = Anneal(kind, weight, clip, weights, clips)
    low, high = (min(weights), max(weights)) if kind == "staged" else weight[::-1]
    shortest, longest = (min(clips), max(clips)) if kind == "staged" else clip[::-1]
    found = [anneal.at(moment) for moment in sorted(moments)]
    for (one, tokens), (later, fewer) in pairwise(found):
        assert later <= one + 1e-12
        assert fewer <= tokens
    assert all(low - 1e-12 <= w <= high + 1e-12 for w, _ in found)
    assert all(shortest <= tokens <= longest for _, tokens in found)
    assert anneal.at(0.0) == anneal.at(-1.0)
    assert anneal.at(1.0) == anneal.at(2.0)
    assert anneal.at(1.0)[1] == (clips[-1] if kind == "staged" else clip[1])


@fuzz
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), progress=st.floats(allow_nan=False))
def test_a_schedule_gives_one_of_its_stages_or_lies_between_its_ends(values: list[float], progress: float) -> None:
    assert staged(values, progress) in values
    between = linear(values[0], values[-1], progress)
    slack = 1e-9 * max(map(abs, values)) + 1e-300
    assert min(values[0], values[-1]) - slack <= between <= max(values[0], values[-1]) + slack


@fuzz
@given(steps=st.integers(2, 500), share=st.floats(0.01, 1), rates=st.lists(SHARE, min_size=1, max_size=500))
def test_a_gate_that_is_never_closed_arrives_as_the_plain_schedule_does(steps, share, rates) -> None:
    progress, anneal = 0.0, Anneal("gated", share=share)
    for number in range(1, steps):
        rate = rates[number % len(rates)]
        progress = pass_gate(progress, rate, rate, anneal.pace(steps), floor=0.0)
        assert progress == pytest.approx(min(1.0, number * anneal.pace(steps)), abs=1e-9)
    assert progress == pytest.approx(1.0, abs=1e-9)


# Scores

SCORES = st.floats(-1e6, 1e6)


@fuzz
@given(a=st.text(max_size=60), b=st.text(max_size=60), tokenizer=st.sampled_from(["rouge_score", "symbols", "unicode"]))
def test_rouge_l_is_a_symmetric_share(a: str, b: str, tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ab, ba, aa = rouge_l([a, b, a], [b, a, a], tokenizer)
    assert ab == ba or (np.isnan(ab) and np.isnan(ba))
    assert np.isnan(ab) or 0 <= ab <= 1
    assert aa == 1 or np.isnan(aa)  # NaN where the text has no token
    assert bool(tokenize(a, tokenizer)) == (aa == 1)


@fuzz
@given(data=st.data(), n=st.integers(2, 12), factors=st.tuples(SCORES, SCORES), normalize=st.booleans())
def test_the_area_under_a_curve_is_linear_in_the_scores(data, n: int, factors, normalize: bool) -> None:
    grid = data.draw(st.lists(st.integers(-1000, 1000), min_size=n, max_size=n, unique=True))
    v, w = (np.array(data.draw(st.lists(st.floats(-100, 100), min_size=n, max_size=n))) for _ in "vw")
    a, b = (factor / 1e4 for factor in factors)
    both = curve_auc(grid, a * v + b * w, normalize)
    apart = a * curve_auc(grid, v, normalize) + b * curve_auc(grid, w, normalize)
    size = (abs(a) + abs(b)) * 100 * (1 if normalize else max(grid) - min(grid))
    assert abs(both - apart) <= 1e-12 * size + 1e-300
    order = data.draw(st.permutations(range(n)))
    assert curve_auc([grid[i] for i in order], v[order], normalize) == curve_auc(grid, v, normalize)
    width = 1 if normalize else max(grid) - min(grid)
    assert v.min() * width - 1e-9 * size - 1e-9 <= curve_auc(grid, v, normalize)
    assert curve_auc(grid, v, normalize) <= v.max() * width + 1e-9 * size + 1e-9


@fuzz
@given(
    rows=st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 5), st.booleans()), min_size=1, max_size=20),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 5),
)
def test_an_interval_holds_its_mean_and_moves_with_the_values(rows, shift: float, seed: int) -> None:
    values = np.array([math.nan if missing and number else value for number, (value, _, missing) in enumerate(rows)])
    groups = [group for _, group, _ in rows]
    found = mean_interval(values, groups, n_boot=200, seed=seed, binary=False)
    there = values[~np.isnan(values)]
    assert found.n == len({group for group, value in zip(groups, values, strict=True) if not math.isnan(value)})
    assert found.n_missing == len(values) - len(there)
    assert found.mean == pytest.approx(there.mean(), rel=1e-9, abs=1e-9)
    if found.n < 2:
        assert math.isnan(found.low) and math.isnan(found.high)
        return
    slack = 1e-9 * max(1.0, float(np.abs(there).max()))
    if float(np.ptp(there)) <= 1e-9 * (slack * 1e9 + abs(shift)):  # all equal, or equal after a shift: no interval
        assert math.isnan(found.low) or found.high - found.low <= 1e-6 * slack * 1e9 or set(there) <= {-1.0, 0.0, 1.0}
        return
    if math.isnan(found.low):  # units of one mean, whose rows differ
        return
    assert found.low <= found.mean + slack
    assert found.mean - slack <= found.high
    assert 0 < found.p <= 1
    # the same draws: a shift moves all three, and the sign turns them round
    wide = 1e-6 * max(1.0, found.high - found.low)
    moved = mean_interval(values + shift, groups, n_boot=200, seed=seed, binary=False)
    assert moved.low - found.low == pytest.approx(shift, abs=wide)
    assert moved.high - found.high == pytest.approx(shift, abs=wide)
    turned = mean_interval(-values, groups, n_boot=200, seed=seed, binary=False)
    assert (turned.low, turned.high) == (pytest.approx(-found.high, abs=wide), pytest.approx(-found.low, abs=wide))
