"""Transplants: which round a text has, whose turns it gets, and what is counted as a change."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.paper import transplant
from analysis.paper.pooling import pool_transplant
from analysis.paper.transplant import EXPLICIT, FirstRound, donors, effects, first_round, of_checkpoint, of_debates
from steerkit.io.tables import write_table
from steerkit.stats.seeds import QUESTION, SEED
from steerkit.text.traces import DebateTrace, Turn
from tests.tiny import tiny_tokenizer
from training.debates.answerers import Reply, Sampling
from training.debates.personas import cast_of
from training.problems.problem import Problem

OPENED = "<|Round 1 - Initial Solutions|>\n\n<|Agent 1 Solution|>: 4"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            f"{OPENED}\n\n<|Agent 2 Solution|>: 5\n\n<|Consensus|>\n4",
            ((1, 2), f"{OPENED}\n\n<|Agent 2 Solution|>: 5\n\n", "consensus"),
        ),
        (f"{OPENED}\n\n<|Round 2 - Revision|>\n\n<|Agent 1 Revision|>: 5", ((1,), f"{OPENED}\n\n", "round 2")),
        (OPENED, None),  # nothing follows: there is nothing to continue
        ("\\boxed{4}", None),
        ("<|Consensus|> 4 <|endofdebate|>", None),
        ("<|Round 2 - Revision|>\n\n<|Agent 1 Revision|>: 5 <|Consensus|>", None),
    ],
)
def test_the_first_round_of_a_text_ends_before_the_tag_that_follows_it(text: str, found) -> None:
    assert first_round(text) == (None if found is None else FirstRound(*found))


def test_a_donor_is_another_text_with_turns_of_the_same_agents() -> None:
    given = donors([(1, 2), (1,), None, (1, 2), (1, 2)], 0)
    assert given[1] is None and given[2] is None
    assert sorted(given[i] for i in (0, 3, 4)) == [0, 3, 4]
    assert all(given[i] != i for i in (0, 3, 4))


class Scripted:
    """Answers own prompts with a text that has a first round, and others with what their last turn says."""

    seen: list[tuple[str, str]]

    def __init__(self, *_) -> None:
        self.seen = []
        Scripted.last = self

    def __call__(self, requests, sampling):
        for request in requests:
            text = getattr(request.prompt, "text", str(request.prompt))
            self.seen.append((request.id, text))
            name, _, index = request.id.partition("/")
            number = int(index.partition("/")[0])
            if name in ("own", "other"):
                said = f"{OPENED[:-1]}{number}\n\n<|Consensus|>\n\\boxed{{{number}}}"
            else:
                said = f"<|Consensus|>\n\\boxed{{{text.rstrip()[-1]}}}"
            yield Reply(request.id, said, 1, 1, True)


def test_the_answer_of_a_model_that_reads_its_first_round_follows_the_transplant(monkeypatch) -> None:
    monkeypatch.setattr(transplant, "LocalModel", Scripted)
    problems = [Problem(f"p{i}", f"{i}+0", str(i), "number", "addition") for i in range(5)]
    table = of_checkpoint(None, tiny_tokenizer(), problems, Sampling(), 0)
    assert table["has_round_1"].all() and table["transplanted"].all()
    found = effects(table)
    assert found["changed"].mean() == found["effect"].mean() == found["follows"].mean() == 1.0
    assert found["changed_again"].mean() == 0.0 and found["right_again"].mean() == 1.0 and found["right"].mean() == 0.0
    assert found["changed_resampled"].mean() == 0.0 and found["chance"].mean() == 0.0 and found["missing"].mean() == 0.0
    assert table["agents"].tolist() == [1] * 5 and set(table["then"]) == {"consensus"}
    swapped = [text for key, text in Scripted.last.seen if key.startswith("swapped")]
    assert all(text.startswith(f"Problem: {i}+0\n\n<|Round 1") for i, text in enumerate(swapped))
    assert all(f": {i}\n\n" not in text for i, text in enumerate(swapped))


def test_a_transplant_that_was_killed_repeats_no_reply(tmp_path, monkeypatch) -> None:
    problems = [Problem(f"p{i}", f"{i}+0", str(i), "number", "addition") for i in range(5)]
    call = (None, tiny_tokenizer(), problems, Sampling(), 0)
    asked: list[str] = []

    class Stopping(Scripted):
        def __call__(self, requests, sampling):
            for reply in super().__call__(requests, sampling):
                if len(asked) == 12:
                    asked.append("stopped")
                    raise KeyboardInterrupt
                asked.append(reply.id)
                yield reply

    monkeypatch.setattr(transplant, "LocalModel", Stopping)
    with pytest.raises(KeyboardInterrupt):
        of_checkpoint(*call, tmp_path / "log.jsonl")
    resumed = of_checkpoint(*call, tmp_path / "log.jsonl")
    replies = [name for name in asked if name != "stopped"]
    assert len(replies) == len(set(replies)) == 5 * 5
    pd.testing.assert_frame_equal(resumed, of_checkpoint(*call))


def test_in_an_explicit_debate_the_second_round_reads_the_turns_of_another_question(monkeypatch) -> None:
    asked = []

    class Reading(Scripted):
        def __call__(self, requests, sampling):
            for request in requests:
                asked.append((request.id, str(request.prompt)))
                name = request.id.partition("/")[0]
                yield Reply(request.id, "\\boxed{1}" if name == "swapped" else "\\boxed{0}", 1, 1, True)

    monkeypatch.setattr(transplant, "LocalModel", Reading)
    held = [
        DebateTrace.of(f"{i}+0", [Turn(a, r, f"said {a} of {i}") for r in (1, 2) for a in (1, 2, 3)], "x", str(i))
        for i in range(4)
    ]
    table = of_debates(None, None, held, cast_of("diverse"), "number", Sampling(), 0)
    assert effects(table)["changed"].mean() == 1.0 and effects(table)["changed_again"].mean() == 0.0
    for key, prompt in asked:
        name, index, _ = key.split("/")
        assert f"{index}+0" in prompt
        assert (f"of {index}" in prompt) == (name in ("own", "again"))
        assert ("said" in prompt) == (name in ("own", "again", "swapped"))  # resampled: what was answered anew


def test_answers_that_were_not_read_are_counted_apart_and_no_change() -> None:
    line = {"question": "q", "gold": "1", "transplanted": True, "donated": "1", "then": "round 2"}
    table = pd.DataFrame(
        [
            {**line, "answer": "1", "again": None, "swapped": "2", "resampled": "1", "has_resampled": True},
            {**line, "answer": "1", "again": "1", "swapped": None, "resampled": None, "has_resampled": True},
            {**line, "answer": "1", "again": "1", "swapped": "1", "resampled": None, "has_resampled": False},
            {**line, "answer": None, "again": "1", "swapped": "2", "resampled": "1", "has_resampled": True},
        ]
    )
    found = effects(table)  # the last question's own answer was not read: nothing can be said about it
    assert len(found) == 3 and found["missing"].tolist() == [0.0, 1.0, 0.0]
    assert found["missing_again"].tolist() == [1.0, 0.0, 0.0] and found["effect"].isna().tolist() == [True, True, False]
    assert found["changed"].tolist()[::2] == [1.0, 0.0] and found["changed"].isna().tolist() == [False, True, False]
    assert found["missing_resampled"].isna().tolist() == [False, False, True]
    assert found["follows"].tolist()[::2] == [0.0, 1.0] and found["chance"].tolist()[::2] == [0.0, 1.0]


@pytest.mark.parametrize("seeds", [1, 3])
def test_transplants_are_pooled_over_training_seeds_with_answers_that_were_read(tmp_path, seeds: int) -> None:
    folders = {20 + k: tmp_path / f"seed-{20 + k}" for k in range(seeds)}
    changed = {20: 0.9, 21: 0.7, 22: 0.5}
    for seed, folder in folders.items():
        parts = []
        for stage in (EXPLICIT, "IMAD"):
            rows = [
                {"question": f"{i}+{seed}", "gold": "0", "transplanted": True, "has_resampled": True, "answer": "1",
                 "again": "1", "resampled": "1", "donated": str(5 + i),
                 "swapped": (None if i >= 18 else "2" if i < 18 * changed[seed] - 0.5 else "1"), "then": "round 2"}
                for i in range(20)
            ]  # fmt: skip
            parts.append(effects(pd.DataFrame(rows)).assign(stage=stage))
        write_table(folder / "transplant" / "effects.csv", pd.concat(parts), {})
        shares = [
            {"stage": stage, "n": 20, "share_with_round_1": 1.0, "share_read": 1.0, "agents": 3.0, "share_agreed": 0.5}
            for stage in (EXPLICIT, "IMAD")
        ]
        write_table(folder / "transplant" / "shares.csv", pd.DataFrame(shares), {})
    table = pool_transplant(folders).set_index("stage")
    line = table.loc["IMAD"]
    expected = [round(18 * changed[seed]) / 18 for seed in folders]
    assert line["value"] == pytest.approx(sum(expected) / seeds) == line["explicit"]
    assert line["missing"] == pytest.approx(0.1) and line["missing_again"] == 0.0 and line["n"] == 18 * seeds
    assert line["low"] < line["value"] < line["high"] and line["unit"] == (QUESTION if seeds == 1 else SEED)
    assert (line["seeds"], line["runs"]) == (seeds, seeds) and line["follows"] == pytest.approx(0.0)
