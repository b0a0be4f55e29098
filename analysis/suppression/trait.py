"""Traits of a text that a rule detects."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Trait = Callable[[str], float]
"""A score of a text: 1 where it shows the trait, else 0."""


def words_trait(words: Sequence[str]) -> Trait:
    """A trait that is 1 where a text contains any of the words, as a whole word in any case, else 0.

    Raises:
        ValueError: no words.
    """
    if not words:
        raise ValueError("expected one word at least that shows the trait; got none. Pass words.")
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
    return lambda text: float(pattern.search(text) is not None)
