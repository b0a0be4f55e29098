"""SFT and GRPO end to end on a model of two layers: what is saved loads, and what is resumed ends the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken

import steerkit as sk
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.text.tags import agents_in, tags
from steerkit.text.traces import DebateTrace, Turn
from tests.tiny import tiny_model, tiny_tokenizer
from training.problems.families import addition
from training.train.checkpoints import LoRA, add_tags, in_rounds, last_checkpoint, save, with_adapter
from training.train.schedules import Anneal
from training.train.sft import SFT, cut_trace, debategpt_target, examples, train_sft

trl = pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
WIDE = {"kind": "llama", "context": 2048}


def model_and_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|user|>"
    return tiny_model(**WIDE), tokenizer


def traces(count: int = 8, rounds: int = 2) -> list[DebateTrace]:
    debates = []
    for number in range(count):
        texts = [f"{i} \\boxed{{{number + (i == 3)}}}" for i in (1, 2, 3)]
        turns = [Turn(i, r, text) for r in range(1, rounds + 1) for i, text in enumerate(texts, 1)]
        sentence = f"A majority of agents converged on the solution of \\boxed{{{number}}}"
        debates.append(DebateTrace.of(f"{number}+0", turns, sentence, str(number)))
    return debates


def test_tags_survive_decoding_saving_and_loading_and_would_not_as_special_tokens(tmp_path) -> None:
    model, tokenizer = model_and_tokenizer()
    before = model.get_input_embeddings().weight.shape[0]
    tagged = add_tags(model, tokenizer, tags())
    assert model.get_input_embeddings().weight.shape[0] == before + 10
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    text = traces(1)[0].text
    ids = tagged(text)["input_ids"]
    assert tagged.decode(ids, skip_special_tokens=True) == text
    save(model, tagged, tmp_path / "checkpoint")
    loaded, again = sk.load(tmp_path / "checkpoint")
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    lost = tiny_tokenizer()
    lost.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags()])
    assert tags()[0] not in lost.decode(lost(text)["input_ids"], skip_special_tokens=True)
    assert tags()[0] not in tokenizer.get_vocab()  # the caller's tokenizer is as it was


def test_examples_hold_the_problem_once_and_are_cut_as_asked() -> None:
    rows = examples(traces(), SFT())
    assert rows[0]["prompt"] == "Problem: 0+0\n\n"
    assert rows[0]["completion"] == traces()[0].text
    led = DebateTrace("0+0", "Problem: 0+0\n\n" + traces()[0].text, "0")
    assert examples([led], SFT()) == rows[:1]
    cut = examples(traces(200), SFT(structure_dropout=0.2))
    short = [row for row in cut if "Round 2" not in row["completion"]]
    assert 20 < len(short) < 60
    assert all("Agent 3" not in row["completion"] for row in short)  # agent 3 never had the consensus
    assert all(row["completion"].endswith("<|endofdebate|>") for row in cut)


def test_debategpt_learns_the_answer_or_a_turn_that_gave_it() -> None:
    trace = traces()[4]
    assert debategpt_target(trace, "answer", "number") == r"\boxed{4}"
    assert debategpt_target(trace, "response", "number") == r"1 \boxed{4}"
    import random

    rng = random.Random(0)
    short = {cut_trace(trace, "number", rng) for _ in range(40)}
    assert {frozenset(agents_in(text)) for text in short} == {
        frozenset({1}), frozenset({2}), frozenset({1, 2})
    }  # fmt: skip
    for text in {cut_trace(trace, "number", rng, "revision") for _ in range(40)}:
        assert [line.partition(">")[0] for line in text.split("\n\n") if line.startswith("<")] in [
            ["<|Round 1 - Initial Solutions|", "<|Agent 1 Solution|", "<|Agent 2 Solution|", "<|Agent 3 Solution|",
             "<|Round 2 - Revision|", f"<|Agent {agent} Revision|", "<|Consensus|", "<|endofdebate|"]
            for agent in (1, 2)
        ]  # fmt: skip
    first = {row["completion"] for row in examples([trace] * 40, SFT(target="first"))}
    assert first == {turn.text for turn in trace.turns if turn.round == 1}
    turns = {cut_trace(trace, "number", rng, "turn") for _ in range(40)}
    assert [
        [line.partition(">")[0] for line in text.split("\n\n") if line.startswith("<")] for text in sorted(turns)
    ] == [
        ["<|Round 1 - Initial Solutions|", f"<|Agent {agent} Solution|", "<|Consensus|", "<|endofdebate|"]
        for agent in (1, 2, 3)
    ]


def test_of_three_rounds_a_shortened_trace_keeps_one_turn_of_the_last_one() -> None:
    import random

    rng, trace = random.Random(0), traces(1, rounds=3)[0]
    for text in {cut_trace(trace, "number", rng, "revision") for _ in range(40)}:
        assert [line.partition(">")[0] for line in text.split("\n\n") if line.startswith("<")] in [
            ["<|Round 1 - Initial Solutions|", "<|Agent 1 Solution|", "<|Agent 2 Solution|", "<|Agent 3 Solution|",
             "<|Round 2 - Revision|", "<|Agent 1 Revision|", "<|Agent 2 Revision|", "<|Agent 3 Revision|",
             "<|Round 3 - Revision|", f"<|Agent {agent} Revision|", "<|Consensus|", "<|endofdebate|"]
            for agent in (1, 2)
        ]  # fmt: skip


def test_an_empty_first_turn_is_no_target() -> None:
    def debate(*texts: str) -> DebateTrace:
        return DebateTrace.of("1+1", [Turn(i, 1, text) for i, text in enumerate(texts, 1)], r"All: \boxed{2}", "2")

    one = [debate("", r"\boxed{2}", "")] * 20
    assert {row["completion"] for row in examples(one, SFT(target="first"))} == {r"\boxed{2}"}
    rows = examples(one, SFT(structure_dropout=1.0, cut_to="turn"))
    assert all(agents_in(row["completion"]) == {2} for row in rows)
    with pytest.raises(ValueError, match="got 1 that give none"):
        examples([debate("", "")], SFT(target="first"))


@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_sft_trains_the_tags_and_leaves_a_checkpoint_that_loads(tmp_path, lora) -> None:
    model, tokenizer = model_and_tokenizer()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    setting = SFT(steps=3, batch=4, micro_batch=2, lora=lora, learning_rate=1e-2)
    folder = train_sft(model, tokenizer, traces(), setting, tmp_path / "sft")
    loaded, tagged = sk.load(folder)
    rows = tagged.convert_tokens_to_ids(list(tags()))
    table = loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight is table
    assert table[rows].std(dim=0).mean() > 0  # no two tags alike
    changed = loaded.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(changed, start["model.layers.0.self_attn.q_proj.weight"])
    again = train_sft(*model_and_tokenizer(), traces(), setting, tmp_path / "sft")
    assert again == folder
    with pytest.raises(ConfigurationChanged, match="learning_rate"):
        train_sft(*model_and_tokenizer(), traces(), replace(setting, learning_rate=1.0), tmp_path / "sft")


def test_training_in_bfloat16_computes_in_it_and_keeps_weights_in_float32(tmp_path) -> None:
    losses = []
    for half in (False, True):
        setting = SFT(steps=2, batch=4, micro_batch=4, lora=None, learning_rate=1e-3, bf16=half)
        folder = train_sft(*model_and_tokenizer(), traces(), setting, tmp_path / str(half))
        assert next(sk.load(folder, dtype="auto")[0].parameters()).dtype is torch.float32
        log = read_json(tmp_path / str(half) / "log.json")
        losses.append(next(line["train_loss"] for line in log if "train_loss" in line))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_gradient_checkpointing_trains_the_same_weights(tmp_path, lora) -> None:
    weights = []
    for on in (None, True):
        setting = SFT(steps=2, batch=4, micro_batch=4, lora=lora, learning_rate=1e-3, checkpointing=on)
        folder = train_sft(*model_and_tokenizer(), traces(), setting, tmp_path / str(on))
        weights.append(sk.load(folder)[0].state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_epochs_of_grpo_count_problems_and_inner_steps() -> None:
    from training.presets import get_preset

    assert grpo(epochs=2.0).steps_for(12) == 12  # 24 problems asked, two a step, one step on each
    assert replace(grpo(), epochs=1.5, prompts=4, inner=2).steps_for(10) == 2 * 4
    assert grpo().steps_for(1000) == 4
    paper = get_preset("llama-3.1-8b").grpo
    assert paper.steps_for(944) == 6 * 944 * 3 and paper.checkpointing


def test_a_cosine_schedule_of_grpo_warms_up_and_falls_to_zero(tmp_path) -> None:
    from training.train.grpo import _trl_config, train_grpo

    arguments = _trl_config(grpo(decay="cosine", warmup=0.25), tmp_path, longest=8)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == ("cosine", 0.25)
    model, tokenizer = model_and_tokenizer()
    setting = replace(grpo(decay="cosine", warmup=0.25, checkpointing=True), epochs=0.5)
    train_grpo(model, add_tags(model, tokenizer, tags()), addition(8, 0, "train"), setting, tmp_path / "grpo")
    assert len(read_rows(tmp_path / "grpo" / "log.jsonl")) == 2


def grpo(**more):
    from training.train.grpo import GRPO

    anneal = Anneal("gated", weight=(0.3, 0.1), clip=(24, 8), floor=0.0)
    return GRPO(
        anneal=anneal, steps=4, prompts=2, generations=4, micro_batch=8, inner=1, learning_rate=1e-3, temperature=1.0,
        top_p=1.0, lora=None, save_every=2, scale=False, beta=0.0, must_end=False, **more,
    )  # fmt: skip


def test_vllm_reserves_cache_for_prompt_and_completion_alone_and_follows_the_shrinking_length(tmp_path) -> None:
    from training.train.grpo import _trl_config, set_generation_length

    arguments = _trl_config(replace(grpo(), vllm=True), tmp_path, longest=31)
    assert (arguments.use_vllm, arguments.vllm_mode, arguments.vllm_max_model_length) == (True, "colocate", 31 + 24)
    of_vllm = SimpleNamespace(max_completion_length=24, vllm_generation=SimpleNamespace(max_completion_length=24))
    set_generation_length(of_vllm, 8)
    assert of_vllm.max_completion_length == of_vllm.vllm_generation.max_completion_length == 8
    of_transformers = SimpleNamespace(
        max_completion_length=24, generation_config=SimpleNamespace(max_new_tokens=24), generation_kwargs={}
    )
    set_generation_length(of_transformers, 8)
    assert of_transformers.generation_config.max_new_tokens == of_transformers.generation_kwargs["max_new_tokens"] == 8


def test_grpo_fades_the_format_reward_and_shortens_what_is_generated(tmp_path) -> None:
    from training.train.grpo import train_grpo

    model, tokenizer = model_and_tokenizer()
    tagged = add_tags(model, tokenizer, tags())
    problems = addition(12, 0, "train")
    folder = train_grpo(model, tagged, problems, grpo(), tmp_path / "grpo")
    log = read_rows(tmp_path / "grpo" / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    assert [row["clip_tokens"] for row in log] == [24, 19, 13, 8]
    assert [row["w_fmt"] for row in log] == pytest.approx([0.3, 0.7 / 3, 0.5 / 3, 0.1])
    assert all(row["length"] <= row["clip_tokens"] for row in log)
    assert log[0]["length"] > 8
    loaded, _ = sk.load(folder)
    assert loaded.get_input_embeddings().weight.shape[0] == 270


@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_grpo_under_autocast_of_float32_weights_trains(tmp_path, lora) -> None:
    from training.train.grpo import train_grpo

    model, tokenizer = model_and_tokenizer()
    setting = replace(grpo(bf16=True), steps=2, lora=lora)
    tagged = add_tags(model, tokenizer, tags())
    folder = train_grpo(model, tagged, addition(12, 0, "train"), setting, tmp_path / "grpo")
    assert next(sk.load(folder, dtype="auto")[0].parameters()).dtype is torch.float32
    assert len(read_rows(tmp_path / "grpo" / "log.jsonl")) == 2


@pytest.mark.parametrize("kind", ["gated", "linear"])
def test_a_schedule_ends_on_time_with_several_steps_on_the_same_completions(kind, tmp_path) -> None:
    from training.train.grpo import train_grpo

    model, tokenizer = model_and_tokenizer()
    setting = replace(
        grpo(), steps=9, inner=3, save_every=3, anneal=Anneal(kind, weight=(0.3, 0.1), clip=(24, 8), floor=0.0)
    )
    train_grpo(model, add_tags(model, tokenizer, tags()), addition(12, 0, "train"), setting, tmp_path / "grpo")
    log = read_rows(tmp_path / "grpo" / "log.jsonl")
    assert [(row["step"], row["clip_tokens"]) for row in log] == [(0, 24), (3, 16), (6, 8)]


def test_a_text_that_fits_the_next_limit_too_earns_more_while_a_gated_schedule_waits(tmp_path) -> None:
    from training.train.grpo import AnnealedReward

    _, tokenizer = model_and_tokenizer()
    anneal = Anneal("gated", clip=(24, 8), floor=1.0)
    short = tokenizer("\\boxed{4}", add_special_tokens=False)["input_ids"]
    long = tokenizer("x" * (24 - len(short)) + "\\boxed{4}", add_special_tokens=False)["input_ids"]
    assert len(short) < 20 < len(long) <= 24
    rewards = {}
    for kind in ("gated", "linear"):
        setting = replace(grpo(format=False), anneal=replace(anneal, kind=kind))
        reward = AnnealedReward(setting, tokenizer, tmp_path / kind, frozenset())
        (tmp_path / kind).mkdir()
        state = SimpleNamespace(global_step=0)
        rewards[kind] = reward(
            prompts=[""] * 4, completions=[""] * 4, completion_ids=[short, long] * 2, gold=["4"] * 4,
            kind=["number"] * 4, question=["2+2"] * 4, trainer_state=state,
        )  # fmt: skip
    assert rewards["gated"] == [1.0, 0.5, 1.0, 0.5] and rewards["linear"] == [1.0, 1.0, 1.0, 1.0]


def test_checkpoints_fall_between_generations() -> None:
    with pytest.raises(ValueError, match=r"save_every as a multiple of inner=3.*Pass 51"):
        replace(grpo(), inner=3, save_every=50)


def test_every_round_of_rows_has_each_row_once_in_its_own_order() -> None:
    rows = in_rounds("abcde", 12, seed=1)
    assert sorted(rows[:5]) == sorted(rows[5:10]) == list("abcde") and len(set(rows[10:])) == 2
    assert rows[:5] != rows[5:10] and rows == in_rounds("abcde", 12, seed=1) != in_rounds("abcde", 12, seed=2)


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_resumed_from(tmp_path) -> None:
    for step, files in {2: ("trainer_state.json", "gate.json"), 10: ("trainer_state.json",), 12: ()}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path, ("trainer_state.json", "gate.json")) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "none") is None


def test_an_adapter_starts_from_its_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # another state of the global generator
        adapted = with_adapter(model_and_tokenizer()[0], LoRA(4, 8), train_embeddings=False, seed=seed)
        return next(value for name, value in adapted.named_parameters() if "lora_A" in name)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = weights(1)
    torch.set_rng_state(before)
    torch.rand(3)
    assert torch.equal(first, weights(1)) and not torch.equal(first, weights(2))


class Killed(Exception):
    pass


def test_an_sft_run_that_was_killed_ends_as_one_that_was_not_and_keeps_one_checkpoint(tmp_path, monkeypatch) -> None:
    from training.train import sft as module

    def run(folder: Path) -> dict[str, torch.Tensor]:
        setting = SFT(steps=5, batch=4, micro_batch=2, lora=LoRA(4, 8), learning_rate=1e-2, save_every=1)
        return sk.load(train_sft(*model_and_tokenizer(), traces(), setting, folder))[0].state_dict()

    whole = run(tmp_path / "whole")

    class Stopping(module.NoFinalSave):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                raise Killed

    monkeypatch.setattr(module, "NoFinalSave", Stopping)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "trainer").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_grpo_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch) -> None:
    import training.train.grpo as module

    def run(folder: Path) -> dict[str, torch.Tensor]:
        model, tokenizer = model_and_tokenizer()
        tagged = add_tags(model, tokenizer, tags())
        checkpoint = module.train_grpo(model, tagged, addition(12, 0, "train"), grpo(), folder)
        return sk.load(checkpoint)[0].state_dict()

    whole = run(tmp_path / "whole")
    plain = module.AnnealedReward.on_step_begin

    def stop(self, args, state, control, **more):
        if state.global_step == 3:
            raise Killed
        return plain(self, args, state, control, **more)

    monkeypatch.setattr(module.AnnealedReward, "on_step_begin", stop)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.undo()
    resumed = run(tmp_path / "cut")
    assert not (tmp_path / "whole" / "trainer" / "checkpoint-4").exists()  # one would train a step too many from it
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    logs = [read_rows(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    assert logs[0] == logs[1]
