"""A hook of mkdocs: pages of the site that are files outside `docs/`, with links that fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "speed.md",
    "benchmarks/growth.png": "growth.png",
}
"""File below the root of the project -> page of the site."""
LINK = re.compile(r"(?<=\]\()docs/")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the files of `OUTSIDE` to the site."""
    root = Path(config["config_file_path"]).parent
    for source, target in OUTSIDE.items():
        content = (root / source).read_bytes()
        if source.endswith(".md"):
            content = LINK.sub("", content.decode("utf-8")).encode("utf-8")
        files.append(File.generated(config, target, content=content))
    return files
