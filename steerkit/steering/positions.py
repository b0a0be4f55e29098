"""Steering positions: which absolute positions of a prompt and its continuation are steered."""

from __future__ import annotations

POSITIONS = ("generated", "from_last_prompt_token", "prompt", "all")
SINK = "+0"
"""Ending of `prompt` and `all` under which an ablation includes position 0, the attention sink."""
SPARING = ("ablate", "leace")
"""Operations that leave position 0 out, unless the positions end in `+0`."""
END = 2**62


def parse_positions(positions: str) -> tuple[str, int]:
    """`"generated:5"` as `("generated", 5)`; without a number, no limit. `"all+0"` is named `"all"`."""
    given, colon, number = str(positions).partition(":")
    name = given.removesuffix(SINK)
    unknown = name not in POSITIONS or (name != given and name not in ("prompt", "all"))
    if unknown or (colon and not (number.isdecimal() and int(number) > 0)):
        raise ValueError(
            f"expected positions among {POSITIONS}, or ':k' after one for its first k, or '+0' after 'prompt' or 'all' "
            f"to ablate position 0 too; got {positions!r}. Choose one."
        )
    return name, int(number) if colon else END


def touches_prompt(positions: str) -> bool:
    """Whether positions of the prompt before its last token are steered."""
    return parse_positions(positions)[0] in ("prompt", "all")


def steered_columns(positions: str, start: int, stop: int, operation: str) -> tuple[int, int]:
    """The half-open range of absolute columns that `positions` means for a prompt in columns `start..stop`.

    An ablation at `prompt` or `all` begins at the second token. The first is an attention sink: almost all of its
    stream lies along few directions, and without a component along one of them the model writes no sense. `+0` after
    the name includes it.
    """
    name, limit = parse_positions(positions)
    first = start + (operation.partition(":")[0] in SPARING and SINK not in positions)
    low = {"generated": stop, "from_last_prompt_token": stop - 1, "prompt": first, "all": first}[name]
    high = stop if name == "prompt" else END
    return low, min(high, low + limit)
