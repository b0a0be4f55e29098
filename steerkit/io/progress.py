"""Progress of long work: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

LINE_EVERY = 20.0  # seconds between two lines of `progress` in a log
LINE_AFTER = 3.0  # seconds until `line` prints


@contextlib.contextmanager
def progress(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, which reports that `n` more of `total` units are done, on stderr.

    A terminal shows a bar. A log gets a line every 20 seconds, and none for short work.

    Example:
        with progress("sweep", len(rows)) as advance:
            for row in rows:
                advance(1)
    """
    if sys.stderr.isatty():
        with _bar(task, total) as advance_bar:
            yield advance_bar
        return
    started = time.monotonic()
    last = started
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            elapsed = now - started
            remaining = elapsed / done * (total - done)
            print(
                f"{task}: {done} of {total}, {elapsed:.0f} s, about {remaining:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    yield advance


@contextlib.contextmanager
def spinner(task: str) -> Iterator[None]:
    """Show a spinner on stderr while the `with` runs, also while stderr is redirected; no output unless a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(file=sys.stderr).status(Text(task)):
        yield


@contextlib.contextmanager
def line(task: str) -> Iterator[None]:
    """Print one line on stderr once the `with` has taken 3 seconds; no output on a terminal."""
    if sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(LINE_AFTER, print, [f"{task} ..."], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _bar(task: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        identifier = bar.add_task(task, total=total)
        yield lambda n: bar.advance(identifier, n)
