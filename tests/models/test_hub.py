"""A hub that does not answer is found out at once; the hubs here are ports of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from steerkit.models.hub import offline_options
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
LOADS = """
import time
import steerkit as sk
began = time.monotonic()
print(sk.load("owner/kept")[0].config.num_hidden_layers)
for arguments in ({"checkpoint": "owner/gone"}, {"checkpoint": "owner/kept", "adapter": "owner/gone"}):
    try:
        sk.load(**arguments)
    except (OSError, ValueError) as error:
        print(str(error).splitlines()[0])
print(time.monotonic() - began)
"""


@pytest.fixture
def closed() -> str:
    """The address of a port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_without_a_hub_what_is_kept_here_loads_and_the_rest_is_refused_within_seconds(closed, tmp_path) -> None:
    kept = tmp_path / "hub" / "models--owner--kept"
    snapshot = kept / "snapshots" / ("a" * 40)
    tiny_model().save_pretrained(snapshot)
    tiny_tokenizer().save_pretrained(snapshot)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.endswith("_OFFLINE")}
    environment |= {"HF_ENDPOINT": closed, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOADS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    blocks, checkpoint, adapter, seconds = done.stdout.splitlines()
    assert blocks == "4"
    assert (
        "named owner/gone; the hub does not answer, and this machine keeps no copy of it" in checkpoint
        and "an adapter with safetensors at owner/gone" in adapter
    )
    assert float(seconds) < 60  # the first alone took 165 when the hub was asked for each file
    assert "Retrying" not in done.stderr


def test_a_hub_that_answers_is_asked_and_so_is_one_behind_a_proxy(closed, tmp_path, monkeypatch) -> None:
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert offline_options("owner/name") == {"local_files_only": True}
    assert offline_options(str(tmp_path)) == offline_options("./none") == {}
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert offline_options("owner/name") == {}
    monkeypatch.delenv("http_proxy")
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        assert offline_options("owner/name") == {}
