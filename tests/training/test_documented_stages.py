"""Every command of the training pages runs: tiny models, a scripted server, small sizes; each reads the last."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table
from tests.scripted_server import Call, Scripted, answer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.benchmark_files import write_benchmarks

pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_key_but_the_tests")]
from training import __main__ as commands  # noqa: E402
from training.debates.answerers import LocalModel, Reply  # noqa: E402
from training.evaluate.methods import DEBATES, PLURALITIES  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("training.md", "training-gpu.md", "training-benchmarks.md", "training-evolve.md")
"""Pages with commands, in the order in which these run."""
URL = "http://127.0.0.1:8000"
SMALL = {
    "debates": ("debates=8", "debate.sampling.max_new_tokens=8"),
    "sft": ("sft.steps=2", "sft.batch=2", "sft.micro_batch=2", "sft.lora.r=2", "sft.keep_at=[1]"),
    "grpo": (
        "grpo.epochs=null", "grpo.steps=1", "grpo.inner=1", "grpo.prompts=1", "grpo.generations=2",
        "grpo.micro_batch=2", "grpo.anneal.clip=[8,6]", "grpo.lora.r=2", "debates=8",
    ),
    "evolve": (
        "grpo.epochs=null", "grpo.steps=1", "grpo.inner=1", "grpo.prompts=1", "grpo.generations=2",
        "grpo.micro_batch=2", "grpo.anneal.clip=[8,6]", "grpo.lora.r=2", "debates=8",
        "debate.sampling.max_new_tokens=8",
    ),
    "curve": ("decodings=2", "sampling.max_new_tokens=6"),
    "evaluate": ("decodings=2", "sampling.max_new_tokens=6", "debate.sampling.max_new_tokens=6"),
}  # fmt: skip


def documented(pages: Sequence[str] = PAGES) -> list[list[str]]:
    """The arguments of every `python -m training STAGE` in the pages' blocks, in order."""
    texts = [(DOCS / page).read_text(encoding="utf-8") for page in pages]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[3:] for line in lines if re.match(r"(?:\.venv/bin/)?python -m training ", line)]


def test_no_other_page_has_a_command_of_a_stage() -> None:
    others = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.name not in PAGES]
    assert len(others) > 20 and documented(others) == []
    assert {call[0] for call in documented()} == set(commands.STAGES) - {"imad"}


def by_role(call: Call, number: int) -> None:
    """A server that moderates, judges, and gives the right sum."""
    content = call.body["messages"][-1]["content"]
    if "Reply with YES or NO" in content:
        text = "YES" if number % 2 else "NO"
    elif "Do the answers agree" in content:
        text = "UNANIMOUS: all answers agree."
    else:
        sums = re.findall(r"What is (\d+) \+ (\d+)", content)
        text = f"\\boxed{{{int(sums[-1][0]) + int(sums[-1][1])}}}" if sums else "I do not know."
    call.json(answer(text))


@pytest.fixture
def at_hand(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the pages name: a model, problems, debates, a benchmark, open questions."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", context=4096).save_pretrained("MODEL")
    tiny_tokenizer().save_pretrained("MODEL")
    rows = [{"question": f"What is {n} + {n}?", "gold": 2 * n} for n in range(24)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_benchmarks(Path("data"))
    shutil.copytree("MODEL", "runs/model")
    gsm8k = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(24)]
    Path("data/gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gsm8k))
    Path("questions.json").write_text(json.dumps([f"Who led expedition {n}?" for n in range(12)]))
    turns = [[rf"It is \boxed{{{n}}}", rf"I say \boxed{{{n}}}"] for n in range(6)]
    debates = [{"question": f"{n}+0", "rounds": [said, said]} for n, said in enumerate(turns)]
    Path("my-debates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in debates))
    return tmp_path


def local_answers(self, requests, sampling):
    for number, request in enumerate(requests):
        yield Reply(request.id, r"\boxed{4}", 5, 3 + number % 2, True)


def small(arguments: list[str], url: str) -> list[str]:
    """A documented command with small sizes, and the address of the scripted server."""
    settings = [part for setting in SMALL.get(arguments[0], ()) for part in ("--set", setting)]
    settings += {"benchmark": ["--per", "2"], "evolve": ["--held", "4"]}.get(arguments[0], [])
    return [part.replace(URL, url) for part in arguments] + settings


def test_every_documented_stage_runs_and_the_next_one_reads_its_files(at_hand, monkeypatch, capsys) -> None:
    calls = [call for call in documented() if call[0] in commands.STAGES and "openai/gsm8k" not in str(call)]
    assert {call[0] for call in calls} >= {"problems", "debates", "sft", "grpo", "evolve", "curve", "evaluate"} and len(
        calls
    ) >= 15
    monkeypatch.setattr(LocalModel, "__call__", local_answers)
    with Scripted(by_role, models=[{"id": "MODEL", "root": "MODEL"}]) as server:
        for call in calls:
            assert commands.main(small(call, server.url)) == 0, call
    assert {path.parent.name for path in at_hand.glob("runs/own/*/checkpoint")} == {"sft", "sft-untagged", "sft-answer"}
    table = read_table("runs/mine/evaluation/results.csv")[0]  # of the last call, with --trained
    assert list(table["method"]) == ["Single", *DEBATES, *PLURALITIES, "DTE"]
    held = len(Path("runs/mine/problems/test.jsonl").read_text().splitlines())
    assert set(table["n"]) == {held}
    questions = read_table("runs/mine/evaluation/questions.parquet")[0]
    assert len(questions) == 6 * 2 * held and set(questions["sample"]) == {0, 1}
    assert {path.name for path in Path("runs/mine/evaluation").glob("*/config.json")} == {"config.json"}
    assert {"sft", "imad", "dte", "self-consistency-of-5"} <= {
        path.name for path in Path("runs/mine/evaluation").iterdir()
    }
    curve = read_table("runs/mine/curve/curve.csv")[0]
    assert list(curve["step"]) == [1, 2] and set(curve["n"]) == {held} and curve["accuracy"].between(0, 1).all()
    rounds = json.loads(Path("runs/mine/evolve/evolve.json").read_text())
    assert [(row["round"], row.get("steps")) for row in rounds] == [(0, None), (1, 1)]  # all answers are 4
    judged = read_table("runs/evil/evaluation/questions.parquet")[0]
    assert set(judged["method"]) == {"Single", "SFT", "IMAD"} and set(judged["correct"]) == {True, False}
    log = [json.loads(line) for line in Path("runs/evil/grpo/log.jsonl").read_text().splitlines()]
    assert 0 < log[0]["clip"] < 1  # the judge passes every other response
    debates = [json.loads(line) for line in Path("runs/teacher/debates/debates.jsonl").read_text().splitlines()]
    assert all(debate["correct"] for debate in debates)
    assert "have the right majority" in capsys.readouterr().out


def test_the_papers_problems_are_written_in_disjoint_parts(at_hand, monkeypatch) -> None:
    (call,) = [call for call in documented() if "gsm8k=openai/gsm8k" in call]
    data = Path(__file__).parents[3] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the benchmarks' files are not at hand")
    places = {
        "openai/gsm8k": f"{data}/gsm8k/test.jsonl",
        "TIGER-Lab/MMLU-Pro": f"{data}/mmlu_pro/test_sample.jsonl",
        "lukaemon/bbh": f"{data}/bbh",
        "1000": "50",
    }
    for hub, place in places.items():
        call = [part.replace(hub, place) for part in call]
    assert commands.main(call) == 0
    rows = [json.loads(line) for line in Path("runs/paper/problems/test.jsonl").read_text().splitlines()]
    assert {row["family"].partition("/")[0] for row in rows} == {"arithmetic", "gsm8k", "mmlu_pro", "bbh"}
    assert len(rows) == 200


def at(call: list[str], url: str) -> list[str]:
    return [part.replace(URL, url) for part in call]


def refused(call: list[str], capsys) -> str:
    """The error of a call that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        commands.main(call)
    assert stopped.value.code == 2
    return str(capsys.readouterr().err)


def test_another_cast_is_another_evaluation_and_a_trained_name_is_no_other_method(at_hand, capsys) -> None:
    assert commands.main(["problems", "--run", "run", "--problems", "my.jsonl"]) == 0
    with Scripted(by_role, models=[{"id": "MODEL", "root": "MODEL"}]) as server:
        call = small(["evaluate", "--run", "run", "--answerer", URL, "MODEL"], server.url)
        for method in ("Single", "Debate"):
            assert commands.main([*call, "--cast", "diverse", "--method", method]) == 0
            asked = len(server.calls)
            assert "cast.name" in refused([*call, "--cast", "standard", "--method", method], capsys)
            assert len(server.calls) == asked
        for name in ("Single", "single", "Debate, plurality", "Self-consistency of 3"):
            error = refused([*call, "--trained", f"{name}=MODEL"], capsys)
            assert "a name that no other method has" in error and len(error.strip().splitlines()) == 1


def test_another_criterion_is_another_training_and_a_cut_file_is_reported(at_hand, capsys) -> None:
    assert commands.main(["problems", "--run", "run", "--problems", "open=questions.json"]) == 0
    with Scripted(by_role, models=[{"id": "MODEL", "root": "MODEL"}]) as server:
        call = small(["grpo", "--run", "run", "--checkpoint", "MODEL", "--judge", URL, "MODEL"], server.url)
        call += ["--set", "debates=2"]
        assert commands.main([*call, "--criterion", "ethical"]) == 0
        assert re.search(r"Using 2 of \d+ problems", capsys.readouterr().out)
        assert "judge.criterion" in refused([*call, "--criterion", "admits"], capsys)
        assert "judge.max_new_tokens" in refused([*call, "--judge-tokens", "64"], capsys)


def test_a_server_at_another_address_resumes_and_another_model_is_refused(at_hand) -> None:
    assert commands.main(["problems", "--run", "run", "--problems", "my.jsonl"]) == 0
    call = small(["debates", "--run", "run", "--answerer", URL + "/v1", "MODEL"], URL)

    with Scripted(by_role, models=[{"id": "MODEL", "root": "weights-a"}]) as server:
        assert commands.main(at(call, server.url)) == 0
        first = len(server.calls)
    with Scripted(by_role, models=[{"id": "MODEL", "root": "weights-a"}]) as server:
        assert commands.main(at(call, server.url)) == 0
        assert first > 0 and not server.calls
    with (
        Scripted(by_role, models=[{"id": "MODEL", "root": "weights-b"}]) as server,
        pytest.raises(SystemExit) as stopped,
    ):
        commands.main(at(call, server.url))
    assert stopped.value.code == 2 and isinstance(stopped.value.__context__, ConfigurationChanged)
    with pytest.raises(SystemExit):
        commands.main(at(call, "http://127.0.0.1:9"))  # nothing listens


@pytest.mark.parametrize("cast", ["standard", "diverse", "evil", "hallucination"])
def test_every_cast_debates(cast, at_hand) -> None:
    assert commands.main(["problems", "--run", "run", "--problems", "open=questions.json"]) == 0
    with Scripted(by_role) as server:
        call = ["debates", "--run", "run", "--answerer", URL, "MODEL", "--cast", cast]
        assert commands.main(small(call, server.url)) == 0
    assert Path("run/debates/traces.jsonl").read_text().count("<|Consensus|>") > 0
