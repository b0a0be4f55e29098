"""`transformers serve` on the loopback: a real OpenAI-compatible server for tests and for `make test-lab`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 300
"""Seconds for the start of the server."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of the checkpoint in a folder, inside the `with`.

    Raises:
        RuntimeError: the server ended, or did not start within `START_S`; with its output.
    """
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        late = threading.Timer(START_S, process.kill)
        late.start()
        rest = threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True)
        lines: list[str] = []
        try:
            for line in process.stderr or ():
                lines.append(line)
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    late.cancel()
                    rest.start()  # so that the pipe does not fill
                    yield found[1]
                    return
            raise RuntimeError("expected transformers serve to start; it ended:\n" + "".join(lines))
        finally:
            late.cancel()
            process.terminate()
            if rest.ident is not None:
                rest.join()
