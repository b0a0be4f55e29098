"""What long work shows: a line in a log, something that moves on a terminal, and neither among the results."""

from __future__ import annotations

import contextlib
import io
import json
import os
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


def test_a_terminal_has_a_spinner_that_turns_while_another_stream_stands_in_and_then_goes() -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", SPINNING], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal that was closed ends
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
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
