"""A live server for tests: `steerkit serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.vllm.modes import ENVIRONMENT

READY_S = 600


@dataclass
class Live:
    """A server.

    Args:
        checkpoint: folder of the model.
        vectors: folder of the served vectors.
        options: further options of `steerkit serve`.
        log: file that its output goes to.
        port: where it listens.
    """

    checkpoint: Path
    vectors: Path
    log: Path
    options: Sequence[str] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        """Start it, at the same port as before, and wait until it answers."""
        self.port = self.port or free_port()
        command = [sys.executable, "-m", "steerkit.cli", "serve", str(self.checkpoint), "--vectors", str(self.vectors)]
        command += ["--port", str(self.port), *self.options]
        environment = {**os.environ, **ENVIRONMENT}
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it answers; `RuntimeError` if it ends before or takes too long."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=5):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start: {self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """End it and its workers at once, as a power cut would."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def serving(checkpoint: Path, vectors: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Live]:
    """A server inside the `with`."""
    live = Live(checkpoint, vectors, log, options)
    try:
        live.start()
        yield live
    finally:
        live.kill()
