"""`python -m training` lists the stages; every example is accepted by the stage's options, and errors are one line."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from training import __main__ as commands

ROOT = Path(__file__).parents[2]


def test_the_list_is_printed_without_loading_torch() -> None:
    code = "import sys; sys.argv = ['training']; import runpy\n"
    code += "try:\n    runpy.run_module('training', run_name='__main__')\nexcept SystemExit as stop:\n"
    code += "    assert stop.code == 0, stop.code\nassert 'torch' not in sys.modules\n"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == commands.listing()
    for name, stage in commands.STAGES.items():
        assert f"{name}: {stage.does}" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "example"), [(name, one) for name, stage in commands.STAGES.items() for one in stage.examples]
)
def test_an_example_of_the_list_passes_the_options_of_its_stage(name, example, monkeypatch) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    module = import_module(commands.STAGES[name].module)
    assert list(inspect.signature(module.main).parameters) == ["arguments"]

    class Parsed(Exception):
        pass

    import argparse

    original = argparse.ArgumentParser.parse_args

    def parse(parser, arguments=None, namespace=None):
        original(parser, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        commands.main([name, *shlex.split(example)])


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("sft", "sft.micro_batch=4", "expected a micro_batch that divides batch, 1 on each of 8 processes"),
        ("grpo", "grpo.micro_batch=4", "expected prompts to be a multiple of the 8 processes"),
        ("grpo", "grpo.vllm=true", "expected a GPU for completions by vLLM"),
    ],
)
def test_batches_and_rollouts_that_are_refused_are_found_before_a_model_is_loaded(
    name, setting, message, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    import torch

    import steerkit as sk
    from training.train import distributed

    rows = [{"question": f"{n}+0", "rounds": [[rf"\boxed{{{n}}}"] * 2]} for n in range(8)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"question": f"What is {n} + 0?", "gold": n} for n in range(8)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "process_count", lambda: 8 if "vllm" not in setting else 1)
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"sft": ["--traces", "traces.jsonl"], "grpo": ["--problems", "my.jsonl"]}[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").mkdir()
    small = {"sft": "sft.batch=8", "grpo": "grpo.prompts=4"}[name]
    settings = ["--set", small, "--set", setting]
    with pytest.raises(SystemExit):
        commands.main([name, "--run", "run", "--checkpoint", "./MODEL", *given, *settings])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["debates", "sft", "grpo", "evolve", "curve", "evaluate"])
def test_processes_meet_and_choose_their_gpus_before_a_stage_reads_or_loads_anything(name, monkeypatch) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    from training.commands import options

    class Met(Exception):
        pass

    def meet() -> bool:
        raise Met

    monkeypatch.setattr(options, "is_distributed", meet)
    monkeypatch.setattr(options, "get_preset", lambda *_: pytest.fail("the stage has begun"))
    module = import_module(commands.STAGES[name].module)
    monkeypatch.setattr(module, "settings_of", lambda *_: pytest.fail("the stage has begun"))
    with pytest.raises(Met):
        commands.main([name, "--run", "run"])


def test_the_held_out_problems_are_of_every_part_of_a_file(tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    from training.train import evolve

    rows = [{"question": f"{task}: what is {n} + 0?", "gold": n} for task in "abcd" for n in range(25)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "MODEL").mkdir()
    monkeypatch.chdir(tmp_path)
    seen = []

    class Begun(Exception):
        pass

    def begin(start, problems, held, *_, **__):
        seen.append((problems, held))
        raise Begun

    monkeypatch.setattr(evolve, "evolve", begin)
    for _ in range(2):
        with pytest.raises(Begun):
            commands.main(
                ["evolve", "--run", "run", "--problems", "my.jsonl", "--checkpoint", "./MODEL", "--held", "20"]
            )
    (problems, held), again = seen
    assert again == (problems, held) and len(held) == 20
    assert {one.question[0] for one in held} == set("abcd") and not {one.id for one in held} & {o.id for o in problems}


def test_an_unknown_stage_exits_with_2_and_names_the_list(capsys) -> None:
    assert commands.main(["sftt"]) == 2
    assert (
        "expected a stage among problems, debates, sft, grpo, evolve, curve, evaluate, benchmark, imad; got 'sftt'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["problems", "--problems", "chess"], "expected a family among"),
        (["problems", "--problems", "missing.jsonl"], "missing.jsonl"),
        (["problems", "--problems", "arithmetic"], "expected a number of problems of the family arithmetic"),
        (["debates"], "expected problems at"),
        (["debates", "--set", "debates=many"], "expected a value of type int"),
        (["sft"], "expected debates at"),
        (["grpo"], "expected problems at"),
        (["evolve"], "expected problems at"),
        (["curve"], "expected a finished stage sft with models in"),
        (["evaluate", "--trained", "x"], "expected problems at"),
        (["sft", "--set", "sft.target=untaged"], "expected one of 'trace'"),
        (["imad", "tiny", "--only", "Foo"], "expected methods among"),
        (["imad", "llama-3.1-8b", "--dry-run", "--device", "h100", "--memory", "-5"], "expected a memory above 0 GiB"),
    ],
)
def test_bad_input_of_a_stage_ends_in_one_line_and_writes_nothing(call, message, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.main([call[0], *(("--run", "run") if call[0] != "imad" else ()), *call[1:]])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith(f"python -m training {call[0]}: ") and message in shown and "\n" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "call",
    [
        ["problems", "--problems", "arithmetic", "--n", "-3", "--n-test", "5"],
        ["problems", "--problems", "arithmetic", "--n", "5", "--n-test", "0"],
        ["evaluate", "--samples", "0"],
        ["grpo", "--judge-tokens", "0"],
    ],
)
def test_a_number_below_one_is_refused_by_the_name_of_its_option(call, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.main([call[0], "--run", "run", *call[1:]])
    assert stopped.value.code == 2 and "expected 1 or more; got" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "call", [["problems", "--run", "run", "--problems", "arithmetic"], ["benchmark", "--data", "data", "--out", "out"]]
)
def test_a_stage_of_one_process_refuses_several_in_one_line(call, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        commands.main(call)
    shown = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "expected one process; got 2" in shown and "\n" not in shown
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_is_one_line(capsys) -> None:
    from steerkit.models.checkpoint import explained
    from training.commands.options import refuse

    of_hub = OSError("We couldn't connect to the hub to load the files.\nCheck your internet connection.")
    assert "\n" not in str(explained(of_hub, "owner/name", offline=False))
    with pytest.raises(SystemExit):
        refuse("debates", of_hub)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_each_debate_has_the_kind_of_answer_of_its_own_question() -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    from steerkit.text.traces import DebateTrace, Turn
    from training.commands.options import kinds_of
    from training.commands.sft import with_consensus
    from training.problems.problem import Problem
    from training.train.sft import SFT, examples

    def debate(question: str, answer: str) -> DebateTrace:
        return DebateTrace.of(question, [Turn(agent, 1, rf"\boxed{{{answer}}}") for agent in (1, 2)], None)

    problems = [Problem(f"w{n}", f"word {n}", "valid", "word", "bbh/a") for n in range(3)]
    problems += [Problem(f"o{n}", f"option {n}", "A", "option", "bbh/b") for n in range(2)]
    traces = [debate(problem.question, problem.gold or "") for problem in problems] + [debate("other", "valid")]
    kinds = kinds_of(problems, traces)
    assert [kinds[trace.question] for trace in traces] == ["word"] * 3 + ["option"] * 2 + ["word"]
    kept = with_consensus(traces, kinds)
    assert len(kept) == 6 and len(with_consensus(traces, "word")) == 4
    for target in ("answer", "response"):
        assert len(examples(kept, SFT(target=target), kinds)) == 6
    assert kinds_of([], traces[:1]) == {"word 0": "number"}


def test_grpo_refuses_other_agents_or_fewer_rounds_than_the_debates_of_the_run_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    import steerkit as sk
    from steerkit.text.traces import DebateTrace, Turn, write_traces

    turns = [Turn(agent, number, rf"\boxed{{{agent}}}") for number in (1, 2) for agent in range(1, 5)]
    trace = DebateTrace.of("What is 1 + 0?", turns, r"\boxed{1}")
    write_traces(tmp_path / "run" / "debates" / "traces.jsonl", [trace])
    (tmp_path / "my.jsonl").write_text('{"question": "What is 1 + 0?", "gold": 1}\n')
    (tmp_path / "MODEL").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    call = ["grpo", "--run", "run", "--problems", "my.jsonl", "--checkpoint", "./MODEL"]
    for settings, message in (
        ([], "agents and rounds of the run's debates, 4 and 2; got grpo.agents=3 and grpo.rounds=2"),
        (["grpo.agents=4", "grpo.rounds=1", "debate.rounds=1"], "4 and 2; got grpo.agents=4 and grpo.rounds=1"),
    ):
        with pytest.raises(SystemExit):
            commands.main([*call, *(part for one in settings for part in ("--set", one))])
        assert message in capsys.readouterr().err


def test_the_evaluation_debates_with_as_many_agents_as_the_run_by_default(tmp_path) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    import argparse

    from steerkit.text.traces import DebateTrace, Turn, write_traces
    from training.commands.options import add_cast, cast_from
    from training.presets import get_preset

    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=tmp_path / "run")
    add_cast(parser)
    preset = get_preset("llama-3.1-8b")
    assert len(cast_from(parser.parse_args([]), preset).personas) == 3
    turns = [Turn(agent, 1, "1") for agent in range(1, 6)]
    write_traces(tmp_path / "run" / "debates" / "traces.jsonl", [DebateTrace.of("q", turns, "1")])
    assert len(cast_from(parser.parse_args([]), preset).personas) == 5
    assert len(cast_from(parser.parse_args(["--agents", "4"]), preset).personas) == 4


def test_grpo_and_the_evaluation_read_the_agents_of_own_debates_that_sft_has_learned(
    tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    import steerkit as sk
    from training.commands import evaluate
    from training.train import grpo, sft

    monkeypatch.chdir(tmp_path)
    debates = [{"question": f"{n}+0", "rounds": [[rf"\boxed{{{n}}}"] * 2] * 2} for n in range(8)]
    Path("my traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in debates))
    Path("my.jsonl").write_text('{"question": "What is 1 + 0?", "gold": 1}\n')
    Path("MODEL").mkdir()

    def learned(model, tokenizer, traces, setting, out, kind) -> Path:
        (out / "checkpoint").mkdir(parents=True)
        return out / "checkpoint"

    monkeypatch.setattr(sk, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(sft, "train_sft", learned)
    for name in ("sft", "other"):
        call = ["sft", "--run", "my run", "--checkpoint", "./MODEL", "--traces", "my traces.jsonl", "--name", name]
        assert commands.main(call) == 0
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for options in ([], ["--checkpoint", "./my run/other/checkpoint"]):
        with pytest.raises(SystemExit):
            commands.main(["grpo", "--run", "my run", "--problems", "my.jsonl", *options])
        shown = capsys.readouterr().err
        assert "agents and rounds of the run's debates, 2 and 2; got grpo.agents=3 and grpo.rounds=2" in shown
    two = ["--set", "grpo.agents=2"]
    monkeypatch.setattr(sk, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(sft, "short_finished", lambda *_: {})
    monkeypatch.setattr(grpo, "train_grpo", lambda model, tokenizer, problems, setting, *_: setting.agents)
    assert commands.main(["grpo", "--run", "my run", "--problems", "my.jsonl", *two]) == 0
    casts = []
    monkeypatch.setattr(evaluate, "evaluate", lambda evaluation, given, cast: casts.append(cast) or pytest.skip())
    with pytest.raises(pytest.skip.Exception):
        commands.main(["evaluate", "--run", "my run", "--problems", "my.jsonl", "--checkpoint", "./MODEL"])
    assert len(casts[0].personas) == 2


def test_a_command_in_a_message_names_a_folder_as_one_word(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    monkeypatch.chdir(tmp_path)
    for call in (["debates"], ["sft"], ["curve"], ["grpo", "--problems", "my.jsonl"]):
        Path("my.jsonl").write_text('{"question": "What is 1 + 0?", "gold": 1}\n')
        with pytest.raises(SystemExit):
            commands.main([call[0], "--run", "my run", *call[1:]])
        proposed = shlex.split(capsys.readouterr().err.split("`")[1])
        assert proposed[:3] == ["python", "-m", "training"] and proposed[4:6] == ["--run", "my run"]


def test_more_samples_are_added_to_a_finished_self_consistency_and_one_untrained_model_is_freed_first(
    tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    import gc
    import weakref

    from training.commands import evaluate
    from training.debates.answerers import Reply

    alive: list[weakref.ref] = []
    counts: list[int] = []

    class Fake:
        def __init__(self, *_, **__) -> None:
            gc.collect()
            counts.append(sum(one() is not None for one in alive))
            alive.append(weakref.ref(self))

        def about(self) -> dict[str, str]:
            return {"checkpoint": "fake"}

        def __call__(self, requests, sampling):
            for request in requests:
                yield Reply(request.id, rf"\boxed{{{sum(map(ord, request.id)) % 3}}}", 5, 4, True)

    monkeypatch.setattr(evaluate, "answerer_of", lambda *_: Fake())
    monkeypatch.setattr(evaluate, "_local", lambda *_: Fake())
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"question": f"{n}+0", "gold": n}) + "\n" for n in range(4)))
    monkeypatch.chdir(tmp_path)
    call = ["evaluate", "--run", "run", "--problems", "my.jsonl", "--trained", "SFT=a", "--trained", "IMAD=b"]
    few = [*call, "--samples", "5", "--samples", "3", "--samples", "3"]
    commands.main([*few, "--method", "IMAD", "--method", "Self-consistency", "--method", "SFT"])
    assert counts == [0, 0, 0]
    first = (tmp_path / "run" / "evaluation" / "results.csv").read_text()
    assert first.count("Self-consistency of 3,") == first.count("Self-consistency of 5,") == 1
    commands.main([*few, "--samples", "10", "--method", "Self-consistency"])
    more = (tmp_path / "run" / "evaluation" / "results.csv").read_text()
    assert all(f"Self-consistency of {k}," in more for k in (3, 5, 10))
    commands.main([*call, "--samples", "10", "--samples", "4", "--method", "Self-consistency"])
    capsys.readouterr()
