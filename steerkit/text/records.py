"""Untagged records of debates: who said what in which round, in one of three layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LAYOUTS = ("turns", "rounds", "messages")
Spoken = tuple[int, int, str]
"""Agent, round and text of a turn."""


def layout_of(record: Mapping[str, Any]) -> str | None:
    """The key of `LAYOUTS` that holds the turns of an untagged record; None without one."""
    return next((key for key in LAYOUTS if key in record), None)


def names_in(record: Mapping[str, Any]) -> set[str]:
    """The names of the agents under the key `turns`; none in another layout, or where a turn has no agent."""
    turns = record.get("turns")
    return {str(turn["agent"]) for turn in turns if _has_agent(turn)} if isinstance(turns, list) else set()


def numbers_of(names: Iterable[str]) -> dict[str, int]:
    """A number from 1 for each name, in sorted order; names that are all integers are sorted by value.

    Example:
        >>> numbers_of(["10", "9", "0"])
        {'0': 1, '9': 2, '10': 3}
    """
    every = set(names)
    ordered = sorted(every, key=int) if all(name.isdecimal() for name in every) else sorted(every)
    return {name: number for number, name in enumerate(ordered, 1)}


def is_incomplete(record: Mapping[str, Any], names: set[str]) -> bool:
    """Whether an agent has no turn in a round of an untagged record.

    Args:
        record: a record with one of the keys of `LAYOUTS`.
        names: the agents of all records that have the key `turns`.
    """
    key = layout_of(record)
    held = record[key] if key is not None else None
    if not isinstance(held, list):
        return False
    if key != "turns":
        sizes = [len(one) for one in held if isinstance(one, list)] if key == "rounds" else [*map(_replies, held)]
        return len(set(sizes)) > 1
    if not all(_has_agent(turn) for turn in held):
        return False
    spoken = [str(turn["agent"]) for turn in held]
    in_round: dict[Any, set[str]] = {}
    for index, (turn, name) in enumerate(zip(held, spoken, strict=True)):
        in_round.setdefault(repr(turn.get("round", 1 + spoken[:index].count(name))), set()).add(name)
    return any(there != names for there in in_round.values())


def _has_agent(turn: Any) -> bool:
    return isinstance(turn, dict) and "agent" in turn


def _replies(chat: Any) -> int:
    """The number of assistant messages of a chat."""
    messages = chat if isinstance(chat, list) else []
    return sum(isinstance(one, dict) and one.get("role") == "assistant" for one in messages)


def spoken_turns(record: Mapping[str, Any], numbers: Mapping[str, int] | None = None) -> list[Spoken]:
    """The turns of an untagged record, ordered by round and agent.

    Layouts, by the key that holds the turns:

    - `turns`: `[{"agent": 1, "round": 1, "text": "..."}, ...]`. Without `round`, an agent's k-th turn is of round k.
      Agents are numbers or names, which are numbered from 1 in sorted order (`numbers_of`).
    - `rounds`: a list of texts per round, agent after agent: `[["...", "...", "..."], ["...", "...", "..."]]`.
    - `messages`: a chat per agent; its k-th message with the role `assistant` is its turn of round k. Du et al. 2023
      (arXiv 2305.14325) store debates in this way.

    Args:
        record: a record with one of these keys.
        numbers: name -> number of each agent, see `numbers_of`; default: of the names in this record.

    Raises:
        ValueError: the turns have another form; the message names the key and what was expected.

    Example:
        >>> spoken_turns({"rounds": [["4", "5"], ["4", "4"]]})
        [(1, 1, '4'), (2, 1, '5'), (1, 2, '4'), (2, 2, '4')]
    """
    key = layout_of(record)
    if key is None:
        raise ValueError(f"expected one of the keys {LAYOUTS}; got {sorted(record)}. Add the turns under one of them.")
    held = record[key]
    if not isinstance(held, list) or not held:
        raise ValueError(
            f"expected a list of at least one entry as {key!r}; got {held!r:.80}. Put the turns in a list."
        )
    if key == "turns":
        spoken = _of_turns(held, numbers_of(names_in(record)) if numbers is None else numbers)
    else:
        spoken = _of_rounds(held) if key == "rounds" else _of_messages(held)
    return sorted(spoken, key=lambda turn: (turn[1], turn[0]))


def _of_turns(turns: Sequence[Any], numbers: Mapping[str, int]) -> list[Spoken]:
    for turn in turns:
        if not isinstance(turn, dict) or not {"agent", "text"} <= set(turn) or not isinstance(turn["text"], str):
            raise ValueError(
                f"expected turns with an agent and a text, {{'agent': 1, 'text': '...'}}; got {turn!r:.80}. Rename the "
                "keys."
            )
    names = [str(turn["agent"]) for turn in turns]
    spoken = []
    for index, turn in enumerate(turns):
        number = turn.get("round", 1 + names[:index].count(names[index]))
        if type(number) is not int or number < 1:
            raise ValueError(
                f"expected the round of a turn as an integer from 1; got {number!r:.80}. Number the rounds from 1."
            )
        spoken.append((numbers[names[index]], number, turn["text"]))
    return spoken


def _of_rounds(rounds: Sequence[Any]) -> list[Spoken]:
    for texts in rounds:
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"expected a list of texts per round, one per agent; got {texts!r:.80}. List the texts.")
    return [(agent, number, text) for number, texts in enumerate(rounds, 1) for agent, text in enumerate(texts, 1)]


def _of_messages(chats: Sequence[Any]) -> list[Spoken]:
    spoken = []
    for agent, chat in enumerate(chats, 1):
        if not isinstance(chat, list) or not all(isinstance(one, dict) and "role" in one for one in chat):
            raise ValueError(f"expected a list of chat messages per agent; got {chat!r:.80}. List role and content.")
        said = [message.get("content") for message in chat if message["role"] == "assistant"]
        if not all(isinstance(text, str) for text in said):
            raise ValueError(f"expected the content of each assistant message as text; got {said!r:.80}. Pass strings.")
        spoken += [(agent, number, str(text)) for number, text in enumerate(said, 1)]
    return spoken
