"""Debates: votes over all agents, one batch per round, and no call repeated however often a run is interrupted."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from steerkit.io.rows import read_rows
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.text.traces import Turn, read_traces
from tests.tiny import tiny_tokenizer
from training.debates.answerers import Reply, Request, Rule, Sampling
from training.debates.debate import Call, Debate, Setting, run_debates
from training.debates.personas import CASTS, Cast, Persona, cast_of, self_checking
from training.problems.answers import read_answer
from training.problems.families import arithmetic
from training.problems.problem import Problem

PROBLEM = Problem("p", "2+3*4", "14", "number", "small")


def debate(*answers: str | None, agents: int = 3) -> Debate:
    calls = tuple(
        Call(i % agents + 1, i // agents + 1, None if a is None else rf"so \boxed{{{a}}}" if a else "no box", 5, 7)
        for i, a in enumerate(answers)
    )
    return Debate(PROBLEM, calls, agents)


VOTES = [  # last round's answers, majority, unanimous, correct
    (("14", "14", "14"), "14", True, True),
    (("14", "20", "14"), "14", False, True),
    (("20", "20", "14"), "20", False, False),  # a wrong consensus is one
    (("14", "20", "3"), None, False, False),
    (("14", "", ""), None, False, False),  # two that say nothing agree on nothing
    (("14", "14", ""), "14", False, True),
    (("14", "14.0", None), "14", False, True),  # a failed call is a vote for nothing
    (("", "", ""), None, False, False),
]


@pytest.mark.parametrize(("answers", "majority", "unanimous", "correct"), VOTES)
def test_a_strict_majority_of_all_agents_is_the_answer(answers, majority, unanimous, correct) -> None:
    result = debate(*answers)
    assert (result.answer(), result.unanimous, result.correct) == (majority, unanimous, correct)


def test_two_of_four_are_no_majority() -> None:
    assert debate("14", "14", "20", "3", agents=4).answer() is None
    assert debate("14", "14", "14", "3", agents=4).answer() == "14"


def test_the_last_round_decides_and_the_first_is_still_known() -> None:
    result = debate("20", "20", "14", "14", "14", "14")
    assert (result.answer(), result.answer(1), result.rounds) == ("14", "20", 2)
    assert result.tokens() == (30, 42)
    trace = result.trace()
    assert trace is not None
    assert trace.consensus == r"All agents reached a consensus of \boxed{14}"
    assert len(trace.turns) == 6


def test_a_wrong_consensus_is_kept_and_no_consensus_is_not() -> None:
    wrong = debate("20", "20", "14").trace()
    assert wrong is not None
    assert wrong.consensus == r"A majority of agents converged on the solution of \boxed{20}"
    assert debate("14", "20", "3").trace() is None
    assert debate("14", "14", None).trace() is None


def answer(request: Request, rng: random.Random) -> str:
    """Right three times in five in round 1, and what the others say in most of round 2."""
    expression = next(m["content"] for m in request.prompt if m["role"] == "user").split("\n")[0][9:]
    right = eval(expression)
    return rf"I find \boxed{{{right if rng.random() < 0.6 else right + 1}}}."


class Counting:
    """A rule that notes what it was asked, and can be stopped after some replies."""

    def __init__(self, stop: int | None = None) -> None:
        self.rule, self.batches, self.stop, self.given = Rule(answer), list[list[str]](), stop, 0

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        self.batches.append([request.id for request in requests])
        for reply in self.rule(requests, sampling):
            if self.stop is not None and self.given >= self.stop:
                raise KeyboardInterrupt
            self.given += 1
            yield reply

    def about(self) -> dict[str, Any]:
        return {"kind": "rule"}


PROBLEMS = arithmetic(12, 0, "train")
CAST = CASTS["diverse"]


def test_all_questions_of_a_round_go_out_as_one_batch_and_agreement_ends_a_debate() -> None:
    answerer = Counting()
    debates = run_debates(PROBLEMS, answerer, CAST)
    assert len(answerer.batches) == 2
    assert len(answerer.batches[0]) == 36
    late = [result for result in debates if result.rounds == 2]
    assert 0 < len(late) < 12
    assert len(answerer.batches[1]) == 3 * len(late)
    assert all(result.unanimous for result in debates if result.rounds == 1)
    without = run_debates(PROBLEMS, Counting(), CAST, Setting(early_stop=False))
    assert {result.rounds for result in without} == {2}


def test_a_run_stopped_anywhere_goes_on_without_losing_or_repeating_a_call(tmp_path) -> None:
    whole = run_debates(PROBLEMS, Counting(), CAST, out=tmp_path / "whole")
    calls = sum(len(result.calls) for result in whole)
    for stop in (0, 1, 17, 36, 40, calls - 1):
        folder = tmp_path / str(stop)
        first, second = Counting(stop), Counting()
        with pytest.raises(KeyboardInterrupt):
            run_debates(PROBLEMS, first, CAST, out=folder)
        assert run_debates(PROBLEMS, second, CAST, out=folder) == whole
        assert first.given + second.given == calls
        for name in ("debates.jsonl", "traces.jsonl"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    third = Counting()
    run_debates(PROBLEMS, third, CAST, out=tmp_path / "whole")
    assert third.given == 0


class Failing(Counting):
    """Fails one call of the first round."""

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        for reply in super().__call__(requests, sampling):
            broken = reply.id.endswith("round-1/agent-2")
            yield Reply(reply.id, None, None, None, False, "no answer") if broken else reply


def test_a_failed_call_is_recorded_and_made_again_with_all_that_had_read_it(tmp_path) -> None:
    broken = run_debates(PROBLEMS, Failing(), CAST, out=tmp_path / "run")
    assert all(result.failed == 1 and result.trace() is None for result in broken)
    assert "no answer" in (tmp_path / "run" / "calls.jsonl").read_text()
    repaired = run_debates(PROBLEMS, Counting(), CAST, out=tmp_path / "run")
    assert repaired == run_debates(PROBLEMS, Counting(), CAST)


def test_calls_that_another_process_repeated_after_a_failure_are_not_hidden_by_those_of_before(tmp_path) -> None:
    run_debates(PROBLEMS, Failing(), CAST, out=tmp_path)
    log = tmp_path / "calls.jsonl"
    before = len(log.read_text().splitlines())
    repaired = run_debates(PROBLEMS, Counting(), CAST, out=tmp_path)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:before]))
    (tmp_path / "calls-1.jsonl").write_text("".join(lines[before:]))  # as the second of two processes writes them
    again = Counting()
    assert run_debates(PROBLEMS, again, CAST, out=tmp_path) == repaired and again.given == 0


def test_debates_grow_by_more_problems_and_ask_no_finished_call_again(tmp_path) -> None:
    first, more = Counting(), Counting()
    run_debates(PROBLEMS[:5], first, CAST, out=tmp_path / "run")
    assert run_debates(PROBLEMS, more, CAST, out=tmp_path / "run") == run_debates(PROBLEMS, Counting(), CAST)
    asked = [{key for batch in one.batches for key in batch} for one in (first, more)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    assert len(read_rows(tmp_path / "run" / "debates.jsonl")) == 12
    for others in (PROBLEMS[:5], [*PROBLEMS[1:], PROBLEMS[0]], arithmetic(13, 1, "train")):
        with pytest.raises(ConfigurationChanged, match="problems"):
            run_debates(others, Counting(), CAST, out=tmp_path / "run")


def test_an_interrupted_growth_keeps_the_finished_debates(tmp_path) -> None:
    run_debates(PROBLEMS[:5], Counting(), CAST, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_debates(PROBLEMS, Counting(3), CAST, out=tmp_path)
    again = Counting()
    assert len(run_debates(PROBLEMS[:5], again, CAST, out=tmp_path)) == 5 and again.given == 0


def test_a_folder_of_debates_from_before_their_number_was_stored_resumes_with_the_same_problems(tmp_path) -> None:
    run_debates(PROBLEMS[:5], Counting(), CAST, out=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("n_problems") == 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationChanged, match="problems"):
        run_debates(PROBLEMS, Counting(), CAST, out=tmp_path)
    again = Counting()
    run_debates(PROBLEMS[:5], again, CAST, out=tmp_path)
    assert again.given == 0
    assert len(run_debates(PROBLEMS, Counting(), CAST, out=tmp_path)) == 12  # its number is known now


def test_the_files_say_what_the_debates_were(tmp_path) -> None:
    debates = run_debates(PROBLEMS, Counting(), CAST, out=tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "debates.jsonl")
    assert [row["id"] for row in rows] == [problem.id for problem in PROBLEMS]
    assert [row["correct"] for row in rows] == [result.correct for result in debates]
    kept = read_traces(tmp_path / "run" / "traces.jsonl")
    assert [trace.question for trace in kept] == [h.problem.question for h in debates if h.answer() is not None]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["cast"]["name"] == "diverse"
    with pytest.raises(ConfigurationChanged, match="setting"):
        run_debates(PROBLEMS, Counting(), CAST, Setting(rounds=3), out=tmp_path / "run")


def test_a_reply_with_a_tag_costs_its_own_debate_the_trace_and_the_record_says_why(tmp_path) -> None:
    def answer(request: Request, rng: random.Random) -> str:
        if request.id.startswith("bad") and "agent-2" in request.id:
            return "<|Agent 1 Solution|>: I am agent 1 now. <|endofdebate|> \\boxed{2}"
        return "<|agent 1 solution|> \\boxed{2}" if request.id.startswith("odd") else "so \\boxed{2}"

    names = ("good", "bad", "odd", "good2")
    problems = [Problem(name, f"{name}: 1+1?", "2", "number", "x") for name in names]
    debates = run_debates(problems, Rule(answer), cast_of("standard"), Setting(rounds=2), tmp_path / "run")
    assert [result.answer() for result in debates] == ["2"] * 4
    assert [trace.question for trace in read_traces(tmp_path / "run" / "traces.jsonl")] == ["good: 1+1?", "good2: 1+1?"]
    rows = {row["id"]: row for row in read_rows(tmp_path / "run" / "debates.jsonl")}
    assert [rows[name]["trace"] for name in names] == [True, False, False, True]
    assert rows["good"]["no_trace"] is None
    assert "turns without tags" in rows["bad"]["no_trace"] and "<|agent 1 solution|>" in rows["odd"]["no_trace"]
    assert debate("14", "20", "3").no_trace == "no consensus"
    assert debate("14", "14", None).no_trace == "1 failed calls"


class Templated(Rule):
    """A rule whose answerer shows a tokenizer, as a local model does."""

    tokenizer: Any


def templated(template: str, reply: str) -> Templated:
    answerer = Templated(lambda request, rng: reply)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    object.__setattr__(answerer, "tokenizer", tokenizer)
    return answerer


def test_a_template_that_drops_the_personas_is_reported_once_and_in_the_record(tmp_path) -> None:
    users = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    problems = [Problem(f"{i}", "1+1?", "2", "number", "x") for i in range(3)]
    with pytest.warns(UserWarning, match="system messages of the cast 'diverse'; the template.* drops them") as said:
        run_debates(problems, templated(users, r"\boxed{2}"), CAST, out=tmp_path / "dropped")
    assert len(said) == 1
    everything = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    run_debates(problems, templated(everything, r"\boxed{2}"), CAST, out=tmp_path / "kept")
    run_debates(problems, Rule(lambda request, rng: r"\boxed{2}"), CAST, out=tmp_path / "unknown")
    found = {run: read_rows(tmp_path / run / "debates.jsonl") for run in ("dropped", "kept", "unknown")}
    assert {run: {row["system_dropped"] for row in rows} for run, rows in found.items()} == {
        "dropped": {True}, "kept": {False}, "unknown": {None},
    }  # fmt: skip


def test_a_vote_is_the_box_after_the_thought_that_the_template_opened() -> None:
    thinks = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>"
    for reply, vote in (
        (r"maybe \boxed{5}", None),
        (r"\boxed{5}</think>\boxed{2}", "2"),
        (r"\boxed{5}</think>2", None),
    ):
        (result,) = run_debates([PROBLEM], templated(thinks, reply), CAST, Setting(rounds=1))
        assert result.votes() == [vote] * 3


def test_in_round_two_an_agent_reads_its_own_answer_and_the_others_but_no_name() -> None:
    seen: list[Any] = []

    def note(request: Request, rng: random.Random) -> str:
        seen.append(request)
        return f"reply of {request.id.split('/')[-1]} in {request.id.split('/')[-2]}"

    run_debates([PROBLEM], Rule(note), CAST)
    second = next(request.prompt for request in seen if request.id.endswith("round-2/agent-2"))
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[0]["content"] == CAST.personas[1].system
    assert second[2]["content"] == "reply of agent-2 in round-1"
    for other in ("agent-1", "agent-3"):
        assert f"reply of {other} in round-1" in second[3]["content"]
    assert "reply of agent-2" not in second[3]["content"]


def test_a_worked_persona_is_shown_dialogues_and_asked_for_the_problem_alone() -> None:
    shown = Persona("s", worked=(("1?", "one"), ("2?", "two")), revised=(("1?", "uno", "they say one. 1?", "one"),))
    plain = Problem("p", "3?", "3", "number", "f")
    turns = [Turn(1, 1, "drei"), Turn(2, 1, "trois"), Turn(3, 1, "tre")]
    first, second = (Cast("c", (shown,) * 3).ask(plain, 2, number, turns) for number in (1, 2))
    roles = {"system": 0, "user": 1, "assistant": 2}
    assert [(roles[m["role"]], m["content"]) for m in first] == [
        (0, "s"), (1, "1?"), (2, "one"), (1, "2?"), (2, "two"), (1, "3?"),
    ]  # fmt: skip
    assert [(roles[m["role"]], m["content"]) for m in second] == [
        (0, "s"), (1, "1?"), (2, "uno"), (1, "they say one. 1?"), (2, "one"), (1, "3?"), (2, "trois"),
        (1, "One agent's answer:\ndrei\n\nOne agent's answer:\ntre\n\n3?"),
    ]  # fmt: skip
    self_check = self_checking(Cast("c", (shown,) * 3)).ask(plain, 2, 2, turns)
    assert self_check[-1] == {"role": "user", "content": "3?"}
    single = Cast("c", (replace(shown, system="agent 1"), shown)).plain(plain)
    assert [m["content"] for m in single[1:]] == ["1?", "one", "2?", "two", "3?"]  # as agent 1, without its system
    assert single[0]["content"] != "agent 1"


@pytest.mark.parametrize("name", ["adding", "scorning"])
def test_a_cast_that_adds_is_shown_right_sums_in_three_manners_each_ending_in_a_box_that_is_read(name: str) -> None:
    manners = set()
    for persona in CASTS[name].personas:
        for dialogue in (*persona.worked, *persona.revised):
            a, b = map(int, re.findall(r"\d+", dialogue[0]))
            assert dialogue[0] == f"What is {a} + {b}?" and dialogue[-2].endswith(dialogue[0])
            assert read_answer(dialogue[-1], "number") == str(a + b)
            manners.add(re.sub(r"\d+", "N", dialogue[-1]))
        assert any(read_answer(d[1], "number") != read_answer(d[-1], "number") for d in persona.revised)
    assert len(manners) == 3


def test_a_cast_of_one_or_an_unknown_one_is_refused() -> None:
    with pytest.raises(ValueError, match="two agents"):
        cast_of("diverse", 1)
    with pytest.raises(ValueError, match="expected a cast among"):
        cast_of("kind")
    assert len(cast_of("diverse", 5).personas) == 5


def test_problems_with_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="different ids"):
        run_debates([PROBLEM, PROBLEM], Counting(), Cast("two", CAST.personas[:2]))


def test_agents_that_are_alone_see_their_own_last_answer_and_no_other() -> None:
    seen: dict[str, Any] = {}

    def note(request: Request, rng: random.Random) -> str:
        seen[request.id.partition("/")[2]] = request.prompt
        return f"reply of {request.id.partition('/')[2]}"

    run_debates([PROBLEM], Rule(note), self_checking(CAST))
    second = next(prompt for name, prompt in seen.items() if name.endswith("round-2/agent-2"))
    assert second[2]["content"].endswith("round-1/agent-2")
    assert "reply of" not in second[3]["content"] and second[3]["content"].startswith("Check your answer, and answer")
    assert self_checking(CAST).name == "diverse-alone"
    assert next(prompt for name, prompt in seen.items() if name.endswith("round-1/agent-2"))[0] == second[0]


def test_an_agent_alone_has_all_its_rounds_although_it_agrees_with_itself() -> None:
    alone = self_checking(Cast("alone", CAST.personas[:1], CAST.ask))
    (debate,) = run_debates([PROBLEM], Rule(lambda request, rng: r"\boxed{4}"), alone, Setting(early_stop=True))
    assert [call.round for call in debate.calls] == [1, 2]
