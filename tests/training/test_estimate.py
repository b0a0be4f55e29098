"""An estimate counts what a real step keeps, and names the setting to change; nothing is loaded or written."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
from benchmarks.training_memory import CASES, CHOSEN_ON, PAGE, ROWS, estimated, page  # noqa: E402
from steerkit.demo.checkpoint import default_checkpoint  # noqa: E402
from steerkit.io.json import read_json  # noqa: E402
from steerkit.text.traces import Turn  # noqa: E402
from training import imad  # noqa: E402
from training.debates.personas import CASTS, cast_of  # noqa: E402
from training.devices import DEVICES, this_device  # noqa: E402
from training.estimate import GIB, QUESTION, estimate, longest_prompt, seconds_to_write, shape_of, to_write  # noqa: E402
from training.memory import KEPT, MARGIN, generation, rollouts, training_step  # noqa: E402
from training.presets import get_preset  # noqa: E402
from training.problems.families import FAMILIES  # noqa: E402
from training.train.checkpoints import LoRA, with_adapter  # noqa: E402

SIZES = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=5, num_key_value_heads=2, tie_word_embeddings=False)


def replace_layers(count: int) -> LlamaConfig:
    return LlamaConfig(**SIZES, num_hidden_layers=count, num_key_value_heads=2, tie_word_embeddings=False)


@pytest.mark.parametrize(("lora", "embeddings"), [(None, False), (LoRA(4, 8, 0.1), True)])
def test_activations_are_those_that_a_real_forward_keeps(lora, embeddings) -> None:
    model = with_adapter(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32), lora, embeddings).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones(2, 30, dtype=torch.long)
    mask = ids.clone()
    mask[1, 20:] = 0
    decoder = (model.get_base_model() if lora else model).get_decoder()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
    found = training_step(CONFIG, lora, 2, 30, train_embeddings=embeddings)
    assert real <= found.activations <= 1.02 * real
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.weights == 4 * sum(p.numel() for p in model.parameters()) and found.optimizer == 12 * trained


def test_a_step_grows_with_a_reference_model_and_with_texts_and_refuses_none() -> None:
    small, large = training_step(CONFIG, None, 1, 30), training_step(CONFIG, None, 2, 30, reference=True)
    assert large.activations > 1.9 * small.activations and large.weights == 2 * small.weights
    whole, again = (training_step(CONFIG, None, 2, 30, checkpointing=on) for on in (False, True))
    inputs = 4 * 2 * 30 * 48
    of_block = (whole.activations - training_step(replace_layers(1), None, 2, 30).activations) / 4
    assert again.activations == whole.activations - 5 * of_block + 5 * inputs
    assert again.backward == max(whole.backward - 4 * 60 * (4 * 48 + 3 * 80), of_block + 4 * 60 * (4 * 48 + 3 * 80))
    assert again.total < whole.total
    with pytest.raises(ValueError, match="expected at least one row"):
        training_step(CONFIG, None, 0, 30)


def test_generation_is_the_sum_that_one_does_by_hand() -> None:
    cache = 4 * 256 * (10 + 20) * 5 * (2 * 2 * 8)
    block = 4 * 48 + 3 * 80
    assert generation(CONFIG, 256, 10, 20) == cache + 12 * 256 * 300 + 4 * 2048 * block
    assert generation(CONFIG, 256, 10, 20, cpu=False) == cache + 12 * 256 * 300 + 4 * 2560 * block


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2", 134_515_008),
        ("qwen2.5-coder-0.5b", 494_032_768),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("mistral-nemo-12b", 12_247_782_400),
    ],
)
def test_the_models_of_the_presets_have_their_published_sizes(name, parameters) -> None:
    assert shape_of(get_preset(name)).parameters == parameters


def test_the_shape_of_a_gguf_file_is_read_from_its_header() -> None:
    file = default_checkpoint()
    by_name = shape_of(get_preset("smollm2"))
    of_file = shape_of(get_preset("qwen2.5-coder-0.5b", None, [f"checkpoint={file}"]))
    assert (of_file.parameters, of_file.layers, of_file.kv_width) == (by_name.parameters, 30, by_name.kv_width)


def test_a_dry_run_of_a_missing_file_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit):
        imad.main(["smollm2", "--set", "checkpoint=nowhere/x.gguf", "--dry-run"])
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-7b"])
def test_a_dry_run_prints_rows_memory_and_hours_and_does_nothing(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    imad.main([name, "--dry-run", "--device", "h200"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("IMAD", "rows", "memory_gib", "hours", "141 GiB"))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_the_setting_to_change_and_the_stage_fits_with_it(capsys) -> None:
    call = ["llama-3.1-8b", "--dry-run", "--device", "h100", "--memory", "100", "--set", "sft.checkpointing=false"]
    imad.main(call)
    change = re.search(r"Above 100 GiB: SFT \(.*\). Pass (--set) (sft.micro_batch=\d)\.", capsys.readouterr().out)
    assert change is not None
    imad.main([*call, *change.groups()])
    assert "Above" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "memory", "stage", "named"),
    [
        (("debate.sampling.max_new_tokens=200000",), 60, "debates", "debate.sampling.max_new_tokens=25000"),
        (("sampling.max_new_tokens=400000",), 60, "test: one answer", "sampling.max_new_tokens=200000"),
        (("grpo.anneal.clip=[500000,500]", "grpo.micro_batch=1"), 90, "IMAD", "grpo.anneal.clip=[62500,500]"),
        (("sft.lora=null",), 60, "SFT", 'sft.lora={"r": 32, "alpha": 32}'),
        (("sft.checkpointing=false",), 45, "SFT", "sft.checkpointing=true"),
    ],
)
def test_the_options_that_are_named_make_their_stage_fit_and_a_shell_reads_them(settings, memory, stage, named) -> None:
    preset = get_preset("llama-3.1-8b", None, ["debates=10", "test=10", *settings])
    shape, device = shape_of(preset), DEVICES["h100"]
    row = estimate(preset, shape, device, memory).set_index("stage").loc[stage]
    options = shlex.split(row["change"])
    assert row["memory_gib"] > memory and options[::2] == ["--set"] * (len(options) // 2) and named in options
    changed = get_preset("llama-3.1-8b", None, ["debates=10", "test=10", *settings, *options[1::2]])
    fitting = estimate(changed, shape, device, memory).set_index("stage").loc[stage]
    assert fitting["memory_gib"] <= memory and fitting["change"] == ""


def test_where_the_weights_alone_do_not_fit_no_setting_is_named_but_a_larger_device() -> None:
    preset = get_preset("llama-3.1-8b")
    table = estimate(preset, shape_of(preset), DEVICES["h100"], memory=12)
    assert set(table["change"]) == {"a larger device", "a larger device, or training/nodes/fsdp.yaml"}
    short = get_preset("llama-3.1-8b", None, ["debate.sampling.max_new_tokens=1", "sampling.max_new_tokens=1"])
    assert "=0" not in "".join(estimate(short, shape_of(short), DEVICES["h100"], memory=12)["change"])


def test_a_mixture_of_experts_that_cannot_be_counted_is_one_line_and_with_an_adapter_on_a_gpu_it_is_counted(
    tmp_path, capsys, monkeypatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralConfig(**sizes, **heads).save_pretrained(tmp_path / "moe")
    call = ["qwen2.5-7b", "--set", f"checkpoint={tmp_path / 'moe'}", "--dry-run"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        imad.main(call)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error and "counted in bfloat16 only" in error
    without = ["--set", "sft.lora.dropout=0", "--set", "grpo.lora.dropout=0"]  # PEFT has none on experts
    imad.main([*call, *without, "--device", "h100"])
    assert "memory_gib" in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["-5", "0", "nan"])
def test_a_memory_that_is_not_above_zero_is_refused(memory, capsys) -> None:
    with pytest.raises(SystemExit):
        imad.main(["tiny", "--dry-run", "--device", "h100", "--memory", memory])
    assert "expected a memory above 0 GiB" in capsys.readouterr().err


def test_grpo_writes_the_completions_of_one_generation_step_at_once_and_its_hours_follow() -> None:
    preset = get_preset("llama-3.1-8b")
    shape, device = shape_of(preset), DEVICES["h100"]
    row = estimate(preset, shape, device).set_index("stage").loc["IMAD"]
    assert row["rows"] == 4  # one prompt with four completions
    assert 3600 * row["hours"] > seconds_to_write(shape, device, 24_000, 4, QUESTION, 2000)
    wide = replace(preset, grpo=replace(preset.grpo, prompts=8))
    wider = estimate(wide, shape, device).set_index("stage").loc["IMAD"]
    assert wider["rows"] == 32 and wider["hours"] < row["hours"] / 3


def test_grpo_on_a_gpu_counts_a_copy_of_the_weights_that_its_adapter_is_merged_into() -> None:
    preset = get_preset("llama-3.1-8b")
    config, lora = shape_of(preset).config, preset.grpo.lora
    step = training_step(config, lora, 4, QUESTION + 2000, dtype=torch.bfloat16, autocast=True, checkpointing=True)
    on_gpu, on_cpu = (rollouts(config, lora, step, 4, QUESTION, 2000, torch.bfloat16, cpu=cpu) for cpu in (0, 1))
    projections = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    assert on_gpu - on_cpu == 2 * projections
    row = estimate(preset, shape_of(preset), DEVICES["h100"]).set_index("stage").loc["IMAD"]
    assert row["memory_gib"] == pytest.approx(MARGIN * max(on_gpu, step.total) / GIB)


def test_every_trained_method_has_a_row_and_the_evaluation_counts_all_decodings() -> None:
    preset = get_preset("llama-3.1-8b")
    shape, device = shape_of(preset), DEVICES["h100"]
    table = estimate(preset, shape, device).set_index("stage")
    assert set(preset.trained) <= set(table.index) and len(preset.trained) == 7
    assert table.loc["test: one answer", "texts"] == 1000 * (3 + 1) * (
        1 + 7
    )  # three seeds and greedy, base and methods
    assert table.loc["test: debates", "texts"] == 1000 * (3 + 1) * 6
    everything = get_preset(
        "llama-3.1-8b",
        None,
        ['what_helps=["DebateGPT + GRPO", "Debate, Train, Evolve"]', "turns=true", "self_check=true"],
    )
    rows = estimate(everything, shape, device).set_index("stage")
    assert {*everything.trained, "SFT before DebateGPT + GRPO", "debates: one self-check"} <= set(rows.index)


def test_a_dry_run_prints_the_sum_of_all_stages(capsys) -> None:
    imad.main(["tiny", "--dry-run", "--device", "h200"])
    preset = get_preset("tiny")
    table = estimate(preset, shape_of(preset), DEVICES["h200"])
    shown = capsys.readouterr().out
    assert f"All stages: {table['tokens'].sum():,} tokens, {table['hours'].sum():.1f} hours" in shown


def test_measured_memory_lies_up_to_25_percent_below_the_estimate_in_cases_that_did_not_shape_it() -> None:
    rows = {row["case"]: row for row in read_json(ROWS)["rows"]}
    held_out = [case for case in CASES if case not in CHOSEN_ON]
    assert len(held_out) >= 3 and any(case.checkpointing for case in held_out)
    for case in CASES:
        row = rows[case.name]
        assert row["estimated"] == round(MARGIN * estimated(case)), "run: python -m benchmarks.training_memory"
        assert row["process"] <= KEPT * row["estimated"]
        if case in held_out:
            assert 1 <= row["estimated"] / row["measured"] <= 1.25
    assert PAGE.read_text() == page([rows[case.name] for case in CASES])


def test_generation_takes_as_many_rows_as_fit() -> None:
    preset = get_preset("llama-3.1-8b")
    shape = shape_of(preset)
    wide = estimate(preset, shape, DEVICES["h200"]).set_index("stage")
    narrow = estimate(preset, shape, DEVICES["h200"], memory=30).set_index("stage")
    assert wide.loc["debates", "rows"] > narrow.loc["debates", "rows"] >= 1
    assert narrow.loc["debates", "memory_gib"] <= 30
    assert wide.loc["debates", "tokens"] == 1000 * 6 * 1024 and wide.loc["IMAD", "texts"] == 6 * 1000 * 3 * 4
    rows = int(narrow.loc["debates", "rows"])
    needed = generation(shape.config, rows, QUESTION + 3 * 1024, 1024, torch.bfloat16, cpu=False)
    assert narrow.loc["debates", "memory_gib"] == pytest.approx(MARGIN * (2 * shape.parameters + needed) / GIB)


def test_the_longest_prompt_of_each_cast_is_counted_as_a_tokenizer_counts_it() -> None:
    path = Path(default_checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    silent = [Turn(agent, 1, "") for agent in (1, 2, 3)]
    for cast, family in ((cast_of(name), family) for name in CASTS for family in ("malice", "clues")):
        lengths = [
            len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
            for problem in FAMILIES[family](16, 0, "train")
            for agent in (1, 2, 3)
            for prompt in (cast.ask(problem, agent, 1, []), cast.ask(problem, agent, 2, silent))
        ]
        assert max(lengths) <= longest_prompt(cast.name, 3, family) <= 1.25 * max(lengths)


def test_the_prompts_of_debates_and_no_others_grow_with_the_worked_examples_of_a_cast() -> None:
    preset = get_preset("smollm2")
    shape = shape_of(preset)
    worked, plain = (
        estimate(replace(preset, cast=cast), shape, DEVICES["a100"]).set_index("stage") for cast in ("adding", "evil")
    )
    assert worked.loc["debates", "memory_gib"] > plain.loc["debates", "memory_gib"]
    assert worked.loc["test: one answer", "memory_gib"] == plain.loc["test: one answer", "memory_gib"]


def test_device_and_memory_are_refused_without_a_dry_run(capsys) -> None:
    with pytest.raises(SystemExit):
        imad.main(["tiny", "--memory", "8"])
    assert "with --dry-run only" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_this_machine_is_measured() -> None:
    device = this_device()
    assert device.on_cpu and 1e8 < device.flops < 1e14 and 1e8 < device.bandwidth < 1e13


def test_texts_are_written_as_many_at_once_as_fit_the_device() -> None:
    shape, device = shape_of(get_preset("llama-3.1-8b")), DEVICES["h100"]
    few, long = to_write(shape, device, 10, 500, 200), to_write(shape, device, 10_000, 8_000, 2_000)
    assert few.rows == 10 and few.seconds == seconds_to_write(shape, device, 10, 10, 500, 200)
    assert long.rows < 256 and MARGIN * long.memory <= 80 * GIB
