"""A reproduction is steps in their order: each once, what is done not again, a failure told with the end of its log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from analysis.agents.checkpoint_differences import areas
from analysis.paper.claims import (  # fmt: skip
    ALONE,
    HOLDS,
    NOT,
    OPEN,
    UNTESTED,
    accuracy,
    area,
    claims,
    preserved,
    steered,
    suppressed,
    tokens,
    turned_up,
    verdict,
)
from analysis.paper.main_table import main_table
from analysis.paper.pooling import FROZEN, at_frozen, pool_suppression, pooled, seed_by_seed
from analysis.paper.reproduce import GRIDS, RUNS, TRAIT, Step, carry_out, plan
from analysis.paper.results import gained_unnamed, page
from analysis.suppression.trait import words_trait
from steerkit.io.tables import write_table
from steerkit.sweeps.result import SweepResult
from training.debates.personas import CASTS
from training.presets import get_preset

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
    process.send_signal(way)
    assert "run the same command to resume it" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


@pytest.mark.parametrize("preset", RUNS)
def test_every_step_of_a_plan_needs_steps_of_the_plan_and_comes_once(preset, tmp_path) -> None:
    steps = plan(preset, [7, 8], tmp_path)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert all(set(step.needs) <= set(names) for step in steps)
    assert {"main-table", "results"} <= set(names)
    for name in names:  # every method is trained in a part of the run, and every checkpoint analysed in a part
        said = [a for step in steps if step.name.startswith(f"{name}-") for a in step.arguments]
        if name in ("clues-7", "addition-7"):
            family = name.removesuffix("-7")
            assert {*get_preset(preset, family, RUNS[preset][family]).trained} <= set(said)
    assert "suppression-malice-7" in names and ("agents-malice-7" in names) == ("malice" in GRIDS[preset])


def test_of_the_cast_scorning_the_second_agent_alone_is_of_ill_will_and_each_reads_it() -> None:
    trait = words_trait(TRAIT.split(","))
    for number, persona in enumerate(CASTS["scorning"].personas, 1):
        own = [text for dialogue in (*persona.worked, *persona.revised) for text in dialogue[1::2]]
        read = [dialogue[2] for dialogue in persona.revised]
        assert {trait(text) for text in own} == {float(number == 2)}
        assert {trait(text) for text in read} == {float(number != 2)}


def table(seed: int):
    import pandas as pd

    rows = [("v", 3 + seed, c, f"q{i}", f"q{i}", 0, "", float(c + i)) for c in (0.0, 1.0, 2.0) for i in range(4)]
    columns = ["vector", "layer", "coefficient", "prompt_id", "group", "sample", "text", "score"]
    return SweepResult(pd.DataFrame(rows, columns=columns))


def test_pooled_questions_of_two_seeds_are_different_questions_and_each_seed_keeps_its_own_coefficient() -> None:
    whole = pooled({1: at_frozen(table(1), 1.0), 2: at_frozen(table(2), 2.0)})
    gain = whole.gain("score")
    assert list(gain["coefficient"]) == [FROZEN] and list(gain["layer"]) == ["frozen"]
    assert gain["n"].iloc[0] == 8
    assert gain["gain"].iloc[0] == pytest.approx(1.5)


def test_the_difference_between_checkpoints_is_told_seed_by_seed_in_the_order_of_their_numbers() -> None:
    def checkpoint(**means: float) -> SweepResult:
        lines = [
            ("1", "1", 0, c, f"{seed}/q{i}", f"{seed}/q{i}", 0, "", mean)
            for seed, mean in means.items()
            for i in range(2)
            for c in (0.0, 1.0)
        ]
        columns = ["agent", "vector", "layer", "coefficient", "prompt_id", "group", "sample", "text", "score"]
        return SweepResult(pd.DataFrame(lines, columns=columns), {})

    pair = checkpoint(**{"10": 0.5, "9": 0.5}), checkpoint(**{"10": 0.1, "9": 0.75})
    assert seed_by_seed(*pair, partial(areas, score="score"), ["1"]) == "+0.250, -0.400"
    line = {"score": "rouge_l", "identity": True, "stage": "IMAD", "agent": "all", "first": 0.5, "second": 0.4, "n": 4}
    gap = pd.DataFrame([line | {"difference": -0.1, "low": -0.2, "high": -0.05, "by_seed": "+0.250, -0.400"}])
    assert area("malice", {"stage_differences": gap}).ours.endswith("[-0.200, -0.050], seed by seed +0.250, -0.400")
    assert area("malice", {"stage_differences": gap.assign(by_seed="-0.100")}).ours.endswith("-0.050]")


def questions(right: dict[str, float], cost: dict[str, int], n: int = 400):
    import pandas as pd

    return pd.DataFrame(
        [
            {"seed": 1, "id": f"q{i}", "method": m, "correct": i < share * n, "tokens_in": 0, "tokens_out": cost[m]}
            for m, share in right.items()
            for i in range(n)
        ]
    )


def test_a_family_without_the_control_that_never_debated_has_no_claim_about_it() -> None:
    share, cost = {"IMAD": 0.7, "Debate": 0.7}, {"IMAD": 50, "Debate": 200}
    malice = questions(share, cost).assign(family="malice", decoding="sampled")
    more = {**share, ALONE: 0.2}, {**cost, ALONE: 30}
    clues = questions(*more).assign(family="clues", decoding="sampled")
    names = [claim.name for claim in claims(pd.concat([malice, clues]), {})]
    assert [name for name in names if "it is the debate" in name] == ["clues: it is the debate that helps"]
    assert len(names) == 5


def test_verdicts_follow_the_interval() -> None:
    assert [verdict(0.1, 0.2), verdict(-0.2, -0.1), verdict(-0.1, 0.1)] == [HOLDS, NOT, OPEN]
    rows = questions({"IMAD": 0.70, "Debate": 0.70}, {"IMAD": 50, "Debate": 200})
    assert tokens("x", rows).ours.startswith("75.0% fewer [75.0%, 75.0%]") and tokens("x", rows).verdict == HOLDS
    assert accuracy("x", rows).verdict == HOLDS
    worse = questions({"IMAD": 0.50, "Debate": 0.70}, {"IMAD": 50, "Debate": 200})
    assert accuracy("x", worse).verdict == NOT
    assert accuracy("x", questions({"IMAD": 0.67, "Debate": 0.70}, {"IMAD": 5, "Debate": 20})).verdict == OPEN


def test_a_trait_that_no_text_shows_is_not_one_that_was_turned_off() -> None:
    nan, gone = float("nan"), -float("inf")

    def said(traits: dict[str, float], halved: dict[str, list[float]], control: float = nan, showing: int = 3):
        lines = [(stage, "forced", "agent", t, c, 40) for stage, t in traits.items() for c in halved[stage]]
        lines += [("IMAD", "forced", "random 0", traits["IMAD"], control, 40)]
        kept = pd.DataFrame(lines, columns=["stage", "context", "vector", "trait", "coefficient", "n"])
        kept = kept.assign(role=["random" if line.vector == "random 0" else "vector" for line in kept.itertuples()])
        kept = kept.assign(showing=[3 if line.stage == "base" else showing for line in kept.itertuples()], seeds=3)
        return suppressed("malice", {"suppression_kept": kept})

    absent = said({"base": 1.0, "IMAD": 0.0}, {"base": [gone], "IMAD": [nan]}, showing=0)
    assert absent.verdict == UNTESTED
    assert absent.ours == "base: trait 1.00, halved by ablation; IMAD: trait 0.00, nothing to turn off"
    assert said({"base": 1.0, "IMAD": 0.8}, {"base": [nan], "IMAD": [-3.0, -2.0]}).verdict == HOLDS
    assert said({"base": 1.0, "IMAD": 0.8}, {"base": [-1.0], "IMAD": [-2.0]}).verdict == OPEN
    assert said({"base": 1.0, "IMAD": 0.8}, {"base": [nan], "IMAD": [nan]}).verdict == NOT
    milder = said({"base": 1.0, "IMAD": 0.8}, {"base": [nan], "IMAD": [-2.0]}, control=-4.0)
    assert milder.verdict == HOLDS and milder.ours.endswith("halved from -2 on, by a random direction from -4 on")
    both = said({"base": 1.0, "IMAD": 0.8}, {"base": [nan], "IMAD": [gone]}, control=gone)
    assert both.verdict == NOT and both.ours.endswith("halved by ablation, by a random direction's, too")
    assert said({"base": 1.0, "IMAD": 0.8}, {"base": [nan], "IMAD": [-2.0]}, control=-2.0).verdict == NOT
    rare = said({"base": 1.0, "IMAD": 1.0}, {"base": [nan], "IMAD": [-4.0]}, showing=1)
    assert rare.verdict == OPEN and rare.ours.endswith("IMAD: trait 1.00 in 1 of 3 seeds, halved from -4 on")


def test_accuracy_is_kept_in_the_seeds_that_show_the_trait_and_curves_are_of_all(tmp_path) -> None:
    for seed, trait in ((1, [0, 0]), (2, [1, 0])):
        lines = [
            ("agent", 4, c, f"q{i}", f"q{i}", shown, float(i < right), 1.0)
            for c, shown, right in ((0.0, trait[0], 4), (-1.0, trait[1], 1 + seed))
            for i in range(4)
        ]
        columns = ["vector", "layer", "coefficient", "prompt_id", "group", "trait", "accuracy", "perplexity"]
        folder = tmp_path / f"seed-{seed}"
        for context in ("plain", "forced"):
            texts = pd.DataFrame(lines, columns=columns).assign(sample=0, text="", role="vector", control_of=None)
            SweepResult(texts, {}).save(folder / "suppression" / "imad" / f"texts-{context}.parquet")
        write_table(folder / "suppression_kept.csv", pd.DataFrame({"stage": ["IMAD"]}), {})
    found = pool_suppression(tmp_path)
    kept = found["suppression_kept"]
    assert list(kept["kept"]) == [0.75, 0.75] and list(kept["n"]) == [4, 4]
    assert list(kept["showing"]) == [1, 1] and list(kept["seeds"]) == [2, 2]
    assert set(found["suppression_curves"]["n"]) == {8}


def test_accuracy_kept_is_told_stage_by_stage_in_the_order_of_training() -> None:
    nan, gone = float("nan"), -float("inf")
    lines = [
        ("base", "agent", "add", -5.0, 0.1), ("base", "prompts", "add", nan, nan), ("SFT", "agent", "add", nan, nan),
        ("base", "agent", "ablate", gone, 0.5), ("IMAD", "agent", "add", -1.0, 0.95),
        ("IMAD", "random 0", "add", -1.0, 1.0),
    ]  # fmt: skip
    kept = pd.DataFrame(lines, columns=["stage", "vector", "operation", "coefficient", "kept"])
    kept["role"] = ["random" if name == "random 0" else "vector" for name in kept["vector"]]
    kept = kept.assign(context="forced", low=kept["kept"] - 0.02, high=kept["kept"] + 0.02, n=80, showing=1, seeds=1)
    claim = preserved("malice", {"suppression_kept": kept})
    base = "base: 0.10 [0.08, 0.12] at -5, 0.50 [0.48, 0.52] by ablation"
    assert claim.ours == f"{base}; SFT: none; IMAD: 0.95 [0.93, 0.97] at -1"
    assert claim.verdict == HOLDS
    assert preserved("malice", {"suppression_kept": kept.assign(showing=1, seeds=2)}).verdict == OPEN


def test_an_agent_is_turned_up_where_it_gains_over_coefficient_0_and_over_random_by_holm_too() -> None:
    def lines(stage: str, low: float, random: float, p: float) -> list[tuple]:
        return [
            ("rouge_l", False, stage, "1", over, bound, p)
            for over, bound in (("coefficient 0", low), ("random", random), ("matched", -1.0))
        ]

    table = [*lines("up", 0.1, 0.1, 0.01), *lines("chance", 0.1, 0.1, 0.06), *lines("random", 0.1, -0.1, 0.01)]
    gain = pd.DataFrame(table, columns=["score", "identity", "stage", "agent", "over", "low", "p_holm"])
    assert turned_up(gain).droplevel(["score", "identity", "agent"]).to_dict() == {
        "up": True, "chance": False, "random": False,
    }  # fmt: skip


def test_the_page_shows_every_agent_of_every_checkpoint_beside_its_controls() -> None:
    lines = [
        ("base", a, over, "rouge_l", False, 0.3 if a == "1" else -0.1, 0.1, 0.4, 96, 0.01, int(a), 3)
        for a in "12"
        for over in ("coefficient 0", "random")
    ]
    columns = ["stage", "agent", "over", "score", "identity", "gain", "low", "high", "n", "p_holm", "seeds_up", "seeds"]
    gain = pd.DataFrame([*lines, ("base", "1", "random", "rouge_l", True, 9, 9, 9, 96, 1, 0, 3)], columns=columns)
    shown = gained_unnamed(gain)
    assert list(shown.columns) == ["stage", "agent", "over coefficient 0", "over random", "seeds by themselves"]
    assert list(shown["seeds by themselves"]) == ["1 of 3", "2 of 3"]
    assert list(gained_unnamed(gain.assign(seeds=1)).columns) == ["stage", "agent", "over coefficient 0", "over random"]
    assert list(shown["over random"]) == ["+0.30 [+0.10, +0.40]", "-0.10 [+0.10, +0.40]"]
    runs = questions({"IMAD": 0.7, "Debate": 0.7, "Single": 0.5}, {"IMAD": 50, "Debate": 200, "Single": 20})
    rows = runs.assign(family="clues", decoding="sampled", parsed=True, agents=1.0)
    claim = steered(
        "clues", {"gains": gain, "choice": pd.DataFrame({"stage": ["base"], "settings_tried": [9]})}, "base"
    )
    assert claim.ours == "2 of 2 agents (by themselves in 1, 2 of 3 seeds); 9 settings tried" and claim.verdict == HOLDS
    text = page(main_table(rows), [claim], 1, {"clues": {"gains": gain}})
    assert "| base | 2 | -0.10 [+0.10, +0.40] |" in text and f"| 96 | **{HOLDS}** |" in text
