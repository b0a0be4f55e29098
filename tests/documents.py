"""Code blocks of README and of the pages, with what they print, and a folder in which they run as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^```(\w*)\n(.*?)^```$(?:\n\n(?:This |The script )?prints\b[^`]*?\n\n```\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
"""A fenced block and, if the next paragraph begins with (This, The script) "prints", what follows it."""
DATA = ("json", "bibtex", "text")
"""Languages of blocks that are no code."""


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Args:
        page: file, below the root of the project.
        number: 1, 2, ... among the page's blocks of its language.
        language: `python` or `bash`.
        code: its text.
        shown: what the page says that it prints; empty: not shown.
    """

    page: str
    number: int
    language: str
    code: str
    shown: str

    @property
    def name(self) -> str:
        """Page and number, as in a traceback."""
        return f"{self.page}, {self.language} block {self.number}"


def blocks_of(page: Path, language: str) -> list[Block]:
    """The blocks of a language on a page, in order."""
    found = [match for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match[1] == language]
    name = str(page.relative_to(ROOT))
    return [Block(name, number, language, match[2], match[3] or "") for number, match in enumerate(found, 1)]


def languages_of(page: Path) -> set[str]:
    """The languages of a page's fenced blocks; outputs, which follow "prints", are left out."""
    return {match[1] for match in FENCE.finditer(page.read_text(encoding="utf-8"))}


def furnish(folder: Path, checkpoint: Path) -> Path:
    """Put what a checkout has into a folder: docs, and the demo's weights. `bash` activates the environment."""
    (folder / "docs").symlink_to(DOCS)
    (folder / checkpoint.name).symlink_to(checkpoint)
    return folder


def bash(code: str, folder: Path) -> str:
    """Run a block of shell commands in a folder and return what it printed; a failing command fails the test."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    environment["PATH"] = f"{Path(sys.prefix) / 'bin'}:{environment['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
