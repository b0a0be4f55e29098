"""Contrast pairs: two continuations of the same prompt, with and without a property."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json
from steerkit.io.rows import read_rows
from steerkit.text.prompt import Prompt, PromptLike, messages_of, prompt_source, render
from steerkit.text.spans import Passage
from steerkit.text.thinking import opens_thinking, reply_of
from steerkit.text.tokens import encode

OF_AB = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
"""Keys of an A/B question, see `steerkit.text.ab`."""


@dataclass(frozen=True)
class ContrastPair:
    """Two continuations of one prompt: the first with the property that a vector represents, the second without it.

    Args:
        prompt: a string (used verbatim), a list of chat messages, or a `Prompt`.
        positive: the continuation with the property.
        negative: the continuation without it.
        group: group id, e.g. the question, stored as text; a group stays on one side of a split. None makes each pair
            its own group.

    Raises:
        ValueError: an empty continuation, or a prompt that is neither a string nor a list of messages.

    Example: `ContrastPair("How are you?", positive=" Great!", negative=" Awful.", group="mood")`
    """

    prompt: PromptLike
    positive: str
    negative: str
    group: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, Mapping) and "ids" in self.prompt:  # a Prompt read from a file
            stored: Any = self.prompt
            object.__setattr__(self, "prompt", Prompt(**stored))
        elif not isinstance(self.prompt, str | Prompt):
            object.__setattr__(self, "prompt", tuple(messages_of(self.prompt)))
        for side in ("positive", "negative"):
            text = getattr(self, side)
            if not isinstance(text, str) or not text:
                raise ValueError(f"expected a non-empty string as the pair's {side}; got {text!r:.80}. Write one.")
        if self.group is not None:
            object.__setattr__(self, "group", str(self.group))

    def passages(
        self, tokenizer: Any, group: str, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Passage, Passage]:
        """Both texts as token ids, each with one span: the tokens of the continuation, without prompt and template.

        Warns:
            UserWarning: the template opens a thought (`<think>`), so that the continuations are read as thinking.
        """
        rendered = render(tokenizer, self.prompt, chat_template_kwargs)
        prompt = rendered.ids
        if opens_thinking(rendered.text) and reply_of(self.positive) in (None, self.positive):
            warnings.warn(
                "the prompt ends inside a thought (<think>), so the pair's continuations are read as thinking and not "
                "as a reply. Begin both with '</think>' to read replies, or pass chat_template_kwargs, e.g. "
                '{"enable_thinking": False}, if the template takes it.',
                UserWarning,
                stacklevel=2,
            )
        group = group if self.group is None else self.group

        def passage(label: str, text: str) -> Passage:
            ids = encode(tokenizer, text)
            span = (len(prompt), len(prompt) + len(ids))
            return Passage((*prompt, *ids), (span,), (label,), group)

        return passage("positive", self.positive), passage("negative", self.negative)


def read_pairs(path: str | Path) -> list[ContrastPair]:
    """Read pairs from a JSON-lines file of `{"prompt", "positive", "negative"}` and optionally `"group"`.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: no pairs, or a line that is not such a row; the message names file and line.

    Example: `pairs = read_pairs("pairs.jsonl")`
    """
    names = {"prompt", "positive", "negative"}
    pairs = []
    for number, row in enumerate(read_rows(path, complete=True), 1):
        if set(OF_AB) <= set(row):
            raise ValueError(
                f"expected rows of {sorted(names)} in {path}; got A/B questions. Read them with sk.read_ab, which "
                "balances the letters, see docs/recipes/caa.md."
            )
        if not names <= set(row) or not set(row) <= names | {"group"}:
            raise ValueError(
                f"expected keys {sorted(names)} and optionally 'group' in {path}, row {number}; got {sorted(row)}. "
                "Rename, add or drop keys."
            )
        try:
            pairs.append(ContrastPair(**row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    if not pairs:
        raise ValueError(f"expected at least one pair in {path}; it is empty. Write one object per line.")
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[ContrastPair]) -> None:
    """Write pairs as JSON lines, atomically; `read_pairs` returns equal pairs."""
    rows = [{key: value for key, value in _as_row(pair).items() if value is not None} for pair in pairs]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def pairs_sha256(pairs: Sequence[ContrastPair]) -> str:
    """A SHA-256 of the content and order of the pairs, for provenance."""
    return sha256(canonical_json([_as_row(pair) for pair in pairs]))


def _as_row(pair: ContrastPair) -> dict[str, Any]:
    """A pair as plain data."""
    return {**asdict(pair), "prompt": prompt_source(pair.prompt)}
