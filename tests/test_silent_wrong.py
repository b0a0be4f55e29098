"""Ways to get wrong numbers without an error: our implementation passes the check, and the check catches the mutant."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import silent_wrong
from tests.verified import VERIFIED, Verified, name_of

Entry = tuple[Callable[[Any, Path], None], Any, Any]

TOPICS = {
    module.name: importlib.import_module(f"tests.silent_wrong.{module.name}")
    for module in pkgutil.iter_modules(silent_wrong.__path__)
}
SILENT: dict[str, Entry] = {
    f"{topic}: {name}": entry for topic in TOPICS for name, entry in TOPICS[topic].SILENT.items()
}


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
@pytest.mark.parametrize("name", SILENT)
def test_ours_passes_and_the_wrong_way_is_caught(name: str, tmp_path: Path) -> None:
    check, ours, mutant = SILENT[name]
    check(ours, tmp_path / "ours")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(mutant, tmp_path / "mutant")


for topic, module in TOPICS.items():
    for entry, (operation, site) in getattr(module, "VERIFIES", {}).items():
        assert entry in module.SILENT, entry
        test = f"{name_of(test_ours_passes_and_the_wrong_way_is_caught)}[{topic}: ...]"
        VERIFIED.append(Verified(site, operation, "mutant", test))


def test_every_entry_has_a_mutant_of_its_own() -> None:
    assert len({id(mutant) for *_, mutant in SILENT.values()}) == len(SILENT) >= 30
