"""Identity of a run: what determines its results is compared when it resumes, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

import steerkit as sk
from steerkit.io.json import read_json, write_json
from steerkit.io.run_folder import ConfigurationChanged, check_config
from steerkit.models.identity import fingerprint
from steerkit.text.tags import tags
from training.presets import TINY, get_preset

pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
from tests.training.test_training import Killed, grpo, model_and_tokenizer, traces  # noqa: E402
from training import imad  # noqa: E402
from training.problems.families import addition  # noqa: E402
from training.problems.problem import Problem  # noqa: E402
from training.train.checkpoints import add_tags, save, weights_on_disk  # noqa: E402
from training.train.grpo import finished_grpo, train_grpo  # noqa: E402
from training.train.sft import SFT, finished_sft, train_sft  # noqa: E402

LATER = {"grpo": ("kept_checkpoints",), "sft": ("keep_at",)}
"""Settings that older configurations do not have."""


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_folder_of_the_preset_tiny_from_before_a_setting_was_added_is_the_same_run(family, tmp_path) -> None:
    preset = get_preset("tiny", family)
    stored = json.loads(json.dumps(asdict(preset)))
    for stage, names in LATER.items():
        for name in names:
            assert stored[stage].pop(name) is None
    write_json(tmp_path / "config.json", stored)
    check_config(tmp_path, asdict(preset), preset.free)
    with pytest.raises(ConfigurationChanged, match=r"sft.learning_rate"):
        check_config(tmp_path, asdict(get_preset("tiny", family, ["sft.learning_rate=1"])), preset.free)


def test_an_sft_run_that_was_killed_goes_on_with_another_micro_batch_and_gives_the_same_model(
    tmp_path, monkeypatch
) -> None:
    import training.train.sft as module

    class Stopping(module.NoFinalSave):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                raise Killed

    setting = SFT(steps=4, batch=4, micro_batch=4, lora=None, learning_rate=1e-2, save_every=1)
    smaller = replace(setting, micro_batch=2, checkpointing=True)
    whole = sk.load(train_sft(*model_and_tokenizer(), traces(), setting, tmp_path / "whole"))[0].state_dict()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, "NoFinalSave", Stopping)
        train_sft(*model_and_tokenizer(), traces(), setting, tmp_path / "cut")
    with pytest.raises(ValueError, match=r"steps \[1\].*passed step 2 without them"):
        train_sft(*model_and_tokenizer(), traces(), replace(smaller, keep_at=(1, 4)), tmp_path / "cut")
    resumed = sk.load(train_sft(*model_and_tokenizer(), traces(), smaller, tmp_path / "cut"))[0].state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stored_has_them", [True, False])
def test_a_finished_run_is_read_with_another_micro_batch_and_with_checkpointing(tmp_path, stored_has_them) -> None:
    setting = SFT(steps=1, batch=4, micro_batch=4, lora=None, learning_rate=1e-2)
    done = train_sft(*model_and_tokenizer(), traces(), setting, tmp_path / "sft")
    if not stored_has_them:
        stored = read_json(tmp_path / "sft" / "config.json")
        write_json(tmp_path / "sft" / "config.json", {k: v for k, v in stored.items() if k not in setting.free})
    smaller = replace(setting, micro_batch=2, checkpointing=True)
    assert train_sft(*model_and_tokenizer(), traces(), smaller, tmp_path / "sft") == done
    with pytest.raises(ConfigurationChanged, match="batch: 4 -> 8"):
        train_sft(*model_and_tokenizer(), traces(), replace(setting, batch=8), tmp_path / "sft")


def test_a_finished_training_is_known_without_its_model_and_only_for_the_same_start_and_settings(tmp_path) -> None:
    start, other = (save(*model_and_tokenizer(), tmp_path / name) for name in ("start", "other"))
    model, _ = sk.load(other)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    model.save_pretrained(other)
    setting, out = SFT(steps=1, batch=4, micro_batch=4, lora=None, learning_rate=1e-2), tmp_path / "sft"
    assert finished_sft(start, traces(), setting, out) is None
    done = train_sft(*sk.load(start), traces(), setting, out)
    assert finished_sft(start, traces(), replace(setting, micro_batch=2), out) == done
    for changed in (
        (other, traces(), setting),
        (start, traces()[:-1], setting),
        (start, traces(), replace(setting, seed=1)),
        (start, traces(), replace(setting, keep_at=(1,))),
    ):
        assert finished_sft(*changed, out) is None
    problems, policy, rewarded = addition(8, 0, "train"), replace(grpo(), steps=1), tmp_path / "grpo"
    assert finished_grpo(done, problems, policy, rewarded) is None
    best = train_grpo(*sk.load(done), problems, policy, rewarded)
    assert finished_grpo(done, problems, policy, rewarded) == best
    for changed in (
        (start, problems, policy),
        (done, problems[1:], policy),
        (done, problems, replace(policy, beta=0.5)),
    ):
        assert finished_grpo(*changed, rewarded) is None


def test_the_weights_of_a_checkpoint_are_known_on_disk_also_where_the_hub_s_files_are(tmp_path, monkeypatch) -> None:
    folder = save(*model_and_tokenizer(), tmp_path / "model")
    own = fingerprint(sk.load(folder)[0])[0]
    assert weights_on_disk(folder) == own
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(folder / file))
    assert weights_on_disk("owner/name") == own
    monkeypatch.undo()
    assert weights_on_disk("owner/name") is weights_on_disk(tmp_path / "none") is weights_on_disk("a.gguf") is None
    (folder / "adapter_config.json").write_text("{}")
    assert weights_on_disk(folder) is None


def test_the_micro_batch_is_part_of_the_identity_where_it_changes_the_result() -> None:
    assert "micro_batch" in replace(grpo(), loss="dapo").free and "micro_batch" not in replace(grpo(), loss="bnpo").free
    free = get_preset("llama-3.1-8b").free
    assert {"sft.micro_batch", "sft.checkpointing", "grpo.micro_batch", "grpo.kept_checkpoints"} <= set(free)
    matched = get_preset("llama-3.1-8b", None, ['what_helps=["SFT on gold answers"]'])
    assert "sft.micro_batch" not in matched.free  # its batch is rounded to micro-batches
    assert "grpo.micro_batch" not in get_preset("tiny").free


def test_the_eight_gpus_of_a_node_train_by_the_commands_of_the_files_and_other_batches_are_refused_at_once(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(imad, "process_count", lambda: 8)
    ran = []
    monkeypatch.setattr(imad, "base_checkpoint", lambda run: ran.append(run) or pytest.fail("it started"))
    for call, message in (
        (["llama-3.1-8b"], "expected a micro_batch that divides sft.batch, 2 on each of 8 processes; got 4"),
        (["llama-3.1-8b", "--set", "sft.micro_batch=2"], "expected prompts to be a multiple of the 8 processes; got 1"),
        (["tiny"], "micro_batch that divides"),
    ):
        with pytest.raises(SystemExit) as stopped:
            imad.main([*call, "--out", str(tmp_path / "run")])
        shown = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and message in shown and "\n" not in shown
    assert not (tmp_path / "run").exists() and not ran
    for file in sorted((imad.Path(imad.__file__).parent / "nodes").glob("*.yaml")):
        text = file.read_text().replace("\\\n#", "")
        (command,) = [line for line in text.splitlines() if "-m training.imad" in line]
        name, *rest = command.partition("-m training.imad ")[2].split()
        imad._check_methods(get_preset(name, None, rest[1::2]), ())


def test_another_judge_or_criterion_is_another_run(tmp_path) -> None:
    questions = [Problem(f"open/{i}", f"Who led expedition {i}?", None, "open", "open") for i in range(4)]
    model, tokenizer = model_and_tokenizer()
    tagged = add_tags(model, tokenizer, tags())
    setting, judge = replace(grpo(), steps=2), lambda pairs: [True for _ in pairs]

    def train(judged_by):
        return train_grpo(model, tagged, questions, setting, tmp_path / "grpo", judge, judged_by)

    train({"model": "a", "criterion": "ethical"})
    for other in ({"model": "a", "criterion": "admits"}, {"model": "b", "criterion": "ethical"}, None):
        with pytest.raises(ConfigurationChanged, match="judge"):
            train(other)


@pytest.mark.parametrize(("kept", "left"), [(None, {2, 4, 6, 8}), (2, {6, 8})])
def test_the_newest_checkpoints_of_grpo_are_kept_and_all_of_them_by_default(tmp_path, kept, left) -> None:
    model, tokenizer = model_and_tokenizer()
    setting = replace(grpo(), steps=9, kept_checkpoints=kept)
    train_grpo(model, add_tags(model, tokenizer, tags()), addition(8, 0, "train"), setting, tmp_path / "grpo")
    assert {int(path.name[11:]) for path in (tmp_path / "grpo" / "trainer").glob("checkpoint-*")} == left


def test_presets_of_large_models_keep_two_checkpoints_of_grpo_and_the_small_ones_all_that_are_analysed() -> None:
    kept = {name: get_preset(name).grpo.kept_checkpoints for name in ("tiny", "smollm2", "llama-3.1-8b", "qwen2.5-7b")}
    assert kept == {"tiny": None, "smollm2": None, "llama-3.1-8b": 2, "qwen2.5-7b": 2}
