"""No module of the four packages imports what only POSIX systems have, also not inside a function."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
POSIX_ONLY = {
    "crypt",
    "curses",
    "fcntl",
    "grp",
    "nis",
    "ossaudiodev",
    "posix",
    "pty",
    "pwd",
    "readline",
    "resource",
    "spwd",
    "syslog",
    "termios",
    "tty",
}


def imported_modules(source: str) -> set[str]:
    """The top-level names of all modules that a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_no_package_imports_a_posix_only_module() -> None:
    paths = [path for top in ("steerkit", "training", "analysis", "figures") for path in (ROOT / top).rglob("*.py")]
    assert len(paths) > 100
    for path in paths:
        assert not imported_modules(path.read_text(encoding="utf-8")) & POSIX_ONLY, path


def test_imports_inside_functions_and_from_imports_are_read() -> None:
    source = "def f():\n    import fcntl\n    from os.path import join\n    from resource import getrusage\n"
    assert imported_modules(source) == {"fcntl", "os", "resource"}
