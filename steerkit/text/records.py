"""Untagged records of debates: who said what in which round, in one of three layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LAYOUTS = ("turns", "rounds", "messages")
Spoken = tuple[int, int, str]
"""Agent, round and text of a turn."""


def layout_of(record: Mapping[str, Any]) -> str | None:
    """The key of `LAYOUTS` that holds the turns of an untagged record; None without one."""
    return next((key for key in LAYOUTS if key in record), None)


def spoken_turns(record: Mapping[str, Any]) -> list[Spoken]:
    """The turns of an untagged record, ordered by round and agent.

    Layouts, by the key that holds the turns:

    - `turns`: `[{"agent": 1, "round": 1, "text": "..."}, ...]`. Without `round`, an agent's k-th turn is of round k.
      Agents are numbers from 1, or names, which are numbered in the order in which they first occur.
    - `rounds`: a list of texts per round, agent after agent: `[["...", "...", "..."], ["...", "...", "..."]]`.
    - `messages`: a chat per agent; its k-th message with the role `assistant` is its turn of round k. Du et al. 2023
      (arXiv 2305.14325) store debates in this way.

    Args:
        record: a record with one of these keys.

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
    spoken = {"turns": _of_turns, "rounds": _of_rounds, "messages": _of_messages}[key](held)
    return sorted(spoken, key=lambda turn: (turn[1], turn[0]))


def _of_turns(turns: Sequence[Any]) -> list[Spoken]:
    for turn in turns:
        if not isinstance(turn, dict) or not {"agent", "text"} <= set(turn) or not isinstance(turn["text"], str):
            raise ValueError(
                f"expected turns with an agent and a text, {{'agent': 1, 'text': '...'}}; got {turn!r:.80}. Rename the "
                "keys."
            )
    names = [str(turn["agent"]) for turn in turns]
    order = list(dict.fromkeys(names))
    number_of = {name: int(name) if all(map(str.isdecimal, order)) else order.index(name) + 1 for name in order}
    spoken = []
    for index, turn in enumerate(turns):
        number = turn.get("round", 1 + names[:index].count(names[index]))
        if type(number) is not int:
            raise ValueError(
                f"expected the round of a turn as an integer from 1; got {number!r:.80}. Number the rounds."
            )
        spoken.append((number_of[names[index]], number, turn["text"]))
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
