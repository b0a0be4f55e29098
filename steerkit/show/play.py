"""A playground: a local page whose sliders steer a live model, three texts streaming side by side.

Needs the extra `play` (Starlette and uvicorn). It listens on this machine only.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn

from steerkit.generation.batches import in_batches
from steerkit.generation.engine import Continuation, Engine, Row
from steerkit.generation.generate import generate
from steerkit.generation.projections import Monitor
from steerkit.generation.sampling import OVERFLOWED, likeliest, random_stream, sample
from steerkit.models.blocks import find_blocks
from steerkit.models.context import context_length
from steerkit.models.ends import ends_of
from steerkit.models.identity import fingerprint
from steerkit.models.model import widest_float
from steerkit.show.pages import environment, inert_json
from steerkit.steering.dose import median_norms, with_coefficients
from steerkit.steering.operations import OPERATIONS
from steerkit.steering.positions import POSITIONS
from steerkit.steering.steering import ADDING, Steering
from steerkit.text.prompt import Prompt, PromptLike, render
from steerkit.text.tokens import decode as decode_ids
from steerkit.vectors.controls import random_like_all
from steerkit.vectors.vector import SteeringVector

MAX_NEW_TOKENS = 512
CONTROL_SEED = 0
"""Seed of the random direction that replaces each vector in the third text."""
NORM_TOKENS = 8
"""New tokens over which the norm is measured after a prompt of one token."""
UNITS = ("coefficient", "dose")
MAX_TEMPERATURE = 5.0
ENDED = -1  # takes the position of a token after the end of a text


class ClientDisconnected(Exception):
    """The browser closed the connection; decoding stops."""


@dataclass(frozen=True)
class GenerationRequest:
    """What the page sends for its three texts.

    Args:
        prompt: the user's message.
        chat: apply the chat template.
        strengths: vector name -> (layer, strength); vectors with strength 0 are left out.
        positions: as for `Steering`.
        operation: as for `Steering`.
        unit: what the strengths are, `"coefficient"` or `"dose"` (of the median norm of the stream over the prompt, at
            the vector's site).
        max_new_tokens: at most `MAX_NEW_TOKENS`.
        temperature: 0 is greedy; all texts draw the same random numbers, those of `sk.generate` with this seed.
        seed: sampling seed.
        watch: vector name and layer whose projections shade the tokens; None for no shading.
    """

    prompt: str
    chat: bool
    strengths: Mapping[str, tuple[int, float]]
    positions: str = "from_last_prompt_token"
    operation: str = "add"
    unit: str = "coefficient"
    max_new_tokens: int = 80
    temperature: float = 0.0
    seed: int = 0
    watch: tuple[str, int] | None = None

    @classmethod
    def from_json(cls, data: Any) -> GenerationRequest:
        """Read a request from the page's JSON.

        Raises:
            ValueError: something is missing or out of range.
        """
        try:
            request = cls(
                prompt=str(data["prompt"]),
                chat=bool(data["chat"]),
                strengths={
                    str(name): (int(layer), float(coefficient))
                    for name, (layer, coefficient) in data["strengths"].items()
                    if float(coefficient)
                },
                positions=str(data["positions"]),
                operation=data["operation"],
                unit=str(data.get("unit", "coefficient")),
                max_new_tokens=int(data["max_new_tokens"]),
                temperature=float(data["temperature"]),
                seed=int(data["seed"]),
                watch=(str(data["watch"][0]), int(data["watch"][1])) if data.get("watch") else None,
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"expected prompt, chat, strengths and settings; got {data!s:.120} ({error!r}). Reload the page."
            ) from error
        if request.unit not in UNITS:
            raise ValueError(f"expected a unit among {UNITS}; got {request.unit!r:.40}. Reload the page.")
        in_range = 1 <= request.max_new_tokens <= MAX_NEW_TOKENS and 0 <= request.temperature <= MAX_TEMPERATURE
        if not request.prompt or not in_range:
            raise ValueError(
                f"expected a prompt, 1 to {MAX_NEW_TOKENS} new tokens and a temperature from 0 to {MAX_TEMPERATURE:g}; "
                f"got {len(request.prompt)} characters, {request.max_new_tokens} and {request.temperature}. "
                "Change the settings."
            )
        return request

    def steerings(self, vectors: Mapping[str, SteeringVector]) -> tuple[Steering, ...]:
        """The steerings of the request; `ValueError` for an unknown vector or layer, or unknown positions.

        `play` has checked that the vectors fit the model.
        """
        self._check(vectors, self.strengths)
        is_dose = self.unit == "dose"
        return tuple(
            Steering(
                vectors[name],
                1.0 if is_dose else strength,
                self.positions,
                self.operation,
                foreign=True,
                layer=layer,
                dose=strength if is_dose else None,
            )
            for name, (layer, strength) in self.strengths.items()
        )

    def watched(self, vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
        """The watched vector with its layer, by name; none without `watch`. `ValueError` as `steerings`."""
        if self.watch is None:
            return {}
        name, layer = self.watch
        self._check(vectors, [name])
        return {name: vectors[name].at(layer)}

    def _check(self, vectors: Mapping[str, SteeringVector], names: Iterable[str]) -> None:
        if unknown := [name for name in names if name not in vectors]:
            raise ValueError(f"expected a vector among {sorted(vectors)}; got {unknown[0]!r}. Reload the page.")


class Texts(NamedTuple):
    """The three texts so far.

    Attributes:
        unsteered: the text without steering.
        steered: the text with it.
        control: the text with a random direction in place of each vector, of the same norm and strength.
        tokens: per text, `(end, projection)` of each token that was read: where it ends in the text, and the projection
            of its stream on the watched direction, after the steering of that layer. The last token is read one step
            later. Empty without `watch`.
    """

    unsteered: str
    steered: str
    control: str
    tokens: tuple[list[tuple[int, float]], ...]


class _Written:
    """The text of a row so far, and where each of its tokens ends in it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text, self.ends, self.ids = tokenizer, "", list[int](), list[int]()

    def extend(self, ids: Sequence[int]) -> None:
        """Decode the tokens that are new. A character that several tokens share belongs to the last of them."""
        if self.ids != list(ids[: len(self.ids)]):  # written again, after a batch did not fit into memory
            self.text, self.ends = "", []
        self.ids = list(ids)
        for count in range(len(self.ends) + 1, len(ids) + 1):
            text = decode_ids(self.tokenizer, ids[:count])
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.text, text, strict=False)))
            self.ends = [*(min(end, same) for end in self.ends), len(text)]
            self.text = text


def stream(
    model: nn.Module,
    tokenizer: Any,
    vectors: Mapping[str, SteeringVector],
    request: GenerationRequest,
    stopped: threading.Event,
) -> Generator[Texts]:
    """Yield the texts so far after each token, with the projections of the tokens; all rows share a batch.

    Args:
        stopped: set it to end the decoding at the next token.

    Raises:
        ValueError: an unknown vector or layer, or a prompt too long; before the first text.
        torch.OutOfMemoryError: one text alone does not fit into memory.
    """
    messages: PromptLike = [{"role": "user", "content": request.prompt}] if request.chat else request.prompt
    prompt = render(tokenizer, messages)
    ids = prompt.ids
    steerings = request.steerings(vectors)
    limit = context_length(model)
    if limit is not None and len(ids) + request.max_new_tokens > limit:
        raise ValueError(
            f"expected prompt and new tokens within the context of {limit}; got {len(ids)} + {request.max_new_tokens}. "
            "Shorten either."
        )
    drawn = random_like_all([one.vector for one in steerings], CONTROL_SEED)
    random = [replace(one, vector=vector) for one, vector in zip(steerings, drawn, strict=True)]
    resolved = with_coefficients([steerings, random], lambda *where: _norms(model, tokenizer, ids, *where))
    rows = [Row(ids), *(Row(ids, one) for one in resolved)]
    watched, ends = request.watched(vectors), ends_of(model, tokenizer)
    uniform = torch.from_numpy(random_stream((request.seed, prompt.text, 0), request.max_new_tokens))
    tokens: list[list[int]] = [[] for _ in rows]
    read: list[list[list[list[float]]]] = [[] for _ in rows]
    progress: queue.Queue[Any] = queue.Queue()  # ids and projections of all rows so far, an exception, or None

    def report() -> None:
        values = [[after for ((_, after),) in row] for row in read]
        progress.put([([id for id in row if id != ENDED], some) for row, some in zip(tokens, values, strict=True)])

    def decode(engine: Engine, numbers: Sequence[int]) -> list[Continuation]:
        monitor = Monitor(watched, len(numbers)) if watched else None
        for place, number in enumerate(numbers):
            tokens[number] = []  # a batch that ran out of memory is repeated
            read[number] = monitor.rows[place] if monitor else []
        choose = _choose(request, uniform, ends, [tokens[number] for number in numbers], report, stopped)
        done = engine.decode(request.max_new_tokens, ends, choose, monitor)
        if monitor:
            report()  # with the last token, which was forwarded after its choice
        return done

    def run() -> None:
        try:
            for _ in in_batches(model, rows, request.max_new_tokens, decode, len(rows)):
                pass
            progress.put(None)
        except Exception as error:  # raised again in the thread that reads the texts
            progress.put(error)

    worker = threading.Thread(target=run, daemon=True)
    written = [_Written(tokenizer) for _ in rows]
    worker.start()
    try:
        while (item := progress.get()) is not None:
            if isinstance(item, ClientDisconnected):
                return
            if isinstance(item, Exception):
                raise item
            for row, (ids_so_far, _) in zip(written, item, strict=True):
                row.extend(ids_so_far)
            shades = [list(zip(row.ends, values, strict=False)) for row, (_, values) in zip(written, item, strict=True)]
            unsteered, steered, control = (row.text for row in written)
            yield Texts(unsteered, steered, control, tuple(shades))
    finally:  # wait until no forward runs through the model's hooks
        stopped.set()
        worker.join()


def _norms(
    model: nn.Module, tokenizer: Any, ids: tuple[int, ...], positions: str, operation: str, site: str
) -> Mapping[int | str, float]:
    """The median norm over the prompt, whatever the positions: nothing is generated before the first text.

    For a prompt of one token, whose position 0 is left out, over the tokens of a short unsteered continuation.
    """
    if norms := median_norms(model, [(ids, ())], None, "prompt", operation, site):
        return norms
    (written,) = generate(
        model, tokenizer, [Prompt.of_ids(tokenizer, ids)], max_new_tokens=NORM_TOKENS, return_details=True
    )
    return median_norms(model, [(ids, written.ids)], None, "from_last_prompt_token", operation, site)


def _choose(
    request: GenerationRequest,
    uniform: torch.Tensor,
    ends: frozenset[int],
    tokens: Sequence[list[int]],
    report: Callable[[], None],
    stopped: threading.Event,
) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """The choice of each next token, which is appended to `tokens` of its row and reported.

    Args:
        uniform: a number in [0, 1) per step, for all rows.
    """

    def choose(logits: torch.Tensor, alive: torch.Tensor, step: int) -> torch.Tensor:
        if stopped.is_set():
            raise ClientDisconnected
        if request.temperature:
            draws = uniform[step].to(logits.device, widest_float(logits.device)).expand(len(alive))
            chosen = sample(logits, draws, request.temperature, 1.0)
        else:
            chosen = likeliest(logits)
        if OVERFLOWED in chosen.tolist():
            raise ValueError("expected finite logits; got NaN or infinity. Move the sliders towards 0.")
        for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
            has_ended = token in ends or tokens[row][-1:] == [ENDED]
            tokens[row].append(ENDED if has_ended else token)
        report()
        return chosen

    return choose


def app(model: nn.Module, tokenizer: Any, vectors: Mapping[str, SteeringVector], host: str) -> Any:
    """The Starlette application: the page, and `POST /stream`, which sends one line of JSON per token.

    Requests that name another host, or lack the page's token, are refused: a web site that is open in the same browser
    could otherwise steer the model.
    """
    import anyio
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    nonce = secrets.token_urlsafe(16)
    token = secrets.token_urlsafe(24)
    facts = {
        "vectors": {name: list(vector.layers) for name, vector in vectors.items()},
        "positions": list(POSITIONS),
        "operations": list(OPERATIONS),
        "units": list(UNITS),
        "dosed": list(ADDING),
        "chat": bool(getattr(tokenizer, "chat_template", None)),
        "max_new_tokens": MAX_NEW_TOKENS,
        "token": token,
    }
    html = environment().get_template("play.html").render(nonce=nonce, facts=inert_json(facts))
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
    one_at_a_time = anyio.Lock()

    async def page(_: Request) -> HTMLResponse:
        headers = {"Content-Security-Policy": policy, "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(html, headers=headers)

    async def texts(http_request: Request) -> Any:
        if not secrets.compare_digest(http_request.headers.get("x-steerkit-token", ""), token):
            return PlainTextResponse("expected a request of this page; got another. Reload the page.", status_code=403)
        try:
            request = GenerationRequest.from_json(await http_request.json())
        except ValueError as error:
            return PlainTextResponse(str(error), status_code=400)

        async def lines() -> AsyncIterator[str]:
            async with one_at_a_time:
                texts = stream(model, tokenizer, vectors, request, threading.Event())
                try:
                    async for shown in iterate_in_threadpool(texts):
                        yield json.dumps(shown._asdict()) + "\n"
                except ValueError as error:
                    yield json.dumps({"error": str(error)}) + "\n"
                except torch.OutOfMemoryError as error:
                    fix = "Shorten the prompt, or lower the number of new tokens."
                    yield json.dumps({"error": f"out of memory: {error} {fix}"}) + "\n"
                finally:
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(texts.close)

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    routes = [Route("/", page), Route("/stream", texts, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[host])])


def play(
    model: nn.Module,
    tokenizer: Any,
    vectors: Mapping[str, SteeringVector],
    port: int = 8765,
    foreign: bool = False,
) -> None:
    """Serve the playground at http://127.0.0.1:PORT until interrupted.

    Args:
        vectors: name -> vector; the page has a slider for each.
        foreign: allow vectors that were read from other weights.

    Raises:
        ValueError: no vector, or one that does not fit the model.
        ModuleNotFoundError: the extra `play` is not installed.

    Example:
        >>> play(model, tokenizer, {"calm": vector})
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the extra `play`; uvicorn is not installed. Run: pip install 'imad-steerkit[play]'"
        ) from error
    if not vectors:
        raise ValueError("expected at least one vector; got none. Pass a file or folder of vectors.")
    blocks, weights = find_blocks(model), fingerprint(model)
    for vector in vectors.values():
        Steering(vector, foreign=foreign, layer="all").check(model, blocks, weights)
    print(f"http://127.0.0.1:{port} (Ctrl-C stops the server)", flush=True)
    uvicorn.run(
        app(model, tokenizer, vectors, "127.0.0.1"),
        host="127.0.0.1",
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )
