"""The graph of imports between our modules, read from their source; imports inside functions count."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "io",
    "text",
    "models",
    "stats",
    "capture",
    "probes",
    "vectors",
    "steering",
    "generation",
    "patching",
    "serving",
    "scores",
    "sweeps",
    "doctor",
    "show",
    "lm_eval",
    "demo",
    "cli",
)
"""The packages of steerkit in order: a package imports only those before it."""
TOPS = ("steerkit", "training", "analysis", "figures")


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Return the file of every module of the four packages by its dotted name."""
    paths = [path for top in TOPS for path in sorted((root / top).rglob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imported(source: str, modules: set[str]) -> set[str]:
    """Return the modules among `modules` that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inside & modules) or {node.module}
    return names & modules


def graph() -> dict[str, set[str]]:
    """Return module -> the modules that it imports; `steerkit/__init__.py`, which imports on first use, is left out."""
    files = module_files()
    return {
        name: imported(path.read_text(encoding="utf-8"), set(files)) - {"steerkit", name}
        for name, path in files.items()
        if name != "steerkit"
    }


def package_of(module: str) -> str:
    """Return `sweeps` for `steerkit.sweeps.store`, and `training` for `training.train.sft`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "steerkit" and len(parts) > 1 else parts[0]


def package_graph(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return package -> the packages that its modules import; `steerkit` is the public interface, `import steerkit`."""
    edges: dict[str, set[str]] = {}
    for name, others in modules.items():
        targets = {package_of(other) for other in others} - {package_of(name)}
        edges.setdefault(package_of(name), set()).update(targets)
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the import circles, each as a list of modules: a depth-first search from every module."""
    closed = []
    for start in sorted(edges):
        stack = [(start, [start])]
        seen: set[str] = set()
        while stack:
            name, path = stack.pop()
            for other in sorted(edges.get(name, ())):
                if other == start:
                    closed.append([*path, start])
                elif other not in seen:
                    seen.add(other)
                    stack.append((other, [*path, other]))
    return closed
