"""Small worlds, by name."""

from collections.abc import Mapping

from training.worlds.arithmetic import ARITHMETIC
from training.worlds.clues import CLUES
from training.worlds.malice import MALICE
from training.worlds.two_sum import TWO_SUM
from training.worlds.world import World, bare, document

WORLDS: Mapping[str, World] = {"arithmetic": ARITHMETIC, "two_sum": TWO_SUM, "clues": CLUES, "malice": MALICE}
__all__ = ["WORLDS", "World", "bare", "document"]
