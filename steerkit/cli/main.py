"""The command line: the app with its commands, and how errors are reported. Help imports nothing heavy."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer

from steerkit.cli.demo import demo
from steerkit.cli.models import bake, doctor, inspect, lens
from steerkit.cli.serve import serve
from steerkit.cli.steer import play, steer
from steerkit.cli.sweeps import report, score, sweep
from steerkit.cli.vectors import convert, extract, probe
from steerkit.io.run_folder import RunFolderBusy
from steerkit.io.signals import restore_interrupt
from steerkit.show.terminal import plain

TRACEBACK = "--traceback"
USER_ERRORS = (ValueError, OSError, ImportError, RunFolderBusy)
"""What the public functions document for bad input, a missing file or extra, and a busy or other run folder."""

RESUMABLE = ("demo", "sweep")

app = typer.Typer(
    help="Read, steer and measure the residual stream of causal language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo, inspect, doctor, lens, play, serve, extract, steer, sweep, score, report, probe, convert, bake
):  # fmt: skip
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        import steerkit

        print(f"steerkit {steerkit.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Print the traceback of an error; also accepted after a command.")
    ] = False,
) -> None:
    """Declare the options that come before a command; `main` handles --traceback wherever it is given."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 success; 1 a failed check, or an internal error; 2 bad input, reported in one line; 130 interrupted.
    """
    restore_interrupt()
    arguments, show_traceback = _without_traceback_option(sys.argv[1:])
    try:
        code = app(args=arguments, prog_name="steerkit", standalone_mode=False) or 0
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        code = _report(error, no_arguments=not arguments)
    if code == 130:
        resumed = next((one for one in arguments if not one.startswith("-")), None) in RESUMABLE
        print(f"steerkit: interrupted{'; repeat the same command to resume' if resumed else ''}.", file=sys.stderr)
    sys.exit(code)


def _report(error: Any, no_arguments: bool) -> int:
    """Print one line about an error on stderr, and return the exit code."""
    if isinstance(error, USER_ERRORS):
        _print_line(str(error))
        return 2
    if hasattr(error, "format_message"):  # a usage error of typer
        if no_arguments:
            error.show()  # the help
            return 2
        message = str(error.format_message()).rstrip(".")
        _print_line(f"{message}{'' if message.endswith('?') else '.'} See --help.")
        return 2
    if type(error).__name__ == "OutOfMemoryError":
        _print_line(f"out of memory: {error} Pass --dtype bfloat16, or use a smaller model.")
        return 2
    _print_line(f"internal error: {type(error).__name__}: {error}. Repeat the command with {TRACEBACK} to locate it.")
    return 1


def _print_line(message: str) -> None:
    lines = [" ".join(plain(line, " ").split()) for line in message.splitlines()]
    print(f"steerkit: {' / '.join(filter(None, lines))}", file=sys.stderr)


def _without_traceback_option(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without --traceback (before a `--`), and whether it was among them."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != TRACEBACK]
    return [*options, *arguments[end:]], TRACEBACK in arguments[:end]
