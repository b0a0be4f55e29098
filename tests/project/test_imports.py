"""Which package may import which: every import is read, also those inside functions."""

from __future__ import annotations

from tests.import_graph import PACKAGES, circles, graph, imported, package_graph


def test_no_module_imports_itself_directly_or_through_others() -> None:
    assert circles(graph()) == []


def test_no_package_imports_itself_through_others() -> None:
    assert circles(package_graph(graph())) == []


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
                    assert rank[other.split(".")[1]] <= rank[package], f"{name} imports {other}, a later package"


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
    assert {other.split(".")[1] for other in used if other.startswith("steerkit.")} <= {"demo", "io", "show", "stats"}
