"""Server: one or several servers that `steerkit serve` has started, for sweeps, capture and the doctor."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from steerkit.io.http import RETRYABLE, Connections, Failure, checked_url, read_key
from steerkit.serving.remote import BY_CONTENT, Finished, Remote, Sent
from steerkit.vectors.vector import SteeringVector

PATH = "/steering/vectors"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0


class ServerError(RuntimeError):
    """A server refused a request, or gave no answer in the time that was granted."""


FIRST_PATIENCE_S = 5.0
"""Seconds for which a server that has not answered yet is tried: a job that is under way has more."""


class Server(Remote):
    """Servers of one model, which share a job's rows.

    A connection that is lost is tried again for `patience_s` seconds: a server that is restarted in the middle of a job
    goes on with it. The vectors that the jobs of this object put on the servers are removed when there is no room for
    new ones; those of earlier processes stay until `clear`. Vectors that you `put` yourself stay.

    Args:
        urls: one address or several, e.g. `http://127.0.0.1:8000`; `/v1` is added if there is no path.
        api_key_env: environment variable with the key; no key is sent if it is unset or this is None.
        concurrency: largest number of requests at a time on each server.
        timeout_s: seconds for one request.
        patience_s: seconds for which a server that does not answer any more is tried; one that has not answered yet
            is tried for 5 seconds at most.
        key_over_plain_http: send the key unencrypted to another machine.

    Raises:
        ValueError: an invalid address, or servers of different models.
        ServerError: a server that does not steer: it has no route for vectors.

    Example:
        >>> engine = sk.serving.Server("http://127.0.0.1:8000")
        >>> [one["name"] for one in engine.listing()["vectors"]]
        ['cheerful']
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        api_key_env: str | None = "STEERKIT_API_KEY",
        concurrency: int = 128,
        timeout_s: float = 600.0,
        patience_s: float = 300.0,
        key_over_plain_http: bool = False,
    ) -> None:
        self.urls = tuple(checked_url(url) for url in ([urls] if isinstance(urls, str) else urls))
        if not self.urls or concurrency < 1 or timeout_s <= 0 or patience_s < 0:
            raise ValueError("expected an address, and numbers above 0; got others. Correct them.")
        self.concurrency, self.timeout_s, self.patience_s = concurrency, timeout_s, patience_s
        self._has_answered = False
        self._of_jobs: dict[str, int] = {}
        self._keys = {url: read_key(api_key_env, url, key_over_plain_http) for url in self.urls}
        models = [self._json(url, "GET", PATH)["model"] for url in self.urls]
        same = ("model_type", "n_layers", "d_model", "fingerprint", "dtype")
        if len({tuple(one[key] for key in same) for one in models}) > 1:
            raise ValueError(f"expected servers of one model; got {models}. Pass those of one.")
        self._model = models[0]
        self._names = {url: self._json(url, "GET", "/models")["data"][0]["id"] for url in self.urls}

    def listing(self) -> dict[str, Any]:
        """See `Remote`; of several servers the vectors that all of them serve."""
        every = [self._json(url, "GET", PATH) for url in self.urls]
        common = set.intersection(*({one["name"] for one in found["vectors"]} for found in every))
        first: dict[str, Any] = every[0]
        vectors = [one for one in first["vectors"] if one["name"] in common]
        return {**first, "sums": min(found["sums"] for found in every), "vectors": vectors}

    def put(self, name: str, vector: SteeringVector) -> None:
        """See `Remote`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vector.safetensors"
            vector.save(path)
            data = path.read_bytes()
        if name.startswith(BY_CONTENT):
            self._of_jobs[name] = len(vector.layers)
        for url in self.urls:
            self._json(url, "PUT", f"{PATH}/{name}", data, "application/octet-stream")

    def delete(self, name: str) -> None:
        """Remove a vector."""
        self._of_jobs.pop(name, None)
        for url in self.urls:
            self._json(url, "DELETE", f"{PATH}/{name}")

    def clear(self) -> None:
        """Remove the vectors that jobs put, those of other clients too; their running requests keep them."""
        for one in self.listing()["vectors"]:
            if one["name"].startswith(BY_CONTENT):
                self.delete(one["name"])

    def make_room(self, kept: Collection[str], pairs: int) -> None:
        """See `Remote`; only vectors of this client's jobs are removed, since other clients may use the others."""
        listing = self.listing()
        served = {one["name"] for one in listing["vectors"]}
        room = listing["capacity"] - sum(len(one["layers"]) for one in listing["vectors"])
        for name in [one for one in self._of_jobs if one in served and one not in kept]:
            if room >= pairs:
                return
            room += self._of_jobs[name]
            self.delete(name)

    def call(self, name: str, argument: Any) -> list[Any]:
        """See `Remote`."""
        body = json.dumps(argument).encode()
        answers = [self._json(url, "POST", f"/steering/{name}", body) for url in self.urls]
        return [one for answer in answers for one in answer["answers"]]

    def complete(self, requests: Sequence[Sent]) -> Iterator[Finished]:
        """See `Remote`."""
        for number, answer in self.completions([_body(one) for one in requests]):
            ids = answer["choices"][0].get("token_ids")
            if ids is None:
                raise ServerError(f"expected token ids from {self.urls}; got none. Use a newer vLLM.")
            yield number, tuple(ids)

    def log_probs(self, requests: Sequence[Sent]) -> Iterator[tuple[int, tuple[float, ...]]]:
        """See `Remote`."""
        bodies = [{**_body(one), "prompt_logprobs": 0} for one in requests]
        for number, answer in self.completions(bodies):
            one = requests[number]
            given = answer["choices"][0].get("prompt_logprobs")
            if given is None:
                raise ServerError(f"expected log-probabilities from {self.urls}; got none. Use a newer vLLM.")
            ids = one.prompt[len(one.prompt) - one.scored :]
            entries = zip(given[len(given) - one.scored :], ids, strict=True)
            yield number, tuple(float(entry[str(token)]["logprob"]) for entry, token in entries)

    def completions(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Post bodies to `/completions`, several at a time; yields `(number, answer)` as they are finished.

        Args:
            bodies: without the model's name.

        Raises:
            ServerError: a request was refused, or a server gave no answer.
        """
        waiting = deque(enumerate(bodies))
        results: queue.SimpleQueue[tuple[int, dict[str, Any]] | Exception] = queue.SimpleQueue()
        every = {url: Connections(url, self._keys[url], self.timeout_s) for url in self.urls}

        def work(url: str, connections: Connections) -> None:
            while not connections.closed.is_set():
                try:
                    number, body = waiting.popleft()
                except IndexError:
                    return
                data = json.dumps({"model": self._names[url], **body}).encode()
                try:
                    answer = self._patiently(partial(_read, connections, "POST", "/completions", data))
                    results.put((number, answer))
                except Exception as error:
                    results.put(error)

        try:
            for _ in range(min(self.concurrency, len(bodies))):
                for url, connections in every.items():
                    threading.Thread(target=work, args=(url, connections), daemon=True).start()
            for _ in bodies:
                found = results.get()
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            for connections in every.values():
                connections.close()

    def _json(
        self, url: str, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        connections = Connections(url, self._keys[url], self.timeout_s)
        answer: dict[str, Any] = self._patiently(lambda: _read(connections, method, path, body, kind))
        return answer

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns; a failure that may pass is tried again while patience lasts."""
        granted = self.patience_s if self._has_answered else min(FIRST_PATIENCE_S, self.patience_s)
        deadline, pause = time.monotonic() + granted, FIRST_WAIT_S
        while True:
            try:
                answer = ask()
                self._has_answered = True
                return answer
            except Failure as failure:
                if not failure.retryable or time.monotonic() + pause > deadline:
                    raise ServerError(str(failure)) from None
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_WAIT_S)


def remote_of(engine: Any) -> Remote:
    """The engine that is meant: itself, or a `Server` for an address or a list of addresses.

    Raises:
        TypeError: anything else.
    """
    if isinstance(engine, Remote):
        return engine
    if isinstance(engine, str) or (isinstance(engine, list | tuple) and all(isinstance(one, str) for one in engine)):
        return Server(engine)
    raise TypeError(
        f"expected an address, several, or an engine of steerkit.serving; got {type(engine).__name__}. Pass "
        '"http://127.0.0.1:8000".'
    )


def extra_arguments(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a request asks for, as `vllm_xargs` takes it: numbers, and JSON text of all else."""
    given = {name: value if isinstance(value, int) else json.dumps(value) for name, value in extra.items()}
    return {"vllm_xargs": given} if extra else {}


NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "min_tokens": 0,
}
"""Sent with each request: what it leaves out, vLLM takes from the checkpoint's generation configuration."""


def _body(one: Sent) -> dict[str, Any]:
    return {
        **NEUTRAL,
        "prompt": list(one.prompt),
        "temperature": 0,
        "max_tokens": one.count,
        "ignore_eos": True,
        "stop_token_ids": list(one.stops),
        "return_token_ids": True,
        **({} if one.salt is None else {"cache_salt": one.salt}),
        **extra_arguments(one.extra),
    }


def _read(
    connections: Connections, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
) -> Any:
    """The JSON of an answer; `Failure` for another one."""
    answer = connections.send(method, path, body, kind)
    text = answer.data.decode(errors="replace")
    if not 200 <= answer.status < 300:
        message = _message(text)
        if answer.status == 404 and path.startswith("/steering"):
            message = "expected a server that steers; this one does not. Start it by `steerkit serve`."
        raise Failure(
            connections.error_line(f"{method} {path}: HTTP {answer.status}: {message}"),
            retryable=answer.status in RETRYABLE or answer.status >= 500,
        )
    try:
        return json.loads(text)
    except ValueError:
        raise Failure(f"{method} {path}: expected JSON; got {text!r:.80}", retryable=True) from None


def _message(text: str) -> str:
    """The message of an error, as the OpenAI API gives it."""
    try:
        found: Any = json.loads(text)
        return str(found["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:300]
