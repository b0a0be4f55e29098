"""The check-up of a checkpoint: which checks run, and what they found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from steerkit.doctor import checks
from steerkit.doctor.checks import Result, State

CHECKS: dict[str, Callable[[nn.Module, Any], Result]] = {
    "weights": checks.weights,
    "tokenizer": checks.tokenizer,
    "boundaries": checks.boundaries,
    "template": checks.template,
    "generation settings": checks.generation_settings,
    "causality": checks.causality,
    "hidden states": checks.hidden_states,
    "padding": checks.padding,
    "coefficient 0": checks.coefficient_zero,
    "sites": checks.sites,
    "cache": checks.cache,
    "operations": checks.operations,
    "conditions": checks.conditions,
    "steered sites": checks.steered_sites,
    "patching": checks.patching,
    "compiled caches": checks.compiled_caches,
    "first new token": checks.first_new_token,
    "adapter": checks.adapter,
}
"""The checks that need a residual stream, by name, in the order in which they run."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        check: name of the check, e.g. `padding`.
        state: `ok`; `note`, a property of the model that users should know; or `failed`.
        detail: what was measured, with the number.
    """

    check: str
    state: State
    detail: str


def examine(
    model: nn.Module,
    tokenizer: Any,
    progress: Callable[[str], None] | None = None,
    finished: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Run all checks on a model.

    Args:
        progress: called with the name of each check before it runs.
        finished: called with the finding of each of these checks after it.

    Returns:
        One finding per check. A check that raises counts as failed, with its error as the detail. Where no residual
        stream is found, that is the only finding.

    Example:
        >>> examine(*sk.load("HuggingFaceTB/SmolLM2-135M-Instruct"))
    """
    stream = run("residual stream", checks.residual_stream, model, tokenizer)
    if stream.state == "failed":
        return [stream]
    found = [stream]
    for name, check in CHECKS.items():
        if progress is not None:
            progress(name)
        found.append(run(name, check, model, tokenizer))
        if finished is not None:
            finished(found[-1])
    return found


def run(name: str, check: Callable[..., Result], *given: Any) -> Finding:
    """The finding of a check of `given`; a check that raises has failed, with its error as the detail."""
    try:
        return Finding(name, *check(*given))
    except Exception as error:  # a model's own code may raise anything
        detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Finding(name, "failed", detail)
