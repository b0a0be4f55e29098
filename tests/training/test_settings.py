"""Settings: a value is checked against its field's annotation, whether it comes from Python or from `--set`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from training.debates.answerers import Sampling
from training.presets import TINY, get_preset, preset_names
from training.settings import override, shell
from training.train.checkpoints import LoRA
from training.train.grpo import GRPO, check_clip
from training.train.schedules import Anneal
from training.train.sft import SFT


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sft.target=untaged", "expected one of 'trace', 'untagged'.* for 'sft.target'; got 'untaged'"),
        ("sft.cut_to=first", "expected one of 'answers'"),
        ("grpo.loss=ppo", "expected one of 'dapo', 'bnpo'"),
        ("grpo.box=second", "expected one of 'last', 'first'"),
        ("grpo.anneal.kind=steps", "expected one of 'linear', 'staged', 'gated'"),
        ("dtype=float8", "expected one of 'float32'.* or null for 'dtype'"),
        ("sft.steps=abc", "expected a value of type int or null for 'sft.steps'; got 'abc'"),
        ("sft.max_length=abc", "expected a value of type int or null for 'sft.max_length'"),
        ("sft.checkpointing=no", "expected a value of type bool or null"),
        ("sft.batch=true", "expected a value of type int for 'sft.batch'"),
        ("grpo.anneal.clip=1000", "expected a list of 2 numbers for 'grpo.anneal.clip'"),
        ("grpo.anneal.clip=[8]", "expected a list of 2 numbers"),
        ('rates={"SFT on gold answers": "fast"}', "expected a value of type Mapping for 'rates'"),
        ("what_helps=[1]", "expected a list of str for 'what_helps'"),
        ('sft.lora={"rank": 8}', r"expected fields among \['r', 'alpha', 'dropout'\] for 'sft.lora'; got \['rank'\]"),
        ('sft.lora={"r": "8"}', "expected a value of type int for 'sft.lora.r'"),
        ("sft.batch=0", "expected batch of 1 or more; got 0"),
        ("sft.max_length=-3", "expected max_length of 1 or more; got -3"),
        ("sft.epochs=0", "expected epochs of 0.01 or more"),
        ("sft.structure_dropout=2", "expected structure_dropout from 0 to 1; got 2.0"),
        ("grpo.generations=1", "expected generations of 2 or more; got 1"),
        ("debates=0", "expected debates of 1 or more; got 0"),
        ("decodings=0", "expected decodings of 1 or more; got 0"),
        ("sampling.max_new_tokens=0", "expected max_new_tokens of 1 or more; got 0"),
        ('sft.lora={"r": 0}', "expected r of 1 or more; got 0"),
        ('sft.lora={"dropout": 7}', "expected dropout from 0 to 1; got 7"),
        ("sft.keep_at=[0,5]", "expected steps from 1 in keep_at"),
        ("grpo.epsilon=-1", "expected epsilon of 0 or more; got -1"),
        ("grpo.temperature=0", "expected a temperature above 0"),
        ("grpo.anneal.floor=9", "expected a floor from 0 to 1"),
        ("grpo.anneal.clips=[]", "at least one weight and clip"),
        ('rates={"SFT on gold answers": -1}', "expected rates of 0 or more"),
        ("grpo.rounds=5", "expected as many rounds in GRPO as in the debates"),
        ("sampling.seed=1", "expected no seed among the settings"),
        ("sampling.top_p=0", "expected top_p above 0 and at most 1; got 0"),
        ("grpo.top_p=0", "expected top_p above 0 and at most 1; got 0"),
        ("sampling.temperature=Infinity", r"expected a value of type float \(finite\) for 'sampling.temperature'"),
        ("grpo.temperature=Infinity", r"expected a value of type float \(finite\)"),
        ("grpo.anneal.weight=[Infinity,1]", "expected a list of 2 numbers"),
        ('grpo.kept=["<|consensus|>"]', r"expected tags of 3 agents and 2 rounds in kept; got \['<|consensus|>'\]"),
        ('grpo.kept=["<|Agent 4 Solution|>"]', "expected tags of 3 agents and 2 rounds in kept"),
        ("family=two_sum", r"expected no family among the settings; got \['family=two_sum'\]. Pass --family to imad"),
        ("cast=nobody", "and a cast among"),
        ("sft.micro_batch=5", "expected a micro_batch that divides"),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "llama-3.1-8b"])
def test_a_value_that_does_not_fit_its_annotation_or_range_is_refused_by_name(name, setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_preset(name, settings=[setting])


def test_a_mistyped_target_is_refused_in_python_too_and_trains_no_other_baseline() -> None:
    with pytest.raises(ValueError, match="expected one of 'trace'"):
        SFT(target="untaged")
    with pytest.raises(ValueError, match="expected one of 'dapo'"):
        GRPO(loss="dappo")
    with pytest.raises(ValueError, match="expected max_new_tokens of 1 or more"):
        Sampling(max_new_tokens=0)


@pytest.mark.parametrize("name", ["tiny", "llama-3.1-8b"])
def test_every_documented_value_of_a_setting_is_accepted(name) -> None:
    settings = [
        "grpo.decay=cosine", "grpo.decay=true", "grpo.decay=false", "grpo.anneal.kind=staged", "sft.steps=null",
        "sft.checkpointing=true", "sft.epochs=2", "grpo.epochs=1.5", "grpo.anneal.clip=[900,400]", "dtype=bfloat16",
        'what_helps=["Debate, Train, Evolve"]', 'rates={"SFT on gold answers": 0.001}',
    ]  # fmt: skip
    assert get_preset(name, settings=settings).grpo.anneal.clip == (900, 400)
    assert get_preset(name, settings=["grpo.decay=cosine"]).grpo.decay == "cosine"
    assert get_preset(name, settings=["grpo.decay=true"]).grpo.decay is True


def test_a_tag_that_keeps_its_reward_is_one_of_the_agents_and_rounds_that_are_set() -> None:
    four = ["grpo.agents=4", 'grpo.kept=["<|Agent 4 Solution|>","<|Consensus|>"]']
    assert get_preset("llama-3.1-8b", settings=four).grpo.kept == ("<|Agent 4 Solution|>", "<|Consensus|>")
    with pytest.raises(ValueError, match="expected tags of 1 agents"):
        GRPO(agents=1, kept=("<|Agent 2 Solution|>",))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused_in_python_too(value) -> None:
    for setting in (lambda: Sampling(temperature=value), lambda: GRPO(temperature=value), lambda: SFT(epochs=value)):
        with pytest.raises(ValueError, match=r"expected a value of type float \(finite\)"):
            setting()
    with pytest.raises(ValueError, match="expected top_p above 0 and at most 1; got 0"):
        Sampling(top_p=0)


def test_an_option_in_a_message_is_one_word_of_a_shell() -> None:
    anneal = Anneal("gated", clip=(200, 40))
    with pytest.raises(ValueError) as refused:
        check_clip({1: 54, 2: 46}, GRPO(anneal=anneal, must_end=True))
    words = shlex.split(str(refused.value).partition("Pass ")[2])
    assert words[:2] == ["--set", "grpo.anneal.clip=[200,54]"]
    assert "'grpo.anneal.clip=[200,54]'" in str(refused.value)  # zsh would look for files by the brackets
    assert shlex.split(shell("--run", Path("my runs"), 3)) == ["--run", "my runs", "3"]


def test_an_object_becomes_the_dataclass_of_its_field() -> None:
    given = get_preset("tiny", "clues", ['sft.lora={"r": 8, "alpha": 16}']).sft.lora
    assert given == LoRA(8, 16)
    assert override(SFT(), ["lora.r=8"]).lora == LoRA(8) and override(SFT(), ["lora=null"]).lora is None


def test_the_presets_keep_their_values_through_a_setting_that_changes_nothing() -> None:
    for preset in (*TINY.values(), *(get_preset(name) for name in preset_names())):
        unchanged = override(preset, [f"test={preset.test}", f"sft.learning_rate={preset.sft.learning_rate}"])
        assert unchanged == preset and unchanged.sft.__dict__ == preset.sft.__dict__
