"""Wrong conditions: read after the push, decided at another position, or not known after the batch became smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import steerkit as sk
from steerkit.generation.engine import Engine, Row
from steerkit.models.model import evaluating
from steerkit.models.site_names import SITES
from steerkit.probes.probe import Probe
from steerkit.steering import rows
from steerkit.text.prompt import encode_prompt
from tests.steering.test_conditions import NEW, PROMPTS, ids_of, slow, threshold, without_end
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

Generate = Callable[[Any, Any, list[str], sk.Steering], list[tuple[list[int], int]]]
"""Returns for each prompt its new ids, and how many of the positions that decided them were steered."""


def check(decide: Any, layer: int) -> Callable[[Generate, Path], None]:
    """Texts and counts of a padded batch against one prompt at a time without a cache."""

    def compare(generate: Generate, _: Path) -> None:
        model, tokenizer = without_end()
        push, read = vector(model, 2), vector(model, layer, seed=7)
        above = threshold(model, tokenizer, read, layer, decide)
        steering = sk.Steering(push, 2.0, when=sk.Condition(read, above=above, decide=decide))
        truth = [slow(model, encode_prompt(tokenizer, one), NEW, steering) for one in PROMPTS]
        assert generate(model, tokenizer, PROMPTS, steering) == truth

    return compare


def ours(model: Any, tokenizer: Any, prompts: list[str], steering: sk.Steering) -> Any:
    return ids_of(model, tokenizer, prompts, [(steering,)] * len(prompts))


def patched(owner: Any, **methods: Any) -> Generate:
    def generate(model: Any, tokenizer: Any, prompts: list[str], steering: sk.Steering) -> Any:
        with mock.patch.multiple(owner, **methods):
            return ours(model, tokenizer, prompts, steering)

    return generate


READ = rows._Gate.read


def reads_after_the_push(self: rows._Gate, stream: Tensor, start: int) -> None:
    """At the layer that is steered: adds a push to what is read, as a hook that runs after the steering's."""
    READ(self, stream + 2.0 * vector(tiny_model(), 2).layers[2], start)


def along_the_stored_vector(model: Any, tokenizer: Any, prompts: list[str], steering: sk.Steering) -> Any:
    """The score `h . v`, where the threshold is of `h . v / |v|`."""
    when = steering.when
    assert when is not None and isinstance(when.direction, sk.SteeringVector)
    ((_, v),) = when.direction.layers.items()
    object.__setattr__(when, "weights", v)
    return ours(model, tokenizer, prompts, steering)


def decides_anew(self: rows._Gate, stream: Tensor, start: int) -> None:
    self.decided = self._holds(stream[self.rows, -1:])[:, 0]
    self.holds = self.decided[:, None]


def share(sweep: Callable[..., sk.SweepResult], _: Path) -> None:
    """Of rows of unequal length: the share of a row's own positions, however long the other rows of its batch are."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    push, read = vector(model, 2), vector(model, 1, seed=7)
    above = threshold(model, tokenizer, read, 1, "token")
    when = sk.Condition(read, above=above, decide="token")
    table = sweep(model, tokenizer, push, PROMPTS, coefficients=[2], when=when, max_new_tokens=NEW).table
    for row in table[table["coefficient"] == 2].itertuples():
        steering = sk.Steering(push, 2.0, when=when)
        _, steered = slow(model, row.prompt_ids, int(row.n_tokens), steering)
        assert row.share_steered == steered / row.n_tokens
    assert set(table[table["coefficient"] == 0]["share_steered"]) == {0.0}


def of_all_columns(*args: Any, **options: Any) -> sk.SweepResult:
    """Divides by the number of tokens that were asked for and reports what is steered at the last step for all."""
    found = sk.sweep(*args, **options)
    last = found.table["share_steered"].round()
    return sk.SweepResult(found.table.assign(share_steered=last), found.meta)


def check_a_smaller_batch(keep: Callable[[Engine, list[int]], None], _: Path) -> None:
    """After rows have left the batch, the others continue with their own decisions."""
    model, tokenizer = without_end()
    read = vector(model, 1, seed=7)
    above = threshold(model, tokenizer, read, 1, "prompt")
    steering = sk.Steering(vector(model, 2), 2.0, when=sk.Condition(read, above=above))
    with torch.no_grad(), evaluating(model):
        engine = Engine(model, [Row(encode_prompt(tokenizer, one), (steering,)) for one in PROMPTS], NEW)
        engine.forward(engine.last_tokens(), engine.width - 1)
        before = engine.compiled.decisions()[:, 0].tolist()
        keep(engine, [3, 1])
        engine.forward(torch.tensor([[7], [8]]), engine.width)
        assert set(before) == {True, False}
        assert engine.compiled.steered() == [before[3], before[1]]


def forgetting(engine: Engine, numbers: list[int]) -> None:
    engine.keep(numbers)
    engine.compiled = engine._compile(range(len(numbers)))


Make = Callable[[Any], sk.Condition]
"""Makes a condition of a vector or a probe that was read at a site of layer 1, above 0 and token by token."""


@cache
def serial() -> tuple[Any, Any]:
    return without_end()


def check_a_condition_is_read_at(site: str, make: Make, _: Path) -> None:
    """At each position the steering acts where the value of the site there scores above 0."""
    model, tokenizer = serial()
    texts = [f"{word} {i}" for i in range(6) for word in ("glad", "grey")]
    acts = sk.collect(model, tokenizer, texts, layers=1, site=site, labels=[text[:4] for text in texts])
    vector_there = sk.SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(7))}, site=site)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[1])])
    for direction in (vector_there, sk.fit_probe(acts, "label")):
        push = sk.Steering(sk.SteeringVector({2: torch.ones(32)}), 1.0, "all", when=make(direction))
        with torch.no_grad(), sk.capture_resid(model, 1, site=site) as read, sk.capture_resid(model, 2) as plain:
            model(input_ids=ids)
        with push.on(model), sk.capture_resid(model, 2) as steered, torch.no_grad():
            model(input_ids=ids)
        moved = (steered[2][0] - plain[2][0]).abs().amax(1) > 0.5
        if isinstance(direction, Probe):
            assert moved.tolist() == [one == direction.classes[1] for one in direction.predict(read[1][0])]
        else:
            assert torch.equal(moved, read[1][0] @ direction.layers[1] > 0)


def at_its_place(direction: Any) -> sk.Condition:
    return sk.Condition(direction, above=0.0, decide="token")


def at_the_stream(direction: Any) -> sk.Condition:
    """Without the site, as a direction of weights alone: after the block."""
    return sk.Condition(replace(direction, site="resid_post"), 1, above=0.0, decide="token")


def before_the_block(direction: Any) -> sk.Condition:
    return sk.Condition(replace(direction, site="resid_pre"), 1, above=0.0, decide="token")


SILENT: dict[str, tuple[Callable[..., None], Any, Any]] = {
    "a condition is read before its steering": (
        check("token", 2), ours, patched(rows._Gate, read=reads_after_the_push)
    ),
    "a score is in the unit of the stream": (check("token", 1), ours, along_the_stored_vector),
    "a prompt decides once": (check("prompt", 1), ours, patched(rows._Gate, read=decides_anew)),
    "each row keeps its condition when the batch shrinks": (check_a_smaller_batch, Engine.keep, forgetting),
    "the share of steered positions is a row's own": (share, sk.sweep, of_all_columns),
    **{
        f"a condition is read at {site}": (
            partial(check_a_condition_is_read_at, site), at_its_place,
            partial(before_the_block if site == "resid_post" else at_the_stream),
        )
        for site in SITES
    },
}  # fmt: skip
VERIFIES = {f"a condition is read at {site}": ("condition", site) for site in SITES}
