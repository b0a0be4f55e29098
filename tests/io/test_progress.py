"""What long work shows: a line in a log, something that moves on a terminal, and neither among the results."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steerkit.cli.main import main
from steerkit.io import progress
from steerkit.io.progress import line, spinner
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
SPINNING = """
import contextlib, io, sys, time
from steerkit.io import progress
with progress.spinner("loading m"), progress.line("loading m"), contextlib.redirect_stderr(io.StringIO()):
    time.sleep(1)
print("steerkit: refused", file=sys.stderr)
"""


def test_a_log_has_one_line_of_what_takes_long_and_none_of_what_does_not(monkeypatch, capsys) -> None:
    with spinner("loading m"), line("loading m"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_AFTER", 0.01)
    with spinner("loading m"), line("loading m"), contextlib.redirect_stderr(io.StringIO()):
        time.sleep(0.5)
    assert capsys.readouterr().err == "loading m ...\n"


def of_a_terminal(code: str) -> bytes:
    """What a program writes to a terminal as its stderr."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal that was closed ends
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    return shown


SLOW = """
import time
from steerkit.io.progress import progress
real = time.monotonic
slow = lambda: 60 * real()  # rich's clock: a batch of 1.5 s takes 90 s
import rich.progress
rich.progress.Progress.__init__.__kwdefaults__["get_time"] = slow
with progress("sweep", 8) as advance:
    for n in (1, 1):
        time.sleep(1.5)
        advance(n)
    time.sleep(0.5)
"""


def test_a_terminal_estimates_the_rest_also_where_a_batch_takes_longer_than_half_a_minute() -> None:
    shown = of_a_terminal(SLOW).decode()
    minutes = [int(found) for found in re.findall(r"about 0:(\d\d):\d\d left", shown)]
    assert "1/8" in shown and "2/8" in shown
    assert minutes and 10 <= minutes[0] < 40  # 7 batches of 90 s, and the load of the machine


def test_a_log_estimates_the_rest_from_the_first_unit_on(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.progress("sweep", 4) as advance:
        advance(0)
        time.sleep(0.5)
        advance(1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "sweep: 0 of 4, 0 s"
    assert re.fullmatch(r"sweep: 1 of 4, [01] s, about [12] s left", second)
    assert progress.remaining(90, 3, 12) == 270


def test_a_terminal_has_a_spinner_that_turns_while_another_stream_stands_in_and_then_goes() -> None:
    shown = of_a_terminal(SPINNING)
    frames = {
        frame for frame in "\u280b\u2819\u2839\u2838\u283c\u2834\u2826\u2827\u2807\u280f" if frame.encode() in shown
    }
    assert len(frames) > 2 and b"loading m" in shown and b"loading m ..." not in shown
    assert shown.decode().splitlines()[-1].endswith("steerkit: refused")


def test_a_command_that_loads_long_says_so_and_prints_nothing_but_json_on_stdout(tmp_path, monkeypatch, capsys) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()  # transformers shows a bar when it saves
    monkeypatch.setattr(progress, "LINE_AFTER", 0.0)
    monkeypatch.setattr(sys, "argv", ["steerkit", "inspect", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    assert left.value.code == 0 and json.loads(shown.out)["n_layers"] == 4
    assert shown.err == f"loading {tmp_path} ...\n"
