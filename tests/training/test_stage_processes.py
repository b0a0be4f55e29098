"""Stages under torchrun: processes share debates and test questions, and the first one writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from steerkit.io.tables import read_table
from tests.scripted_server import Scripted
from tests.training.test_documented_stages import by_role
from training import __main__ as commands

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_key_but_the_tests")]
ROOT = Path(__file__).parents[2]
SETTINGS = ("decodings=1", "debates=8", "sampling.max_new_tokens=6", "debate.sampling.max_new_tokens=6")
OF_SETTINGS = [part for setting in SETTINGS for part in ("--set", setting)]
WORK = """
import json, sys
from training.__main__ import main
for call in json.loads(sys.argv[1]):
    assert main(call) == 0
"""


def started(calls: list[list[str]], folder: Path) -> list[str]:
    """Two processes, as torchrun starts them, that run the same commands; what each has printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORK, json.dumps(calls)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in range(2)
    ]
    shown = [child.communicate(timeout=400)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    return shown


def test_two_processes_ask_each_question_once_and_give_the_tables_of_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} + {n}?", "gold": 2 * n} for n in range(24)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert commands.main(["problems", "--run", "one", "--problems", "my.jsonl"]) == 0
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "problems").rename(tmp_path / "two" / "problems")
    with Scripted(by_role, models=[{"id": "MODEL", "root": "MODEL"}]) as server:

        def calls(run: str) -> list[list[str]]:
            common = ["--run", run, "--answerer", server.url, "MODEL", "--cast", "standard", *OF_SETTINGS]
            problems = ["--problems", "two/problems/{}.jsonl"]
            parts = {"debates": "train", "evaluate": "test"}
            own = {"debates": [], "evaluate": ["--samples", "2"]}
            return [[stage, *common, *(part.format(parts[stage]) for part in problems), *own[stage]] for stage in parts]

        first, second = started(calls("two"), tmp_path)
        asked = len(server.calls)
        for call in calls("one"):
            assert commands.main(call) == 0
        assert len(server.calls) == 2 * asked
    assert "debates kept in" in first and "Tables in" in first and second == ""
    logs = sorted(path.name for path in (tmp_path / "two" / "debates").glob("calls*.jsonl"))
    assert logs == ["calls-1.jsonl", "calls.jsonl"]
    for name in ("debates/debates.jsonl", "debates/traces.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    tables = [read_table(tmp_path / run / "evaluation" / "results.csv")[0] for run in ("one", "two")]
    assert tables[0].equals(tables[1])
