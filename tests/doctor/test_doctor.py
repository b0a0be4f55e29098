"""The check-up passes a sound model, and finds each fault that is planted in one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from steerkit.cli import models as cli
from steerkit.cli.models import doctor
from steerkit.doctor.report import CHECKS, Finding, examine
from tests.small_models import build
from tests.tiny import tiny_model, tiny_tokenizer


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def found_in(model: Any, check: str) -> Finding:
    return next(finding for finding in examine(model, tiny_tokenizer()) if finding.check == check)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2"])
def test_a_sound_model_has_no_failed_check(kind) -> None:
    found = examine(tiny_model(kind), tiny_tokenizer())
    assert not [finding for finding in found if finding.state == "failed"], found
    assert states(found) == {
        "residual stream": "ok", "weights": "ok", "tokenizer": "ok", "hidden states": "note", "padding": "ok",
        "coefficient 0": "ok", "cache": "ok", "first new token": "note", "adapter": "ok",
    }  # fmt: skip


def test_a_tokenizer_without_template_is_noted_and_one_with_too_many_tokens_fails() -> None:
    found = examine(tiny_model(), tiny_tokenizer(template=False))
    assert states(found)["tokenizer"] == "note"
    larger = tiny_tokenizer()
    larger.add_tokens(["<a>", "<b>"])
    found = examine(tiny_model(), larger)
    assert states(found)["tokenizer"] == "failed"
    assert "262 tokens for 260 embeddings" in str(found)


class Leaky(torch.nn.Module):
    """Adds to every row the mean over its batch: rows are not independent."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out + 0.1 * out.mean(dim=(0, 1), keepdim=True)


def test_each_check_is_a_function_that_returns_a_state_and_a_detail() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    results = {name: check(model, tokenizer) for name, check in CHECKS.items()}
    findings = {finding.check: (finding.state, finding.detail) for finding in examine(model, tokenizer)}
    assert results.items() <= findings.items() and set(findings) - set(results) == {"residual stream"}


def test_rows_that_see_their_batch_are_found() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = Leaky(model.model.layers[1].mlp)
    found = states(examine(model, tiny_tokenizer()))
    assert found["padding"] == "failed"
    assert found["cache"] == "failed"


def test_a_stream_that_is_replaced_between_blocks_is_refused_with_the_reason() -> None:
    model = tiny_model()
    block = model.model.layers[2]
    plain = block.forward

    def other(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(hidden_states, *args, **kwargs).repeat(1, 1, 1)[:, :, :16]

    block.forward = other
    assert states(examine(model, tiny_tokenizer())) == {"residual stream": "failed"}


class OneWord(torch.nn.Module):
    """A head that says one token, whatever the stream is."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1e4 * (torch.arange(260) == 65)


def test_texts_that_steering_does_not_change_are_noted() -> None:
    model = tiny_model()
    assert "3 of them differ from the unsteered texts" in found_in(model, "cache").detail
    model.lm_head = OneWord(model.lm_head)
    found = found_in(model, "cache")
    assert (found.state, found.detail.endswith("0 of them differ from the unsteered texts: nothing is shown")) == (
        "note",
        True,
    )


@pytest.mark.parametrize(
    ("kind", "check", "detail"),
    [
        ("mamba", "hidden states", "begins after block 0 and not with the embedding"),
        ("qwen4_exp_text", "hidden states", "the stream is 256 wide where its last entry is 64"),
        ("bart", "cache", "batched by length, since it cannot be padded on the left"),
        ("jamba", "cache", "scored token by token"),
    ],
)
def test_a_property_of_an_unusual_model_is_noted(kind: str, check: str, detail: str) -> None:
    model = build(kind)
    assert not [finding for finding in examine(model, tiny_tokenizer()) if finding.state == "failed"]
    assert detail in found_in(model, check).detail


def test_an_adapter_that_does_nothing_is_found_and_one_that_does_is_not() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config).eval()
    found = examine(model, tiny_tokenizer())
    assert states(found)["adapter"] == "failed"  # B is zero: nothing was trained
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    found = examine(model, tiny_tokenizer())
    assert states(found)["adapter"] == "ok"


def test_the_command_prints_json_and_its_exit_code_is_1_if_a_check_failed(tmp_path, capsys, monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(cli, "load_model", lambda checkpoint, loading: (model, tokenizer))
    doctor("somewhere", as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert {row["check"] for row in shown} >= {"padding", "cache"}
    doctor("somewhere")
    assert "All checks passed." in capsys.readouterr().out
    tokenizer.add_tokens(["<a>", "<b>"])
    with pytest.raises(SystemExit) as stopped:
        doctor("somewhere")
    assert stopped.value.code == 1
    assert "Failed checks: tokenizer" in capsys.readouterr().out
