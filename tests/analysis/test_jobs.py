"""The scripts of docs/recipes on real checkpoints: run once, resumed, stored with their provenance."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import steerkit as sk
from analysis.patching.fact_recall import CAPITALS
from analysis.recipes import jobs
from figures import recipes
from figures.pages import RESULTS
from steerkit.io.files import sha256
from steerkit.io.json import read_json
from tests.tiny import tiny_model, tiny_tokenizer

STORED = sorted((RESULTS / recipes.JOB_FOLDER).glob("*.json"))
CODE = """import steerkit as sk
model, tokenizer = sk.load("CHECKPOINT")
print(open("input.txt").read(), N)
open("drawn.png", "wb").write(b"drawn")
open("../ran.txt", "a").write("once ")
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of a tiny checkpoint, and the one job that runs its script."""

    def write(folder: Path, _: Namespace) -> None:
        (folder / "input.txt").write_text("read")

    for part in (tiny_model(), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(jobs, "PAGES", tmp_path)
    monkeypatch.setattr(jobs, "default_checkpoint", lambda: tmp_path / "tiny")
    monkeypatch.setattr(jobs, "JOBS", {"small": jobs.Job(write, "One file.", {"N)": "3)"}, {"drawn.png": "A picture"})})
    path = tmp_path / "small.md"
    path.write_text(f"# Small\n\n```python\n{CODE}```\n")
    return path


def test_jobs_are_those_of_the_pages_and_their_changes_leave_scripts_that_compile() -> None:
    assert sorted(jobs.JOBS) == sorted(recipes.JOBS)
    given = Namespace(judge_url="http://127.0.0.1:1", judge_model="m", run=None)
    for name, job in jobs.JOBS.items():
        code = jobs.changed(jobs.changed(jobs.script(name), job.changes), jobs.places_of(job, given))
        compile(code, name, "exec")
        assert not re.search(r"CHECKPOINT|LAYER|COEFFICIENT|JUDGE|:8000", code), name
        assert all(picture in code for picture in job.pictures)
    with pytest.raises(ValueError, match="expected 'b' in the script"):
        jobs.changed("a", {"b": "c"})


def test_a_job_stores_output_pictures_and_provenance_and_is_run_once(page: Path, tmp_path: Path, capsys) -> None:
    arguments = ["small", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "recipes" / "jobs")]
    jobs.main(arguments)
    jobs.main(arguments)
    assert (tmp_path / "out" / "ran.txt").read_text() == "once "
    assert capsys.readouterr().out.count("read 3") == 2
    found = read_json(tmp_path / "recipes" / "jobs" / "small.json")
    model = found["models"]["SmolLM2-135M-Instruct"]
    assert model["checkpoint"] == "tiny" and model["model_fingerprint"]
    assert found["changes"] == {"N)": "3)"} and found["seconds"] > 0 and found["threads"] > 0
    assert found["command"] == "python -m analysis jobs small --out OUT" and re.fullmatch(
        r"[0-9a-f]+( and changes)?|unknown", found["commit"]
    )
    assert found["script_sha256"] == sha256(CODE)
    shown = recipes.job_block(tmp_path, "small")
    assert "```text\nread 3\n```" in shown and "![A picture](drawn.png)" in shown and "`3)` for `N)`" in shown
    (picture,) = recipes.pictures(tmp_path).items()
    assert picture[0] == "docs/recipes/drawn.png" and picture[1].read_bytes() == b"drawn"


def test_a_script_that_fails_is_named_and_run_again(page: Path, tmp_path: Path) -> None:
    page.write_text("```python\n" + CODE.replace("N)", "N) or open('allowed.txt')") + "```\n")
    arguments = ["small", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"expected .*script.py to end without an error"):
        jobs.main(arguments)
    (tmp_path / "out" / "small" / "allowed.txt").touch()
    jobs.main(arguments)
    assert (tmp_path / "out" / "small" / "finished.json").exists()


def test_jobs_that_lack_a_judge_or_a_run_are_skipped_and_refused_where_they_are_named(tmp_path, monkeypatch, capsys):
    ran: list[str] = []

    def run(name: str, _: Namespace) -> dict[str, Any]:
        ran.append(name)
        return {"seconds": 1.0, "printed": "", "pictures": {}}

    monkeypatch.setattr(jobs, "run_job", run)
    jobs.main(["--out", str(tmp_path)])
    assert ran == ["monitoring", "lm-eval"]
    assert "growing-sweep: skipped, it needs --judge-url and --judge-model" in capsys.readouterr().out
    for arguments, told in ((["checkpoints"], "expected --run for checkpoints"), (["x"], "expected jobs among")):
        with pytest.raises(SystemExit):
            jobs.main([*arguments, "--out", str(tmp_path)])
        assert told in capsys.readouterr().err


def test_the_task_of_the_harness_has_the_capital_once_and_at_every_place_equally_often(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jobs, "write_vector", lambda *_: None)
    jobs.write_task(tmp_path, Namespace())
    rows = [json.loads(line) for line in (tmp_path / "capitals.jsonl").read_text().splitlines()]
    assert [row["choices"][row["answer"]] for row in rows] == list(CAPITALS.values())
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [row["answer"] for row in rows] == [0, 1, 2, 3] * 5


def test_pairs_of_checkpoints_are_right_and_wrong_answers_and_the_checkpoints_are_those_of_the_run(
    tmp_path, monkeypatch
) -> None:

    def debate(prompt: str, *answers: str) -> SimpleNamespace:
        turns = [SimpleNamespace(round=1, text=f"so \\boxed{{ {answer} }}") for answer in answers]
        late = SimpleNamespace(round=2, text="\\boxed{ 9 }")
        return SimpleNamespace(prompt_text=prompt, gold="4", turns=[late, *turns])

    debates = [debate("all right", "4", "4"), debate("What?", "4", "5", "6")]
    monkeypatch.setattr(jobs, "read_traces", lambda _: debates)
    for part in ("base", "sft", "grpo"):
        (tmp_path / "run" / part / "checkpoint").mkdir(parents=True)
    (tmp_path / "job").mkdir()
    jobs.write_checkpoints(tmp_path / "job", Namespace(run=tmp_path / "run"))
    (pair,) = sk.read_pairs(tmp_path / "job" / "PAIRS.jsonl")
    assert (pair.prompt, pair.positive, pair.negative) == ("What?", "\\boxed{ 4 }", "\\boxed{ 5 }")
    parts = {name: (tmp_path / "job" / name).resolve().parent.name for name in ("BASE", "SFT", "IMAD")}
    assert parts == {"BASE": "base", "SFT": "sft", "IMAD": "grpo"}


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem)
def test_what_a_page_shows_is_of_the_script_on_this_page(file: Path) -> None:
    found = read_json(file)
    assert found["script_sha256"] == sha256(jobs.script(file.stem))
    assert found["changes"] == dict(jobs.JOBS[file.stem].changes)
    assert all((file.parent / picture).is_file() for picture in found["pictures"])


@pytest.mark.parametrize("name", jobs.JOBS)
def test_the_command_that_a_page_prints_has_every_option_that_the_job_needs(name: str, monkeypatch) -> None:
    seen: list[Namespace] = []
    monkeypatch.setattr(
        jobs, "run_job", lambda name, given: seen.append(given) or {"printed": "", "pictures": {}, "seconds": 0}
    )
    jobs.main(jobs.command_of(name, jobs.JOBS[name]).split()[4:])
    assert seen[0].names == [name] and all(getattr(seen[0], one) for one in (*jobs.JOBS[name].needs, "out"))
