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
    expected = DebateTrace.of("2+2", [Turn(*turn) for turn in SAID], "All say \\boxed{4}", "4", {"source": "here"})
    assert read_traces(path) == [expected]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"rounds": []}, "expected a list of at least one entry as 'rounds'"),
        ({"rounds": ["a", "b"]}, "expected a list of texts per round"),
        ({"rounds": [["a", "b"], ["c"]]}, "expected the agents"),
        ({"turns": [{"agent": 1}]}, "expected turns with an agent and a text"),
        ({"turns": [{"agent": 1, "round": "one", "text": "a"}]}, "expected the round of a turn as an integer"),
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
