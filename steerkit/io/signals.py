"""Signals: make long commands interruptible also when they were started in the background."""

from __future__ import annotations

import signal


def restore_interrupt() -> None:
    """Install Python's default SIGINT handler where SIGINT was ignored on entry, as in a background job of a script."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
