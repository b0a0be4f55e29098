"""An estimate counts what a real step keeps, and names the setting to change; nothing is loaded or written."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig

pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
from steerkit.demo.checkpoint import default_checkpoint  # noqa: E402
from training import imad  # noqa: E402
from training.devices import DEVICES, this_device  # noqa: E402
from training.estimate import GIB, QUESTION, estimate, seconds_to_write, shape_of, to_write  # noqa: E402
from training.memory import MARGIN, generation, training_step  # noqa: E402
from training.presets import get_preset  # noqa: E402
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
    whole, again = (training_step(CONFIG, None, 2, 30, checkpointing=on).activations for on in (False, True))
    of_block = (whole - training_step(replace_layers(1), None, 2, 30).activations) / 4
    assert of_block < again < whole / 3
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
    assert all(word in shown for word in ("GRPO", "rows", "memory_gib", "hours", "141 GiB"))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_the_setting_to_change_and_the_stage_fits_with_it(capsys) -> None:
    call = ["llama-3.1-8b", "--dry-run", "--device", "h100", "--memory", "100", "--set", "sft.checkpointing=false"]
    imad.main(call)
    change = re.search(r"SFT needs .* GiB of 100. Pass (--set) (sft.micro_batch=\d)", capsys.readouterr().out)
    assert change is not None
    imad.main([*call, *change.groups()])
    assert "SFT needs" not in capsys.readouterr().out


def test_generation_takes_as_many_rows_as_fit() -> None:
    preset = get_preset("llama-3.1-8b")
    shape = shape_of(preset)
    wide = estimate(preset, shape, DEVICES["h200"]).set_index("stage")
    narrow = estimate(preset, shape, DEVICES["h200"], memory=30).set_index("stage")
    assert wide.loc["debates", "rows"] > narrow.loc["debates", "rows"] >= 1
    assert narrow.loc["debates", "memory_gib"] <= 30
    assert wide.loc["debates", "tokens"] == 1000 * 6 * 1024 and wide.loc["GRPO", "texts"] == 6 * 1000 * 3 * 4
    rows = int(narrow.loc["debates", "rows"])
    needed = generation(shape.config, rows, QUESTION + 3 * 1024, 1024, torch.bfloat16, cpu=False)
    assert narrow.loc["debates", "memory_gib"] == pytest.approx(MARGIN * (2 * shape.parameters + needed) / GIB)


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
