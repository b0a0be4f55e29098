"""Processes that share requests give the replies of one process, and each answers its part only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from training.debates.answerers import Request, Rule, Sampling
from training.debates.shared import Shared

ROOT = Path(__file__).parents[2]
WORK = """
import json, os, sys
from dataclasses import asdict
from training.debates.answerers import Request, Rule, Sampling
from training.debates.shared import Shared
asked = []
rule = Rule(lambda request, rng: (asked.append(request.id), f"{request.prompt} {rng.random()}")[1])
requests = [Request(f"q{i}", f"question {i}") for i in range(5)]
replies = sorted((asdict(reply) for reply in Shared(rule)(requests, Sampling())), key=lambda reply: reply["id"])
none = list(Shared(rule)(requests[:1], Sampling()))
print(json.dumps({"replies": replies, "asked": asked, "one": len(none)}))
"""


def test_two_processes_answer_half_of_the_requests_each_and_receive_all_replies() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=200)[0].splitlines()[-1]) for process in started)
    assert first["replies"] == second["replies"]
    assert first["asked"] == ["q0", "q2", "q4", "q0"] and second["asked"] == ["q1", "q3"]
    assert first["one"] == second["one"] == 1
    rule = Rule(lambda request, rng: f"{request.prompt} {rng.random()}")
    requests = [Request(f"q{i}", f"question {i}") for i in range(5)]
    alone = {reply.id: reply.text for reply in rule(requests, Sampling())}
    assert {reply["id"]: reply["text"] for reply in first["replies"]} == alone


def test_one_process_alone_answers_every_request() -> None:
    rule = Rule(lambda request, rng: str(request.prompt))
    requests = [Request("a", "x"), Request("b", "y")]
    assert [reply.text for reply in Shared(rule)(requests, Sampling())] == ["x", "y"]
    assert Shared(rule).about() == rule.about()
