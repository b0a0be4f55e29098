"""Traces: tagged text and turns are two views of one thing, and what is malformed is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import steerkit as sk
from steerkit.text import traces
from steerkit.text.prompt import encode_prompt
from steerkit.text.tags import CONSENSUS, END, agent_tag, agents_in, misspelt_tag, round_tag, tags, without_tags
from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, Turn, read_traces, write_traces
from steerkit.text.turn_contrasts import read_contrasts, turn_contrasts, write_contrasts
from tests.tiny import tiny_model, tiny_tokenizer

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published"
TWO_ROUNDS = DebateTrace.of(
    "2+3*4",
    [
        Turn(1, 1, "1. 3*4 = 12\n2. 2+12 = 14\n\n\\(\\boxed{14}\\)"),
        Turn(2, 1, "\\boxed{20}\n\n---\n\nSELF-CRITIQUE\nI added first."),
        Turn(3, 1, "x = 3*4 // first\n$\\boxed{14}$"),
        Turn(1, 2, "I stay with \\boxed{14}."),
        Turn(2, 2, "The product comes first: \\boxed{14}"),
        Turn(3, 2, "\\boxed{14}"),
    ],
    "All agents reached a consensus of \\boxed{14}",
    gold="14",
)


def test_the_ten_tags_of_the_paper_come_in_order() -> None:
    found = tags()
    assert len(found) == 10
    assert found[0] == "<|Round 1 - Initial Solutions|>"
    assert found[5] == "<|Agent 1 Revision|>"
    assert found[-2:] == (CONSENSUS, END)
    assert len(tags(agents=3, rounds=3)) == 11  # a third round is a revision by the same agents


def test_a_trace_is_written_with_a_blank_line_before_every_tag_and_a_colon_after_an_agent() -> None:
    text = DebateTrace.of("q", [Turn(1, 1, " a "), Turn(2, 1, "b")], "they agree").text
    assert text == (
        "<|Round 1 - Initial Solutions|>\n\n<|Agent 1 Solution|>: a\n\n<|Agent 2 Solution|>: b\n\n"
        "<|Consensus|>\nthey agree\n\n<|endofdebate|>"
    )


def test_without_its_tags_a_trace_says_the_same_and_names_nobody() -> None:
    bare = TWO_ROUNDS.untagged()
    assert bare.prompt == TWO_ROUNDS.prompt and bare.text == without_tags(TWO_ROUNDS.body)
    assert "<|" not in bare.text and not agents_in(bare.text)
    assert [bare.text[a:b] for a, b in bare.spans] == [turn.text for turn in TWO_ROUNDS.turns]
    assert list(bare.labels) == ["1", "2", "3"] * 2 and bare.group == TWO_ROUNDS.question


def test_a_colon_and_a_bar_of_a_texts_own_outlive_its_tags() -> None:
    assert (
        without_tags("<|Agent 1 Solution|>: : a <| b |> <|Agent 2 Revision|>: c\n\n<|endofdebate|>") == ": a <| b |> c"
    )


def test_what_stands_before_the_first_tag_is_kept_and_not_said_twice() -> None:
    text = "Problem: 2+3*4\n\n" + TWO_ROUNDS.text
    trace = DebateTrace("2+3*4", text)
    assert trace.text == text
    assert trace.turns == TWO_ROUNDS.turns
    assert trace.spans().prompt == trace.prompt and "Problem:" not in trace.spans().text


def test_the_agents_in_a_broken_text_are_counted() -> None:
    one, two = agent_tag(1, 1), agent_tag(2, 2)
    assert agents_in(f"{one}: x {one}: y {two} z") == {1, 2}
    assert agents_in("nobody") == set()


def test_all_turns_in_one_forward_equal_one_forward_per_turn() -> None:
    model, tokenizer = tiny_model(context=1024), tiny_tokenizer()
    trace = TWO_ROUNDS
    got = {position: sk.collect(model, tokenizer, [trace.spans()], position=position) for position in ("last", "mean")}
    assert list(got["last"].items["label"]) == list("123123")
    assert set(got["last"].items["group"]) == {"2+3*4"}
    text = trace.text
    pieces = list(encode_prompt(tokenizer, trace.prompt))
    at = 0
    for number, turn in enumerate(trace.turns):
        start = text.index(f": {turn.text}\n\n<|", at) + 2  # the turn itself, not the same words in an earlier one
        pieces += encode(tokenizer, text[at:start])
        before = len(pieces)
        at = start + len(turn.text)
        pieces += encode(tokenizer, text[start:at])
        with torch.no_grad(), sk.capture_resid(model) as streams:
            model(input_ids=torch.tensor([pieces]))
        for layer, stream in streams.items():
            for position, wanted in (("last", stream[0, -1]), ("mean", stream[0, before:].mean(0))):
                torch.testing.assert_close(got[position].at(layer)[number], wanted, rtol=1e-4, atol=1e-5)


def test_alone_leaves_no_tag_and_no_other_turn() -> None:
    alone = TWO_ROUNDS.alone()
    assert [spanned.labels for spanned in alone] == [(agent,) for agent in "123123"]
    for spanned, turn in zip(alone, TWO_ROUNDS.turns, strict=True):
        assert spanned.prompt == "Problem: 2+3*4\n\n" and spanned.text == turn.text
        ((start, stop),) = spanned.spans
        assert spanned.text[start:stop] == turn.text


def released() -> str:
    """A file in the released layout: a JSON list, indented by two, with a leading question in one record."""
    rows = [
        {"question": "2+3*4", "debate_trace": TWO_ROUNDS.text, "gold_answer": "14"},
        {
            "question": "Who crossed the river?",
            "debate_trace": "Question: Who crossed the river?\n\n"
            + DebateTrace.of("", [Turn(1, 1, "Nobody knows \u2013 \u00e9"), Turn(2, 1, "It was I")], "none").text,
            "consensus_type": "majority",
            "consensus_explanation": "two of three",
        },
    ]
    return json.dumps(rows, indent=2)


def test_a_file_in_the_released_format_comes_out_as_it_went_in(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(released())
    traces = read_traces(tmp_path / "in.json")
    write_traces(tmp_path / "out.json", traces)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "in.json").read_bytes()
    assert traces[1].extra["consensus_type"] == "majority"
    write_traces(tmp_path / "rows.jsonl", traces)
    assert read_traces(tmp_path / "rows.jsonl") == traces


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the paper's released records are not beside this checkout")
def test_the_papers_own_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    traces = read_traces(PUBLISHED / "debates.json")
    assert [len(trace.turns) for trace in traces] == [6, 3]
    write_traces(tmp_path / "debates.json", traces)
    assert (tmp_path / "debates.json").read_bytes() == (PUBLISHED / "debates.json").read_bytes()
    contrasts = read_contrasts(PUBLISHED / "steering_pairs.json")
    write_contrasts(tmp_path / "pairs.json", contrasts)
    assert (tmp_path / "pairs.json").read_bytes() == (PUBLISHED / "steering_pairs.json").read_bytes()


def test_a_turns_contrast_has_its_context_and_the_others_of_its_round(tmp_path: Path) -> None:
    contrasts = turn_contrasts(TWO_ROUNDS, 8)
    second = contrasts[4]
    assert second.identifier == "question_8_round_2_agent_2"
    assert second.context.startswith("Problem: 2+3*4\n\n<|Round 1")
    assert second.context.endswith("I stay with \\boxed{14}.\n\n<|Agent 2 Revision|>")
    assert second.others == {"1": "I stay with \\boxed{14}.", "3": "\\boxed{14}"}
    write_contrasts(tmp_path / "pairs.json", contrasts)
    assert read_contrasts(tmp_path / "pairs.json") == contrasts


def test_a_trace_is_parsed_once_whatever_is_read_from_it(monkeypatch) -> None:
    parsed = []

    def counted(text: str):
        parsed.append(text)
        return original(text)

    original = traces._parse
    monkeypatch.setattr(traces, "_parse", counted)
    trace = DebateTrace(TWO_ROUNDS.question, "Problem: 2+3*4\n\n" + TWO_ROUNDS.text)
    for _ in range(2):
        trace.spans(), trace.untagged(), trace.alone(), turn_contrasts(trace, 1)
    assert parsed == [trace.text]


def test_turn_ranges_are_where_the_turns_are_in_the_text() -> None:
    trace = DebateTrace("q", f"lead\n\n{with_one_turn_emptied(TWO_ROUNDS.text)}")
    assert [trace.text[start:stop] for start, stop in trace.turn_ranges] == [turn.text for turn in trace.turns]
    assert trace.turns[1].text == "" and len(trace.spans().spans) == len(trace.turns) - 1
    spanned = trace.spans()
    assert [spanned.text[start:stop] for start, stop in spanned.spans] == [t.text for t in trace.turns if t.text]


SHORT = DebateTrace.of("q", [Turn(1, 1, "a \\boxed{2}"), Turn(2, 1, "b\nc")], "All \\boxed{2}").text


@pytest.mark.parametrize(
    "text", [SHORT.replace("\n", "\r\n"), SHORT.replace("|>: ", "|> "), SHORT.replace("|>: ", "|>:")]
)
def test_line_ends_and_a_missing_colon_change_no_turn(text: str) -> None:
    trace = DebateTrace("q", text)
    assert (trace.turns, trace.consensus) == (DebateTrace("q", SHORT).turns, "All \\boxed{2}")
    assert trace.spans().text.count("\r") == 0


MISSPELT = [
    "<| Agent 2 Solution |>", "<|agent 2 solution|>", "<|Agent 2 solution|>", "<|AGENT 2 SOLUTION|>",
    "<|Agent 2 Solutions|>",
    "<|Agent 2 Solution>", "<Agent 2 Solution|>", "<Agent 2 Solution>", "<|Agent 2 Solution|", "|Agent 2 Solution|>",
    "<|Agent  2  Solution|>", "<|Agent 2\nSolution|>", "<|Agent 02 Solution|>", "<|Agnet 2 Solution|>", "<|Agent 2|>",
    "<|Agent_2_Solution|>", "< |Agent 2 Solution| >", "<||Agent 2 Solution||>", "<|Agent 2 Solution:|>",
    "<|Agent B Solution|>",
]  # fmt: skip


@pytest.mark.parametrize("tag", MISSPELT)
def test_a_misspelt_tag_is_refused_in_place_of_losing_its_turn(tag: str) -> None:
    wrong = SHORT.replace(agent_tag(2, 1), tag)
    with pytest.raises(ValueError, match=r"expected tags exactly as .*Correct the tags"):
        DebateTrace("q", wrong)


@pytest.mark.parametrize(
    "tag", ["<|consensus|>", "<|Concensus|>", "<|Consensus |>", "<|Consensus>", "<|End of debate|>"]
)
def test_a_misspelt_consensus_or_end_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="expected tags exactly as"):
        DebateTrace("q", SHORT.replace(CONSENSUS, tag))


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|endoftext|>", "<|assistant|>", "| Agent 1 | Agent 2 |", "a <| b |> c", "a < b | c > d",
     "<consensus>",
     "<agent>", "Agent 1 Solution: 5", "if x<|y|>z", "x | agent 1 said 5 > 4", *tags(4, 3)],
)  # fmt: skip
def test_another_marker_is_no_misspelt_tag(text: str) -> None:
    assert misspelt_tag(f"a {text} b\n") is None


ROUND_2 = DebateTrace.of("q", [Turn(a, r, f"{a}{r}") for r in (1, 2) for a in (1, 2, 3)], "yes").text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SHORT.replace("Agent 1", "Agent 9").replace("Agent 2", "Agent 1").replace("Agent 9", "Agent 2"),
            "in the order 1 to n",
        ),
        (SHORT.replace("Agent 2", "Agent 3"), "in the order 1 to n"),
        (ROUND_2.replace("<|Agent 2 Revision|>: 22\n\n", ""), "in the order 1 to n"),
        (ROUND_2.replace("<|Agent 3 Revision|>: 32\n\n", ""), r"expected the agents \[1, 2, 3\] in round 2"),
        (SHORT.replace(round_tag(1), f"{round_tag(1)}\nHello."), "directly after .*got 'Hello.'"),
        (ROUND_2.replace(round_tag(2), f"{round_tag(2)}: so"), "directly after .*got ': so'"),
        (SHORT.replace(END, ""), "as its first and last tag"),
        (SHORT + f"\n\n{END}", "once, as the last tag"),
    ],
)
def test_a_trace_has_agents_1_to_n_in_every_round_and_one_end(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DebateTrace("q", text)


def with_one_turn_emptied(text: str) -> str:
    """The text without the words of agent 2 in round 1."""
    tag = agent_tag(2, 1)
    start = text.index(tag) + len(tag)
    return text[:start] + ":   \n\n" + text[text.index(agent_tag(3, 1)) :]
