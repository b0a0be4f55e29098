"""Learning curve: SFT keeps its models at chosen steps, and a command tabulates loss and accuracy over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import steerkit as sk
from steerkit.io.tables import read_table

pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
from tests.training.test_training import model_and_tokenizer, traces  # noqa: E402
from training import __main__ as commands  # noqa: E402
from training.commands.curve import loss_at  # noqa: E402
from training.debates.answerers import LocalModel, Reply  # noqa: E402
from training.train.checkpoints import LoRA, save  # noqa: E402
from training.train.sft import SFT, train_sft  # noqa: E402


@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_a_model_that_was_kept_at_the_last_step_is_the_checkpoint_and_the_training_is_the_same(tmp_path, lora) -> None:
    base = save(*model_and_tokenizer(), tmp_path / "base")
    setting = SFT(steps=2, batch=4, micro_batch=4, lora=lora, learning_rate=1e-2, keep_at=(1, 2))
    done = train_sft(*sk.load(base), traces(), setting, tmp_path / "kept")
    plain = SFT(steps=2, batch=4, micro_batch=4, lora=lora, learning_rate=1e-2)
    other = train_sft(*sk.load(base), traces(), plain, tmp_path / "plain")
    assert train_sft(*sk.load(base), traces(), setting, tmp_path / "kept") == done
    with pytest.raises(ValueError, match=r"steps \[1, 2\].*without them"):
        train_sft(*sk.load(base), traces(), setting, tmp_path / "plain")
    weights = [sk.load(folder)[0].state_dict() for folder in (done, other)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    kept = {path.name: path for path in (tmp_path / "kept" / "steps").iterdir()}
    assert set(kept) == {"1", "2"}
    logits = []
    for folder in (kept["1"], kept["2"], done):
        alone = lora is None or folder == done
        model, tokenizer = sk.load(folder) if alone else sk.load(base, adapter=folder)
        ids = torch.tensor([tokenizer(traces(1)[0].text)["input_ids"]])
        logits.append(model(ids).logits)
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_the_table_has_the_kept_steps_and_the_last_one_with_their_losses(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = model_and_tokenizer()
    model.save_pretrained("MODEL")
    tokenizer.save_pretrained("MODEL")
    rows = [{"question": f"What is {n} + 0?", "gold": n, "family": "zero" if n < 4 else "more"} for n in range(12)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    debates = [{"question": f"{n}+0", "rounds": [[rf"\boxed{{{n}}}"] * 2]} for n in range(8)]
    Path("traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in debates))
    small = ["sft.steps=12", "sft.batch=2", "sft.micro_batch=2", "sft.lora.r=2", "sft.learning_rate=0.01"]
    call = ["sft", "--run", "run", "--checkpoint", "MODEL", "--traces", "traces.jsonl"]
    call += [part for setting in (*small, "sft.keep_at=[4,8]") for part in ("--set", setting)]
    curve = ["curve", "--run", "run", "--checkpoint", "MODEL", "--set", "decodings=1", "--problems", "my.jsonl"]
    with pytest.raises(SystemExit):
        commands.main(curve)
    assert "--set 'sft.keep_at=[25,50]'" in capsys.readouterr().err and not Path("run").exists()
    assert commands.main(call) == 0
    asked = []

    def answers(self, requests, sampling):
        asked.append(len(requests))
        for request in requests:
            yield Reply(request.id, rf"\boxed{{{len(asked)}}}", 5, 4, True)

    monkeypatch.setattr(LocalModel, "__call__", answers)
    assert commands.main(curve) == 0
    table = read_table("run/curve/curve.csv")[0]
    assert list(table.columns[:3]) == ["step", "family", "loss"] and asked == [12] * 3
    assert list(table["step"]) == [4, 4, 8, 8, 12, 12]
    assert list(table["family"]) == ["zero", "more"] * 3 and list(table["n"]) == [4, 8] * 3
    assert list(table["accuracy"]) == [1 / 4, 0, 1 / 4, 0, 1 / 4, 0]  # of the questions 1 + 0, 2 + 0 and 3 + 0
    losses = [row["loss"] for row in json.loads(Path("run/sft/log.json").read_text()) if "loss" in row]
    assert len(losses) == 12
    means = [sum(part) / len(part) for part in (losses[:4], losses[:8], losses[2:])]
    assert list(table["loss"])[::2] == pytest.approx(means)
    assert commands.main(curve) == 0 and asked == [12] * 3  # finished steps are read


def test_a_step_to_keep_after_the_last_one_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("MODEL").mkdir()
    debates = [{"question": f"{n}+0", "rounds": [[rf"\boxed{{{n}}}"] * 2]} for n in range(8)]
    Path("traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in debates))
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    settings = ["sft.epochs=3", "sft.batch=4", "sft.micro_batch=4", "sft.keep_at=[2,6,7]"]
    call = ["sft", "--run", "run", "--checkpoint", "./MODEL", "--traces", "traces.jsonl"]
    with pytest.raises(SystemExit):
        commands.main([*call, *(part for one in settings for part in ("--set", one))])
    assert "expected steps up to 6, the last one with 8 examples, in keep_at; got [7]" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"up to 3, .*got \[9\]"):
        train_sft(*model_and_tokenizer(), traces(), SFT(steps=3, keep_at=(2, 9)), "run")
    assert not Path("run").exists()


def test_a_loss_is_the_mean_of_the_last_ten_steps_logged_one_by_one_or_together() -> None:
    log = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 25, "train_loss": 2.5}]
    assert [loss_at(log, step) for step in (5, 10, 19, 20, 25)] == [3.0, 3.0, 3.0, 2.0, 2.0]
    each = [{"step": step, "loss": float(step)} for step in range(1, 26)]
    assert [loss_at(each, step) for step in (1, 4, 10, 25)] == [1.0, 2.5, 5.5, 20.5]
