"""Recipes whose activations round otherwise in a second call, as with another number of threads, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.recipes import caa, conditional, persona
from steerkit.demo.questions import read_questions
from steerkit.io.run_folder import ConfigurationChanged
from tests.analysis.test_caa import write_questions
from tests.analysis.test_persona import HOW, TRAIT, share_of_s
from tests.project.test_recipes import refusing_model
from tests.tiny import tiny_model, tiny_tokenizer


def measure_caa(out: Path) -> list[pd.DataFrame]:
    pairs = [caa.as_asked(p, False) for p in sk.read_ab(write_questions(out.with_suffix(".jsonl"), alike=False))]
    *tables, facts = caa.measure_behavior(
        tiny_model(), tiny_tokenizer(), pairs, out, layers=[1, 2], n_test=4, n_random=2, n_texts=2
    )
    return [*tables, pd.DataFrame(facts)]


def measure_persona(out: Path) -> list[pd.DataFrame]:
    gains, facts = persona.measure_persona(*refusing_model(), TRAIT, sk.judge(rule=share_of_s), out, **HOW)
    return [gains, pd.DataFrame([facts]).drop(columns=[name for name in facts if name.startswith("monitoring")])]


def measure_conditional(out: Path) -> list[pd.DataFrame]:
    setting = replace(conditional.Setting(), layer=2, condition_layers=(0, 1), coefficient=1.0, max_new_tokens=2)
    some = read_questions()[:9]
    parts = {"train": some[:3], "validation": some[3:6], "test": some[6:]}
    model, tokenizer = tiny_model(context=2048), tiny_tokenizer()
    when, vector, roc = conditional.read_once(model, tokenizer, parts, setting, out)
    always = conditional.swept(model, tokenizer, {"steps": vector}, parts["test"], when, setting, out / "when")
    return [roc, always]


@pytest.mark.filterwarnings("ignore::steerkit.sweeps.result.FewWarning")
@pytest.mark.parametrize("measure", [measure_caa, measure_persona, measure_conditional])
def test_a_recipe_resumes_where_activations_round_otherwise(
    measure: Callable[[Path], Any], tmp_path, monkeypatch
) -> None:
    first = measure(tmp_path / "run")
    collect = sk.collect

    def rounded_otherwise(*args: Any, **how: Any) -> sk.Activations:
        acts = collect(*args, **how)
        return replace(acts, values=acts.values * (1 + 2e-7 * torch.rand_like(acts.values)))

    monkeypatch.setattr(sk, "collect", rounded_otherwise)
    monkeypatch.setattr(caa, "median_norms", lambda *args, **how: pytest.fail("read again"))
    for one, other in zip(first, measure(tmp_path / "run"), strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_what_was_read_with_other_settings_is_refused(tmp_path) -> None:
    parts = {name: read_questions()[:3] for name in ("train", "validation", "test")}
    setting = replace(conditional.Setting(), layer=2, condition_layers=(0, 1))
    model, tokenizer = tiny_model(context=2048), tiny_tokenizer()
    conditional.read_once(model, tokenizer, parts, setting, tmp_path)
    with pytest.raises(ConfigurationChanged):
        conditional.read_once(model, tokenizer, parts, replace(setting, train=7), tmp_path)
