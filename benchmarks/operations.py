"""Speed of each operation, site and condition against `add` at `resid_post`, in one batch of the sweep's rows."""

from __future__ import annotations

from collections.abc import Iterator
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
"""New tokens per row: with more, twelve comparisons would take half an hour."""
READ = 10
"""The layer that a condition reads."""


def operations(pairs: int = MIN_PAIRS) -> Iterator[Measured]:
    """Seconds of each other operation, of `add` at each other site and under each condition, over those of `add`."""
    with endless() as (model, tokenizer):
        vector = inputs.vector()
        always = sk.Condition(vector, READ, above=-1e9)
        each_token = sk.Condition(vector, READ, above=-1e9, decide="token")
        ways: list[tuple[str, str, dict[str, Any]]] = [
            *((f"operation {name}", PLACE, {"operation": name}) for name in OPERATIONS if name != "add"),
            *((f"add at {site}", PLACE, {"site": site}) for site in SITES if site != DEFAULT),
            ("add, condition on the prompt", CONDITION, {"when": always}),
            ("add, condition at each token", CONDITION, {"when": each_token}),
        ]

        def rows(**options: Any) -> list[Row]:
            there = sk.SteeringVector(vector.at(LAYER).layers, vector.meta, options.pop("site", DEFAULT))
            steering = sk.Steering(there, positions="from_last_prompt_token", **options)
            strengths = [0.1 * c for c in COEFFICIENTS if c]  # no text may end or overflow
            return [Row(prompt, (steering.scaled(c),)) for prompt in prompt_ids() for c in strengths]

        plain = rows()
        for job, target, options in ways:
            own = rows(**options)
            same = run(model, tokenizer, own, NEW) == run(model, tokenizer, plain, NEW)
            if "when" in options and not same:
                raise RuntimeError(f"expected a condition that always holds to change no token; {job} did.")
            yield compare(
                f"{job}, {len(own)} rows x {NEW} tokens",
                "operation add",
                lambda own=own: run(model, tokenizer, own, NEW),
                lambda: run(model, tokenizer, plain, NEW),
                pairs,
                target,
                "conditions always hold; the tokens are those of add" if same else "",
                inverse=True,
            )
