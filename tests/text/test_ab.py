from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit as sk
from steerkit.text.prompt import render
from tests.reference import hidden_states
from tests.tiny import tiny_model, tiny_tokenizer

EVALS = Path(__file__).parents[3] / "shared" / "data" / "evals"


def row(number: int, matching: str, other: str, options: str = "AB") -> dict[str, Any]:
    listed = "".join(f"\n ({letter}) option {letter}" for letter in options)
    question = f"Question {number}?" + (f"\n\nChoices:{listed}" if options else "")
    return {"question": question, "answer_matching_behavior": matching, "answer_not_matching_behavior": other}


def write(path: Path, rows: list[Any], as_list: bool = False) -> Path:
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(one) + "\n" for one in rows))
    return path


MIXED = [
    *[row(i, " (A)", " (B)") for i in range(5)],
    *[row(i, " (B)", " (A)") for i in range(5, 8)],
    row(8, " (C)", " (A)", "ABC"),
    row(9, " (A)", " (B)", "ABCD"),
    row(10, " (A)", " (C)", "AC"),
    {**row(11, " (A)", " (B)"), "answer_not_matching_behavior": [" (B)", " (C)"]},
]


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_without_two_options_are_dropped_and_the_letters_balanced(as_list: bool, tmp_path) -> None:
    path = write(tmp_path / "mixed.jsonl", MIXED, as_list)
    with pytest.warns(
        UserWarning, match=r"dropped 4 of 12 rows without exactly two options, and 2 to balance.*6 pairs"
    ):
        pairs = sk.read_ab(path)
    assert Counter(pair.positive for pair in pairs) == {" (A)": 3, " (B)": 3}
    assert all({pair.positive, pair.negative} == {" (A)", " (B)"} for pair in pairs)
    numbers = [int(str(pair.prompt).split("?")[0].split()[1]) for pair in pairs]
    assert numbers == sorted(numbers) and max(numbers) < 8
    for number, pair in zip(numbers, pairs, strict=True):
        assert pair.positive == MIXED[number]["answer_matching_behavior"]
        assert pair.group == f"mixed-{number + 1}"
    with pytest.warns(UserWarning):
        assert sk.read_ab(path) == pairs


@pytest.mark.parametrize("as_list", [False, True])
def test_a_byte_order_mark_before_the_questions_is_no_part_of_them(as_list: bool, tmp_path) -> None:
    path = write(tmp_path / "a.json", [row(0, " (A)", " (B)"), row(1, " (B)", " (A)")], as_list)
    plain = sk.read_ab(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert sk.read_ab(path) == plain


def test_yes_and_no_are_balanced_too_and_nothing_is_said_where_nothing_is_dropped(tmp_path) -> None:
    rows = [{**row(i, *answers, ""), "statement": "s"} for i, answers in enumerate([(" Yes", " No"), (" No", " Yes")])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = sk.read_ab(write(tmp_path / "words.jsonl", rows), chat=True)
    assert [pair.positive for pair in pairs] == [" Yes", " No"]
    assert pairs[0].prompt == ({"role": "user", "content": "Question 0?"},)


def test_rows_that_differ_in_their_options_only_share_a_group(tmp_path) -> None:
    one, two = row(1, " (A)", " (B)"), row(1, " (B)", " (A)")
    two["question"] = two["question"].replace("option A", "another")
    assert {pair.group for pair in sk.read_ab(write(tmp_path / "a.jsonl", [one, two]))} == {"a-1"}


def test_files_that_are_no_questions_are_refused_with_the_row(tmp_path) -> None:
    for rows, message in [
        ([row(0, " (A)", " (B)"), {"question": "?"}], r"answer_not_matching_behavior.*row 2; got \['question'\]"),
        ([row(0, " (A)", " (B)"), row(1, " (A)", " (B)")], r"each of the two answers matches sometimes.*'\(A\)': 2"),
        ([row(0, " (C)", " (A)", "ABC")], "got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            sk.read_ab(write(tmp_path / "bad.jsonl", rows))
    with pytest.raises(ValueError, match="row 1; got str"):
        sk.read_ab(write(tmp_path / "bad.json", ["text"], as_list=True))
    with pytest.raises(FileNotFoundError):
        sk.read_ab(tmp_path / "none.jsonl")


def test_the_letter_is_read_and_shown_and_the_last_token_is_the_bracket(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = sk.read_ab(write(tmp_path / "q.jsonl", [row(0, " (A)", " (B)"), row(1, " (B)", " (A)")]))
    letter = sk.collect(model, tokenizer, pairs, layers=[1], position="letter")
    assert letter.items["token"].tolist() == ["A", "B", "B", "A"]
    assert "position 'letter', tokens 'A' 2, 'B' 2" in repr(letter)
    second_last = sk.collect(model, tokenizer, pairs, layers=[1], position=-2)
    assert torch.equal(letter.resid, second_last.resid) and "tokens 'A' 2, 'B' 2" in repr(second_last)
    assert "tokens ')' 4" in repr(sk.collect(model, tokenizer, pairs, layers=[1]))
    ids = [*render(tokenizer, pairs[0].prompt).ids, *render(tokenizer, " (A)").ids]
    torch.testing.assert_close(letter.resid[0, 0], hidden_states(model, ids)[2][-2], rtol=1e-4, atol=1e-5)
    means = sk.collect_means(model, tokenizer, pairs, layers=[1], position="letter")
    one, two = sk.difference_in_means(letter), sk.difference_in_means(means)
    torch.testing.assert_close(one.layers[1], two.layers[1], rtol=1e-5, atol=1e-6)
    assert one.meta["read_position"] == "letter"


def test_a_letter_that_is_not_at_one_place_is_refused() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"expected spans that end alike"):
        sk.collect(model, tokenizer, [sk.ContrastPair("x", " (A)", " B")], layers=[1], position="letter")
    with pytest.raises(ValueError, match="expected a letter in every span"):
        sk.collect(model, tokenizer, [sk.ContrastPair("x", " (A)", " ()")], layers=[1], position="letter")


@pytest.mark.skipif(not EVALS.is_dir(), reason="the model-written evaluations are not on this machine")
@pytest.mark.parametrize(
    ("name", "count"),
    [("corrigible-neutral-HHH", 340), ("survival-instinct", 426), ("wealth-seeking-inclination", 952),
     ("persona-agreeableness", 1000)],
)  # fmt: skip
def test_published_files_are_read_balanced(name: str, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pairs = sk.read_ab(EVALS / f"{name}.jsonl")
    assert len(pairs) == count and set(Counter(pair.positive for pair in pairs).values()) == {count // 2}


def test_pairs_read_from_a_file_of_ab_questions_are_refused_with_the_name_of_its_reader(tmp_path) -> None:
    path = write(tmp_path / "ab.jsonl", [row(1, " (A)", " (B)")])
    with pytest.raises(ValueError, match=r"got A/B questions. Read them with sk.read_ab"):
        sk.read_pairs(path)
