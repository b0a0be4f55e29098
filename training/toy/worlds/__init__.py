"""Toy worlds, by name."""

from __future__ import annotations

from collections.abc import Mapping

from training.toy.worlds.arithmetic import ARITHMETIC
from training.toy.worlds.clues import CLUES
from training.toy.worlds.malice import MALICE
from training.toy.worlds.two_sum import TWO_SUM
from training.toy.worlds.world import World, bare, document

WORLDS: Mapping[str, World] = {"arithmetic": ARITHMETIC, "two_sum": TWO_SUM, "clues": CLUES, "malice": MALICE}
__all__ = ["WORLDS", "World", "bare", "document"]
