"""A reproduction is steps in their order: each once, what is done not again, a failure told with the end of its log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.paper import reproduce
from analysis.paper.claims import (  # fmt: skip
    ALONE,
    HOLDS,
    NOT,
    NOT_SHOWN,
    NOT_SPECIFIC,
    OTHER_GRPO,
    OTHER_SFT,
    UNTESTED,
    Claim,
    claims,
    malicious,
    of_answers,
    of_protocol,
    rules,
    steered,
    suppressed,
    transplant,
    verdict,
)
from analysis.paper.main_table import main_table
from analysis.paper.pooling import malicious_fall, over_runs, pool_suppression, ratio_over_runs
from analysis.paper.protocol import CAST, PLANTED_BASE, TAGGED
from analysis.paper.reproduce import (  # fmt: skip
    FULL,
    GRIDS,
    RUNS,
    TRAIT,
    Step,
    carry_out,
    config,
    finished_seeds,
    note_start,
    plan,
    seconds_left,
    seeds_of,
    waiting_for,
)
from analysis.paper.results import (
    Published,
    controls_table,
    malicious_table,
    page,
    read_published,
    suppression_table,
    transplant_table,
)
from analysis.probes import erased
from analysis.suppression.trait import words_trait
from steerkit.io.json import read_json, write_json
from steerkit.io.tables import write_table
from steerkit.stats.seeds import QUESTION, SEED
from training.debates.personas import CASTS
from training.evaluate.methods import PLURALITIES
from training.evaluate.results import differences
from training.presets import get_preset, override

ROOT = Path(__file__).parents[2]
QUICK = ("-n", "1", "-r", "1", "pass")


def test_steps_run_once_in_the_order_of_their_needs(tmp_path, capsys) -> None:
    steps = [Step("second", "timeit", QUICK, ("first",)), Step("first", "timeit", QUICK)]
    carry_out(steps, tmp_path, workers=2)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["first", "first", "second", "second"]
    carry_out(steps, tmp_path, workers=2)
    assert capsys.readouterr().out == ""
    changed = Step("first", "timeit", (*QUICK, "pass"))
    carry_out([changed], tmp_path, workers=1)
    assert "first: done" in capsys.readouterr().out  # another command under the same name is another step
    carry_out([steps[0], changed], tmp_path, workers=1)
    assert capsys.readouterr().out.startswith("second: started")  # what needs it is another step, too


def test_of_steps_that_could_be_started_the_one_that_most_others_wait_for_comes_first() -> None:
    steps = [Step("draw", "m", ()), Step("train", "m", ()), Step("test", "m", (), ("train",)),
             Step("show", "m", (), ("test", "draw"))]  # fmt: skip
    assert waiting_for(steps) == {"draw": 1, "train": 2, "test": 1, "show": 0}
    every = plan("tiny", seeds_of("tiny", True, 0), Path("runs"), full=True)
    counts = waiting_for(every)
    first = sorted(every, key=lambda step: -counts[step.name])
    place = {step.name: number for number, step in enumerate(first)}
    analyses = [number for name, number in place.items() if name.startswith(("agents", "protocol", "suppression"))]
    assert max(place["clues-0-debates"], place["clues-0-controls"]) < min(analyses)
    for step in first:
        assert all(place[need] < place[step.name] for need in step.needs)


def test_running_steps_are_reported_with_the_last_line_of_their_logs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reproduce, "REPORT_EVERY", 0.0)
    line = "SFT: 3 of 8, 60 s, about 100 s left"
    until = f"import os\nfor _ in range(10**7):\n if os.path.exists({str(tmp_path / 'seen')!r}): break"
    work = ("-n", "1", "-r", "1", "-s", f"print({line!r}, flush=True)", until)
    monkeypatch.setattr(reproduce, "print", lambda text, **_: _note(text, line, tmp_path / "seen"), raising=False)
    carry_out([Step("training", "timeit", work)], tmp_path, workers=1)
    assert "0 of 1 steps done, no estimate before the first one is done" in (tmp_path / "seen").read_text()


def test_a_report_estimates_the_rest_from_the_finished_steps_of_each_module(tmp_path) -> None:
    names = {"a": "train", "b": "train", "c": "train", "d": "analyse", "e": "draw"}
    steps = [Step(name, module, ()) for name, module in names.items()]
    assert seconds_left(steps, {}, {"a": 50.0}, 2) is None
    done = {"a": 600.0, "d": 120.0}
    assert seconds_left(steps, done, {"b": 200.0}, 2) == ((600 - 200) + 600 + (600 + 120) / 2) / 2
    assert seconds_left(steps, done, {"b": 900.0}, 1) == 0 + 600 + 360
    (tmp_path / "b.log").write_text("SFT: 3 of 8\n")
    report = reproduce._report(steps, done, {"b": 200.0}, 2, tmp_path)
    assert report.splitlines() == ["2 of 5 steps done, about 11 min left", "  b, 3 min: SFT: 3 of 8"]


def _note(text: str, line: str, seen: Path) -> None:
    if line in text:
        seen.write_text(text)


def test_a_step_that_fails_stops_what_needs_it_and_shows_its_log(tmp_path) -> None:
    steps = [Step("broken", "json.tool", (str(tmp_path / "missing"),)), Step("after", "timeit", QUICK, ("broken",))]
    with pytest.raises(RuntimeError, match=r"(?s)\['broken'\] did not.*No such file"):
        carry_out(steps, tmp_path, workers=2)
    assert not (tmp_path / "done" / "after").exists()


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_a_reproduction_that_is_ended_ends_its_steps(tmp_path, way) -> None:
    begun = tmp_path / "begun"
    wait = f"import os, threading; open({str(begun)!r}, 'w').write(str(os.getpid())); threading.Event().wait(60)"
    steps = f"lambda *_: [reproduce.Step('long', 'timeit', ('-n', '1', '-r', '1', {wait!r}))]"
    work = (
        f"from analysis.paper import reproduce; reproduce.plan = {steps}; reproduce.main(['--out', {str(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", work], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (begun.exists() and begun.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(way)
    assert "run the same command to resume it" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("preset", RUNS)
def test_every_step_of_a_plan_needs_steps_of_the_plan_and_comes_once(preset, full, tmp_path) -> None:
    steps = plan(preset, seeds_of(preset, full, 7, 2), tmp_path, full)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert all(set(step.needs) <= set(names) for step in steps)
    assert {"main-table", "results"} <= set(names)
    for name in names:  # every method is trained in a part of the run, and every checkpoint analysed in a part
        said = [a for step in steps if step.name.startswith(f"{name}-") for a in step.arguments]
        if name in ("clues-7", "addition-7"):
            family = name.removesuffix("-7")
            settings = (FULL if full else RUNS)[preset][family]
            assert {*get_preset(preset, family, settings).trained} <= set(said)
    assert "suppression-malice-7" in names and ("agents-malice-7" in names) == ("malice" in GRIDS[preset])


def test_a_plan_of_one_family_is_the_part_of_the_whole_plan_that_names_it(tmp_path) -> None:
    whole, part = (plan("tiny", seeds_of("tiny", True, 20, 2, only), tmp_path, True) for only in ((), ("malice",)))
    kept = {step.name: step for step in whole if "malice-2" in step.name}
    assert {step.name: step for step in part if not step.always} == kept
    assert {step.name for step in part if step.always} == {"main-table", "results", "figures", "figures-malice"}


def test_smollm2_has_its_own_number_of_seeds_for_each_family_and_a_given_number_holds_for_all(tmp_path) -> None:
    assert seeds_of("smollm2", True, 20) == {"addition": range(20, 23), "malice": range(20, 21)}
    assert seeds_of("smollm2", True, 21, 1, ("addition",)) == {"addition": range(21, 22)}
    assert set(seeds_of("tiny", True, 20).values()) == {range(20, 21)}
    steps = {step.name: step for step in plan("smollm2", seeds_of("smollm2", True, 20), tmp_path, True)}
    runs = [
        f"{tmp_path}/{run}" for run in ("addition/seed-20", "addition/seed-21", "addition/seed-22", "malice/seed-20")
    ]
    assert [part for part in steps["main-table"].arguments if "seed-" in part] == runs
    assert "malice-20" in steps and "malice-21" not in steps


@pytest.mark.parametrize(("analysis", "family"), [("agents", "addition"), ("suppression", "malice")])
def test_each_checkpoint_of_smollm2_is_a_step_that_waits_for_its_training_alone(analysis, family, tmp_path) -> None:
    steps = {step.name: step for step in plan("smollm2", seeds_of("smollm2", True, 20), tmp_path, True)}
    for stage, need in (("base", "debates"), ("SFT", "imad"), ("IMAD", "imad")):
        step = steps[f"{analysis}-{family}-20-{stage.lower()}"]
        assert step.needs == (f"{family}-20-{need}",) and step.arguments[-2:] == ("--only", stage)
    joined = steps[f"{analysis}-{family}-20"]
    assert {f"{analysis}-{family}-20-{stage}" for stage in ("base", "sft", "imad")} < set(joined.needs)
    assert "--only" not in joined.arguments and "--step" not in joined.arguments


def test_first_rounds_are_patched_and_names_erased_for_each_seed_of_both_presets_with_settings_that_exist(
    tmp_path,
) -> None:
    for preset, family in (("tiny", "clues"), ("smollm2", "addition")):
        steps = {step.name: step for step in plan(preset, seeds_of(preset, True, 20, 2), tmp_path, True)}
        assert sum(name.startswith(("patch-rounds-", "erasure-")) for name in steps) == 4
        for seed in (20, 21):
            run, out = tmp_path / family / f"seed-{seed}", tmp_path / "analysis" / family / f"seed-{seed}"
            patch, erase = (steps[f"{name}-{family}-{seed}"] for name in ("patch-rounds", "erasure"))
            assert patch.needs == erase.needs == (f"{family}-{seed}",)
            assert patch.arguments[:4] == ("patch-rounds", str(run), "--out", str(out / "patch-rounds"))
            assert erase.arguments[:4] == ("erasure", str(run), "--out", str(out / "erasure"))
            setting = override(erased.Setting(), erase.arguments[5::2])
            if preset == "tiny":
                assert len(patch.arguments) == len(erase.arguments) == 4 and setting == erased.Setting()
            else:
                assert set(erase.arguments[4::2]) == {"--set"} and setting.shrinkage == 0.1
                assert patch.arguments[4:] == ("--n", "60", "--layers", "4,9,14,19,24")


def mark_done(out: Path, steps: Sequence[Step]) -> None:
    """Marks of completion as `carry_out` writes them."""
    by_name = {step.name: step for step in steps}
    for step in steps:
        write_json(out / "done" / step.name, {"step": config(step, by_name), "seconds": 1.0})


def test_tables_of_finished_seeds_are_made_again_by_a_call_that_names_fewer(tmp_path) -> None:
    for family, seed in (("addition", 20), ("addition", 21), ("malice", 20), ("addition", 22)):
        (tmp_path / family / f"seed-{seed}").mkdir(parents=True)
    mark_done(tmp_path, plan("smollm2", seeds_of("smollm2", True, 20), tmp_path, True))
    (tmp_path / "done" / "protocol-addition-22").unlink()
    known, left_out = finished_seeds("smollm2", tmp_path, True)
    assert known == {"addition": [20, 21], "malice": [20]} and left_out == {22: ["protocol-addition-22"]}
    steps = {step.name: step for step in plan("smollm2", {"addition": [23]}, tmp_path, True, finished=known)}
    shown = [part for part in steps["main-table"].arguments if "seed-" in part]
    assert [Path(part).relative_to(tmp_path).as_posix() for part in shown] == [
        "addition/seed-20", "addition/seed-21", "addition/seed-23", "malice/seed-20"
    ]  # fmt: skip
    assert [part for part in steps["results"].arguments if part.isdecimal()] == ["20", "21", "23"]
    assert "figures-malice" in steps and not any(name.startswith("malice") for name in steps)


def test_a_seed_that_was_run_with_other_settings_is_left_out_of_the_tables_and_named(
    tmp_path, monkeypatch, capsys
) -> None:
    for family in ("clues", "malice"):
        (tmp_path / family / "seed-20").mkdir(parents=True)
    mark_done(tmp_path, plan("tiny", seeds_of("tiny", False, 20), tmp_path, fluency="some/model"))
    assert finished_seeds("tiny", tmp_path, False, "some/model") == ({"clues": [20], "malice": [20]}, {})
    planned = []
    monkeypatch.setattr(reproduce, "carry_out", lambda steps, *_: planned.extend(steps))
    call = ["--out", str(tmp_path), "--first", "21"]
    reproduce.main([*call, "--fluency", "some/model"])
    assert "left out" not in capsys.readouterr().out
    monkeypatch.setitem(reproduce.GRIDS["tiny"], "clues", ("max_new_tokens=9",))
    reproduce.main(call)
    assert "Seed 20 is left out of the tables: 4 of its steps, such as agents-clues-20" in capsys.readouterr().out
    tables = [[part for part in step.arguments if "seed-" in part] for step in planned if step.name == "main-table"]
    assert [len(runs) for runs in tables] == [4, 2]
    reproduce.main(["--out", str(tmp_path), "--first", "20"])  # it is run again, and not left out
    assert "left out" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_steps_of_a_reproduction_that_is_killed_end_with_it(tmp_path) -> None:
    begun = tmp_path / "begun"
    wait = f"import os, threading; open({str(begun)!r}, 'w').write(str(os.getpid())); threading.Event().wait(60)"
    steps = f"[reproduce.Step('long', 'timeit', ('-n', '1', '-r', '1', {wait!r}))]"
    work = f"from analysis.paper import reproduce; reproduce.carry_out({steps}, reproduce.Path({str(tmp_path)!r}), 1)"
    process = subprocess.Popen([sys.executable, "-c", work], cwd=ROOT)
    while not (begun.exists() and begun.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    status = Path(f"/proc/{begun.read_text()}/stat")
    until = time.monotonic() + 20
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":  # not yet collected by init
        assert time.monotonic() < until
        time.sleep(0.05)


def test_of_the_cast_scorning_the_second_agent_alone_is_of_ill_will_and_each_reads_it() -> None:
    trait = words_trait(TRAIT.split(","))
    for number, persona in enumerate(CASTS["scorning"].personas, 1):
        own = [text for dialogue in (*persona.worked, *persona.revised) for text in dialogue[1::2]]
        read = [dialogue[2] for dialogue in persona.revised]
        assert {trait(text) for text in own} == {float(number == 2)}
        assert {trait(text) for text in read} == {float(number != 2)}


def test_the_start_of_a_seed_is_noted_once(tmp_path) -> None:
    note_start(tmp_path / "started.json", [20])
    (first,) = read_json(tmp_path / "started.json")
    note_start(tmp_path / "started.json", [20, 21])
    again, second = read_json(tmp_path / "started.json")
    assert again == first and second["seed"] == 21 and second["commit"] and second["time"]


def runs(**values: float) -> dict[int, pd.DataFrame]:
    return {
        int(seed[1:]): pd.DataFrame(
            [{"agent": "1", "gain": value, "low": value - 1, "high": value + 1, "p": 0.5, "n": 9}]
        )
        for seed, value in values.items()
    }


def test_over_several_seeds_the_unit_is_the_seed_and_with_one_its_own_interval_stays() -> None:
    found = over_runs(runs(s3=0.2, s1=0.4, s2=0.6), ["agent"], "gain", means=("n",)).iloc[0]
    assert (found["gain"], found["unit"], found["seeds"], found["by_seed"]) == (
        pytest.approx(0.4),
        SEED,
        3,
        "0.4 0.6 0.2",
    )
    assert found["high"] - found["gain"] == pytest.approx(4.3027 * 0.2 / 3**0.5, rel=1e-3) and found["n"] == 9
    one = over_runs(runs(s3=0.2), ["agent"], "gain").iloc[0]
    assert (one["low"], one["high"], one["p"], one["unit"]) == (-0.8, 1.2, 0.5, QUESTION)
    double = {1: pd.concat([runs(s1=0.1)[1]] * 2)}
    with pytest.raises(ValueError, match="one row per seed"):
        over_runs(double, ["agent"], "gain")


def test_a_ratio_over_seeds_is_that_of_their_means() -> None:
    def run(right: float, before: float) -> pd.DataFrame:
        line = {"stage": "IMAD", "a": right, "b": before, "kept": 9.0, "kept_low": 8.0, "kept_high": 10.0}
        return pd.DataFrame([line])

    found = ratio_over_runs({1: run(0.4, 0.8), 2: run(0.5, 0.9), 3: run(0.3, 0.7)}, ["stage"], "a", "b", "kept").iloc[0]
    assert found["kept"] == pytest.approx(0.5) and found["kept_low"] < 0.5 < found["kept_high"]
    assert found["by_seed"] == "0.5 0.5556 0.4286"
    one = ratio_over_runs({1: run(0.4, 0.8)}, ["stage"], "a", "b", "kept").iloc[0]
    assert (one["kept"], one["kept_low"], one["kept_high"]) == (9.0, 8.0, 10.0)


def test_every_rule_has_what_its_page_shows_and_a_file_of_its_own() -> None:
    known = rules()
    assert {"tokens", "accuracy", "debate", "area", "steered", "speaks", "suppressed", "preserved"} <= set(known)
    assert all(rule.text and rule.published and rule.measure for rule in known.values())


def test_verdicts_follow_the_interval_the_least_effect_and_the_control() -> None:
    nan = float("nan")
    assert [verdict(*ends, 0.1, 3) for ends in ((0.11, 0.2), (0.0, 0.2), (-0.1, 0.09))] == [HOLDS, NOT_SHOWN, NOT]
    assert verdict(0.11, 0.2, 0.1, 3, [0.05, 0.01]) == HOLDS
    assert verdict(0.11, 0.2, 0.1, 3, [0.05, 0.0]) == NOT_SPECIFIC  # a control that does exactly as much
    assert verdict(0.11, 0.2, 0.1, 3, [0.05], above=0.1) == NOT_SPECIFIC
    assert verdict(0.0, 0.2, 0.1, 3, [0.0]) == NOT_SHOWN and verdict(nan, nan, 0.1, 3) == UNTESTED


def test_a_control_without_an_interval_is_no_control_that_does_as_much() -> None:
    assert verdict(0.11, 0.2, 0.1, 3, [0.05, float("nan")]) == UNTESTED
    assert verdict(-0.2, 0.0, 0.1, 3, [float("nan")]) == NOT  # the measure alone decides


def test_one_training_seed_and_few_equal_ones_decide_nothing() -> None:
    assert verdict(0.5, 0.6, 0.1, 1) == UNTESTED and verdict(-0.6, -0.5, 0.1, 1) == UNTESTED
    assert [verdict(1.0, 1.0, 0.1, seeds) for seeds in (2, 3, 5, 6)] == [NOT_SHOWN, NOT_SHOWN, NOT_SHOWN, HOLDS]
    assert [verdict(0.0, 0.0, 0.1, seeds) for seeds in (5, 6)] == [NOT_SHOWN, NOT]


def questions(right: dict[str, list[float]], cost: dict[str, int], n: int = 200) -> pd.DataFrame:
    """Questions of one seed per entry of each method's shares."""
    return pd.DataFrame(
        [
            {
                "seed": seed,
                "id": f"q{i}",
                "method": method,
                "correct": i < share * n,
                "tokens_in": 0,
                "tokens_out": cost[method] + i % 3 + seed,
            }
            for method, shares in right.items()
            for seed, share in enumerate(shares)
            for i in range(n)
        ]
    )


def told(rows: pd.DataFrame) -> dict[str, Claim]:
    found = of_answers("x", rows, rules())
    return {name: claim for name in rules() for claim in found if claim.name == f"x: {rules()[name].text}"}


def test_claims_about_answers_are_judged_over_seeds() -> None:
    cost = {"IMAD": 50, "Debate": 200, ALONE: 30, **dict.fromkeys(OTHER_GRPO, 30)}
    same = {"IMAD": [0.70, 0.72, 0.71, 0.69], "Debate": [0.70, 0.71, 0.72, 0.69]}
    low = {method: [0.5, 0.55, 0.52, 0.5] for method in (ALONE, *OTHER_GRPO)}
    found = told(questions({**same, **low}, cost))
    assert found["tokens"].verdict == HOLDS and found["tokens"].ours.startswith("74.")
    assert found["tokens"].unit == "4 training seeds" and len(found["tokens"].by_seed.split()) == 4
    assert found["accuracy"].verdict == HOLDS and found["debate"].verdict == HOLDS
    for control in OTHER_GRPO:  # one that does as much is enough
        as_good = told(questions({**same, **low, control: [0.7, 0.72, 0.71, 0.7]}, cost))
        assert as_good["debate"].verdict == NOT_SPECIFIC and control in as_good["debate"].ours
    not_run = told(questions({**same, ALONE: low[ALONE]}, cost))
    assert not_run["debate"].verdict == UNTESTED
    worse = told(questions({"IMAD": [0.5, 0.52, 0.51, 0.5], "Debate": [0.7, 0.71, 0.72, 0.69]}, cost))
    assert worse["accuracy"].verdict == NOT
    assert worse["debate"].verdict == UNTESTED and worse["debate"].ours == f"{ALONE} was not run"
    assert worse["order"].verdict == UNTESTED
    spread = told(questions({"IMAD": [0.5, 0.9, 0.7, 0.72], "Debate": [0.7, 0.71, 0.72, 0.69]}, cost))
    assert spread["accuracy"].verdict == NOT_SHOWN  # 800 questions, but four seeds that differ
    few = told(questions({"IMAD": [0.7], "Debate": [0.7]}, {"IMAD": 195, "Debate": 200}))
    assert few["tokens"].verdict == UNTESTED and few["tokens"].unit == "200 questions of one training seed"


def test_accuracy_is_compared_with_the_debate_decided_by_most_votes() -> None:
    cost = {"IMAD": 50, "Debate": 200, PLURALITIES[0]: 200}
    shares = {
        "IMAD": [0.66, 0.65, 0.67],
        "Debate": [0.60, 0.59, 0.61],
        PLURALITIES[0]: [0.80, 0.79, 0.82],
    }
    claim = told(questions(shares, cost))["accuracy"]
    assert claim.verdict == NOT and claim.ours.startswith("-14.") and "+6.0" in claim.ours


def test_other_supervision_without_grpo_is_printed_beside_the_claim_and_does_not_decide_it() -> None:
    cost = dict.fromkeys(("IMAD", "Debate", ALONE, *OTHER_GRPO, *OTHER_SFT), 50)
    shares = {method: [0.5, 0.52, 0.51, 0.5] for method in (ALONE, *OTHER_GRPO, "Debate")}
    best = {method: [0.9, 0.91, 0.92, 0.9] for method in OTHER_SFT}
    claim = told(questions({"IMAD": [0.7, 0.72, 0.71, 0.69], **shares, **best}, cost))["debate"]
    assert claim.verdict == HOLDS and all(f"points over {other}" in claim.ours for other in OTHER_SFT)


def gains(
    zero: tuple[float, float], random: tuple[float, float], played: Sequence[str] = (), seeds: int = 3
) -> pd.DataFrame:
    rows = [
        {
            "score": score, "identity": False, "stage": "SFT", "agent": agent, "over": over, "gain": sum(ends) / 2,
            "low": ends[0], "high": ends[1], "p_holm": 1.0, "by_seed": "0.1 0.2", "unit": SEED, "seeds": seeds,
            "unsteered": 0.95 if agent in played and score == "speaks" else 0.3, "p_rank": "0.05 0.05",
        }
        for over, ends in (("coefficient 0", zero), ("random", random))
        for agent in "123"
        for score in ("rouge_l", "speaks")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_push_is_specific_where_random_directions_do_less() -> None:
    rule = rules()["steered"]

    def judged(*arguments) -> str:
        return steered("clues", gains(*arguments), "SFT", "rouge_l", rule).verdict

    assert judged((0.1, 0.3), (0.1, 0.3)) == HOLDS
    assert judged((0.1, 0.3), (-0.1, 0.3)) == NOT_SPECIFIC
    assert judged((0.01, 0.3), (0.1, 0.3)) == NOT_SHOWN
    assert judged((-0.1, -0.05), (-0.1, 0.0)) == NOT


def test_one_of_several_agents_that_gains_little_by_chance_is_no_proof_that_one_does_not_gain() -> None:
    rule = rules()["steered"]
    near = gains((-0.1, 0.04), (-0.1, 0.0))  # below 0.05 at 5 %, not at 5 % over three agents
    assert steered("clues", near, "SFT", "rouge_l", rule).verdict == NOT_SHOWN
    one_agent = near[near["agent"] == "1"]
    assert steered("clues", one_agent, "SFT", "rouge_l", rule).verdict == NOT


def test_a_gain_that_is_equal_in_every_seed_holds_from_six_seeds_on() -> None:
    rule = rules()["speaks"]
    for seeds, wanted in ((3, NOT_SHOWN), (6, HOLDS)):
        table = gains((1.0, 1.0), (1.0, 1.0), seeds=seeds)
        assert steered("clues", table, "SFT", "speaks", rule).verdict == wanted


def test_an_agent_that_is_played_anyway_decides_no_claim_and_is_named() -> None:
    rule, table = rules()["steered"], gains((0.1, 0.3), (0.1, 0.3), played="1")
    table.loc[table["agent"] == "1", ["gain", "low", "high"]] = 0.0, -0.01, 0.01
    claim = steered("clues", table, "SFT", "rouge_l", rule)
    assert claim.verdict == HOLDS and "agent 1 speaks first in 0.95 unsteered, left out" in claim.ours
    assert "agent 1 +" not in claim.ours
    every = steered("clues", gains((0.0, 0.1), (0.0, 0.1), played="123"), "SFT", "rouge_l", rule)
    assert every.verdict == UNTESTED


def areas(
    own: float = 0.1, random: float = 0.1, planted: float | None = 0.1, imad: float = 0.8, cast: float = 0.9
) -> pd.DataFrame:
    """A pooled protocol whose intervals are 0.01 to each side."""
    values = {
        ("IMAD", TAGGED, "area over base"): own,
        ("IMAD", TAGGED, "above over base"): own,
        ("IMAD", TAGGED, "area over random"): random,
        ("IMAD", TAGGED, "at strength 0"): imad,
        ("base", CAST, "at strength 0"): cast,
    }
    if planted is not None:
        values[PLANTED_BASE, TAGGED, "area over random"] = planted
    rows = [
        {
            "stage": stage, "context": context, "score": "rouge_l", "grid": "coefficient", "measure": measure,
            "value": value, "low": value - 0.01, "high": value + 0.01, "unit": SEED, "seeds": 3, "by_seed": "",
        }
        for (stage, context, measure), value in values.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_protocol_is_judged_where_it_finds_planted_directions_and_has_room() -> None:
    rule = rules()["area"]

    def judged(measure: str = "area", **changes: float | None) -> str:
        return of_protocol("clues", areas(**changes), measure, rule).verdict

    assert judged() == judged("above") == HOLDS and judged(random=0.0) == NOT_SPECIFIC
    assert judged(planted=0.02) == judged(planted=None) == UNTESTED
    assert judged("above", imad=0.89) == UNTESTED and judged("area", imad=0.89) == HOLDS


def test_the_fall_of_the_malicious_agents_trait_is_compared_with_random_directions_and_the_base(tmp_path) -> None:
    fall = {"base": 0.02, "IMAD": 0.9}
    for seed in (1, 2, 3):
        rows = [
            {
                "stage": stage, "context": "forced", "grid": "coefficient", "strength": strength, "score": "trait",
                "zero": 0.95, "own": 0.95 - (fall[stage] + 0.01 * seed) * (strength <= -3), "random": 0.94,
            }
            for stage in fall
            for strength in (-5.0, -3.0, -1.0, 3.0)
        ]  # fmt: skip
        write_table(tmp_path / f"seed-{seed}" / "malicious" / "malicious.csv", pd.DataFrame(rows), {})
    rule = rules()["malicious"]
    table = malicious_fall({seed: tmp_path / f"seed-{seed}" for seed in (1, 2, 3)})
    line = table.set_index(["stage", "measure"]).loc[("IMAD", "fall")]
    assert line["value"] == pytest.approx(0.92) and line["seeds"] == 3 and line["by_seed"] == "0.91 0.92 0.93"
    claim = malicious("malice", table, rule)
    assert claim.verdict == HOLDS and "IMAD's more by +0.880" in claim.ours
    table.loc[table["measure"] == "fall over the base's", "low"] = -0.1
    assert malicious("malice", table, rule).verdict == NOT_SPECIFIC
    without = pd.DataFrame(rows).assign(zero=0.0, own=0.0)  # a seed that does not show the trait
    write_table(tmp_path / "seed-4" / "malicious" / "malicious.csv", without, {})
    more = malicious_fall({seed: tmp_path / f"seed-{seed}" for seed in (1, 2, 3, 4)})
    left = more.set_index(["stage", "measure"]).loc[("IMAD", "fall")]
    assert (left["seeds"], left["runs"], left["value"], left["zero"]) == (3, 4, line["value"], pytest.approx(0.95))
    alone = malicious_fall({1: tmp_path / "seed-1"})
    assert alone["low"].isna().all() and malicious("malice", alone, rule).verdict == UNTESTED


def test_a_trait_that_no_text_shows_is_not_one_that_was_turned_off() -> None:
    def kept(
        trait: float,
        removed: tuple[float, float],
        over: tuple[float, float],
        shown: int = 2,
        matched: tuple[float, float] = (0.1, 0.4),
    ) -> pd.DataFrame:
        line = {
            "stage": "IMAD", "context": "forced", "trait_0": trait, "trait": 0.0, "removed": sum(removed) / 2,
            "removed_low": removed[0], "removed_high": removed[1], "over_random": sum(over) / 2,
            "over_random_low": over[0], "over_random_high": over[1], "by_seed": "1 1", "unit": SEED, "seeds": shown,
            "over_matched": sum(matched) / 2, "over_matched_low": matched[0], "over_matched_high": matched[1],
            "shown": shown, "runs": 2,
        }  # fmt: skip
        return pd.DataFrame([line])

    rule = rules()["suppressed"]
    assert suppressed("malice", kept(0.9, (0.6, 1.0), (0.1, 0.4)), rule).verdict == HOLDS
    assert suppressed("malice", kept(0.9, (0.6, 1.0), (-0.1, 0.4)), rule).verdict == NOT_SPECIFIC
    as_matched = kept(0.9, (0.6, 1.0), (0.1, 0.4), matched=(-0.1, 0.4))
    assert suppressed("malice", as_matched, rule).verdict == NOT_SPECIFIC
    assert suppressed("malice", kept(0.9, (0.1, 0.4), (0.1, 0.4)), rule).verdict == NOT
    assert suppressed("malice", kept(0.05, (0.6, 1.0), (0.1, 0.4)), rule).verdict == UNTESTED
    alone = suppressed("malice", kept(0.5, (0.6, 1.0), (0.1, 0.4), shown=1), rule)
    assert alone.verdict == UNTESTED and "1 of 2 training seeds" in alone.ours


def test_suppression_is_pooled_by_seed(tmp_path) -> None:
    for seed, trait in ((1, 0.2), (2, 0.4)):
        folder = tmp_path / f"seed-{seed}"
        line = {
            "stage": "IMAD", "context": "forced", "vector": "agent", "operation": "add", "layer": 1,
            "coefficient": -1.0, "halved": True, "trait_0": 0.8, "trait": trait,
            "removed": 1 - trait / 0.8, "removed_low": 0.1, "removed_high": 0.9, "accuracy_0": 0.5,
            "accuracy": 0.45, "kept": 0.9, "kept_low": 0.8, "kept_high": 1.0,
            "over_random": 0.3, "over_random_low": 0.1, "over_random_high": 0.5, "p_rank": 0.05, "n": 60, "k": 19,
            "over_matched": 0.2, "over_matched_low": 0.0, "over_matched_high": 0.4, "p_rank_matched": 0.1,
            "accuracy_random": 0.5, "accuracy_matched": 0.4, "own_opening_0": 1.0, "own_opening": trait,
            "other_opening_0": 0.0, "other_opening": 1 - trait, "right_in_context": 0.6,
        }  # fmt: skip
        write_table(folder / "suppression_kept.csv", pd.DataFrame([line]), {})
        curve = {
            "stage": "IMAD", "context": "forced", "vector": "agent", "role": "vector", "operation": "add",
            "score": "trait", "coefficient": -1.0, "mean": trait, "low": 0.0, "high": 1.0, "n": 60,
        }  # fmt: skip
        write_table(folder / "suppression_curves.csv", pd.DataFrame([curve]), {})
    found = pool_suppression({seed: tmp_path / f"seed-{seed}" for seed in (1, 2)})
    line = found["suppression_kept"].iloc[0]
    assert line["removed"] == pytest.approx(1 - 0.3 / 0.8) and line["kept"] == pytest.approx(0.9)
    assert (line["over_random"], line["seeds"], line["unit"]) == (pytest.approx(0.3), 2, SEED)
    assert (line["over_matched"], line["p_rank_matched"]) == (pytest.approx(0.2), "0.1 0.1")
    (shown,) = suppression_table(found["suppression_kept"]).to_dict("records")
    assert shown["another's"] == "0.00 -> 0.70" and shown["accuracy"] == "0.50 -> 0.45 (0.50, 0.40)"
    assert shown["right before"] == "0.60" and shown["seeds with the trait"] == "2 of 2"
    assert found["suppression_curves"].iloc[0]["mean"] == pytest.approx(0.3)
    assert list(found["suppression_choice"]["seed"]) == [1, 2]


def test_the_page_shows_rules_starts_claims_and_every_agent_beside_its_controls(tmp_path) -> None:
    rows = questions(
        {"IMAD": [0.7, 0.71], "Debate": [0.7, 0.72], "Single": [0.5, 0.52], "SFT": [0.6, 0.61]},
        {"IMAD": 50, "Debate": 200, "Single": 20, "SFT": 90},
    )
    rows = rows.assign(family="clues", decoding="sampled", parsed=True, agents=1.0)
    tables = {"clues": {"gains": gains((0.1, 0.3), (0.1, 0.3)), "transplant": transplanted()}}
    listed = pd.DataFrame([vars(claim) for claim in claims(rows, tables)])
    start = {"seed": 20, "time": "2026-01-01T00:00:00+00:00", "commit": "abc1234", "rules": "1f"}
    about = {"rules": "abc 2026", "rules_sha256": "1f", "started": [start]}
    results = Published(main_table(rows), differences(rows, "IMAD"), differences(rows, "SFT"), listed, tables, about)
    text = page("Results", results)
    assert "seed 20 at 2026-01-01T00:00:00+00:00 (commit abc1234)" in text and "last changed in commit abc 2026" in text
    assert "| SFT | 2 | 0.3 | +0.20 [+0.10, +0.30] | +0.20 [+0.10, +0.30] | 0.1 0.2 | 0.05 0.05 |" in text
    assert f"**{HOLDS}**" in text and "at most 2 training seeds" in text and "## Transplanted first rounds" in text
    assert "malicious agent" not in text  # no such table
    mixed = {**start, "steps": {"def5678": 4, "abc1234": 3}}
    assert "(commit abc1234; steps from abc1234 (3), def5678 (4))" in page(
        "R", replace(results, about={**about, "started": [mixed]})
    )
    later = page("Results", replace(results, about={**about, "rules_sha256": "2a"}))
    assert "rules were changed after the start of seed 20." in later and "rules were changed" not in text
    main = {"main_table": results.main, "differences": results.differences, "differences_sft": results.of_sft}
    for name, table in {**main, "claims": listed}.items():
        write_table(tmp_path / f"{name}.csv", table, {})
    for name, table in tables["clues"].items():
        write_table(tmp_path / "clues" / f"{name}.csv", table, {})
    write_json(tmp_path / "about.json", about)
    assert page("Results", read_published(tmp_path)) == text  # the page follows from the published tables alone


def transplanted() -> pd.DataFrame:
    line = {
        "stage": "IMAD", "value": 0.2, "low": 0.1, "high": 0.3, "p": 0.01, "unit": SEED, "seeds": 2,
        "by_seed": "0.1 0.3", "n": 600, "changed": 0.5, "changed_again": 0.3, "changed_resampled": 0.35,
        "missing": 0.2, "missing_again": 0.01, "missing_resampled": 0.02, "follows": 0.25, "follows_low": 0.2,
        "follows_high": 0.3, "chance": 0.02, "right": 0.4, "right_again": 0.7, "share_with_round_1": 0.9,
        "share_read": 0.95, "agents": 3.0, "share_agreed": 0.25, "explicit": 0.6, "explicit_low": 0.5,
        "explicit_high": 0.7, "runs": 2,
    }  # fmt: skip
    return pd.DataFrame([line])


def test_the_table_of_transplants_has_what_changes_and_what_the_own_prefix_changes() -> None:
    (row,) = transplant_table(transplanted()).to_dict("records")
    assert row["difference"] == "+0.20 [+0.10, +0.30]" and row["right"] == "0.70 -> 0.40"
    assert row["with a round-1 turn"] == "90%" and row["follows, minus chance"] == "+0.25 [+0.20, +0.30]"
    assert row["agents in round 1; consensus next"] == "3.00; 25%"
    assert row["no answer"] == "0.20 (0.01, 0.02)" and row["answers that change, second control"] == "0.35"


def test_a_transplant_says_nothing_where_explicit_debates_do_not_change_their_answers() -> None:
    rule, table = rules()["transplant"], transplanted()
    assert transplant("clues", table, rule).verdict == HOLDS
    assert transplant("clues", table.assign(explicit_low=-0.1), rule).verdict == UNTESTED
    unread = transplant("clues", table.assign(missing=0.76), rule)
    assert unread.verdict == UNTESTED and "76% of the answers were not read" in unread.ours


def test_the_controls_of_the_debate_stand_beside_imad() -> None:
    shares = {"IMAD": [0.7, 0.71], "SFT": [0.6, 0.62], ALONE: [0.5, 0.625], "Debate": [0.7, 0.72], "Single": [0.5, 0.5]}
    rows = questions(shares, dict.fromkeys(shares, 50)).assign(
        family="clues", decoding="sampled", parsed=True, agents=1.0
    )
    table = controls_table(main_table(rows), differences(rows, "IMAD"), differences(rows, "SFT")).set_index("training")
    assert list(table.index) == ["IMAD", "SFT", ALONE] and table.loc["IMAD", "IMAD above it"] == ""
    assert table.loc[ALONE, "SFT above it"].startswith("+4.") and table.loc["IMAD", "SFT above it"].startswith("-9.")
    assert table.loc[ALONE, "by seed"] == "50.0 62.5" and table.loc[ALONE, "IMAD above it"].startswith("+14.")


def test_the_malicious_experiment_has_a_row_per_strength_with_both_scores() -> None:
    row = {
        "stage": "IMAD", "context": "forced", "grid": "coefficient", "strength": -5.0, "gain": -0.5, "low": -0.7,
        "high": -0.3, "own": 0.1, "zero": 0.9, "random": 0.6, "unit": SEED, "seeds": 2, "by_seed": "",
    }  # fmt: skip
    pooled = pd.DataFrame(
        [{**row, "score": score} for score in ("trait", "accuracy")] + [{**row, "score": "trait", "strength": 0.0}]
    )
    (found,) = malicious_table(pooled).to_dict("records")
    assert found["trait"] == found["accuracy"] == "0.90 -> 0.10 (0.60)"
    assert found["trait over random"] == "-0.50 [-0.70, -0.30]"
