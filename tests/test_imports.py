"""Who may import whom: every import is read, also those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = [  # in this order: a package imports only those above it
    "io", "text", "models", "stats", "capture", "probes", "vectors", "steering", "generation", "scores", "sweeps",
    "doctor", "show", "lm_eval", "demo", "cli",
]  # fmt: skip
TOPS = ("steerkit", "training", "analysis", "figures")


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    paths = [path for top in TOPS for path in sorted((root / top).rglob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imported(source: str, modules: set[str]) -> set[str]:
    """The modules among `modules` that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & modules) or {node.module}
    return found & modules


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports; the package `steerkit` itself imports names only on first use."""
    files = module_files()
    return {
        name: imported(path.read_text(), set(files)) - {"steerkit", name}
        for name, path in files.items()
        if name != "steerkit"
    }


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or on a way round (a depth-first search from every module)."""
    found = []
    for start in sorted(edges):
        stack = [(start, [start])]
        seen: set[str] = set()
        while stack:
            name, path = stack.pop()
            for other in sorted(edges.get(name, ())):
                if other == start:
                    found.append([*path, start])
                elif other not in seen:
                    seen.add(other)
                    stack.append((other, [*path, other]))
    return found


def test_no_module_imports_itself_on_a_way_round() -> None:
    assert circles(graph()) == []


def test_a_circle_is_found_also_where_one_import_stands_inside_a_function() -> None:
    sources = {"a": "def f():\n    from b import x\n", "b": "import c\n", "c": "from a import f\n"}
    edges = {name: imported(source, set(sources)) for name, source in sources.items()}
    assert ["a", "b", "c", "a"] in circles(edges)


def test_a_package_imports_only_packages_above_it() -> None:
    rank = {name: number for number, name in enumerate(PACKAGES)}
    for name, others in graph().items():
        if name.startswith("steerkit."):
            package = name.split(".")[1]
            assert package in rank, f"add {package} to PACKAGES, where it belongs in the order"
            for other in others:
                if other.startswith("steerkit."):
                    assert rank[other.split(".")[1]] <= rank[package], f"{name} imports {other}, a higher package"


def test_training_analysis_and_figures_import_steerkit_and_never_the_reverse() -> None:
    allowed = {
        "steerkit": {"steerkit"},
        "training": {"steerkit", "training"},
        "analysis": {"steerkit", "training", "analysis"},
        "figures": {"steerkit", "figures"},
    }
    for name, others in graph().items():
        tops = {other.split(".")[0] for other in others}
        assert tops <= allowed[name.split(".")[0]], f"{name} imports {sorted(others)}"


def test_figures_read_tables_and_draw_plots_and_nothing_else() -> None:
    used = {other for name, others in graph().items() if name.startswith("figures") for other in others}
    assert {other.split(".")[1] for other in used if other.startswith("steerkit.")} <= {"io", "show"}
