"""The command `serve`."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from steerkit.cli.inputs import check_checkpoint, check_port
from steerkit.cli.options import Checkpoint
from steerkit.show.terminal import hint

CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PLUGINS = ("steerkit", "steerkit_http")


def serve(
    checkpoint: Checkpoint,
    vectors: Annotated[Path, typer.Option(help="Folder of the vectors that requests may ask for.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients; default: that of its folder.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key that clients must send.", envvar="STEERKIT_API_KEY")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Largest number of vectors of a request at one layer.")] = 4,
    capacity: Annotated[int, typer.Option(min=1, help="Largest number of served (vector, layer) pairs.")] = 512,
    sums: Annotated[int, typer.Option(min=0, help="Largest number of means of the stream read at a time.")] = 4,
    foreign: Annotated[bool, typer.Option(help="Also serve vectors that were read from other weights.")] = False,
    engine: Annotated[
        list[str] | None, typer.Option(help="A further option of vLLM, e.g. --engine=--max-model-len=2048; repeatable.")
    ] = None,
) -> None:
    """Serve a model by vLLM, steered per request.

    The server speaks the OpenAI API.

    A request asks for a vector in `vllm_xargs`, e.g.
    {"steerkit": "{\\"vector\\": \\"cheerful\\", \\"layer\\": 14, \\"coefficient\\": 2}"}.

    Example: steerkit serve CHECKPOINT --vectors runs/vectors
    """
    check_checkpoint(checkpoint)
    if find_spec("vllm") is None:
        raise ImportError("expected vLLM in this environment; it is not installed. See docs/serving.md.")
    if not vectors.is_dir():
        raise ValueError(f"expected a folder of vectors; got {str(vectors)!r}, which is none. Make it.")
    from steerkit.serving.checkpoint import check_hub, checkpoint_folder, fingerprint_of_folder

    if host not in LOOPBACK and not api_key:
        raise ValueError(
            f"expected --api-key for a server that other machines reach, at {host}; got none: anybody could add and "
            "remove vectors. Pass a key, or --host 127.0.0.1."
        )
    check_port(host, port)
    folder = checkpoint_folder(checkpoint, Path("runs/checkpoints"))
    if Path(folder).is_dir():
        fingerprint = fingerprint_of_folder(Path(folder))
    else:
        check_hub(str(folder))
        fingerprint = None
    if fingerprint is None:
        hint("The weights of this checkpoint have no fingerprint: vectors of other weights are not refused.", False)
    settings = {
        "vectors": str(vectors.resolve()),
        "slots": slots,
        "capacity": capacity,
        "sums": sums,
        "foreign": foreign,
        "fingerprint": fingerprint,
    }
    environment = {**CPU, **os.environ}
    known = [one for one in environment.get("VLLM_PLUGINS", "").split(",") if one]
    environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*known, *PLUGINS]))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", host, "--port", str(port), "--served-model-name", name or Path(str(folder)).name]
    command += ["--generation-config", "vllm"]  # no penalties of the checkpoint, as without a server
    command += ["--additional-config", json.dumps({"steerkit": settings})]
    if api_key:
        environment["VLLM_API_KEY"] = api_key  # an argument could be read in the list of processes
    os.execve(sys.executable, [*command, *(engine or [])], environment)
