"""Speed of each operation, site and condition against `add` at `resid_post`, in one batch of the sweep's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import steerkit as sk
from benchmarks import inputs
from benchmarks.decoding import COEFFICIENTS, LAYER, endless, prompt_ids, run
from benchmarks.timing import MIN_PAIRS, Measured, compare
from steerkit.generation.engine import Row
from steerkit.models.site_names import DEFAULT, SITES
from steerkit.steering.operations import OPERATIONS

PLACE, CONDITION = "<= 1.1", "<= 1.25"
NEW = 24
"""New tokens per row."""
READ = 10
"""The layer that a condition reads."""


def operations(pairs: int = MIN_PAIRS) -> Iterator[Measured]:
    """Seconds of each other operation over those of `add`."""
    yield from against_add([(f"operation {name}", PLACE, {"operation": name}) for name in OPERATIONS], pairs)


def sites(pairs: int = MIN_PAIRS) -> Iterator[Measured]:
    """Seconds of `add` at each other site over those at `resid_post`."""
    yield from against_add([(f"add at {site}", PLACE, {"site": site}) for site in SITES], pairs)


def conditions(pairs: int = MIN_PAIRS) -> Iterator[Measured]:
    """Seconds of `add` under a condition that always holds over those without one."""
    vector = inputs.vector()
    always = sk.Condition(vector, READ, above=-1e9)
    each_token = sk.Condition(vector, READ, above=-1e9, decide="token")
    ways = [("prompt", always), ("token", each_token)]
    yield from against_add([(f"add, condition on the {name}", CONDITION, {"when": when}) for name, when in ways], pairs)


def against_add(ways: Sequence[tuple[str, str, dict[str, Any]]], pairs: int) -> Iterator[Measured]:
    """Seconds of each way of steering (job, target, options of `sk.Steering`) over those of `add` at `resid_post`.

    Raises:
        RuntimeError: a condition that always holds changed a token.
    """
    with endless() as (model, tokenizer):
        vector = inputs.vector()

        def rows(**options: Any) -> list[Row]:
            there = sk.SteeringVector(vector.at(LAYER).layers, vector.meta, options.pop("site", DEFAULT))
            steering = sk.Steering(there, positions="from_last_prompt_token", **options)
            strengths = [0.1 * c for c in COEFFICIENTS if c]  # no text may end or overflow
            return [Row(prompt, (steering.scaled(c),)) for prompt in prompt_ids() for c in strengths]

        plain = rows()
        for job, target, options in ways:
            if options in ({"operation": "add"}, {"site": DEFAULT}):
                continue
            own = rows(**options)
            same = run(model, tokenizer, own, NEW) == run(model, tokenizer, plain, NEW)
            if "when" in options and not same:
                raise RuntimeError(f"expected a condition that always holds to change no token; {job} did.")
            yield compare(
                f"{job}, {len(own)} rows x {NEW} tokens",
                f"add at {DEFAULT}",
                lambda own=own: run(model, tokenizer, own, NEW),
                lambda: run(model, tokenizer, plain, NEW),
                pairs,
                target,
                "the tokens are those of add" if same else "",
                inverse=True,
            )
