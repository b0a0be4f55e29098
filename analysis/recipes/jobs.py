"""`python -m analysis jobs`: run the scripts of docs/recipes on real checkpoints, and store what they print and draw.

Each script is the one of its page, with names of files and sizes replaced. It runs in a process and a folder of its
own. A job that has finished is not run again, and what an interrupted one has on disk (rows of a sweep, answers of a
judge) is used again. `python -m figures.pages` writes the pages.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import steerkit as sk
from analysis.commit import commit
from analysis.inputs import BASE, IMAD, SFT, base_of, files_of
from analysis.patching.fact_recall import CAPITALS, TEMPLATE
from analysis.published import published
from analysis.recipes.persona import SIDES, TRAIT, ask
from steerkit.capture.collect import collect_each
from steerkit.demo.checkpoint import default_checkpoint
from steerkit.io.files import sha256, write_text
from steerkit.io.json import read_json, write_json
from steerkit.io.rows import append_rows
from steerkit.io.run_folder import run_folder
from steerkit.models.identity import describe
from steerkit.text.traces import read_traces

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "recipes"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
LAYER = 15
"""Of the vector that the jobs read: half of SmolLM2's depth, chosen before any result."""
N_PAIRS = 200
BOXED = re.compile(r"\\boxed\{ (\S+) \}")
JUDGE, RUN = ("judge_url", "judge_model"), ("run",)
TASK = """task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: capitals.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
metadata:
  version: 1
"""


def script(page: str) -> str:
    """The code of a page of docs/recipes; it has one block."""
    (block,) = BLOCK.findall((PAGES / f"{page}.md").read_text(encoding="utf-8"))
    return str(block)


def changed(code: str, changes: Mapping[str, str]) -> str:
    """The code with names of files, addresses and sizes replaced.

    Raises:
        ValueError: the code does not hold a text that is to be replaced.
    """
    for old, new in changes.items():
        if old not in code:
            raise ValueError(f"expected {old!r} in the script; it is not there. Correct the changes.")
        code = code.replace(old, new)
    return code


def write_vector(folder: Path, _: argparse.Namespace) -> None:
    """`VECTOR.safetensors`: cheerful against gloomy instructions, read at the last token of the prompts."""
    trait = read_json(TRAIT)
    chats = {side: [ask(question, one) for one in trait[side] for question in trait["read"]] for side in SIDES}
    model, tokenizer = sk.load(default_checkpoint())
    read = collect_each(model, tokenizer, chats, positions=[-1], layers=[LAYER])
    sk.difference_in_means(read[-1]).save(folder / "VECTOR.safetensors")


def write_persona_data(folder: Path, _: argparse.Namespace) -> None:
    """`DATA`: two instructions per side with four questions, three questions for the layer, six for the test."""
    trait = read_json(TRAIT)
    read = [
        {"label": side, "prompt": ask(question, one)}
        for side in SIDES
        for one in trait[side][:2]
        for question in trait["read"][:4]
    ]
    write_lines(folder / "DATA" / "read.jsonl", read)
    for name, part, count in (("valid", "validation", 3), ("test", "test", 6)):
        write_lines(folder / "DATA" / f"{name}.jsonl", [{"prompt": ask(question)} for question in trait[part][:count]])


def write_prompts(folder: Path, given: argparse.Namespace) -> None:
    """The vector, and `PROMPTS.jsonl`: six questions."""
    write_vector(folder, given)
    questions = read_json(TRAIT)["test"][:6]
    write_lines(folder / "PROMPTS.jsonl", [{"id": str(i), "prompt": ask(one)} for i, one in enumerate(questions)])


def write_task(folder: Path, given: argparse.Namespace) -> None:
    """The vector, and a task of the harness: the capital of each country among four."""
    write_vector(folder, given)
    names = list(CAPITALS.values())
    rows = []
    for i, (country, capital) in enumerate(CAPITALS.items()):
        others = [names[(i + step) % len(names)] for step in (1, 2, 3)]
        choices = [*others[: i % 4], capital, *others[i % 4 :]]
        rows.append({"question": TEMPLATE.format(country), "choices": choices, "answer": i % 4})
    write_lines(folder / "capitals.jsonl", rows)
    write_text(folder / "capitals.yaml", TASK)


def write_checkpoints(folder: Path, given: argparse.Namespace) -> None:
    """Links to the three checkpoints of a run, and pairs: the right answer to a question and a wrong one."""
    for name, checkpoint in checkpoints_of(given.run).items():
        (folder / name.upper()).unlink(missing_ok=True)
        (folder / name.upper()).symlink_to(Path(checkpoint).resolve())
    pairs = []
    for number, trace in enumerate(read_traces(given.run / "debates" / "traces.jsonl")):
        answers = (BOXED.search(turn.text) for turn in trace.turns if turn.round == 1)
        if wrong := [found[1] for found in answers if found and found[1] != trace.gold]:
            right, other = (f"\\boxed{{ {answer} }}" for answer in (trace.gold, wrong[0]))
            pairs.append(sk.ContrastPair(trace.prompt_text, right, other, str(number)))
    sk.write_pairs(folder / "PAIRS.jsonl", pairs[:N_PAIRS])


def checkpoints_of(run: Path) -> dict[str, str | Path]:
    """Base, SFT and IMAD of a run of `training.imad`."""
    return {BASE: base_of(run), SFT: run / "sft" / "checkpoint", IMAD: run / "grpo" / "checkpoint"}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines anew."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    append_rows(path, rows)


@dataclass(frozen=True)
class Job:
    """The script of a page, and what it runs on.

    Args:
        write: writes the files that the script reads into its folder.
        data: these files in one sentence, for the page.
        changes: text of the script -> its replacement: layers and sizes.
        pictures: file that the script draws -> what it shows.
        needs: the options that it cannot run without.
    """

    write: Callable[[Path, argparse.Namespace], None]
    data: str
    changes: Mapping[str, str]
    pictures: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


AT = {".at(LAYER)": f".at({LAYER})"}
VECTOR = "The vector is the difference in means of cheerful and gloomy instructions at the last token of the prompts."
JOBS = {
    "monitoring": Job(
        write_vector,
        VECTOR,
        {**AT, ".pdf": ".png"},
        {
            "monitoring.png": "Projection on the vector at each token, with an instruction to be cheerful",
            "monitoring-steered.png": "Projection before and after the steering, without an instruction",
        },
    ),
    "persona-vectors": Job(
        write_persona_data,
        "16 texts for the vector, 3 questions for the layer and 6 for the test come from "
        "`analysis/recipes/cheerful_trait.json`.",
        {"LAYERS": "[12, 18]", "64": "24", "sk.controls.random(v)": "sk.controls.random(v, n=3)"},
        needs=JUDGE,
    ),
    "growing-sweep": Job(
        write_prompts,
        f"{VECTOR} The prompts are 6 questions of `analysis/recipes/cheerful_trait.json`.",
        {**AT, "48": "24", "[:5]": "[:3]", "sk.controls.random(vectors)": "sk.controls.random(vectors, n=3)"},
        needs=JUDGE,
    ),
    "lm-eval": Job(
        write_task,
        f"{VECTOR} The task asks for the capitals of 20 countries; each question has four answers to choose from.",
        {**AT, "COEFFICIENT": "1.0", 'tasks=["arc_easy"]': 'tasks=["capitals.yaml"]', '"arc_easy"': '"capitals"'},
    ),
    "checkpoints": Job(
        write_checkpoints,
        "The checkpoints are those of the [miniature](../training-results.md), a small model that was trained from "
        f"scratch. Each pair (at most {N_PAIRS}) has one question of the debates on which the models were trained. The "
        "positive continuation is the right answer. The negative one is a wrong answer that an agent gave in round 1.",
        {".pdf": ".png"},
        {
            "profiles.png": "Accuracy of probes by layer, for base, SFT and IMAD",
            "cosines.png": "Cosine of the directions of base, SFT and IMAD by layer",
        },
        RUN,
    ),
}


def run_job(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run the script of a page in its folder below `given.out`, if it has not finished there; return what it showed.

    Raises:
        SystemExit: the script failed.
    """
    job, code = JOBS[name], script(name)
    checkpoints = checkpoints_of(given.run) if "run" in job.needs else {"SmolLM2-135M-Instruct": default_checkpoint()}
    about: dict[str, Any] = {}
    if "judge_url" in job.needs:
        about["judge"] = Path(given.judge_model).name
    if "run" in job.needs:
        about["run"] = {key: read_json(given.run / "config.json")[key] for key in ("family", "seed")}
    sized = changed(code, job.changes)
    content = {label: files_of(checkpoint)["files_sha256"] for label, checkpoint in checkpoints.items()}
    with run_folder(given.out / name, {"script": sized, "checkpoints": content, **about}) as folder:
        file = folder / "finished.json"
        if file.exists():
            return dict(read_json(file))
        if not (folder / "script.py").exists():
            job.write(folder, given)
        write_text(folder / "script.py", changed(sized, places_of(job, given)))
        began, version = time.perf_counter(), commit()
        printed = run_script(folder)
        found = {
            "job": name, "command": command_of(name, job), "commit": version, "printed": printed,
            "seconds": time.perf_counter() - began, "threads": torch.get_num_threads(), "changes": dict(job.changes),
            "data": job.data, "pictures": dict(job.pictures), "script_sha256": sha256(code), **about,
            "models": {label: published(describe(*sk.load(path))) for label, path in checkpoints.items()},
        }  # fmt: skip
        write_json(file, found)
    return found


def places_of(job: Job, given: argparse.Namespace) -> dict[str, str]:
    """What stands for the checkpoint and the judge in the script; a job's own file keeps the judge's answers."""
    if "run" in job.needs:
        return {}  # links of these names are in the folder
    places = {'"CHECKPOINT"': repr(str(default_checkpoint()))}
    if "judge_url" in job.needs:
        places |= {'"http://127.0.0.1:8000"': repr(given.judge_url), '"JUDGE"': repr(given.judge_model)}
        places['100: very.")'] = '100: very.", cache="answers.jsonl")'
    return places


def run_script(folder: Path) -> str:
    """Run `script.py` in its folder, without a network except for the judge; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"expected {folder / 'script.py'} to end without an error; see above. The same call runs it again.")
    return done.stdout


def command_of(name: str, job: Job) -> str:
    """The call that runs a job, with placeholders."""
    options = [f"{option_of(one)} {one.upper()}" for one in (*job.needs, "out")]
    return " ".join(["python -m analysis jobs", name, *options])


def option_of(name: str) -> str:
    """The option of this name."""
    return f"--{name.replace('_', '-')}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis jobs", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(JOBS)}; default: all that can run")
    parser.add_argument("--judge-url", help="OpenAI-compatible server that rates texts")
    parser.add_argument("--judge-model", help="name of its model")
    parser.add_argument("--run", type=Path, help="folder of a run of training.imad: base, SFT and IMAD")
    parser.add_argument("--out", type=Path, required=True, help="folder of the jobs; the same call resumes them")
    parser.add_argument("--results", type=Path, help="folder for outputs and pictures: results/recipes/jobs")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in JOBS]:
        parser.error(f"expected jobs among {', '.join(JOBS)}; got {', '.join(unknown)}. Pass one of these names.")
    for name in given.names or JOBS:
        if missing := [option_of(one) for one in JOBS[name].needs if getattr(given, one) is None]:
            if given.names:
                parser.error(f"expected {' and '.join(missing)} for {name}; got none. Pass them.")
            print(f"{name}: skipped, it needs {' and '.join(missing)}", flush=True)
            continue
        found = run_job(name, given)
        if given.results:
            write_json(given.results / f"{name}.json", found)
            for picture in found["pictures"]:
                shutil.copyfile(given.out / name / picture, given.results / picture)
        print(f"{name}: {found['seconds']:.0f} s\n\n{found['printed']}", flush=True)
