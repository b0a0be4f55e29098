"""Long commands end at an interrupt also where SIGINT was ignored on entry, as in a background job of a script."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steerkit.io.signals import restore_interrupt

ROOT = Path(__file__).parents[2]
WAITING = """
import sys, time
if "restore" in sys.argv:
    from steerkit.io.signals import restore_interrupt
    restore_interrupt()
try:
    print("ready", flush=True)
    time.sleep(float(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(7)
"""


def started_with_sigint_ignored(*arguments: str) -> subprocess.Popen[str]:
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", WAITING, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    return process


def test_a_process_with_sigint_ignored_is_interrupted_after_restore_interrupt() -> None:
    with started_with_sigint_ignored("60", "restore") as process:
        assert process.wait(timeout=30) == 7


def test_without_restore_interrupt_the_same_process_ignores_the_interrupt() -> None:
    with started_with_sigint_ignored("1") as process:
        assert process.wait(timeout=30) == 0


@pytest.fixture
def sigint_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_handler_of_the_caller_is_kept(sigint_ignored) -> None:
    def handler(*_: object) -> None: ...

    signal.signal(signal.SIGINT, handler)
    restore_interrupt()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("command", ["training", "training.imad"])
def test_the_training_commands_restore_the_interrupt(command, sigint_ignored, capsys) -> None:
    if command == "training":
        from training.__main__ import main

        main([])
    else:
        pytest.importorskip("trl", reason="the extra `train` is not installed")
        from training.imad import main as imad

        imad(["smollm2", "--dry-run"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
