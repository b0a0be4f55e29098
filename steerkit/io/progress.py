"""Progress of long work: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

LINE_EVERY = 20.0  # seconds between two lines of `progress` in a log
LINE_AFTER = 3.0  # seconds until `line` prints


@contextlib.contextmanager
def progress(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, which reports that `n` more of `total` units are done, on stderr.

    Both show an estimate of the rest: the time per finished unit times the units that are left. A terminal has it with
    a bar, from the first unit on. A log gets a line every 20 seconds, and none for short work.

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
            left = f", about {rest:.0f} s left" if (rest := remaining(now - started, done, total)) is not None else ""
            print(f"{task}: {done} of {total}, {now - started:.0f} s{left}", file=sys.stderr, flush=True)

    yield advance


def remaining(elapsed: float, done: float, total: float) -> float | None:
    """Seconds for the rest, if a unit takes as long as those that are done; None before the first one."""
    return elapsed / done * (total - done) if done else None


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
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Remaining(ProgressColumn):
        """rich's own column keeps samples of 30 seconds: it has no estimate where a batch takes longer."""

        def render(self, task: Task) -> Text:
            rest = remaining(task.elapsed or 0.0, task.completed, task.total or 0.0)
            return Text("" if rest is None else f"about {timedelta(seconds=round(rest))} left")

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        identifier = bar.add_task(task, total=total)
        yield lambda n: bar.advance(identifier, n)
