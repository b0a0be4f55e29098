"""A stand-in for vLLM: our own engine behind the plugin's front end (the served folder, the parser), and over HTTP."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

import steerkit as sk
from steerkit.capture.resid import capture_resid
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.models.identity import fingerprint
from steerkit.serving.buffers import COUNTS
from steerkit.serving.folder import Model, VectorFolder, stored_vector
from steerkit.serving.remote import Finished, Remote, Sent
from steerkit.serving.request import Asked, BadRequest, parse_all
from steerkit.vectors.vector import SteeringVector

LOCK = threading.Lock()
"""Fakes may share a model, which is used by one thread at a time."""


class Fake(Remote):
    """An engine that answers as one of vLLM would."""

    capacity = 512

    def __init__(self, model: Any, tokenizer: Any, folder: Path, sums: int = 2) -> None:
        folder.mkdir(exist_ok=True)
        self.own = model
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.eos_token = self.tokenizer.chat_template = None
        about = Model(model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size)
        self.folder = VectorFolder(folder, Model(**{**asdict(about), "fingerprint": fingerprint(model)[0]}))
        self.n_sums = sums
        self.sums: dict[str, dict[str, Any]] = {}
        self.lost: dict[str, int] = {}
        self.requests = 0
        self.replicas = 1

    def listing(self) -> dict[str, Any]:
        model = {
            **asdict(self.folder.model),
            "checkpoint": "fake",
            "dtype": "float32",
            "context": 128,
            "cache_tokens": 256,
            "replicas": self.replicas,
            "vocabulary": 260,
            "ends": [256],
            "device": "cpu",
            "vllm": "0",
        }
        vectors = [asdict(one) for one in self.folder.served().values()]
        return {"model": model, "slots": 4, "capacity": self.capacity, "sums": self.n_sums, "vectors": vectors}

    def put(self, name: str, vector: SteeringVector) -> None:
        path = self.folder.path / f"{name}.safetensors"
        vector.save(path)
        if error := self.folder.served()[name].error:
            path.unlink()
            raise ValueError(error)

    def delete(self, name: str) -> None:
        (self.folder.path / f"{name}.safetensors").unlink()

    def make_room(self, kept: Collection[str], pairs: int) -> None:
        pass

    def complete(self, requests: Sequence[Sent]) -> Iterator[Finished]:
        for number in reversed(range(len(requests))):  # in no particular order
            yield number, self.answer(requests[number])

    def log_probs(self, requests: Sequence[Sent]) -> Iterator[tuple[int, tuple[float, ...]]]:
        for number in reversed(range(len(requests))):
            yield number, self.scored(requests[number])

    def scored(self, one: Sent) -> tuple[float, ...]:
        """Log-probabilities of the last tokens of a prompt, by plain forwards."""
        self.requests += 1
        asked, steerings = self._asked(one)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for steering in steerings:
                stack.enter_context(steering.on(self.own, prompt_length=asked.prompt))
            logits = self.own(input_ids=torch.tensor([one.prompt]), use_cache=False).logits[0]
        logs = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor([one.prompt[1:]]).T)[:, 0]
        return tuple(logs[len(logs) - one.scored :].tolist())

    def _asked(self, one: Sent) -> tuple[Asked, tuple[sk.Steering, ...]]:
        """What a request asks for, checked as the plugin would, and its steerings."""
        asked = parse_all(
            one.extra, self.folder.served(), slots=4, n_prompt=len(one.prompt), n_new=one.count, n_layers=4
        )
        steerings = tuple(
            sk.Steering(
                stored_vector(self.folder.path, push.content), push.coefficient, push.positions, push.operation,
                layer=push.layers,
            )
            for push in asked.pushes
        )  # fmt: skip
        return asked, steerings

    def answer(self, one: Sent) -> tuple[int, ...]:
        """The new token ids; `BadRequest` as the plugin would refuse."""
        self.requests += 1
        asked, steerings = self._asked(one)
        if asked.read is not None:
            self._add_up(one.prompt, asked)
        draw = asked.draw
        options = {} if draw is None else {"temperature": draw.temperature, "top_p": draw.top_p}
        streams = [()] if draw is None else [draw.stream]
        rows = [Row(one.prompt, steerings)]
        ((_, done),) = next(iter(decode(self.own, self.tokenizer, rows, streams, max_new_tokens=one.count, **options)))
        if done.overflowed and draw is not None:
            self.lost[draw.name] = len(done.ids)
        ids = done.all_ids
        stop = next((i for i, token in enumerate(ids) if token in one.stops), len(ids))
        return ids[: stop + 1]

    def _add_up(self, prompt: tuple[int, ...], asked: Asked) -> None:
        read = asked.read
        assert read is not None
        with torch.no_grad(), capture_resid(self.own) as streams:
            self.own(input_ids=torch.tensor([prompt]), use_cache=False)
        if read.each:
            norms = [streams[layer][0, read.start : read.stop].double().norm(dim=-1).tolist() for layer in range(4)]
            self.sums[read.key] = {"norms": norms}
            return
        zero = {
            "sum": torch.zeros(4, 32, dtype=torch.float64),
            "norm": torch.zeros(4, dtype=torch.float64),
            "tokens": 0,
        }
        total = self.sums.setdefault(read.key, zero)
        for layer in read.layers:
            part = streams[layer][0, read.start : read.stop].double()
            total["sum"][layer] += read.weight * part.sum(0)
            total["norm"][layer] += read.weight * part.norm(dim=-1).sum()
        total["tokens"] += read.stop - read.start

    def call(self, name: str, argument: Any) -> list[Any]:
        if name == "counts":
            return [dict.fromkeys(COUNTS, self.requests)]
        if name == "overflowed":
            return [{key: self.lost.pop(key) for key in argument if key in self.lost}]
        found = {key: self.sums.pop(key) for key in argument if key in self.sums}
        return [
            {
                k: {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in one.items()}
                for k, one in found.items()
            }
        ]


def answered(fake: Fake, method: str, path: str, data: bytes) -> Any:
    """What a server of this engine answers, as JSON."""
    name = path.rsplit("/")[-1]
    if method == "GET":
        return {"data": [{"id": "fake"}]} if name == "models" else fake.listing()
    if method == "DELETE":
        return fake.delete(name) or {}
    if method == "PUT":
        file = fake.folder.path / f".{name}.safetensors"
        file.write_bytes(data)
        vector = SteeringVector.load(file)
        file.unlink()
        return fake.put(name, vector) or {}
    body = json.loads(data)
    if name != "completions":
        return {"answers": fake.call(name, body)}
    given = body.get("vllm_xargs", {})
    extra = {key: json.loads(value) if isinstance(value, str) else value for key, value in given.items()}
    sent = Sent(tuple(body["prompt"]), body["max_tokens"], tuple(body["stop_token_ids"]), extra)
    if "prompt_logprobs" in body:
        count = len(sent.prompt) - 1
        values = fake.scored(Sent(sent.prompt, sent.count, (), extra, scored=count))
        entries = [{str(token): {"logprob": x, "rank": 1}} for token, x in zip(sent.prompt[1:], values, strict=True)]
        return {"choices": [{"token_ids": [0], "prompt_logprobs": [None, *entries]}]}
    return {"choices": [{"token_ids": list(fake.answer(sent))}]}


@contextlib.contextmanager
def over_http(
    fake: Fake, key: str | None = None, before: Callable[[str], str | None] = lambda path: None
) -> Iterator[str]:
    """The address of a server of this engine inside the `with`.

    Args:
        fake: the engine.
        key: what clients must send.
        before: called with each path; "drop" closes the connection, "busy" answers 503.
    """

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind, given = before(self.path), self.headers.get("Authorization")
            status, found = 200, None
            if kind == "drop":
                self.close_connection = True
                return
            if key is not None and given != f"Bearer {key}":
                status, found = 401, {"error": {"message": f"no such key: {given}"}}
            elif kind == "busy":
                status = 503
            elif not self.path.startswith("/v1/"):
                status = 404
            else:
                try:
                    with LOCK:
                        found = answered(fake, self.command, self.path, data)
                except (BadRequest, ValueError) as error:
                    status, found = 400, {"error": {"message": str(error)}}
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(json.dumps(found).encode())

        do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815  names of the standard library

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
