"""The check-up of a served model: what steering through vLLM relies on, each tested on the running server."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerkit.doctor.checks import Result
from steerkit.doctor.report import Finding, run
from steerkit.serving.remote import Remote, Sent
from steerkit.serving.request import KEY
from steerkit.vectors.vector import SteeringVector

PROBE = "doctor-probe"
NEW_TOKENS = 32
BLOCKS = 8
"""Blocks of 32 tokens of the prefix cache that the long prompts fill."""
FLOOD = 48
"""Requests that are sent at once, so that prompts are read in parts."""
FULL, LONG = 2**13, 160
"""Largest cache, in tokens, that is filled to see what preemption does, and the new tokens of each request there: more
than a block of the cache, so that requests that fitted at first need more."""


class _Patient:
    """A server under examination, with a random direction at its middle layer."""

    def __init__(self, server: Remote) -> None:
        self.server, model = server, server.model()
        self.vocabulary, self.context = model["vocabulary"], model["context"]
        self.layer = model["n_layers"] // 2
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(model["d_model"], generator=generator)
        self.vector = SteeringVector({self.layer: direction / direction.norm()})
        server.put(PROBE, self.vector)
        self.strength = self._strength()

    def prompt(self, length: int, seed: int = 0) -> tuple[int, ...]:
        """A prompt of fixed pseudo-random tokens."""
        length = min(length, self.context - NEW_TOKENS)
        return tuple((7919 * (i + 1) + 104729 * seed) % self.vocabulary for i in range(length))

    def sent(self, prompt: tuple[int, ...], coefficient: float | None, positions: str = "all") -> Sent:
        """A greedy request; None: plain."""
        one = {"vector": PROBE, "coefficient": coefficient, "positions": positions}
        return Sent(prompt, NEW_TOKENS, (), {} if coefficient is None else {KEY: [one]})

    def ids(self, *requests: Sent) -> list[tuple[int, ...]]:
        """The new tokens of requests that are sent together."""
        return [ids for _, ids in sorted(self.server.complete(requests))]

    def alone(self, request: Sent) -> tuple[int, ...]:
        """The new tokens of a request that is sent alone."""
        return self.ids(request)[0]

    def fresh(self, request: Sent) -> tuple[int, ...]:
        """The new tokens of a request that is sent alone and reads nothing from the prefix cache."""
        return self.alone(replace(request, salt=uuid.uuid4().hex))

    def counts(self) -> dict[str, int]:
        """What the workers have counted."""
        found: dict[str, int] = self.server.call("counts", None)[0]
        return found

    def _strength(self) -> float:
        """Four times the smallest of some coefficients that changes a text."""
        plain = self.alone(self.sent(self.prompt(8), None))
        for power in range(10):
            if self.alone(self.sent(self.prompt(8), 4.0**power)) != plain:
                return 4.0 ** (power + 1)
        raise ValueError(
            f"expected a text that a push of norm {4.0**9:g} at layer {self.layer} changes; none did. The server does "
            "not steer."
        )


def _coefficient_zero(patient: _Patient) -> Result:
    """A request with coefficient 0 gives the plain text."""
    prompt = patient.prompt(20)
    plain, zero = patient.alone(patient.sent(prompt, None)), patient.alone(patient.sent(prompt, 0.0))
    return ("ok", "the plain text") if plain == zero else ("failed", _first_difference(plain, zero))


def _beside(patient: _Patient) -> Result:
    """Plain and steered requests in one batch are what they are alone."""
    requests = [patient.sent(patient.prompt(12, seed), c) for seed in range(4) for c in (None, patient.strength)]
    together, alone = patient.ids(*requests), [patient.alone(one) for one in requests]
    changed = sum(together[i] != together[i + 1] for i in range(0, len(requests), 2))
    return _same(alone, together, f"{changed} of 4 texts are changed by coefficient {patient.strength:g}", changed > 0)


def _cached(patient: _Patient) -> Result:
    """Long prompts in turn, plain and steered, with the prefix cache and each with a cache of its own."""
    long = patient.prompt(32 * BLOCKS + 5, 9)
    strength = patient.strength
    order = [None, strength, None, strength, -strength, None, strength]
    found = [patient.alone(patient.sent(long, one)) for one in order]
    fresh = {one: patient.fresh(patient.sent(long, one)) for one in dict.fromkeys(order)}
    shown = fresh[None] != fresh[strength]
    return _same([fresh[one] for one in order], found, "plain and steered requests in turn", shown)


def _conversation(patient: _Patient) -> Result:
    """A second turn, whose prompt is the first one with its steered answer."""
    first = patient.sent(patient.prompt(32 * BLOCKS, 11), patient.strength, "generated")
    answer = patient.alone(first)
    prompt = (*first.prompt, *answer, *patient.prompt(3, 12))
    second = [Sent(prompt, NEW_TOKENS, (), extra) for extra in (first.extra, {})]
    found = [patient.alone(one) for one in (*second, *second)]
    fresh = [patient.fresh(one) for one in second]
    return _same([*fresh, *fresh], found, "second turns, steered and plain", fresh[0] != fresh[1])


def _flooded(patient: _Patient) -> Result:
    """Many long prompts at once are what they are alone, read in parts or not."""
    length = min(32 * BLOCKS * 2, patient.context // 2)
    alone, together, counted = _at_once(patient, FLOOD, length)
    parts, mixed = counted["partial_prefills"], counted["mixed_steps"]
    detail = f"{FLOOD} prompts of {length} tokens at once: {parts} parts of prompts, {mixed} mixed steps"
    return _same(alone, together, detail, parts + mixed > 0)


def _preempted(patient: _Patient) -> Result:
    """More texts at once than the cache holds: some are preempted, computed again, and what they are alone."""
    room = int(patient.server.model()["cache_tokens"])
    if room > FULL:
        return "note", (
            f"not tested: the cache of {room} tokens is too large to be filled here. Start the server with "
            f"--engine=--num-gpu-blocks-override={FULL // 128} to test it"
        )
    new = min(LONG, patient.context - 9)
    count = room // 128 + 8
    alone, together, counted = _at_once(patient, count, 8, new)
    detail = f"{count} texts of {new} new tokens in a cache of {room}: {counted['preemptions']} preemptions"
    return _same(alone, together, detail, counted["preemptions"] > 0)


def _at_once(
    patient: _Patient, count: int, length: int, new: int = NEW_TOKENS
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], dict[str, int]]:
    """New tokens of some of many requests, plain and steered, sent alone and together, and what was counted there."""
    requests = [
        replace(patient.sent(patient.prompt(length, 20 + i), (None, patient.strength)[i % 2]), count=new)
        for i in range(count)
    ]
    before = patient.counts()
    together = patient.ids(*requests)
    counted = {name: after - before[name] for name, after in patient.counts().items()}
    some = range(0, count, (count // 8) | 1)  # an odd step: plain and steered ones
    return [patient.alone(requests[i]) for i in some], [together[i] for i in some], counted


def _ours(patient: _Patient) -> Result:
    """The first tokens of this process's engine, where the weights are at hand."""
    import steerkit as sk
    from steerkit.generation.batches import in_batches
    from steerkit.generation.engine import Engine, Row

    checkpoint = patient.server.model()["checkpoint"]
    if not Path(checkpoint).is_dir():
        return "note", f"the weights are not at hand: {checkpoint} is no folder here"
    model, _ = sk.load(checkpoint, dtype=patient.server.model()["dtype"])
    steering = sk.Steering(patient.vector, patient.strength, "all", foreign=True)
    prompts = [patient.prompt(10 + 5 * seed, 40 + seed) for seed in range(4)]
    rows = [Row(prompt, steerings) for prompt in prompts for steerings in ((), (steering,))]

    def work(engine: Engine, numbers: Sequence[int]) -> Any:
        return engine.decode(NEW_TOKENS, frozenset(), lambda logits, _rows, _step: logits.argmax(-1))

    done = dict(pair for batch in in_batches(model, rows, NEW_TOKENS, work) for pair in batch)
    own = [done[i].ids for i in range(len(rows))]
    theirs = patient.ids(*[patient.sent(p, c) for p in prompts for c in (None, patient.strength)])
    same = sum(a == b for a, b in zip(own, theirs, strict=True))
    detail = f"{same} of {len(own)} texts of {NEW_TOKENS} tokens are those of this process's engine"
    if same == len(own):
        return "ok", detail
    wide = patient.server.model()["dtype"] == "float32"
    return ("failed" if wide else "note"), detail + ("" if wide else "; rounding decides between near-equal tokens")


CHECKS: dict[str, Callable[[_Patient], Result]] = {
    "coefficient 0": _coefficient_zero,
    "batch": _beside,
    "prefix cache": _cached,
    "conversation": _conversation,
    "many prompts": _flooded,
    "preemption": _preempted,
    "steerkit's engine": _ours,
}


def examine_served(
    server: Any,
    progress: Callable[[str], None] | None = None,
    finished: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Run all checks on a server (a `steerkit.serving.Server`, `VLLM`, or an address).

    A vector is added for it, and removed at the end.

    Args:
        progress: called with the name of each check before it runs.
        finished: called with the finding of each of these checks after it.

    Returns:
        One finding per check; a check that raises counts as failed.

    Example:
        >>> examine_served("http://127.0.0.1:8000")
    """
    from steerkit.serving.client import ServerError, remote_of

    try:
        remote = remote_of(server)
        model = remote.model()
    except ServerError as error:
        return [Finding("server", "failed", f"{server}: {error}")]
    about = f"vLLM {model['vllm']}, {model['model_type']}, {model['dtype']}, context {model['context']}"
    findings = [Finding("server", "ok", about)]
    unserved = [one for one in remote.listing()["vectors"] if one["error"]]
    for one in unserved:
        findings.append(Finding(f"vector {one['name']}", "note", one["error"]))
    try:
        patient = _Patient(remote)
        for name, check in CHECKS.items():
            if progress is not None:
                progress(name)
            findings.append(run(name, check, patient))
            if finished is not None:
                finished(findings[-1])
    except (ValueError, RuntimeError) as error:
        findings.append(Finding("steering", "failed", str(error)))
    finally:
        with contextlib.suppress(ValueError, RuntimeError):  # a server that did not take the vector has none to remove
            remote.delete(PROBE)
    return findings


def _same(expected: Sequence[tuple[int, ...]], found: Sequence[tuple[int, ...]], detail: str, shown: bool) -> Result:
    different = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if different:
        first = different[0]
        return "failed", (
            f"{len(different)} of {len(found)} texts differ, e.g. {_first_difference(expected[first], found[first])}; "
            + detail
        )
    if not shown:
        return "note", f"{len(found)} texts are the same; {detail}: nothing is shown"
    return "ok", f"{len(found)} texts are the same; {detail}"


def _first_difference(expected: Sequence[int], found: Sequence[int]) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    return f"from new token {place} on: {list(found[place : place + 3])} for {list(expected[place : place + 3])}"
