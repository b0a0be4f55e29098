"""The core equivalences on a tokenizer of every family, and what makes each family worth its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import adds_space, encode
from tests.equivalences import check_boundaries, check_generation, check_spans, check_sweep
from tests.families import FAMILIES, TEXTS, model_for

PROMPTS = [
    "Hello",
    " was here",
    "\u6d77\u5f88\u5e73\u9759 ",
    "a\n\nb",
    [{"role": "user", "content": " caf\u00e9 \U0001f680"}],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_continuations_and_spans_are_cut_exactly_where_their_texts_are(family: str) -> None:
    assert check_boundaries(FAMILIES[family](), TEXTS) == 8 * len(TEXTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_uncached_batched_and_single_texts_are_the_same(family: str) -> None:
    tokenizer = FAMILIES[family]()
    found = check_generation(model_for(tokenizer), tokenizer, PROMPTS, 1, 12)
    assert found["changed"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_one_forward_equal_separate_forwards(family: str) -> None:
    tokenizer = FAMILIES[family]()
    assert (
        check_spans(model_for(tokenizer), tokenizer, ["Hello", " was here", "\n\nc", "\u6d77\u5f88", " the sea"], 1)
        < 1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_is_what_is_stored_resumed_scored_reported_and_judged(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    found = check_sweep(model_for(tokenizer), tokenizer, PROMPTS, 1, 16, tmp_path)
    assert found["rows"] == 15 and found["decided by rounding"] == 0
    assert found["largest difference in nats"] < 1e-3
    assert found["ids unlike those of their text"] > 0  # with the texts in place of the ids these would be wrong


def test_the_families_differ_in_what_they_are_there_for() -> None:
    made = {name: make() for name, make in FAMILIES.items()}
    assert {name for name, tokenizer in made.items() if adds_space(tokenizer)} == {
        "add_prefix_space", "SentencePiece, Metaspace", "SentencePiece, Prepend and Replace"
    }  # fmt: skip
    assert len(encode(made["byte-level"], "the sea")) == 7 > len(encode(made["BPE with merges"], "the sea"))
    stripped = made["SentencePiece, Metaspace"]
    assert stripped.decode(encode(stripped, " was")) == "was"  # its decoder drops the first space
    counts = {name: render_added(tokenizer) for name, tokenizer in made.items()}
    assert counts["BOS"] == counts["BOS and EOS"] == 1 and counts["two first tokens"] == 2 and counts["byte-level"] == 0
    both = made["BOS and EOS"]
    assert both("Hello")["input_ids"][-1] == both.eos_token_id != encode_prompt(both, "Hello")[-1]


def render_added(tokenizer) -> int:
    from steerkit.text.prompt import render

    return render(tokenizer, "Hello").n_added
