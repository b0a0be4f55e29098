"""`python -m analysis notebooks`: run the notebooks of docs on the demo's model, and store what they show.

A notebook stores the hash of its code, so that a test can tell whether its outputs belong to this code.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
HASH = "code_sha256"


def code_of(notebook: Mapping[str, Any]) -> list[str]:
    """The source of each code cell."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Run a cell; return its outputs as Jupyter stores them.

    Args:
        source: code of the cell.
        names: names that the code may use; those that it defines are added.
        where: name of the cell in error messages.

    Returns:
        What the cell prints, then the value of its last line, where that is an expression whose value is not None.
    """
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = _lines(value._repr_html_())
        outputs.append({"output_type": "execute_result", "data": data, "metadata": {}})
    return outputs


def run_notebook(notebook: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Run all cells in a temporary folder; return the notebook with their outputs."""
    names: dict[str, Any] = {}
    cells, count = [], 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                outputs = run_cell("".join(cell["source"]), names, f"{name}, cell {count}")
                for output in outputs:
                    if output["output_type"] == "execute_result":
                        output["execution_count"] = count
                cell = {**cell, "execution_count": count, "outputs": outputs}
            cells.append(cell)
    metadata = {**notebook["metadata"], HASH: sha256(canonical_json(code_of(notebook)))}
    return {**notebook, "cells": cells, "metadata": metadata}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the notebooks and write them back."""
    parser = argparse.ArgumentParser(prog="python -m analysis notebooks", description=__doc__)
    parser.add_argument("notebook", nargs="*", type=Path, help="default: all notebooks of docs")
    given = parser.parse_args(arguments)
    for path in given.notebook or sorted(FOLDER.glob("*.ipynb")):
        found = run_notebook(json.loads(path.read_text(encoding="utf-8")), path.name)
        write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"{path.name}: {len(code_of(found))} cells run")
