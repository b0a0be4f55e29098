"""Debate traces: tagged text and the turns in it, in the format of the paper's released data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerkit.io.files import write_text
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from steerkit.text.prompt import PromptLike
from steerkit.text.records import LAYOUTS, is_incomplete, layout_of, names_in, numbers_of, spoken_turns
from steerkit.text.spans import SpannedText
from steerkit.text.tags import CONSENSUS, END, TAG, agent_tag, misspelt_tag, round_tag

Range = tuple[int, int]
NAMES = "agent_names"
"""Key of `DebateTrace.extra` that holds the names of the agents 1 to n, where a record names them."""


@dataclass(frozen=True)
class Turn:
    """The text of one agent in one round.

    Args:
        agent: the agent's number, counted from 1.
        round: the round's number, counted from 1.
        text: the turn's text, without white space at its ends.
    """

    agent: int
    round: int
    text: str


@dataclass(frozen=True)
class DebateTrace:
    r"""A debate as one tagged text, kept verbatim up to its line ends: CR LF is stored as LF.

    The layout, with a blank line between parts: `<|Round 1 - Initial Solutions|>`, `<|Agent 1 Solution|>: ...`, ...,
    `<|Round 2 - Revision|>`, `<|Agent 1 Revision|>: ...`, ..., `<|Consensus|>` and its sentence, `<|endofdebate|>`.
    If the agents agree in round 1, there is no round 2. Every round has the agents 1 to n in order. The colon after an
    agent's tag may be missing. Text may precede the first tag (`Problem: ...`).

    Args:
        question: the question of the debate.
        text: the tagged text.
        gold: the correct answer, if there is one.
        extra: further fields of its record, e.g. `consensus_type`.
        asked: what precedes the trace when a model reads it; None is `Problem: {question}` and a blank line.

    Attributes:
        turns: the turns in the order of the text.
        turn_ranges: half-open character range of each turn in `text`; an empty one for a turn without text.
        consensus: the sentence after `<|Consensus|>`; None if the tag is missing.

    Raises:
        ValueError: tags that are missing, repeated, misspelt or out of order, or text between a round's tag and its
            first agent (the message names the tag and what was expected), or a question, text or answer that is not a
            string.

    Example:
        trace = DebateTrace.of("2+2", [Turn(1, 1, "4"), Turn(2, 1, "4")], "All agents agree on 4")

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3, and its released data.
    """

    question: str
    text: str
    gold: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    asked: PromptLike | None = None
    turns: tuple[Turn, ...] = field(init=False)
    turn_ranges: tuple[Range, ...] = field(init=False, repr=False, compare=False)
    consensus: str | None = field(init=False)

    def __post_init__(self) -> None:
        for name in ("question", "text", "gold"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "gold" and value is None):
                raise ValueError(f"expected the {name} of a debate as text; got {value!r:.80}. Put it in quotes.")
        object.__setattr__(self, "text", self.text.replace("\r\n", "\n"))
        try:
            _check_spelling(self.text)
            turns, ranges, consensus = _parse(self.text)
        except ValueError as error:
            raise ValueError(f"{error} Correct the tags, or leave this trace out.") from None
        object.__setattr__(self, "turns", tuple(turns))
        object.__setattr__(self, "turn_ranges", tuple(ranges))
        object.__setattr__(self, "consensus", consensus)

    @classmethod
    def of(
        cls,
        question: str,
        turns: Sequence[Turn],
        consensus: str | None,
        gold: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> DebateTrace:
        """Write turns, in the order of rounds and agents, as tagged text.

        Raises:
            ValueError: a turn whose text holds a tag, or turns that do not form a debate.
        """
        if tagged := [turn for turn in turns if TAG.search(turn.text)]:
            raise ValueError(f"expected turns without tags in their text; got {tagged[0].text!r:.80}. Take them out.")
        parts: list[str] = []
        number = 0
        for turn in turns:
            if turn.round != number:
                number = turn.round
                parts.append(round_tag(number))
            parts.append(f"{agent_tag(turn.agent, turn.round)}: {turn.text.strip()}")
        if consensus is not None:
            parts.append(f"{CONSENSUS}\n{consensus.strip()}")
        return cls(question, "\n\n".join([*parts, END]), gold, extra or {})

    @property
    def body(self) -> str:
        """The text from the first tag on."""
        return self.text[self.text.index(round_tag(1)) :]

    @property
    def prompt(self) -> PromptLike:
        """What precedes the trace: `asked`, or as in training `Problem: {question}` and a blank line."""
        return f"Problem: {self.question}\n\n" if self.asked is None else self.asked

    @property
    def prompt_text(self) -> str:
        """`prompt`, which must be a text here.

        Raises:
            ValueError: chat messages or token ids precede the trace.
        """
        if not isinstance(self.prompt, str):
            raise ValueError(f"expected a text before the trace; got {self.prompt!r:.80}. Pass asked=None, or a text.")
        return self.prompt

    def spans(self) -> SpannedText:
        """The body after its prompt, with a span per turn, labelled with the agent and grouped by question.

        The token ids are those that a model is trained on and writes: the body is encoded at once (`cut="whole"`), so
        the first token of a turn may include the space before it.

        In a causal model, one forward of this text gives each turn the same activations as a forward of the text up to
        that turn's end. A turn without text has no span.
        """
        body = self.body
        shift = len(body) - len(self.text)
        spans: list[Range] = []
        labels: list[str] = []
        for turn, (start, stop) in zip(self.turns, self.turn_ranges, strict=True):
            if turn.text:
                spans.append((start + shift, stop + shift))
                labels.append(str(turn.agent))
        return SpannedText(body, tuple(spans), tuple(labels), self.question, "whole", self.prompt)

    def untagged(self) -> SpannedText:
        """`spans` of the same text without its tags: the turns follow one another, and no tag names their agents."""
        text = ""
        spans: list[Range] = []
        labels: list[str] = []
        for turn in self.turns:
            if turn.text:
                spans.append((len(text), len(text) + len(turn.text)))
                labels.append(str(turn.agent))
                text += f"{turn.text}\n\n"
        text += self.consensus or ""
        return SpannedText(text, tuple(spans), tuple(labels), self.question, "whole", self.prompt)

    def alone(self) -> list[SpannedText]:
        """Each turn directly after the prompt, without tags and without the other turns."""
        return [
            SpannedText(turn.text, ((0, len(turn.text)),), (str(turn.agent),), self.question, "whole", self.prompt)
            for turn in self.turns
            if turn.text
        ]


def _parse(text: str) -> tuple[list[Turn], list[Range], str | None]:
    """The turns of a tagged text, the character range of each, and the consensus."""
    tags = list(TAG.finditer(text))
    if not tags or tags[0]["round"] != "1" or tags[-1].group() != END:
        ends = [tag.group() for tag in tags[:: max(1, len(tags) - 1)]]
        raise ValueError(f"expected a trace from {round_tag(1)} to {END}; got {ends} as its first and last tag.")
    turns: list[Turn] = []
    ranges: list[Range] = []
    consensus = None
    number = 0
    speakers: list[int] = []  # the agents with a turn in the current round
    first_speakers: list[int] = []  # the agents of round 1
    stops = [*(tag.start() for tag in tags[1:]), len(text)]
    for tag, stop in zip(tags, stops, strict=True):
        if tag["agent"]:
            _check_agent(tag, number, speakers, consensus)
            agent = int(tag["agent"])
            speakers.append(agent)
            start, end = _stripped(text, tag.end(), stop)
            turns.append(Turn(agent, number, text[start:end]))
            ranges.append((start, end))
            continue
        first_speakers = first_speakers or speakers
        if number and consensus is None:
            _check_speakers(tag, number, speakers, first_speakers)
        if tag["round"]:
            _check_round(tag, number, consensus, text[tag.end() : stop])
            number += 1
            speakers = []
        elif tag.group() == CONSENSUS:
            if consensus is not None:
                raise ValueError(f"expected {CONSENSUS} once; got it again at character {tag.start()}.")
            consensus = text[tag.end() : stop].strip()
        elif tag is not tags[-1]:
            raise ValueError(f"expected {END} once, as the last tag; got it at character {tag.start()} too.")
    return turns, ranges, consensus


def _check_spelling(text: str) -> None:
    """`ValueError` for text that resembles a tag: it would count as the words of the agent before it."""
    if wrong := misspelt_tag(text):
        raise ValueError(
            f"expected tags exactly as {agent_tag(1, 1)}; got {wrong.group()!r} at character {wrong.start()}."
        )


def _stripped(text: str, start: int, stop: int) -> Range:
    """The range of a turn's text after its tag, without the colon and the white space at its ends."""
    raw = text[start:stop]
    lead = len(raw) - len(raw.lstrip().removeprefix(":").lstrip())
    return start + lead, max(start + lead, start + len(raw.rstrip()))


def _check_agent(tag: re.Match[str], number: int, speakers: Sequence[int], consensus: str | None) -> None:
    """`ValueError` for an agent's tag after the consensus, of another round's kind, or not of the next agent."""
    wanted = agent_tag(len(speakers) + 1, max(number, 1))
    if consensus is not None or not number or tag.group() != wanted:
        raise ValueError(
            f"expected each agent once per round, in the order 1 to n: {wanted} next, and before {CONSENSUS}; got "
            f"{tag.group()} at character {tag.start()} of round {number}, after the agents {list(speakers)}."
        )


def _check_speakers(tag: re.Match[str], number: int, speakers: Sequence[int], first_speakers: Sequence[int]) -> None:
    """`ValueError` at the end of a round without turns, or with other agents than round 1."""
    if not speakers or speakers != first_speakers:
        raise ValueError(
            f"expected the agents {list(first_speakers)} in round {number}, at least one; got {list(speakers)} "
            f"before {tag.group()} at character {tag.start()}."
        )


def _check_round(tag: re.Match[str], number: int, consensus: str | None, after: str) -> None:
    """`ValueError` for a round's tag after the consensus, not of the next round, or with text before its agents."""
    if tag.group() != round_tag(number + 1) or consensus is not None:
        raise ValueError(
            f"expected {round_tag(number + 1)} next, before {CONSENSUS}; got {tag.group()} at character {tag.start()}."
        )
    if after.strip():
        raise ValueError(
            f"expected the agents directly after {tag.group()}; got {after.strip()!r:.80} at character {tag.end()}."
        )


def read_traces(path: str | Path, skip_incomplete: bool = False) -> list[DebateTrace]:
    """Read traces from a JSON list in the released format, or from JSON lines of the same records.

    A record has `question` and `debate_trace`. It may have `gold_answer`, and other fields, which `extra` keeps. An
    untagged record has its turns in place of `debate_trace` (see `steerkit.text.records.spoken_turns`), and may have
    `consensus`; its text is written with the tags. Names of agents have the same number in all records of the file;
    `extra["agent_names"]` keeps them.

    Args:
        path: the file.
        skip_incomplete: leave out untagged records in which an agent has no turn in a round.

    Raises:
        ValueError: the file holds no such records, a record is not a trace, or an agent has no turn in some records;
            the message names file and record.
    """
    records = list(enumerate(read_records(path), 1))
    names = {name for _, record in records if "debate_trace" not in record for name in names_in(record)}
    incomplete = [number for number, row in records if "debate_trace" not in row and is_incomplete(row, names)]
    if skip_incomplete:
        records = [(number, record) for number, record in records if number not in set(incomplete)]
    elif silent := [number for number in incomplete if layout_of(records[number - 1][1]) == "turns"]:
        raise ValueError(
            f"{path}, record {silent[0]}: expected a turn of each of the agents {', '.join(numbers_of(names))} in "
            f"every round of every record; got {len(silent)} of {len(records)} records without one, "
            f"the first: {', '.join(map(str, silent[:5]))}. Add the turns, or leave these records out."
        )
    numbers = numbers_of(names)
    traces = []
    for number, row in records:
        try:
            traces.append(_trace_of(row, numbers))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
    return traces


def _trace_of(row: Mapping[str, Any], numbers: Mapping[str, int]) -> DebateTrace:
    """The trace in a record, tagged or not; `numbers` are those of the agents' names."""
    layout = layout_of(row) if "debate_trace" not in row else None
    if missing := {"question", layout or "debate_trace"} - set(row):
        raise ValueError(
            f"expected the keys 'question' and 'debate_trace', or {' or '.join(map(repr, LAYOUTS))} in its place; got "
            f"{sorted(row)}. Add {sorted(missing)}."
        )
    used = {"question", "debate_trace", "gold_answer"} if layout is None else {"question", "gold_answer", "consensus"}
    extra = {key: value for key, value in row.items() if key not in used | {layout}}
    gold: Any = row.get("gold_answer")
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        gold = str(gold)
    if layout is None:
        return DebateTrace(row["question"], row["debate_trace"], gold, extra)
    consensus = row.get("consensus")
    if not isinstance(consensus, str | None):
        raise ValueError(f"expected the consensus as text; got {consensus!r:.80}. Put it in quotes.")
    turns = [Turn(*turn) for turn in spoken_turns(row, numbers)]
    if layout == "turns" and any(name != str(number) for name, number in numbers.items()):
        extra[NAMES] = list(numbers)
    return DebateTrace.of(row["question"], turns, consensus, gold, extra)


def write_traces(path: str | Path, traces: Iterable[DebateTrace]) -> None:
    """Write traces, atomically: a `.json` path as the released list, with the same bytes, any other as JSON lines."""
    rows = [
        {
            "question": trace.question,
            "debate_trace": trace.text,
            **({} if trace.gold is None else {"gold_answer": trace.gold}),
            **trace.extra,
        }
        for trace in traces
    ]
    write_records(path, rows)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON objects: a list from a `.json` path, one object per line from any other path."""
    if Path(path).suffix != ".json":
        return read_rows(path, complete=True)
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"expected a JSON list of objects in {path}; got {str(rows)[:80]!r}. Put the records in [ and ], or write "
            "one per line in a .jsonl file."
        )
    return rows


def write_records(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON objects, atomically: a list to a `.json` path, one object per line to any other path."""
    if Path(path).suffix == ".json":
        write_text(path, json.dumps(rows, indent=2))
    else:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
