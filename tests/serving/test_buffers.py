"""A fake engine: requests that arrive, are read in chunks, preempted and finished, against a slow reference.

The fake model's block adds the token's own vector; what a position's stream becomes depends on its pushes alone, so
every position of every step can be compared.
"""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steerkit.generation.sampling import random_stream, sample
from steerkit.serving.buffers import Steerer
from steerkit.serving.plugin import follow
from steerkit.serving.request import KEY, Asked, Draw, Push, Read, to_wire
from steerkit.steering.positions import POSITIONS, steered_columns
from steerkit.vectors.vector import SteeringVector

LAYERS, WIDTH, BUDGET, VOCABULARY = 3, 5, 16, 11
VECTORS = {
    name: SteeringVector({layer: torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + layer)) for layer in
                          range(LAYERS)})
    for seed, name in ((10, "a"), (20, "b"), (30, "c"))
}  # fmt: skip


def number(key: object) -> int:
    return zlib.crc32(repr(key).encode())


def embedding(request: str, position: int, layer: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(number((request, position, layer))))


@dataclass
class Fake:
    """A request of the fake scheduler."""

    name: str
    prompt: int
    new: int
    asked: Asked
    computed: int = 0
    length: int = 0
    streams: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.length = self.prompt


Batch = list[tuple[Fake, int]]


def scheduled(running: list[Fake], rng: random.Random) -> Batch:
    """Requests and numbers of their tokens, in any order, within the budget."""
    rng.shuffle(running)
    left, batch = BUDGET, []
    for one in running:
        count = min(one.length - one.computed, left, rng.choice([1, 3, 99]))
        if count > 0:
            batch.append((one, count))
            left -= count
    return batch


def forward(batch: Batch, steerer: Steerer, two_summands: bool) -> None:
    """A step of the fake model; records the stream of each position."""
    starts = [0, *itertools.accumulate(count for _, count in batch)]
    steerer.begin([one.name for one, _ in batch], starts, [o.computed for o, _ in batch], [o.prompt for o, _ in batch])
    for layer, buffers in enumerate(steerer.layers):
        places = [(one, one.computed + i) for one, count in batch for i in range(count)]
        stream = torch.stack([embedding(one.name, position, layer) for one, position in places])
        residual = torch.full_like(stream, 0.5) if two_summands else None
        out = buffers(stream, None) if residual is None else buffers(stream - residual, residual) + residual
        for (one, position), row in zip(places, out, strict=True):
            one.streams[layer, position] = row


def run(requests: list[Fake], steerer: Steerer, rng: random.Random, two_summands: bool = False) -> dict[str, int]:
    """Run requests to their ends; returns how often things happened."""
    happened = {"chunks": 0, "preemptions": 0, "mixed": 0}
    waiting, running = list(requests), list[Fake]()
    while waiting or running:
        if waiting and rng.random() < 0.6:
            running.append(waiting.pop(0))
            steerer.requests[running[-1].name] = running[-1].asked
        if len(running) > 1 and rng.random() < 0.15:
            rng.choice(running).computed = 0
            happened["preemptions"] += 1
        if batch := scheduled(running, rng):
            happened["chunks"] += sum(one.computed + count < one.prompt for one, count in batch)
            happened["mixed"] += len({one.computed < one.prompt for one, _ in batch}) == 2
            forward(batch, steerer, two_summands)
        for one, count in batch:
            one.computed += count
            one.length += one.computed == one.length
            if one.length == one.prompt + one.new + 1:
                running.remove(one)
                steerer.finish(one.name)
    return happened


def reference(one: Fake, layer: int, position: int) -> torch.Tensor:
    """What the stream of a position should be, one push after the other."""
    stream = embedding(one.name, position, layer)
    for push in one.asked.pushes:
        low, high = steered_columns(push.positions, 0, one.asked.prompt or one.prompt, push.operation)
        if layer in push.layers and low <= position < high:
            vector = VECTORS[push.content].layers[layer]
            if push.operation == "add":
                stream = stream + push.coefficient * vector
            else:
                unit = vector / vector.norm()
                stream = stream - push.coefficient * (stream @ unit) * unit
    return stream


def steerer(sums: int = 0, capacity: int = 9) -> Steerer:
    return Steerer(LAYERS, WIDTH, BUDGET, 3, capacity, sums, torch.device("cpu"), VECTORS.__getitem__)


def pushes(rng: random.Random) -> tuple[Push, ...]:
    some = []
    for _ in range(rng.randint(0, 3)):
        positions = rng.choice([*POSITIONS, "all+0"]) + rng.choice(["", "", f":{rng.randint(1, 4)}"])
        layers = tuple(sorted(rng.sample(range(LAYERS), rng.randint(1, LAYERS))))
        some.append(Push(rng.choice("abc"), layers, rng.uniform(-2, 2), positions, rng.choice(["add", "ablate"])))
    return tuple(some)


def check(requests: list[Fake]) -> None:
    for one in requests:
        assert len(one.streams) == LAYERS * (one.prompt + one.new)
        for (layer, position), stream in one.streams.items():
            torch.testing.assert_close(stream, reference(one, layer, position), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("two_summands", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_position_of_every_schedule_is_steered_as_alone(seed, two_summands) -> None:
    rng = random.Random(seed)
    requests = []
    for i in range(24):
        prompt = rng.randint(1, 20)
        asked = Asked(pushes(rng), prompt=rng.choice([None, rng.randint(1, prompt)]))
        requests.append(Fake(f"{seed}-{i}", prompt, rng.randint(1, 6), asked))
    happened = run(requests, steerer(), rng, two_summands)
    assert min(happened.values()) > 0
    check(requests)


def test_a_bank_that_is_full_reads_vectors_again_and_changes_nothing() -> None:
    rng, under_test, read = random.Random(0), steerer(capacity=1), []
    under_test.read = lambda content: read.append(content) or VECTORS[content]
    requests = [Fake(f"{i}", 3, 2, Asked((Push("abc"[i % 3], (1,), 1.0, "all", "add"),))) for i in range(9)]
    for one in requests:
        run([one], under_test, rng)
    assert len(read) == 9  # a bank of two rows, and three vectors in turn
    check(requests)


@pytest.mark.parametrize("seed", range(6))
def test_every_read_token_is_counted_once_whatever_the_schedule(seed) -> None:
    rng = random.Random(seed)
    under_test = steerer(sums=2)
    requests, wanted = [], {"x": torch.zeros(LAYERS, WIDTH, dtype=torch.float64), "y": None}
    wanted["y"], norms, tokens = wanted["x"].clone(), {"x": 0.0, "y": 0.0}, {"x": 0, "y": 0}
    for i in range(20):
        prompt = rng.randint(2, 30)
        start = rng.randint(0, prompt - 1)
        read = Read(rng.choice("xy"), (0, 2), start, rng.randint(start + 1, prompt), rng.uniform(0.1, 1))
        one = Fake(f"r{seed}-{i}", prompt, 1, Asked(read=read))
        requests.append(one)
        tokens[read.key] += read.stop - read.start
        for position in range(read.start, read.stop):
            for layer in (0, 2):
                wanted[read.key][layer] += read.weight * embedding(one.name, position, layer).double()
            norms[read.key] += read.weight * float(embedding(one.name, position, 2).double().norm())
    happened = run(requests, under_test, rng)
    assert happened["preemptions"] > 0
    assert happened["chunks"] > 0
    found = under_test.take_sums(["x", "y", "z"])
    assert set(found) == {"x", "y"}
    for key, one in found.items():
        torch.testing.assert_close(torch.tensor(one["sum"], dtype=torch.float64), wanted[key], rtol=1e-9, atol=1e-9)
        assert one["tokens"] == tokens[key]
        assert one["norm"][2] == pytest.approx(norms[key], rel=1e-9)
        assert one["norm"][1] == 0
    assert under_test.take_sums(["x", "y"]) == {}


def test_norms_are_those_of_each_position_whatever_the_schedule() -> None:
    rng, under_test, wanted = random.Random(3), steerer(sums=2), {}
    requests = []
    for i in range(20):
        prompt = rng.randint(2, 30)
        start = rng.randint(0, prompt - 1)
        read = Read(f"k{i}", (0, 2), start, rng.randint(start + 1, prompt), 0.0, True)
        requests.append(one := Fake(f"n{i}", prompt, 1, Asked(read=read)))
        where = range(read.start, read.stop)
        wanted[read.key] = [float(embedding(one.name, position, 2).double().norm()) for position in where]
    happened = run(requests, under_test, rng)
    assert happened["preemptions"] > 0 and happened["chunks"] > 0
    found = under_test.take_sums([*wanted, "other"])
    assert {key: one["norms"][2] for key, one in found.items()} == {
        key: pytest.approx(norms, rel=1e-9) for key, norms in wanted.items()
    }
    assert under_test.take_sums(list(wanted)) == {}


def test_norms_that_newer_ones_pushed_out_are_left_out(monkeypatch) -> None:
    from steerkit.serving import buffers

    monkeypatch.setattr(buffers, "NORMS", 5)
    under_test, rng = steerer(sums=2), random.Random(0)
    for key in "xy":
        run([Fake(key, 3, 1, Asked(read=Read(key, (0,), 0, 3, 0.0, True)))], under_test, rng)
    assert set(under_test.take_sums(["x", "y"])) == {"y"}


def test_a_sum_that_newer_ones_pushed_out_is_missed_by_its_count_of_tokens() -> None:
    under_test, rng = steerer(sums=2), random.Random(0)
    for key in "xyz":
        run([Fake(key, 3, 1, Asked(read=Read(key, (0,), 0, 3, 1.0)))], under_test, rng)
    run([Fake("x2", 3, 1, Asked(read=Read("x", (0,), 0, 3, 1.0)))], under_test, rng)
    assert under_test.take_sums(["x"])["x"]["tokens"] == 3  # and not 6: the client refuses it


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_drawn_as_our_engine_draws_them_whatever_the_schedule(seed) -> None:
    """The logits of a request's step are fixed; what is left in them is one token, the one that `sample` gives."""
    rng = random.Random(seed)
    under_test = steerer()

    def logits_of(name: str, step: int) -> torch.Tensor:
        return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(number((name, step))))

    draws = {f"d{i}": Draw(f"row {i}", (seed, f"p{i % 3}", i), rng.choice([0.0, 0.5, 1.0]), rng.choice([0.6, 1.0]), 8)
             for i in range(10)}  # fmt: skip
    chosen: dict[tuple[str, int], int] = {}
    original = under_test.begin

    def begin(names, starts, computed, prompts) -> None:
        original(names, starts, computed, prompts)
        steps = [int(computed[i]) + starts[i + 1] - starts[i] - prompts[i] for i in range(len(names))]
        logits = torch.stack([logits_of(name, step) for name, step in zip(names, steps, strict=True)])
        before = logits.clone()
        under_test.choose(logits)
        for row, (name, step) in enumerate(zip(names, steps, strict=True)):
            if step < 0 or name not in draws:
                assert torch.equal(logits[row], before[row])
            else:
                chosen[name, step] = int(logits[row].argmax())
        under_test.choose(before)  # only once per step: prompt log-probabilities pass through the same function
        assert torch.isfinite(before).all()

    under_test.begin = begin
    run([Fake(name, rng.randint(1, 9), 8, Asked(draw=draw)) for name, draw in draws.items()]
        + [Fake("plain", 4, 8, Asked())], under_test, rng)  # fmt: skip
    for name, draw in draws.items():
        numbers = torch.tensor(random_stream(draw.stream, 8))
        for step in range(8):
            logits = logits_of(name, step)[None]
            expected = (logits.argmax() if draw.temperature == 0
                        else sample(logits, numbers[step : step + 1], draw.temperature, draw.top_p))  # fmt: skip
            assert chosen[name, step] == int(expected)


def test_a_request_whose_logits_overflow_is_reported_with_its_number_of_tokens() -> None:
    under_test = steerer()
    draw = Draw("row", (), 0.0, 1.0, 8)
    under_test.requests["r"] = Asked(draw=draw)
    for computed, scheduled, bad in ((0, 3, False), (3, 1, True), (4, 1, True)):
        under_test.begin(["r"], [0, scheduled], [computed], [3])
        logits = torch.full((1, VOCABULARY), float("nan") if bad else 0.0)
        under_test.choose(logits)
        assert torch.isfinite(logits.max())
    assert under_test.draws.overflowed == {"row": 1}


def test_between_the_steps_of_a_runner_nothing_is_steered_or_read() -> None:
    """vLLM runs tokens of no request there, e.g. where another replica has requests."""
    kept = steerer(sums=1)
    parameters = {
        "pushed": {"pushes": [Push("a", (0,), 2.0, "all", "add")]},
        "read": {"read": Read("sum", (0,), 0, 3, 1.0)},
    }
    wires = {
        name: to_wire(Asked(tuple(one.get("pushes", ())), read=one.get("read"))) for name, one in parameters.items()
    }
    streams = torch.arange(30.0).reshape(6, WIDTH)
    seen = []
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(
            num_reqs=2,
            req_ids=list(wires),
            num_computed_tokens_cpu=np.zeros(2, int),
            num_prompt_tokens=np.array([3, 3]),
        ),
        query_start_loc=SimpleNamespace(np=np.array([0, 3, 6])),
        _prepare_inputs=lambda output: None,
    )

    def execute(output: object) -> str:
        runner._prepare_inputs(output)
        seen.append(kept.layers[0](streams, None))
        return "done"

    runner.execute_model = execute
    follow(runner, kept)
    new = [
        SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args={KEY: wire}))
        for name, wire in wires.items()
    ]
    step = SimpleNamespace(finished_req_ids=(), preempted_req_ids={"other"}, scheduled_new_reqs=new)
    assert runner.execute_model(step) == "done"
    torch.testing.assert_close(seen[0][:3], streams[:3] + 2.0 * VECTORS["a"].layers[0])
    for _ in range(2):
        assert torch.equal(kept.layers[0](streams, None), streams)
    assert kept.counts["preemptions"] == 1
    assert kept.take_sums(["sum"])["sum"]["sum"][0] == streams[3:].sum(0).tolist()


def test_a_step_that_needs_more_vectors_than_the_bank_holds_ends_the_engine_rather_than_steer_wrong() -> None:
    """Requests keep vectors that were removed, beside those that were added since."""
    kept = steerer(capacity=1)
    for name, content in zip("xyz", "abc", strict=True):
        kept.requests[name] = Asked((Push(content, (0,), 1.0, "all", "add"),))
    kept.begin(["x", "y"], [0, 1, 2], [0, 0], [1, 1])
    kept.begin(["z"], [0, 1], [0], [1])
    with pytest.raises(RuntimeError, match="larger capacity"):
        kept.begin(["x", "y", "z"], [0, 1, 2, 3], [0, 0, 0], [1, 1, 1])
