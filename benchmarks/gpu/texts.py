"""Texts of an exact length: a tokenizer with one token per byte, and debates that fill a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerkit.text.tags import tags
from steerkit.text.traces import DebateTrace, Turn
from training.problems.problem import Problem
from training.train.checkpoints import with_tags

FIRST = "Problem: 1+1\n\n"


def byte_tokenizer() -> Any:
    """A tokenizer with a token for each of the 256 bytes, an end token and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")


def debates(tokenizer: Any, lengths: list[int]) -> list[DebateTrace]:
    """Debates of one round whose training texts have these numbers of tokens, tags and end token counted.

    Raises:
        ValueError: a length that is too short for the tags.
    """
    tagged = with_tags(tokenizer, tags(2, 1))

    def debate(filled: int) -> DebateTrace:
        turns = [Turn(1, 1, "x" * filled), Turn(2, 1, "y")]
        return DebateTrace.of("1+1", turns, r"A majority of agents converged on the solution of \boxed{2}", "2")

    empty = debate(1)
    used = len(tagged(FIRST)["input_ids"]) + len(tagged(empty.body)["input_ids"]) + 1
    if short := [length for length in lengths if length < used]:
        raise ValueError(f"expected at least {used} tokens; got {short}. Pass longer texts.")
    return [debate(1 + length - used) for length in lengths]


def scripted(problems: Sequence[Problem]) -> list[DebateTrace]:
    """Debates of three agents and two rounds in which all answers are right, for runs that are no measurement."""
    traces = []
    for problem in problems:
        turns = [Turn(a, r, rf"\boxed{{{problem.gold}}}") for r in (1, 2) for a in (1, 2, 3)]
        consensus = rf"All agents reached a consensus of \boxed{{{problem.gold}}}"
        traces.append(DebateTrace.of(problem.question, turns, consensus, problem.gold))
    return traces
