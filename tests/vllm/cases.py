"""The requests whose tokens vLLM and our engine must agree on: 16 prompts x 20 steerings x 64 tokens.

They were written before the first comparison, and none may be dropped.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import steerkit as sk
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.text.prompt import encode_prompt

NEW_TOKENS = 64
PROMPTS = (
    "x",
    "The sea",
    "The first thing she saw",
    "In the evening the street was",
    "A letter came. It said:",
    "1, 2, 3, 4,",
    "Q: What is the capital of France?\nA:",
    "def add(a, b):\n    return",
    "Once upon a time there was a small town by the river, and in that town",
    "Dear Sir or Madam,\n\nI am writing to you because",
    "The recipe needs two eggs, a cup of flour, a pinch of salt and some milk. First,",
    "She opened the door, looked around, closed it again, and told everybody who was waiting outside that",
    "To be, or not to be, that is the question: whether it is nobler in the mind to suffer the slings and arrows of",
    "The committee met on Monday. It discussed the budget, the new building, the old building, the roof of the old "
    "building and the weather. In the end it decided",
    "List of animals: cat, dog, horse, cow, sheep, goat, pig, hen, duck, goose, mouse, rat, fox, wolf, bear, deer, "
    "hare",
    "One morning, when the train was late again, the stationmaster wrote a notice. It read: dear passengers, the train "
    "is late because the bridge is closed, the bridge is closed because of the water, and the water is high because of "
    "the rain. We are sorry, and we hope that",
)
"""Of 1 to about 60 tokens, so that some prompts share no block, and some fill several."""
MANY = (12, 14, 16)
STEERINGS: tuple[Sequence[Mapping[str, Any]], ...] = (
    (),
    ({"layer": 16, "coefficient": 1.0, "positions": "generated"},),
    ({"layer": 16, "coefficient": 2.0, "positions": "from_last_prompt_token"},),
    ({"layer": 16, "coefficient": -1.5, "positions": "prompt"},),
    ({"layer": 16, "coefficient": 1.0, "positions": "all"},),
    ({"layer": 16, "coefficient": 2.0, "positions": "generated:5"},),
    ({"layer": 16, "coefficient": 2.0, "positions": "all:4"},),
    ({"layer": 16, "coefficient": 3.0, "positions": "prompt:2"},),
    ({"layer": MANY, "coefficient": 0.5, "positions": "from_last_prompt_token"},),
    ({"layer": MANY, "coefficient": 0.5, "positions": "all"},),
    ({"layer": 29, "coefficient": 0.5, "positions": "all"},),
    ({"layer": 0, "coefficient": 0.5, "positions": "from_last_prompt_token:8"},),
    ({"layer": 16, "coefficient": 1.0, "positions": "all", "operation": "ablate"},),
    ({"layer": 16, "coefficient": 1.0, "positions": "generated", "operation": "ablate"},),
    ({"layer": 16, "coefficient": -2.0, "positions": "prompt", "operation": "ablate"},),
    ({"layer": "all", "coefficient": 0.5, "positions": "all", "operation": "ablate"},),
    ({"layer": 16, "coefficient": 0.0, "positions": "all"},),
    (
        {"layer": 14, "coefficient": 1.0, "positions": "all"},
        {"layer": 20, "coefficient": 1.0, "positions": "all", "operation": "ablate"},
    ),
    (
        {"layer": 16, "coefficient": 1.0, "positions": "prompt"},
        {"layer": 16, "coefficient": 2.0, "positions": "generated"},
    ),
    (
        {"layer": 16, "coefficient": 2.0, "positions": "all"},
        {"layer": 16, "coefficient": 0.5, "positions": "from_last_prompt_token", "operation": "ablate"},
    ),
)
"""For each request its steerings, in the order in which they act; all with the vector `mood`."""
SUBJECTS = ("weather", "journey", "meeting", "morning", "garden", "dinner", "city", "film")


def cases(count: int | None = None) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Prompts with their steerings; with `count`, that many, spread over both."""
    every = [(prompt, steering) for steering in STEERINGS for prompt in PROMPTS]
    if count is None:
        return every
    return [every[(index * 37) % len(every)] for index in range(count)]


def mood(model: Any, tokenizer: Any) -> sk.SteeringVector:
    """The vector of all cases: cheerful minus gloomy ends of eight sentences."""
    ends = (" wonderful, a joy from the first minute.", " dreadful, a pain from the first minute.")
    pairs = [sk.ContrastPair(f"The {subject} was", *ends, subject) for subject in SUBJECTS]
    return sk.difference_in_means(sk.collect(model, tokenizer, pairs, position="mean"))


def steerings(vector: sk.SteeringVector, steering: Sequence[Mapping[str, Any]]) -> tuple[sk.Steering, ...]:
    """A case's steerings for our engine."""
    return tuple(
        sk.Steering(vector, one["coefficient"], one["positions"], one.get("operation", "add"), layer=one["layer"])
        for one in steering
    )


@contextlib.contextmanager
def endless(model: Any, tokenizer: Any) -> Iterator[Any]:
    """The tokenizer of a model that no token ends inside the `with`."""
    unending = copy.deepcopy(tokenizer)
    unending.eos_token = unending.chat_template = None
    kept = model.generation_config
    model.generation_config = copy.deepcopy(kept)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    try:
        yield unending
    finally:
        model.generation_config = kept


def reference(model: Any, tokenizer: Any, vector: sk.SteeringVector, new: int = NEW_TOKENS) -> list[list[int]]:
    """The new tokens of every case, by our engine, greedy, whatever token ends a text."""
    rows = [Row(encode_prompt(tokenizer, prompt), steerings(vector, steering)) for prompt, steering in cases()]
    with endless(model, tokenizer) as unending:
        done = dict(pair for batch in decode(model, unending, rows, [], max_new_tokens=new) for pair in batch)
    return [list(done[index].ids) for index in range(len(rows))]


def margin(model: Any, tokenizer: Any, vector: sk.SteeringVector, case: int, ids: Sequence[int], other: int) -> float:
    """How much likelier our engine's next token is than another one after some new tokens of a case, in nats.

    Computed by one forward of prompt and tokens, without a cache.
    """
    prompt, steering = cases()[case]
    start = encode_prompt(tokenizer, prompt)
    with contextlib.ExitStack() as stack:
        for one in steerings(vector, steering):
            stack.enter_context(one.on(model, prompt_length=len(start)))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*start, *ids]]), use_cache=False).logits[0, -1]
    return float(logits.log_softmax(-1).max() - logits.log_softmax(-1)[other])
