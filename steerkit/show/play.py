"""A playground: a local page whose sliders steer a live model, both texts streaming side by side.

Needs the extra `play` (Starlette and uvicorn). It listens on this machine only.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import AsyncIterator, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steerkit.generation.engine import Continuation, Engine, Row, in_batches
from steerkit.generation.generate import ends_of
from steerkit.generation.sampling import likeliest, random_stream, sample
from steerkit.models.blocks import find_blocks
from steerkit.models.context import context_length
from steerkit.steering.positions import POSITIONS
from steerkit.steering.steering import Steering
from steerkit.text.prompt import Prompt, encode_prompt
from steerkit.vectors.vector import SteeringVector

PAGE = Path(__file__).parent / "templates" / "play.html"
MOST = 512


class Stopped(Exception):
    """Nobody listens any more."""


@dataclass(frozen=True)
class Wish:
    """What the page asks for.

    Args:
        prompt: what the user says; through the chat template where there is one and `chat` is true.
        pushes: vector name -> (layer, coefficient); coefficient 0 is left out.
        positions: as for `Steering`.
        max_new_tokens: at most `MOST`.
        temperature: 0 is greedy; both texts draw the same random numbers.
        seed: of these.
    """

    prompt: str
    chat: bool
    pushes: Mapping[str, tuple[int, float]]
    positions: str = "from_last_prompt_token"
    max_new_tokens: int = 80
    temperature: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, data: Any) -> Wish:
        """From the page's JSON.

        Raises:
            ValueError: something is missing or out of range.
        """
        try:
            pushes = {str(name): (int(layer), float(c)) for name, (layer, c) in data["pushes"].items() if float(c)}
            wish = cls(
                str(data["prompt"]), bool(data["chat"]), pushes, str(data["positions"]), int(data["max_new_tokens"]),
                float(data["temperature"]), int(data["seed"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"expected prompt, chat, pushes and settings; got {data!s:.120} ({error}).") from error
        if not wish.prompt or not 1 <= wish.max_new_tokens <= MOST or not 0 <= wish.temperature <= 5:
            raise ValueError(
                f"expected a prompt, 1 to {MOST} new tokens and a temperature from 0 to 5; got {len(wish.prompt)} "
                f"characters, {wish.max_new_tokens} and {wish.temperature}."
            )
        return wish


def stream(
    model: nn.Module, tokenizer: Any, vectors: Mapping[str, SteeringVector], wish: Wish, stopped: threading.Event
) -> Generator[tuple[str, str]]:
    """`(unsteered, steered)` texts so far, after each token; both rows share a batch.

    Raises:
        ValueError: an unknown vector or layer, or a prompt too long; before the first text.
    """
    steerings = []
    for name, (layer, coefficient) in wish.pushes.items():
        if name not in vectors:
            raise ValueError(f"expected a vector among {sorted(vectors)}; got {name!r}.")
        steerings.append(Steering(vectors[name], coefficient, wish.positions, foreign=True, layer=layer))
    asked: Prompt = [{"role": "user", "content": wish.prompt}] if wish.chat else wish.prompt
    ids = encode_prompt(tokenizer, asked)
    limit = context_length(model)
    if limit is not None and len(ids) + wish.max_new_tokens > limit:
        raise ValueError(f"expected prompt and new tokens within {limit}; got {len(ids)} + {wish.max_new_tokens}.")
    rows = [Row(ids), Row(ids, tuple(steerings))]
    ends = ends_of(model, tokenizer)
    uniform = torch.from_numpy(random_stream((wish.seed, wish.prompt, 0), wish.max_new_tokens)).float()
    news: list[list[int]] = [[], []]
    found: queue.Queue[Any] = queue.Queue()

    def choose(logits: torch.Tensor, alive: torch.Tensor, step: int) -> torch.Tensor:
        if stopped.is_set():
            raise Stopped
        if wish.temperature:
            chosen = sample(logits, uniform[step].expand(len(alive)).to(logits.device), wish.temperature, 1.0)
        else:
            chosen = likeliest(logits)
        for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
            if token not in ends and not (news[row] and news[row][-1] < 0):
                news[row].append(token)
            else:
                news[row].append(-1)
        found.put([[token for token in row if token >= 0] for row in news])
        return chosen

    def work(engine: Engine, numbers: Any) -> list[Continuation]:
        return engine.decode(wish.max_new_tokens, ends, choose)

    def run() -> None:
        try:
            for _ in in_batches(model, rows, wish.max_new_tokens, work, 2):
                pass
            found.put(None)
        except Exception as error:  # it is raised again where the texts are read
            found.put(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, Stopped):
                return
            if isinstance(item, Exception):
                raise item
            unsteered, steered = (tokenizer.decode(row, skip_special_tokens=True) for row in item)
            yield unsteered, steered
    finally:  # the model is free again only when nothing runs through its hooks
        stopped.set()
        worker.join()


def app(model: nn.Module, tokenizer: Any, vectors: Mapping[str, SteeringVector], host: str) -> Any:
    """The page, and `POST /stream`: a line of JSON per token.

    Requests that name another host, or come from another page, are refused: a web site that is open in the same browser
    could else steer the model.
    """
    import anyio
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    layers = list(find_blocks(model).modules)
    facts = {
        "layers": layers,
        "vectors": {name: {str(k): n for k, n in vector.norms().items()} for name, vector in vectors.items()},
        "positions": list(POSITIONS),
        "chat": bool(getattr(tokenizer, "chat_template", None)),
        "most": MOST,
    }
    nonce, token = secrets.token_urlsafe(16), secrets.token_urlsafe(24)
    data = json.dumps({**facts, "token": token}).replace("<", "\\u003c")
    html = PAGE.read_text(encoding="utf-8").replace("{{ nonce }}", nonce).replace("{{ data }}", data)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
    one_at_a_time = anyio.Lock()

    async def page(_: Request) -> HTMLResponse:
        headers = {"Content-Security-Policy": policy, "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(html, headers=headers)

    async def texts(request: Request) -> Any:
        if not secrets.compare_digest(request.headers.get("x-steerkit-token", ""), token):
            return PlainTextResponse("expected a request of the page itself; open it anew.", status_code=403)
        try:
            wish = Wish.of(await request.json())
        except ValueError as error:
            return PlainTextResponse(str(error), status_code=400)

        async def lines() -> AsyncIterator[str]:
            async with one_at_a_time:
                texts = stream(model, tokenizer, vectors, wish, threading.Event())
                try:
                    async for unsteered, steered in iterate_in_threadpool(texts):
                        yield json.dumps({"unsteered": unsteered, "steered": steered}) + "\n"
                except ValueError as error:
                    yield json.dumps({"error": str(error)}) + "\n"
                finally:
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(texts.close)

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    routes = [Route("/", page), Route("/stream", texts, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[host])])


def play(model: nn.Module, tokenizer: Any, vectors: Mapping[str, SteeringVector], port: int = 8765) -> None:
    """Serve the playground at http://127.0.0.1:PORT until interrupted.

    Raises:
        ValueError: no vector, or one that does not fit the model.
        ModuleNotFoundError: the extra `play` is not installed.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the playground needs `pip install 'imad-steerkit[play]'`") from error
    if not vectors:
        raise ValueError("expected one vector at least to play with; got none.")
    blocks = find_blocks(model)
    for name, vector in vectors.items():
        if vector.d_model != blocks.d_model or not set(vector.layers) <= set(blocks.modules):
            raise ValueError(
                f"expected vectors of width {blocks.d_model} at layers below {len(blocks)}; {name!r} is {vector}."
            )
    print(f"http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    uvicorn.run(
        app(model, tokenizer, vectors, "127.0.0.1"), host="127.0.0.1", port=port, log_level="warning",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
