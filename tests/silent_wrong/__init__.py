"""Ways to get wrong numbers without an error, by topic. Each module has a dictionary `SILENT`.

An entry is `name: (check, ours, mutant)`. `check(implementation, folder)` passes for ours and fails for the
mutant, which runs without an error and gives a wrong result. `VERIFIES`, where there is one, names for some entries the
operation and the site whose mutant it is, for the table of docs/concepts/steering.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def plain(check: Callable[[Any], None]) -> Callable[[Any, Path], None]:
    """A check that needs no folder, as an entry's check."""
    return lambda implementation, _: check(implementation)
