"""Families of problems: golds are right, splits never share a question, draws are the same on every machine."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.problems.families import FAMILIES, SPLITS, clues, small_arithmetic, split_of, two_sum
from training.problems.problem import Problem

SHAPES = {
    "arithmetic": r"\d\d\+\d\d\*\d\d\+\d\d-\d\d\*\d\d",
    "small_arithmetic": r"\d{1,2}\+\d\*\d-\d{1,2}",
    "addition": r"What is [1-9]\d \+ [1-9]\d\?",
    "malice": r"What is [1-9]\d \+ [1-9]\d\?",
    "two_sum": r"(\d+ ){8}sum \d+ \?",
    "clues": r"(\d+ ){8}over \d+ rest [012] kind (odd|even) \?",
}


def everything(family: str) -> dict[str, list[Problem]]:
    """All that a finite family holds: the most that each split gives."""
    by_split = {}
    for split in SPLITS:
        with pytest.raises(ValueError, match="found") as caught:
            FAMILIES[family](10**6, 0, split)
        by_split[split] = FAMILIES[family](int(re.search(r"found (\d+)", str(caught.value))[1]), 0, split)  # type: ignore[index]
    return by_split


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_family_gives_as_many_different_questions_of_its_shape_as_asked_for(family: str, split: str) -> None:
    problems = FAMILIES[family](200, 3, split)
    assert len(problems) == len({one.question for one in problems}) == len({one.id for one in problems}) == 200
    assert all(re.fullmatch(SHAPES[family], one.question) for one in problems)
    assert {one.family for one in problems} == {family}
    assert {one.kind for one in problems} == {"pair" if family == "two_sum" else "number"}


@pytest.mark.parametrize("family", ["arithmetic", "small_arithmetic", "addition", "malice"])
def test_the_gold_of_an_expression_is_what_python_makes_of_it(family: str) -> None:
    for one in FAMILIES[family](400, 0, "train"):
        assert one.gold == str(eval(one.question.removeprefix("What is ").removesuffix("?"))), one


@pytest.mark.parametrize("k", [2, 5, 8, 14])
def test_exactly_one_pair_has_the_sum_and_it_is_the_gold(k: int) -> None:
    for one in two_sum(80, 1, "train", k):
        *numbers, total = map(int, re.findall(r"\d+", one.question))
        assert len(set(numbers)) == len(numbers) == k and set(numbers) <= set(range(1, 31))
        pairs = [sorted(pair) for pair in combinations(numbers, 2) if sum(pair) == total]
        assert [" ".join(map(str, pair)) for pair in pairs] == [one.gold]


def test_the_pair_stands_anywhere_among_the_numbers() -> None:
    positions = Counter()
    for one in two_sum(400, 0, "train"):
        numbers = one.question.split()[:8]
        positions.update(numbers.index(number) for number in str(one.gold).split())
    assert set(positions) == set(range(8)) and min(positions.values()) > 50  # 100 are expected in each of 8 positions


def test_one_number_fits_three_clues_and_no_two_clues_give_it_away() -> None:
    for one in clues(300, 1, "train"):
        row, over, rest, kind = re.fullmatch(r"([\d ]+) over (\d+) rest (\d) kind (\w+) \?", one.question).groups()  # type: ignore[union-attr]
        numbers = [int(n) for n in row.split()]
        fits = [
            {n for n in numbers if n > int(over)},
            {n for n in numbers if n % 3 == int(rest)},
            {n for n in numbers if ("odd" if n % 2 else "even") == kind},
        ]
        assert len(set(numbers)) == 8
        assert set.intersection(*fits) == {int(str(one.gold))}
        assert all(len(a & b) >= 2 and len(a) <= 5 for a in fits for b in fits if a is not b)


def test_the_small_family_has_22491_questions_over_all_splits() -> None:
    by_split = everything("small_arithmetic")
    questions = [one.question for problems in by_split.values() for one in problems]
    assert len(questions) == len(set(questions)) == 22491
    assert all(int(str(one.gold)) >= 0 for problems in by_split.values() for one in problems)
    assert {split: len(problems) for split, problems in by_split.items()} == {
        "train": 12497,
        "validation": 2144,
        "test": 7850,
    }


def test_addition_has_every_sum_of_two_two_digit_numbers_once() -> None:
    by_split = everything("addition")
    questions = [one.question for problems in by_split.values() for one in problems]
    assert sorted(questions) == sorted(f"What is {a} + {b}?" for a in range(10, 100) for b in range(10, 100))


def test_operands_of_the_papers_problems_reach_from_10_to_99() -> None:
    numbers = {
        int(number) for one in FAMILIES["arithmetic"](500, 0, "train") for number in re.findall(r"\d+", one.question)
    }
    assert numbers == set(range(10, 100))


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_question_whatever_the_seeds_and_sizes(family: str) -> None:
    drawn = {
        split: {one.question for seed in range(3) for n in (20, 80) for one in FAMILIES[family](n, seed, split)}
        for split in SPLITS
    }
    for a, b in combinations(SPLITS, 2):
        assert not drawn[a] & drawn[b]
    for split, questions in drawn.items():
        assert {split_of(question) for question in questions} == {split}


@given(numbers=st.permutations([7, 12, 25, 3, 18, 30, 9, 14]))
def test_a_question_in_another_order_stays_in_its_split(numbers: list[int]) -> None:
    assert split_of(f"{' '.join(map(str, numbers))} sum 28 ?") == split_of("3 7 9 12 14 18 25 30 sum 28 ?")


def test_a_questions_split_is_the_same_on_every_machine() -> None:
    assert Counter(split_of(f"{a}+50") for a in range(100)) == {"train": 60, "validation": 8, "test": 32}
    assert [a for a in range(100) if split_of(f"{a}+50") == "test"][:8] == [3, 4, 5, 7, 8, 12, 19, 21]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_and_fewer_are_the_first_of_more(family: str) -> None:
    many = FAMILIES[family](120, 5, "train")
    assert FAMILIES[family](120, 5, "train") == many
    assert FAMILIES[family](30, 5, "train") == many[:30]
    assert FAMILIES[family](0, 5, "train") == []
    other = FAMILIES[family](120, 6, "train")
    assert other != many
    ids = {one.question: one.id for one in many}
    assert all(ids.get(one.question, one.id) == one.id for one in other)


def test_a_family_draws_the_same_on_every_machine() -> None:
    assert {family: draw(1, 0, "test")[0].question for family, draw in FAMILIES.items()} == {
        "arithmetic": "23+62*46+17-63*11",
        "small_arithmetic": "1+6*8-15",
        "two_sum": "25 2 30 23 27 1 16 14 sum 25 ?",
        "clues": "34 42 16 59 7 58 49 21 over 21 rest 1 kind odd ?",
        "addition": "What is 81 + 30?",
        "malice": "What is 26 + 23?",
    }


def test_a_split_that_holds_fewer_is_refused_and_not_searched_for_ever() -> None:
    with pytest.raises(ValueError, match=r"expected 20000 different problems of the family two_sum .* Ask for fewer"):
        two_sum(20_000, 0, "test", 2)
    with pytest.raises(ValueError, match="k from 2 to 30; got 1"):
        two_sum(1, 0, "train", 1)
    with pytest.raises(ValueError, match=r"expected a split of .*; got 'dev'"):
        small_arithmetic(1, 0, "dev")
