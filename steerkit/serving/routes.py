"""HTTP routes beside the OpenAI API: which vectors are served, and adding and removing them while the server runs.

Entry point `vllm.endpoint_plugins`; vLLM loads it only where `VLLM_PLUGINS` names it, as `steerkit serve` does. The
routes begin with `/v1`, so the server's API key guards them like its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerkit.serving.folder import NAME, VectorFolder, vector_files
from steerkit.serving.plugin import Settings, folder_of_config, listing_of

PATH = "/v1/steering/vectors"
WITHOUT = "expected an engine that steers; this one was started without. Start it by `steerkit serve`."
QUESTIONS = ("sums", "overflowed", "counts")
LARGEST = 2**28
"""Largest vector file that is taken over HTTP, in bytes."""


class SteeringRoutes:
    """The plugin object that vLLM asks for: attaches the routes and gets the engine's configuration."""

    name = "steerkit_http"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the routes to the server."""

        async def listed(request: Any) -> Any:
            return _answer(request, _Known.listing)

        async def put(request: Any) -> Any:
            name, data = request.path_params["name"], await _body(request)
            return await asyncio.to_thread(_answer, request, lambda known: _put(known, name, data))

        async def delete(request: Any) -> Any:
            def removed(known: _Known) -> dict[str, Any]:
                _delete(known, request.path_params["name"])
                return known.listing()

            return _answer(request, removed)

        async def ask(request: Any) -> Any:
            return await _ask(request, request.path_params["name"], await _body(request))

        app.add_route(PATH, listed, methods=["GET"])
        app.add_route(PATH + "/{name}", put, methods=["PUT"])
        app.add_route(PATH + "/{name}", delete, methods=["DELETE"])
        app.add_route("/v1/steering/{name}", ask, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the served folder of the engine; None where it was started without steering."""
        config = getattr(engine_client, "vllm_config", None)
        settings = Settings.of(config) if config is not None else None
        state.steerkit = None if settings is None else _Known(config, folder_of_config(config, settings), settings)
        state.steerkit_engine = engine_client


@dataclass(frozen=True)
class _Known:
    """What a server that steers knows of itself."""

    config: Any
    folder: VectorFolder
    settings: Settings

    def listing(self) -> dict[str, Any]:
        return listing_of(self.config, self.folder, self.settings)


class BadUpload(ValueError):
    """A vector that cannot be added or removed."""

    status = 400


class NotServed(BadUpload):
    """No vector has this name."""

    status = 404


def _answer(request: Any, work: Any) -> Any:
    from fastapi.responses import JSONResponse

    known = getattr(request.app.state, "steerkit", None)
    if known is None:
        return JSONResponse({"error": {"message": WITHOUT}}, status_code=404)
    try:
        return JSONResponse(work(known))
    except BadUpload as error:
        return JSONResponse({"error": {"message": str(error)}}, status_code=error.status)


async def _ask(request: Any, name: str, data: bytes | None) -> Any:
    """What the workers answer to `sums`, `overflowed` or `counts`."""
    from fastapi.responses import JSONResponse

    if getattr(request.app.state, "steerkit", None) is None:
        return JSONResponse({"error": {"message": WITHOUT}}, status_code=404)
    try:
        argument = json.loads(data or b"null")
    except ValueError:
        argument = None
    texts = isinstance(argument, list) and all(isinstance(one, str) for one in argument)
    if name not in QUESTIONS or (name != "counts" and not texts):
        message = f"expected one of {QUESTIONS} with a list of texts; got {name!r:.80}. Correct it."
        return JSONResponse({"error": {"message": message}}, status_code=400)
    arguments = () if name == "counts" else (argument,)
    answers = await request.app.state.steerkit_engine.collective_rpc(f"steerkit_{name}", args=arguments)
    return JSONResponse({"answers": answers[:1]})  # all workers of an engine have the same


async def _body(request: Any) -> bytes | None:
    """The request's body; None where it is too large, which is found out before it is in memory."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > LARGEST:
            return None
    return bytes(data)


def _put(known: _Known, name: str, data: bytes | None) -> dict[str, Any]:
    """Add a vector file under a name; a bad one is refused and leaves nothing behind."""
    folder, settings = known.folder, known.settings
    _check_name(name)
    if data is None:
        raise BadUpload(f"expected a vector file of at most {LARGEST} bytes; got a larger one. Put it into the folder.")
    target = folder.path / f"{name}.safetensors"
    if others := [path.name for path in _files_of(folder, name) if path != target]:
        raise BadUpload(
            f"expected a name that no other file has; {others} have {name!r}. Remove it, or rename the vector."
        )
    with tempfile.TemporaryDirectory(dir=folder.path, prefix=".") as trial:
        (Path(trial) / target.name).write_bytes(data)
        tried = VectorFolder(Path(trial), folder.model, folder.foreign, settings.capacity).served()
        one = tried.get(name)
        if one is None or one.error:
            reason = one.error if one is not None else "it holds several vectors"
            reason = reason.replace(f"{trial}/", "").rstrip(".")
            raise BadUpload(f"expected a vector that fits the served model; {name!r}: {reason}. Send another file.")
        total = len(one.layers) + sum(len(other.layers) for key, other in folder.served().items() if key != name)
        if total > settings.capacity:
            raise BadUpload(
                f"expected at most {settings.capacity} pairs of vector and layer; this would make {total}. Remove a "
                "vector, or start the server with a larger capacity."
            )
        os.replace(Path(trial) / target.name, target)
    return asdict(folder.served()[name])


def _delete(known: _Known, name: str) -> None:
    """Remove a vector; requests that are running keep it."""
    _check_name(name)
    folder = known.folder
    if not (files := _files_of(folder, name)):
        raise NotServed(f"expected a served vector among {sorted(folder.served())}; got {name!r}. Name one of these.")
    for path in files:
        path.unlink(missing_ok=True)


def _files_of(folder: VectorFolder, name: str) -> list[Path]:
    return [path for path in map(Path, vector_files(folder.path)) if path.stem == name]


def _check_name(name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise BadUpload(f"expected a name of letters, digits, '.', '_' and '-'; got {name!r:.80}. Rename the vector.")
