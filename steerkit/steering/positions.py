"""Steering positions: which absolute positions of a prompt and its continuation are steered."""

from __future__ import annotations

POSITIONS = ("generated", "from_last_prompt_token", "prompt", "all")
END = 2**62


def parse_positions(positions: str) -> tuple[str, int]:
    """`"generated:5"` as `("generated", 5)`; without a number, no limit."""
    name, colon, number = str(positions).partition(":")
    if name not in POSITIONS or (colon and not (number.isdecimal() and int(number) > 0)):
        raise ValueError(
            f"expected positions among {POSITIONS}, or ':k' after one for its first k; got {positions!r}. Choose one."
        )
    return name, int(number) if colon else END


def touches_prompt(positions: str) -> bool:
    """Whether positions of the prompt before its last token are steered."""
    return parse_positions(positions)[0] in ("prompt", "all")


def steered_columns(positions: str, start: int, stop: int) -> tuple[int, int]:
    """The half-open range of absolute columns that `positions` means for a prompt in columns `start..stop`."""
    name, limit = parse_positions(positions)
    low = {"generated": stop, "from_last_prompt_token": stop - 1, "prompt": start, "all": start}[name]
    high = stop if name == "prompt" else END
    return low, min(high, low + limit)
