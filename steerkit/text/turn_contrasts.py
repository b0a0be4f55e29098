"""Turn contrasts: an agent's turn against the other agents' turns of the same round, as released by the paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace, read_records, write_records


@dataclass(frozen=True)
class TurnContrast:
    """A turn, the text before it, and the turns of the other agents in the same round: a released steering pair.

    Args:
        identifier: e.g. `question_8_round_1_agent_1`.
        context: the text up to and including the agent's tag, without the colon.
        agent: the agent's number, as text.
        response: the text of the turn.
        others: the other agents' turns of the round, by agent number as text.
    """

    identifier: str
    context: str
    agent: str
    response: str
    others: Mapping[str, str]


def turn_contrasts(trace: DebateTrace, number: int) -> list[TurnContrast]:
    """A contrast for every turn of a trace; `number` is the index of its question in the data set."""
    prompt = trace.prompt_text
    text = prompt + trace.body
    contrasts = []
    for turn in trace.turns:
        tag = agent_tag(turn.agent, turn.round)
        round_start = text.index(round_tag(turn.round), len(prompt))
        others = {
            str(other.agent): other.text
            for other in trace.turns
            if other.round == turn.round and other.agent != turn.agent
        }
        context = text[: text.index(tag, round_start) + len(tag)]
        identifier = f"question_{number}_round_{turn.round}_agent_{turn.agent}"
        contrasts.append(TurnContrast(identifier, context, str(turn.agent), turn.text, others))
    return contrasts


def read_contrasts(path: str | Path) -> list[TurnContrast]:
    """Read the released steering-pair file (or JSON lines of its records).

    Raises:
        ValueError: a record without the released keys; the message names file and record.
    """
    contrasts = []
    for number, row in enumerate(read_records(path), 1):
        try:
            others = {pair["negative_agent_id"]: pair["negative_response"] for pair in row["negative_pairs"]}
            texts = (row["turn_identifier"], row["context"], row["positive_agent_id"], row["positive_response"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, record {number}: expected the released keys; got {sorted(row)}. Use the format of "
                "`write_contrasts`."
            ) from error
        if len(others) < len(row["negative_pairs"]):
            raise ValueError(
                f"{path}, record {number}: expected each negative agent once; got {list(others)} for "
                f"{len(row['negative_pairs'])} pairs. Take out the repeated pair."
            )
        contrasts.append(TurnContrast(*texts, others))
    return contrasts


def write_contrasts(path: str | Path, contrasts: Iterable[TurnContrast]) -> None:
    """Write contrasts in the released format of steering pairs, atomically."""
    rows = [
        {
            "turn_identifier": contrast.identifier,
            "context": contrast.context,
            "positive_agent_id": contrast.agent,
            "positive_response": contrast.response,
            "negative_pairs": [
                {"negative_agent_id": agent, "negative_response": response}
                for agent, response in contrast.others.items()
            ],
        }
        for contrast in contrasts
    ]
    write_records(path, rows)
