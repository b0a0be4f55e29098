"""Engines of vLLM that steer, as generators of sweeps: one in this process (`VLLM`), or servers (`Server`).

What is common to both: vectors are put into the served folder under the hash of their content, rows become requests of
token ids, and random numbers are those of `steerkit.generate`, so that a table has the rows that this process would
have generated.
"""

from __future__ import annotations

import itertools
import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from steerkit.capture.activations import ActivationMeans, Layer
from steerkit.capture.pooling import Position, pool_at, token_index, with_letter_found
from steerkit.capture.texts import Texts, labelled_texts, passages_of, texts_sha256
from steerkit.generation.choices import Scored
from steerkit.generation.engine import Continuation, Row
from steerkit.generation.generate import check_numbers, check_room
from steerkit.generation.generator import Settings
from steerkit.io.files import sha256
from steerkit.io.versions import versions
from steerkit.models.ends import end_of_turn
from steerkit.models.identity import fingerprint, tokenizer_sha256
from steerkit.models.site_names import DEFAULT
from steerkit.serving.request import DRAW, KEY, LARGEST, LARGEST_WIDE, NORMS, OPERATIONS, PROMPT, READ, largest_stream
from steerkit.steering.dose import Texts as Continued
from steerkit.steering.positions import steered_columns
from steerkit.steering.steering import Steering
from steerkit.text.spans import Passage
from steerkit.vectors.vector import SteeringVector

REPORTED = 64
"""Rows that are reported together: how many texts an interrupted job may have to generate again."""
BY_CONTENT = "content-"
"""Beginning of the names of vectors that jobs put into the served folder."""
STRONG = 1e4
"""Norm of a push from which overflow is looked for in wide number formats."""


Finished = tuple[int, tuple[int, ...]]
"""The number of a request, and its new token ids."""


@dataclass(frozen=True)
class Sent:
    """A request: token ids, and what is asked for beside.

    Args:
        prompt: token ids.
        count: largest number of new tokens.
        stops: tokens that end the text, beside no others.
        extra: see `steerkit.serving.request`.
        scored: number of the last tokens of the prompt whose log-probabilities are wanted.
        salt: requests share blocks of the prefix cache only with those of the same salt.
    """

    prompt: tuple[int, ...]
    count: int
    stops: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    salt: str | None = None
    scored: int = 0


class Remote(ABC):
    """An engine of vLLM with the plugin, in this process (`VLLM`) or behind HTTP (`Server`)."""

    @abstractmethod
    def listing(self) -> dict[str, Any]:
        """The served model, the limits and the vectors; see `steerkit.serving.routes`."""

    @abstractmethod
    def put(self, name: str, vector: SteeringVector) -> None:
        """Add a vector to the served ones.

        Raises:
            ValueError: it does not fit the served model, or there is no room.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a vector from the served ones."""

    @abstractmethod
    def make_room(self, kept: Collection[str], pairs: int) -> None:
        """Remove vectors of earlier jobs, except some, for new pairs of vector and layer."""

    @abstractmethod
    def complete(self, requests: Sequence[Sent]) -> Iterator[Finished]:
        """Yield `(number, new token ids)` of requests as they are finished; ids end with the stop token, if any."""

    @abstractmethod
    def log_probs(self, requests: Sequence[Sent]) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Yield `(number, log-probabilities of the last `scored` tokens of the prompt)` as requests are finished."""

    @abstractmethod
    def call(self, name: str, argument: Any) -> list[Any]:
        """What `sums`, `overflowed` or `counts` answers, one entry per worker group."""

    # ------------------------------------------------------------------------------------------------------ generator

    def model(self) -> dict[str, Any]:
        """What the engine says of its model; asked for once."""
        known: dict[str, Any] | None = self.__dict__.get("_model")
        if known is None:
            known = self.__dict__["_model"] = self.listing()["model"]
        return known

    def check_model(self, model: nn.Module) -> None:
        """`ValueError` unless a model in this process has the served weights."""
        own, served = fingerprint(model), (self.model()["fingerprint"], None)
        if served[0] is not None and own != served:
            raise ValueError(
                f"expected the weights that the engine serves, {served}; got a model with {own}. Pass that model, or "
                "None."
            )

    def about(self, tokenizer: Any) -> dict[str, Any]:
        """See `steerkit.generation.generator.Generator`."""
        served = self.model()
        template = getattr(tokenizer, "chat_template", None)
        return {
            "checkpoint": served["checkpoint"],
            "weights": served["dtype"],
            "model_fingerprint": served["fingerprint"],
            "adapter_fingerprint": None,
            "model_type": served["model_type"],
            "dtype": served["dtype"],
            "attention": "vllm",
            "device": served["device"],
            "kernels": "vllm",
            "blocks": None,
            "n_layers": served["n_layers"],
            "d_model": served["d_model"],
            "versions": {**versions(), "vllm": served["vllm"]},
            "template_sha256": sha256(str(template)) if template else None,
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
        }

    def ends(self, tokenizer: Any) -> frozenset[int]:
        """See `steerkit.models.ends.ends_of`."""
        known = (*self.model()["ends"], getattr(tokenizer, "eos_token_id", None), end_of_turn(tokenizer))
        return frozenset(int(token) for token in known if token is not None)

    def check(self, rows: Sequence[Row], settings: Settings) -> None:
        """`ValueError` for a row or a setting that does not fit the served model."""
        check_numbers(settings.max_new_tokens, settings.temperature, settings.top_p, settings.batch_rows)
        served = self.model()
        check_room(rows, settings.max_new_tokens, served["context"])
        highest = max((max(row.prompt, default=0) for row in rows), default=0)
        if highest >= served["vocabulary"]:
            raise ValueError(
                f"expected tokens among the {served['vocabulary']} of the served model; got token {highest}. Load its "
                "own tokenizer."
            )
        self._offer(row.steerings for row in rows)

    def decode(
        self, tokenizer: Any, rows: Sequence[Row], streams: Sequence[Any], settings: Settings
    ) -> Iterator[list[tuple[int, Continuation]]]:
        """See `steerkit.generation.generator.Generator`."""
        self.check(rows, settings)
        if any(map(self._may_overflow, rows)):
            self._check_replicas("an overflow of strong steering")
        ends, job = self.ends(tokenizer), uuid.uuid4().hex
        stops = tuple(sorted(ends))
        sent, watched, too_strong = [], {}, []
        numbers = []
        for number, row in enumerate(rows):
            if self._overflows(row):
                too_strong.append((number, Continuation((), None, overflowed=True)))
                continue
            numbers.append(number)
            extra: dict[str, Any] = {}
            if pushes := [specification(one) for one in row.steerings if float(one.coefficient) != 0]:
                extra[KEY] = pushes
            if settings.temperature > 0 or self._may_overflow(row):
                watched[f"{job}-{number}"] = number
                extra[DRAW] = {
                    "name": f"{job}-{number}",
                    "stream": _listed(streams[number]) if settings.temperature > 0 else [],
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                }
            sent.append(Sent(row.prompt, settings.max_new_tokens, stops, extra))
        if too_strong:
            yield too_strong
        finished: list[Finished] = []
        for place, ids in self.complete(sent) if sent else ():
            finished.append((numbers[place], ids))
            if len(finished) >= REPORTED:
                yield self._reported(finished, watched, job, ends)
                finished = []
        if finished:
            yield self._reported(finished, watched, job, ends)

    def _reported(
        self,
        finished: Sequence[tuple[int, tuple[int, ...]]],
        watched: Mapping[str, int],
        job: str,
        ends: frozenset[int],
    ) -> list[tuple[int, Continuation]]:
        """The continuations of finished rows; those that overflowed are asked for once for all of them."""
        names = [name for number, _ in finished if (name := f"{job}-{number}") in watched]
        lost = {name: step for found in self.call("overflowed", names) for name, step in found.items()} if names else {}
        reported = []
        for number, ids in finished:
            step = lost.get(f"{job}-{number}")
            if step is not None:
                reported.append((number, Continuation(ids[:step], None, overflowed=True)))
            elif ids and ids[-1] in ends:
                reported.append((number, Continuation(ids[:-1], ids[-1])))
            else:
                reported.append((number, Continuation(ids, None)))
        return reported

    def _check_replicas(self, what: str) -> None:
        """`ValueError` for a server of several data-parallel replicas, of which vLLM asks only the first."""
        if (count := self.model()["replicas"]) > 1:
            raise ValueError(
                f"expected an engine without data-parallel replicas, to read {what}; got {count}. Start a server for "
                "each, and pass all their addresses as engine=."
            )

    def _overflows(self, row: Row) -> bool:
        """Whether the engine refuses a row since its stream could overflow; such a row is not sent."""
        largest = LARGEST.get(self.model()["dtype"], LARGEST_WIDE)
        return largest < largest_stream(
            [
                (tuple(one.vector.layers), float(one.coefficient), str(one.operation), max(one.vector.norms().values()))
                for one in row.steerings
            ]
        )

    def _may_overflow(self, row: Row) -> bool:
        """Whether the logits of a row could be infinite: looking at them costs time."""
        strongest = max(
            (abs(float(one.coefficient)) * max(one.vector.norms().values()) for one in row.steerings), default=0.0
        )
        return strongest > 0 and (self.model()["dtype"] == "float16" or strongest > STRONG)

    def _offer(self, steerings: Iterable[Sequence[Steering]]) -> None:
        """Put every vector that is needed and not served yet."""
        needed = {(name_of(one), one.foreign): one for several in steerings for one in several}
        served = {one["name"]: one for one in self.listing()["vectors"]} if needed else {}
        missing = {key: one for key, one in needed.items() if key[0] not in served or served[key[0]]["error"]}
        if missing:
            pairs = sum(len(one.vector.layers) for one in missing.values())
            self.make_room({name for name, _ in needed}, pairs)
            listing = self.listing()
            used = sum(len(one["layers"]) for one in listing["vectors"])
            if pairs > (room := listing["capacity"] - used):
                raise ValueError(
                    f"expected vectors of at most {room} pairs of vector and layer, as {used} of the engine's "
                    f"{listing['capacity']} are used; got {pairs} pairs. Sweep fewer layers or vectors at a time, "
                    f"remove served vectors (those of jobs are named {BY_CONTENT}...; `Server(url).clear()` removes "
                    "them), or start the engine with a larger capacity (`steerkit serve --capacity`)."
                )
        for (name, foreign), one in missing.items():
            self.put(name, SteeringVector(one.vector.layers) if foreign else one.vector)

    def score(
        self, tokenizer: Any, rows: Sequence[Row], texts: Sequence[tuple[int, ...]], settings: Settings
    ) -> Iterator[list[tuple[int, Scored]]]:
        """See `steerkit.generation.generator.Generator`."""
        served = self.model()["context"]
        if (longest := max(len(row.prompt) + len(text) for row, text in zip(rows, texts, strict=True))) >= served:
            raise ValueError(
                f"expected prompt and choice within {served - 1} tokens, the served context without one new token; got "
                f"{longest}. Shorten either."
            )
        self._offer(row.steerings for row in rows)
        too_strong = [number for number, row in enumerate(rows) if self._overflows(row)]
        if too_strong:
            yield [(number, Scored(math.nan)) for number in too_strong]
        numbers = [number for number in range(len(rows)) if number not in set(too_strong)]
        sent = []
        for number in numbers:
            row, text = rows[number], texts[number]
            pushes = [specification(one) for one in row.steerings if float(one.coefficient) != 0]
            extra = {KEY: pushes, PROMPT: len(row.prompt)} if pushes else {}
            sent.append(Sent((*row.prompt, *text), 1, (), extra, scored=len(text)))
        finished: list[tuple[int, Scored]] = []
        for place, values in self.log_probs(sent) if sent else ():
            total = sum(values)
            finished.append((numbers[place], Scored(total if math.isfinite(total) else math.nan)))
            if len(finished) >= REPORTED:
                yield finished
                finished = []
        if finished:
            yield finished

    def norms(self, texts: Continued, positions: str, operation: str, site: str = DEFAULT) -> dict[Layer, float]:
        """See `steerkit.steering.dose.median_norms`; empty for an engine without sums, or with several replicas."""
        if not self.listing()["sums"] or self.model()["replicas"] > 1:
            return {}
        room, layers = self.model()["context"] - 1, list(range(self.model()["n_layers"]))
        asked: list[tuple[Sent, str, int]] = []
        job = uuid.uuid4().hex
        for number, (prompt, ids) in enumerate(texts):
            whole = (*prompt, *ids)[:room]
            low, high = steered_columns(positions, 0, len(prompt), operation)
            high = min(high, len(whole))
            for start in range(max(low, 1), high, NORMS // 2):
                key, stop = f"{job}/{number}-{start}", min(high, start + NORMS // 2)
                read = {"key": key, "layers": layers, "weight": 0.0, "start": start, "stop": stop, "each": True}
                asked.append((Sent(whole[:stop], 1, (), {READ: read}), key, stop - start))
        found: list[np.ndarray] = []
        while asked:
            many = max(1, sum(total <= NORMS for total in itertools.accumulate(count for *_, count in asked)))
            part, asked = asked[:many], asked[many:]
            for _ in self.complete([sent for sent, *_ in part]):
                pass
            answers = self.call("sums", [key for _, key, _ in part])
            got = [np.array(one[key]["norms"], float) for _, key, _ in part for one in answers if key in one]
            if len(got) != len(part) or any(np.isnan(norms).any() for norms in got):
                raise RuntimeError(
                    f"expected the engine to read the norms of {len(part)} texts; it read fewer. Another job may have "
                    "read at the same time; repeat the call."
                )
            found += got
        if not found:
            return {}
        medians = np.median(np.concatenate(found, axis=1), axis=1)
        return dict(zip(layers, medians.tolist(), strict=True))

    # -------------------------------------------------------------------------------------------------------- capture

    def collect_means(
        self,
        tokenizer: Any,
        texts: Texts,
        *,
        layers: Sequence[int] | None = None,
        position: Position = "last",
        labels: Iterable[object] | None = None,
        groups: Iterable[object] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ActivationMeans:
        """The means of `steerkit.collect_means`, of streams that never leave the engine.

        Args:
            layers: block indices; None: all. The other arguments are those of `steerkit.collect`.

        Raises:
            ValueError: an engine without sums, more labels than it has sums, or a bad text.

        Example:
            >>> means = sk.serving.Server("http://127.0.0.1:8000").collect_means(tokenizer, pairs, layers=[14])
            >>> vector = sk.difference_in_means(means)
        """
        items = labelled_texts(texts, labels, groups)
        served = self.model()
        wanted = list(range(served["n_layers"])) if layers is None else [int(layer) for layer in layers]
        passages = passages_of(tokenizer, items, chat_template_kwargs)
        check_room([Row(passage.ids) for passage in passages], 1, served["context"])
        read_at = with_letter_found(tokenizer, passages, position)
        pool_at(read_at, passages)  # raises where a span is too short
        index = token_index(read_at)

        def weighed(start: int, stop: int) -> tuple[int, int, float]:
            if index is None:
                return start, stop, 1 / (stop - start)
            at = index + (start if index >= 0 else stop)
            return at, at + 1, 1.0

        sums = self._read(passages, wanted, weighed)
        counts = {label: sum(passage.labels.count(label) for passage in passages) for label in sums}
        names = tuple(sorted(sums))
        mean = torch.stack(
            [
                torch.stack([torch.tensor(sums[name]["sum"][layer], dtype=torch.float64) for layer in wanted])
                / counts[name]
                for name in names
            ]
        )
        meta = {
            **self.about(tokenizer),
            "read_layers": wanted,
            "read_position": position,
            "data_sha256": texts_sha256(items, chat_template_kwargs),
        }
        return ActivationMeans(mean, tuple(counts[name] for name in names), names, tuple(wanted), meta)

    def _read(self, passages: Sequence[Passage], layers: Sequence[int], weighed: Any) -> dict[str, dict[str, Any]]:
        """The sums per label over all spans; every token is counted once, which the engine's count of tokens shows."""
        self._check_replicas("sums of the stream")
        job = uuid.uuid4().hex
        labels = sorted({label for passage in passages for label in passage.labels})
        room = self.listing()["sums"]
        if len(labels) > room:
            raise ValueError(
                f"expected an engine with a sum for each of {len(labels)} labels; got {room}. Start it with "
                f'"sums": {len(labels)} in its settings.'
            )
        sent, tokens = [], dict.fromkeys(labels, 0)
        for passage in passages:
            for label, span in zip(passage.labels, passage.spans, strict=True):
                start, stop, weight = weighed(*span)
                tokens[label] += stop - start
                read = {"key": f"{job}/{label}", "layers": list(layers), "weight": weight, "start": start, "stop": stop}
                read["each"] = False
                sent.append(Sent(passage.ids[:stop], 1, (), {READ: read}))
        for _ in self.complete(sent):
            pass
        return {
            label: _joined(self.call("sums", [f"{job}/{label}"]), f"{job}/{label}", tokens[label]) for label in labels
        }


def _joined(found: Sequence[Mapping[str, Any]], key: str, tokens: int) -> dict[str, Any]:
    """The sum of what several engines have read for a key.

    Raises:
        RuntimeError: they have read another number of tokens than was asked for.
    """
    parts = [one[key] for one in found if key in one]
    read = sum(part["tokens"] for part in parts)
    if read != tokens:
        raise RuntimeError(
            f"expected the engine to read {tokens} tokens; it read {read}. Another job may have used its sums; repeat "
            "the call, or start it with more of them."
        )
    total = torch.stack([torch.tensor(part["sum"], dtype=torch.float64) for part in parts]).sum(0)
    norm = torch.tensor([part["norm"] for part in parts], dtype=torch.float64).sum(0)
    return {"sum": total.tolist(), "norm": norm.tolist(), "tokens": tokens}


def name_of(steering: Steering) -> str:
    """The name under which the vector of a steering is served."""
    return f"{BY_CONTENT}{steering.vector.content()}"


def specification(steering: Steering) -> dict[str, Any]:
    """A steering as a request asks for it; `ValueError` for an operation or a site that is not served."""
    if steering.when is not None:
        raise ValueError(
            f"expected a steering without a condition through vLLM; got when={str(steering.when)!r}. Use the model in "
            "this process."
        )
    if steering.site != DEFAULT:
        raise ValueError(
            f"expected the site {DEFAULT} through vLLM; got {steering.site}. Use the model in this process."
        )
    if steering.operation not in OPERATIONS:
        raise ValueError(
            f"expected an operation among {OPERATIONS} through vLLM; got {str(steering.operation)!r}. Use the "
            "transformers engine."
        )
    return {
        "vector": name_of(steering),
        "layer": list(steering.vector.layers),
        "coefficient": float(steering.coefficient),
        "positions": steering.positions,
        "operation": steering.operation,
    }


def _listed(stream: Any) -> Any:
    return [_listed(one) for one in stream] if isinstance(stream, tuple | list) else stream
