"""Wrong projections while a model writes: of another token's stream, or of the stream on the other side of the push."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import steerkit as sk
from tests.generation.test_projections import slow
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

Read = Callable[[Any, Any, sk.Steering, sk.SteeringVector], tuple[Any, Any, Any]]
PROMPT = "A rather long prompt"


def check_a_tokens_projections_are_of_the_stream_at_the_token(read: Read, _: Path) -> None:
    """`read` gives the generated ids, and for each its projection before and after the push of the same layer."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    steering, watched = sk.Steering(vector(model, 1), 1.0), vector(model, 1, seed=5)
    ids, before, after = read(model, tokenizer, steering, watched)
    prompt = sk.render(tokenizer, PROMPT).ids
    truth = slow(model, (*prompt, *ids), watched, steering.vector, len(prompt) - 1)
    for found, values in zip((before, after), truth, strict=True):
        np.testing.assert_allclose(np.asarray(found), values[len(prompt) :], rtol=1e-4, atol=1e-4)


def watched(model: Any, tokenizer: Any, steering: sk.Steering, vector: sk.SteeringVector) -> tuple[Any, Any, Any]:
    (one,) = sk.generate(model, tokenizer, [PROMPT], max_new_tokens=8, steering=steering, watch={"v": vector})
    return one.ids, one.projections["v"]["before"], one.projections["v"]["after"]


def of_the_position_that_chose_it(
    model: Any, tokenizer: Any, steering: sk.Steering, vector: sk.SteeringVector
) -> tuple[Any, Any, Any]:
    """The stream from which a token was chosen: that of the token before."""
    ids, _, _ = watched(model, tokenizer, steering, vector)
    table = sk.project(model, tokenizer, [ids], vector, prompts=[PROMPT], steering=steering)
    earlier = table.iloc[-len(ids) - 1 : -1]
    return ids, earlier["before"], earlier["after"]


def before_is_after(
    model: Any, tokenizer: Any, steering: sk.Steering, vector: sk.SteeringVector
) -> tuple[Any, Any, Any]:
    """Read by a hook that runs after the steering's."""
    ids, _, after = watched(model, tokenizer, steering, vector)
    return ids, after, after


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "a token's projection is of its own stream": (
        check_a_tokens_projections_are_of_the_stream_at_the_token, watched, of_the_position_that_chose_it
    ),
    "before is before the push": (
        check_a_tokens_projections_are_of_the_stream_at_the_token, watched, before_is_after
    ),
}  # fmt: skip
