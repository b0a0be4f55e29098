"""Turn contrasts: an agent's turn against the other agents' turns of the same round, as released by the paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace, read_records, write_records


@dataclass(frozen=True)
class TurnContrast:
    """A turn, the text before it, and what the other agents said in the same round: a released steering pair.

    Args:
        identifier: e.g. `question_8_round_1_agent_1`.
        context: the text up to and including the agent's tag, without the colon.
        agent: who speaks.
        response: the turn's own text.
        others: agent -> its text.
    """

    identifier: str
    context: str
    agent: str
    response: str
    others: Mapping[str, str]


def turn_contrasts(trace: DebateTrace, number: int) -> list[TurnContrast]:
    """A contrast for every turn of a trace, which is question `number` of its data set."""
    text = trace.prompt + trace.body
    found = []
    for turn in trace.turns:
        tag = agent_tag(turn.agent, turn.round)
        opened = text.index(round_tag(turn.round), len(trace.prompt))
        others = {str(t.agent): t.text for t in trace.turns if t.round == turn.round and t.agent != turn.agent}
        context = text[: text.index(tag, opened) + len(tag)]
        identifier = f"question_{number}_round_{turn.round}_agent_{turn.agent}"
        found.append(TurnContrast(identifier, context, str(turn.agent), turn.text, others))
    return found


def read_contrasts(path: str | Path) -> list[TurnContrast]:
    """Read the released steering-pair file (or JSON lines of its records).

    Raises:
        ValueError: a record without the released keys; the message names file and record.
    """
    found = []
    for number, row in enumerate(read_records(path), 1):
        try:
            others = {pair["negative_agent_id"]: pair["negative_response"] for pair in row["negative_pairs"]}
            texts = (row["turn_identifier"], row["context"], row["positive_agent_id"], row["positive_response"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, record {number}: expected the released keys; got {sorted(row)}. Write what `write_contrasts` "
                "writes."
            ) from error
        if len(others) < len(row["negative_pairs"]):
            raise ValueError(
                f"{path}, record {number}: expected each negative agent once; got {list(others)} for "
                f"{len(row['negative_pairs'])} pairs. Take out the repeated one."
            )
        found.append(TurnContrast(*texts, others))
    return found


def write_contrasts(path: str | Path, contrasts: Iterable[TurnContrast]) -> None:
    """Write steering pairs in the released format, atomically."""
    rows = [
        {
            "turn_identifier": one.identifier,
            "context": one.context,
            "positive_agent_id": one.agent,
            "positive_response": one.response,
            "negative_pairs": [{"negative_agent_id": k, "negative_response": v} for k, v in one.others.items()],
        }
        for one in contrasts
    ]
    write_records(path, rows)
