"""Progress of long work: a bar on a terminal, a quiet line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

LINE_EVERY = 20.0
LINE_AFTER = 3.0


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. On a terminal a bar on stderr; else a line every 20 seconds, and none for short work."""
    if sys.stderr.isatty():
        with _bar(what, total) as bar:
            yield bar
        return
    began = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            left = (now - began) / done * (total - done)
            print(
                f"{what}: {done} of {total}, {now - began:.0f} s, about {left:.0f} s left", file=sys.stderr, flush=True
            )

    yield advance


@contextlib.contextmanager
def spinner(what: str) -> Iterator[None]:
    """On a terminal a spinner on stderr, also while another stream stands in its place; in a log nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(file=sys.stderr).status(Text(what)):
        yield


@contextlib.contextmanager
def line(what: str) -> Iterator[None]:
    """In a log one line on stderr, once the `with` has taken 3 seconds; on a terminal nothing."""
    if sys.stderr.isatty():
        yield
        return
    late = threading.Timer(LINE_AFTER, print, [f"{what} ..."], {"file": sys.stderr, "flush": True})
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
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
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
