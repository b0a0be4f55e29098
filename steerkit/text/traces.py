"""Debate traces: tagged text and the turns in it, in the format of the paper's released data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerkit.io.files import write_text
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from steerkit.text.spans import SpannedText
from steerkit.text.tags import CONSENSUS, END, TAG, agent_tag, round_tag


@dataclass(frozen=True)
class Turn:
    """What one agent says in one round, both counted from 1; without white space at either end."""

    agent: int
    round: int
    text: str


@dataclass(frozen=True)
class DebateTrace:
    r"""A debate as one tagged text, kept verbatim.

    The layout, a blank line between parts: `<|Round 1 - Initial Solutions|>`, `<|Agent 1 Solution|>: ...`, ...,
    `<|Round 2 - Revision|>`, `<|Agent 1 Revision|>: ...`, ..., `<|Consensus|>` and its sentence, `<|endofdebate|>`.
    Agreement in round 1 leaves round 2 out; text may stand before the first tag (`Problem: ...`).

    Args:
        question: what is debated.
        text: the tagged text.
        gold: the right answer, if there is one.
        extra: further fields of its record, e.g. `consensus_type`.

    Attributes:
        turns: read from the text, in its order.
        consensus: the sentence after `<|Consensus|>`, read from the text; None where the tag is missing.

    Raises:
        ValueError: tags that are missing, repeated or out of order (the message names the tag and what was expected),
            or a question, text or answer that is no text.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3, and its released data.
    """

    question: str
    text: str
    gold: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = field(init=False)
    consensus: str | None = field(init=False)

    def __post_init__(self) -> None:
        for name in ("question", "text", "gold"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "gold" and value is None):
                raise ValueError(f"expected the {name} of a debate as text; got {value!r:.80}. Put it in quotes.")
        try:
            places, consensus = _parse(self.text)
        except ValueError as error:
            raise ValueError(f"{error} Mend the tags, or leave this trace out.") from None
        turns = tuple(Turn(agent, number, self.text[a:b]) for agent, number, a, b in places)
        object.__setattr__(self, "turns", turns)
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
            ValueError: a turn's text that holds a tag, or turns that are no debate.
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
    def prompt(self) -> str:
        """What stands before the trace in training: `Problem: {question}` and a blank line."""
        return f"Problem: {self.question}\n\n"

    def spans(self) -> SpannedText:
        """Prompt and body as one text with a span per turn, labelled with its agent and grouped by question.

        Attention looks back only, so reading all spans in one forward equals one forward per turn over the text up to
        that turn's end. A turn without text has no span.
        """
        lead, body = len(self.prompt), self.body
        places = [(agent, a, b) for agent, _, a, b in _parse(body)[0] if b > a]
        where = tuple((a + lead, b + lead) for _, a, b in places)
        return SpannedText(self.prompt + body, where, tuple(str(agent) for agent, _, _ in places), self.question)

    def untagged(self) -> SpannedText:
        """`spans` of the same text without its tags: the turns stand one after the other, and nothing names them."""
        text, spans, labels = self.prompt, [], []
        for turn in self.turns:
            if turn.text:
                spans.append((len(text), len(text) + len(turn.text)))
                labels.append(str(turn.agent))
                text += f"{turn.text}\n\n"
        return SpannedText(text + (self.consensus or ""), tuple(spans), tuple(labels), self.question)

    def alone(self) -> list[SpannedText]:
        """Each turn right after the prompt, without tags and without the other turns: nothing tells who speaks."""
        lead = len(self.prompt)
        return [
            SpannedText(self.prompt + t.text, ((lead, lead + len(t.text)),), (str(t.agent),), self.question)
            for t in self.turns
            if t.text
        ]


def _parse(text: str) -> tuple[list[tuple[int, int, int, int]], str | None]:
    """Each turn's agent, round and character range; and the consensus."""
    found = list(TAG.finditer(text))
    if not found or found[0]["round"] != "1" or found[-1].group() != END:
        ends = [tag.group() for tag in found[:: max(1, len(found) - 1)]]
        raise ValueError(f"expected a trace from {round_tag(1)} to {END}; the first and last tag are {ends}.")
    turns: list[tuple[int, int, int, int]] = []
    consensus = None
    number, spoke, first = 0, list[int](), None
    stops = [*(tag.start() for tag in found[1:]), len(text)]
    for tag, stop in zip(found, stops, strict=True):
        after, inside = tag.end(), text[tag.end() : stop]
        if tag["agent"]:
            agent = int(tag["agent"])
            if consensus is not None or tag.group() != agent_tag(agent, number) or agent in spoke:
                raise ValueError(
                    f"expected each agent once per round, as {agent_tag(agent, max(number, 1))}, and before "
                    f"{CONSENSUS}; got {tag.group()} at character {tag.start()} of round {number}, after {spoke}."
                )
            spoke.append(agent)
            lead = len(inside) - len(inside.lstrip().removeprefix(":").lstrip())
            turns.append((agent, number, after + lead, max(after + lead, after + len(inside.rstrip()))))
            continue
        if number and first is None:
            first = spoke
        if number and consensus is None and (not spoke or set(spoke) != set(first or ())):
            raise ValueError(
                f"expected the agents {sorted(first or [])} in round {number}, one at least; got {spoke} before "
                f"{tag.group()} at character {tag.start()}."
            )
        if tag["round"]:
            if tag.group() != round_tag(number + 1) or consensus is not None:
                raise ValueError(
                    f"expected {round_tag(number + 1)} next, before {CONSENSUS}; got {tag.group()} at character "
                    f"{tag.start()}."
                )
            number, spoke = number + 1, []
        elif tag["last"] == "Consensus":
            if consensus is not None:
                raise ValueError(f"expected {CONSENSUS} once; got it again at character {tag.start()}.")
            consensus = inside.strip()
        elif tag is not found[-1]:
            raise ValueError(f"expected {END} once, as the last tag; got it at character {tag.start()} too.")
    return turns, consensus


def read_traces(path: str | Path) -> list[DebateTrace]:
    """Read traces: a JSON list as the paper released it, or JSON lines of the same records.

    A record has `question`, `debate_trace`, and `gold_answer` or other fields, which are kept in `extra`.

    Raises:
        ValueError: no such list, or a record that is no trace; the message names file and record.
    """
    traces = []
    for number, row in enumerate(read_records(path), 1):
        try:
            if missing := {"question", "debate_trace"} - set(row):
                raise ValueError(
                    f"expected the keys 'question' and 'debate_trace'; got {sorted(row)}. Add {sorted(missing)}."
                )
            extra = {k: v for k, v in row.items() if k not in ("question", "debate_trace", "gold_answer")}
            traces.append(DebateTrace(row["question"], row["debate_trace"], row.get("gold_answer"), extra))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
    return traces


def write_traces(path: str | Path, traces: Iterable[DebateTrace]) -> None:
    """Write traces, atomically: a `.json` path as the released list, byte for byte its layout, else JSON lines."""
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
    if Path(path).suffix != ".json":
        return read_rows(path, complete=True)
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"expected a JSON list of objects in {path}; got {str(rows)[:80]!r}. Put the records in [ and ], or write "
            "one a line in a .jsonl file."
        )
    return rows


def write_records(path: str | Path, rows: list[dict[str, Any]]) -> None:
    if Path(path).suffix == ".json":
        write_text(path, json.dumps(rows, indent=2))
    else:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
