"""Untagged records of debates become the traces that the same turns would give."""

from __future__ import annotations

import json

import pytest

from steerkit.text.records import spoken_turns
from steerkit.text.traces import DebateTrace, Turn, read_traces

SAID = [(1, 1, "I say 4"), (2, 1, "I say 5"), (1, 2, "still 4"), (2, 2, "now 4")]
TURNS = [{"agent": agent, "round": number, "text": text} for agent, number, text in SAID]
ROUNDS = [["I say 4", "I say 5"], ["still 4", "now 4"]]
CHATS = [
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": first},
     {"role": "user", "content": "others say"}, {"role": "assistant", "content": second}]
    for first, second in zip(*ROUNDS, strict=True)
]  # fmt: skip
NAMED = [{**turn, "agent": ("Ann", "Bob")[turn["agent"] - 1]} for turn in TURNS]
UNNUMBERED = [{"agent": turn["agent"], "text": turn["text"]} for turn in TURNS]


@pytest.mark.parametrize(
    "record",
    [{"turns": TURNS}, {"turns": TURNS[::-1]}, {"turns": NAMED}, {"turns": UNNUMBERED}, {"rounds": ROUNDS},
     {"messages": CHATS}],
    ids=["turns", "reversed", "names", "without rounds", "rounds", "chats"],
)  # fmt: skip
def test_every_layout_gives_the_trace_of_its_turns(record, tmp_path) -> None:
    assert spoken_turns(record) == SAID
    rest = {"question": "2+2", "gold_answer": "4", "consensus": "All say \\boxed{4}", "source": "here"}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({**rest, **record}) + "\n")
    extra = {"source": "here"} | ({"agent_names": ["Ann", "Bob"]} if record == {"turns": NAMED} else {})
    expected = DebateTrace.of("2+2", [Turn(*turn) for turn in SAID], "All say \\boxed{4}", "4", extra)
    assert read_traces(path) == [expected]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"rounds": []}, "expected a list of at least one entry as 'rounds'"),
        ({"rounds": ["a", "b"]}, "expected a list of texts per round"),
        ({"rounds": [["a", "b"], ["c"]]}, "expected the agents"),
        ({"turns": [{"agent": 1}]}, "expected turns with an agent and a text"),
        ({"turns": [{"agent": 1, "round": "one", "text": "a"}]}, "expected the round of a turn as an integer"),
        ({"turns": [{"agent": 1, "round": 0, "text": "a"}]}, "an integer from 1; got 0. Number the rounds from 1"),
        ({"messages": [["a"]]}, "expected a list of chat messages per agent"),
        ({"messages": [[{"role": "assistant", "content": None}]]}, "expected the content of each assistant message"),
        ({"rounds": [["a <|Consensus|>", "b"]]}, "expected turns without tags in their text"),
        ({"rounds": [["a", "b"]], "consensus": 4}, "expected the consensus as text"),
        ({"answers": []}, "expected the keys 'question' and 'debate_trace', or 'turns' or 'rounds' or 'messages'"),
    ],
)
def test_another_form_is_refused_in_one_line_with_file_and_record(record, message, tmp_path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "2+2", "rounds": ROUNDS}) + "\n" + json.dumps({"question": "q", **record}))
    with pytest.raises(ValueError, match=message) as raised:
        read_traces(path)
    assert str(raised.value).startswith(f"{path}, record 2: ") and "\n" not in str(raised.value)


def said_by(*names: object, question: str = "2+2") -> dict:
    return {"question": question, "turns": [{"agent": name, "round": 1, "text": f"by {name}"} for name in names]}


def written(path, *records: dict):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_an_agent_has_one_number_in_all_records_whatever_the_order_of_speaking(tmp_path) -> None:
    path = written(tmp_path / "mine.jsonl", said_by("Bob", "Ann"), said_by("Ann", "Bob", question="3+3"))
    for trace in read_traces(path):
        assert [(turn.agent, turn.text) for turn in trace.turns] == [(1, "by Ann"), (2, "by Bob")]
        assert trace.extra["agent_names"] == ["Ann", "Bob"]


def test_agents_that_are_counted_from_0_are_shifted_and_10_follows_9(tmp_path) -> None:
    (trace,) = read_traces(written(tmp_path / "zero.jsonl", said_by(1, 0)))
    assert [turn.text for turn in trace.turns] == ["by 0", "by 1"] and trace.extra["agent_names"] == ["0", "1"]
    (trace,) = read_traces(written(tmp_path / "ten.jsonl", said_by(*range(10, 0, -1))))
    assert [turn.text for turn in trace.turns] == [f"by {n}" for n in range(1, 11)] and not trace.extra


def test_records_in_which_an_agent_is_silent_are_counted_and_can_be_left_out(tmp_path) -> None:
    path = written(tmp_path / "mine.jsonl", said_by("Ann", "Bob"), said_by("Bob"), said_by("Ann", "Cy", "Bob"))
    with pytest.raises(ValueError, match="record 1: expected a turn of each of the agents Ann, Bob, Cy in every round"):
        read_traces(path)
    path = written(tmp_path / "mine.jsonl", said_by("Ann", "Bob"), said_by("Bob"), said_by("Bob", "Ann"))
    with pytest.raises(ValueError, match=r"record 2: .*; got 1 of 3 records without one, the first: 2\. Add the turns"):
        read_traces(path)
    assert [len(trace.turns) for trace in read_traces(path, skip_incomplete=True)] == [2, 2]
    ragged = {"question": "q", "rounds": [["a", "b"], ["c"]]}
    assert read_traces(written(tmp_path / "rounds.jsonl", ragged), skip_incomplete=True) == []


def test_a_number_as_correct_answer_is_read_as_its_text(tmp_path) -> None:
    records = [{**said_by(1, 2), "gold_answer": gold} for gold in (18, 2.5, None)]
    assert [trace.gold for trace in read_traces(written(tmp_path / "mine.jsonl", *records))] == ["18", "2.5", None]
