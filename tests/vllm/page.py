"""The commands and the code of docs/serving.md, run as they are written.

Run by `python -m pytest tests/vllm/page.py` in the environment of vLLM. Three things differ from the page:
`make serve-env` does nothing, since it has run; the server is started in the background; the task of
lm-evaluation-harness is a local one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.http import CHOICE, QUESTIONS, post
from tests.vllm.live import Live
from tests.vllm.modes import ENVIRONMENT

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SETUP, CURL, HARNESSES = (text for language, text in BLOCKS if language == "bash")
CLIENT, SWEEP, OFFLINE = (text for language, text in BLOCKS if language == "python")
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import includes

@task
def capitals():
    return Task(dataset=MemoryDataset([Sample(input="Name the capital of France.", target="Paris")]), scorer=includes())
"""


def bash(text: str, folder: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    command = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **more)


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[tuple[Path, Live]]:
    """The page's first block has run in a folder, and its server answers."""
    with socket.socket() as one:
        if one.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000 of the page is taken on this machine")
    folder = tmp_path_factory.mktemp("page")
    (folder / ".venv-vllm").symlink_to(sys.prefix)
    *lines, server = SETUP.rstrip().splitlines()
    assert " serve " in server
    done = bash("make() { [ $1 = serve-env ]; }\n" + "\n".join(lines) + '\necho "CHECKPOINT=$CHECKPOINT"', folder)
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = re.search(r"CHECKPOINT=(.*)", done.stdout)
    assert checkpoint is not None
    environment = {**os.environ, **ENVIRONMENT, "CHECKPOINT": checkpoint[1]}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {server}"],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    live = Live(folder, folder / "runs" / "served", log, port=8000, process=process)  # type: ignore[arg-type]
    try:
        live.wait()
        yield folder, live
    finally:
        live.kill()


def test_curl_and_the_openai_client_give_the_same_steered_answer(started, capsys) -> None:
    folder, live = started
    done = bash(CURL, folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    exec(CLIENT, {})
    printed = capsys.readouterr().out.removesuffix("\n")
    sent = json.loads(CURL[CURL.index("-d '") + 4 : CURL.rindex("'")])
    plain = post(live, "/v1/chat/completions", {k: v for k, v in sent.items() if k != "vllm_xargs"})[1]
    assert printed == answer != plain["choices"][0]["message"]["content"]


def test_the_sweeps_of_the_page_agree(started, monkeypatch) -> None:
    monkeypatch.chdir(started[0])
    names: dict[str, Any] = {}
    exec(SWEEP, names)
    served = names["result"].table
    assert (started[0] / "runs" / "sweep" / "rows.jsonl").exists()
    exec(OFFLINE, names)
    assert list(names["result"].table["text"]) == list(served["text"])
    assert served["text"].nunique() > 2


def test_the_commands_of_the_harnesses_run(started) -> None:
    folder, _ = started
    (folder / "task.py").write_text(TASK)
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "choice.yaml").write_text(CHOICE.format(file=folder / "q.jsonl"))
    inspect, harness = re.split(r"\n(?=python )", HARNESSES.rstrip())
    done = bash(inspect + " --display none", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((folder / "logs").iterdir())
    done = bash(harness.replace("hellaswag", f"local_choice --include_path {folder}"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "local_choice" in done.stdout
