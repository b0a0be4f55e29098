"""The commit of the source, for the provenance of results."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The project's commit, with "and changes" where tracked files differ from it; "unknown" outside a checkout."""
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        head, changes = (
            subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} and changes" if changes else head
