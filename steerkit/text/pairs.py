"""Contrast pairs: the same prompt answered in two ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json
from steerkit.io.rows import read_rows
from steerkit.text.prompt import Prompt, encode_prompt, messages_of
from steerkit.text.spans import Passage
from steerkit.text.tokens import encode


@dataclass(frozen=True)
class ContrastPair:
    """Two continuations of one prompt, the first with the property that a vector shall carry, the second without.

    Args:
        prompt: a string (used verbatim) or a list of chat messages.
        positive: the continuation with the property.
        negative: the continuation without it.
        group: what must not straddle a split, e.g. the question; None makes every pair its own group.
    """

    prompt: Prompt
    positive: str
    negative: str
    group: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", tuple(messages_of(self.prompt)))
        for side in ("positive", "negative"):
            text = getattr(self, side)
            if not isinstance(text, str) or not text:
                raise ValueError(f"expected a non-empty string as the pair's {side}; got {text!r:.80}. Write one.")

    def passages(
        self, tokenizer: Any, group: str, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Passage, Passage]:
        """Both texts tokenised, each with one span: the continuation's own tokens, nothing of prompt or template."""
        prompt = encode_prompt(tokenizer, self.prompt, chat_template_kwargs)
        group = group if self.group is None else self.group
        return tuple(  # type: ignore[return-value]
            Passage((*prompt, *ids), ((len(prompt), len(prompt) + len(ids)),), (label,), group)
            for label in ("positive", "negative")
            for ids in [encode(tokenizer, getattr(self, label))]
        )


def read_pairs(path: str | Path) -> list[ContrastPair]:
    """Read pairs from a JSON-lines file of `{"prompt", "positive", "negative"}` and optionally `"group"`.

    Raises:
        ValueError: no pairs, or a line that is not such a row; the message names file and line.
    """
    names = {"prompt", "positive", "negative"}
    pairs = []
    for number, row in enumerate(read_rows(path, complete=True), 1):
        if not names <= set(row) or not set(row) <= names | {"group"}:
            raise ValueError(
                f"expected keys {sorted(names)} and optionally 'group' in {path}, row {number}; got {sorted(row)}. "
                "Rename, add or drop keys."
            )
        try:
            if row.get("group") is not None:
                row["group"] = str(row["group"])
            pairs.append(ContrastPair(**row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    if not pairs:
        raise ValueError(f"expected at least one pair in {path}; it is empty. Write one object a line.")
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[ContrastPair]) -> None:
    """Write pairs as JSON lines, atomically; `read_pairs` gives back equal ones."""
    rows = [{k: v for k, v in asdict(pair).items() if v is not None} for pair in pairs]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def pairs_sha256(pairs: Sequence[ContrastPair]) -> str:
    """A hash of the pairs' content and order, for provenance."""
    return sha256(canonical_json([asdict(pair) for pair in pairs]))
