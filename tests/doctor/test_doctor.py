"""The check-up passes a sound model, and finds each fault that is planted in one."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from steerkit.cli import models as cli
from steerkit.cli.models import doctor
from steerkit.doctor import checks, report
from steerkit.doctor.checks import _operation_error, compiled_caches
from steerkit.doctor.report import CHECKS, Finding, examine
from steerkit.models.cache_argument import cache_argument
from steerkit.models.site_names import SITES
from steerkit.steering.operations import OPERATIONS
from tests.models.test_identity import adapted
from tests.small_models import build
from tests.tiny import tiny_model, tiny_tokenizer
from tests.verified import verifies


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def found_in(model: Any, check: str, tokenizer: Any = None) -> Finding:
    """The finding of one check, which is that of `examine` (`test_each_check_is_a_function_...`)."""
    return report.run(check, CHECKS[check], model, tokenizer or tiny_tokenizer())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2"])
def test_a_sound_model_has_no_failed_check(kind) -> None:
    found = examine(tiny_model(kind), tiny_tokenizer())
    assert not [finding for finding in found if finding.state == "failed"], found
    assert states(found) == {
        "residual stream": "ok", "weights": "ok", "tokenizer": "ok", "boundaries": "ok", "template": "ok",
        "generation settings": "ok", "causality": "ok", "hidden states": "note", "padding": "ok", "coefficient 0": "ok",
        "sites": "note" if kind == "gpt_neox" else "ok",
        "cache": "ok", "operations": "ok", "conditions": "ok", "steered sites": "ok", "patching": "ok",
        "compiled caches": "ok", "first new token": "note", "adapter": "ok",
    }  # fmt: skip


def test_a_tokenizer_without_template_is_noted_and_one_with_too_many_tokens_fails() -> None:
    assert found_in(tiny_model(), "tokenizer", tiny_tokenizer(template=False)).state == "note"
    larger = tiny_tokenizer()
    larger.add_tokens(["<a>", "<b>"])
    found = found_in(tiny_model(), "tokenizer", larger)
    assert found.state == "failed"
    assert "262 tokens for 260 embeddings" in found.detail


class Leaky(torch.nn.Module):
    """Adds to every row the mean over its batch: rows are not independent."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out + 0.1 * out.mean(dim=0, keepdim=True)


def test_each_check_is_a_function_that_returns_a_state_and_a_detail() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    results = {name: check(model, tokenizer) for name, check in CHECKS.items()}
    findings = {finding.check: (finding.state, finding.detail) for finding in examine(model, tokenizer)}
    assert results.items() <= findings.items() and set(findings) - set(results) == {"residual stream"}


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (KeyError("layers"), "KeyError: 'layers'"),
        (AssertionError("no cache"), "AssertionError: no cache"),
        (ImportError("no kernel"), "ImportError: no kernel"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (ValueError("expected a cache"), "expected a cache"),
    ],
)
def test_a_check_that_raises_has_failed_and_the_others_run(error: Exception, detail: str, monkeypatch) -> None:
    def raising(*_: object) -> None:
        raise error

    monkeypatch.setattr(report, "CHECKS", {"cache": raising, "weights": checks.weights})
    found = examine(tiny_model(), tiny_tokenizer())
    assert found[1] == Finding("cache", "failed", detail) and found[2].state == "ok"


def test_rows_that_see_their_batch_are_found() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = Leaky(model.model.layers[1].mlp)
    assert found_in(model, "padding").state == found_in(model, "cache").state == "failed"


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
    findings = {finding.check: finding for finding in examine(model, tiny_tokenizer())}
    assert not [finding for finding in findings.values() if finding.state == "failed"]
    assert detail in findings[check].detail


def test_an_adapter_that_does_nothing_is_found_and_one_that_does_is_not() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config).eval()
    assert found_in(model, "adapter").state == "failed"  # B is zero: nothing was trained
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    assert found_in(model, "adapter").state == "ok"


def test_the_command_prints_json_and_its_exit_code_is_1_if_a_check_failed(tmp_path, capsys, monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(cli, "load_model", lambda checkpoint, loading: (model, tokenizer))
    doctor("somewhere", as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert {row["check"] for row in shown} >= {"padding", "cache"}
    doctor("somewhere")
    shown = capsys.readouterr()
    assert "All checks passed." in shown.out
    assert [line.split()[1] for line in shown.err.splitlines() if "checking" in line][:2] == ["weights", "tokenizer"]
    told = [line.split(":")[0] for line in shown.err.splitlines() if line.startswith("  ")]
    assert len(told) == len(CHECKS) and set(told) == {"  ok", "  note"}  # each as soon as it is known
    tokenizer.add_tokens(["<a>", "<b>"])
    with pytest.raises(SystemExit) as stopped:
        doctor("somewhere")
    assert stopped.value.code == 1
    assert "Failed checks: tokenizer" in capsys.readouterr().out


# A model that is broken on purpose, for each further check


def result_of(check: str, model: Any, tokenizer: Any) -> tuple[str, str]:
    finding = found_in(model, check, tokenizer)
    return finding.state, finding.detail


def test_a_tokenizer_that_loses_characters_fails_and_one_that_normalises_is_noted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert result_of("boundaries", tiny_model(), tokenizer) == (
        "note", "the tokenizer normalises texts: 'Hello' becomes 'hello'"
    )  # fmt: skip
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("e", "")
    state, detail = result_of("boundaries", tiny_model(), tokenizer)
    assert state == "failed" and "decode to 'Hllo'" in detail


def test_a_template_that_changes_by_itself_fails_and_one_that_writes_the_date_is_noted() -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + plain
    state, detail = result_of("template", tiny_model(), tokenizer)
    assert state == "note" and "it writes the date" in detail
    tokenizer.chat_template = "{{ strftime_now('%f') }}" + plain
    assert result_of("template", tiny_model(), tokenizer)[0] == "failed"


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
            "it leaves out system messages",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}x",
            "it leaves out system messages",
        ),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n", "it opens a thought"),
    ],
)
def test_what_a_template_does_with_system_messages_and_thoughts_is_noted(template: str, detail: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    state, found = result_of("template", tiny_model(), tokenizer)
    assert state == "note" and detail in found


def test_settings_that_generate_does_not_use_are_noted() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.repetition_penalty = 1.1
    state, detail = result_of("generation settings", model, tokenizer)
    assert state == "note" and "does not use {'repetition_penalty': 1.1}" in detail
    model = tiny_model()
    model.generation_config.eos_token_id = tokenizer.eos_token = tokenizer.chat_template = None
    assert result_of("generation settings", model, tokenizer)[0] == "note"


class LooksAhead(torch.nn.Module):
    """Adds the stream of the next token, but only in texts that are longer than the probe of `find_blocks`."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out + 0.5 * out.roll(-1, 1) if x.shape[1] > 5 else out


def test_a_model_that_looks_ahead_is_found() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = LooksAhead(model.model.layers[1].mlp)
    state, detail = result_of("causality", model, tiny_tokenizer())
    assert state == "failed" and "later tokens change the stream" in detail


def test_a_model_whose_later_forwards_run_no_hooks_is_found(monkeypatch) -> None:
    model = tiny_model()
    plain = type(model).forward

    @functools.wraps(plain)
    def deaf(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As compiled code: of a forward over a static cache that has tokens, the blocks' hooks do not run."""
        cache = kwargs.get(cache_argument(self))
        compiled = type(cache).__name__ == "StaticCache" and int(cache.get_seq_length()) > 0
        hooks = [layer._forward_hooks for layer in self.model.layers]
        kept = [dict(one) for one in hooks]
        if compiled:
            for one in hooks:
                one.clear()
        try:
            return plain(self, *args, **kwargs)
        finally:
            for one, before in zip(hooks, kept, strict=True):
                one.update(before)

    monkeypatch.setattr(type(model), "forward", deaf)
    state, detail = result_of("compiled caches", model, tiny_tokenizer())
    assert state == "failed" and "hooks" in detail, detail


def test_a_static_cache_that_changes_the_unsteered_tokens_too_is_transformers_matter() -> None:
    model = build("gpt_neo")
    state, detail = result_of("compiled caches", model, tiny_tokenizer())
    assert state == "note" and "steered or not" in detail, detail


@pytest.mark.parametrize(("broken", "expected"), [("steered", "failed"), ("always", "note")])
def test_an_error_with_a_static_cache_is_of_steering_unless_the_model_alone_has_it(
    broken: str, expected: str, monkeypatch
) -> None:
    model = tiny_model()
    plain = type(model).forward

    @functools.wraps(plain)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        steered = any(layer._forward_hooks for layer in self.model.layers)
        if type(kwargs.get(cache_argument(self))).__name__ == "StaticCache" and (steered or broken == "always"):
            raise ValueError("no static cache")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", refusing)
    state, detail = compiled_caches(model, tiny_tokenizer())
    assert state == expected and "no static cache" in detail, detail


def test_an_adapter_that_its_fingerprint_does_not_name_is_found(monkeypatch) -> None:
    from steerkit.models import identity

    monkeypatch.setattr(identity, "active_adapter_parts", lambda model: [])
    state, detail = result_of("adapter", adapted("LORA"), tiny_tokenizer())
    assert state == "failed" and "do not say so" in detail


@verifies("doctor", operations=OPERATIONS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_misses_its_formula_is_found(name: str, monkeypatch) -> None:
    """Half of what this operation changes is written."""
    from steerkit.steering.rows import RowSteering

    whole = RowSteering.edit

    def half(self: Any, place: tuple[str, int], value: torch.Tensor) -> torch.Tensor | None:
        new = whole(self, place, value)
        steered = {str(one.operation) for row in self.rows for one in row}
        return new if new is None or steered != {name} else (new + value) / 2

    monkeypatch.setattr(RowSteering, "edit", half)
    state, detail = result_of("operations", tiny_model(), tiny_tokenizer())
    assert state == "failed" and f"{name} misses its formula" in detail


@verifies("doctor", operations=["condition"])
def test_a_condition_that_is_decided_anew_for_each_token_is_found(monkeypatch) -> None:
    from steerkit.steering.rows import _Gate

    def forgets(self: Any, stream: torch.Tensor, start: int) -> None:
        self.holds = self._holds(stream[self.rows])

    monkeypatch.setattr(_Gate, "read", forgets)
    state, detail = result_of("conditions", tiny_model(), tiny_tokenizer())
    assert state == "failed" and "texts with a condition" in detail


@verifies("doctor", operations=["add", "clamp"], sites=SITES[:-1])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["add", "clamp"])
def test_an_operation_that_misses_its_formula_at_a_site_is_found(site: str, name: str, monkeypatch) -> None:
    """At this site alone half of the change is written."""
    from steerkit.steering.rows import RowSteering

    whole = RowSteering.edit

    def half(self: Any, place: tuple[str, int], value: torch.Tensor) -> torch.Tensor | None:
        new = whole(self, place, value)
        steered = {str(one.operation) for row in self.rows for one in row}
        return new if new is None or place[0] != site or steered != {name} else (new + value) / 2

    monkeypatch.setattr(RowSteering, "edit", half)
    state, detail = checks.sites(tiny_model(), tiny_tokenizer())
    assert state == "failed" and f"{name} at {site} of block 2 misses its formula" in detail


@verifies("doctor", operations=["condition"], sites=SITES[:-1])
@pytest.mark.parametrize("site", SITES[:-1])
def test_a_condition_at_a_site_that_is_decided_wrongly_is_found(site: str, monkeypatch) -> None:
    """At this site alone a condition holds in a batch where it does not hold alone."""
    from steerkit.steering.rows import RowSteering, _Gate

    edit, read, at = RowSteering.edit, _Gate.read, [""]

    def edit_at(self: Any, place: tuple[str, int], value: torch.Tensor) -> torch.Tensor | None:
        at[0] = place[0]
        return edit(self, place, value)

    def opposite(self: Any, stream: torch.Tensor, start: int) -> None:
        read(self, stream, start)
        if at[0] == site and len(stream) > 1:
            self.holds = ~self.holds

    monkeypatch.setattr(RowSteering, "edit", edit_at)
    monkeypatch.setattr(_Gate, "read", opposite)
    state, detail = checks.steered_sites(tiny_model(), tiny_tokenizer())
    assert state == "failed" and "texts steered at other sites" in detail


def test_a_patch_that_leaves_a_position_out_is_found_and_a_stream_that_is_not_all_is_noted(monkeypatch) -> None:
    from steerkit.patching.runs import Patch, Runs

    plain = Runs.patched

    def short(self: Any, patches: Any, values: Any) -> list[float]:
        return plain(self, [Patch(one.place, one.start, one.stop - 1, one.columns) for one in patches], values)

    assert checks.patching(tiny_model(), tiny_tokenizer())[0] == "ok"
    monkeypatch.setattr(Runs, "patched", short)
    state, detail = checks.patching(tiny_model(), tiny_tokenizer())
    assert state == "failed" and "misses the run with its stream" in detail
    monkeypatch.undo()
    state, detail = checks.patching(build("zamba2"), tiny_tokenizer())
    assert state == "note" and "later blocks read more than this stream" in detail


@pytest.mark.parametrize("check", [checks.hidden_states, checks.coefficient_zero])
def test_a_stream_that_is_not_finite_is_found(check: Any) -> None:
    model = tiny_model()
    assert check(model, tiny_tokenizer())[0] != "failed"
    torch.nn.init.constant_(model.model.layers[2].mlp.down_proj.weight, float("nan"))
    assert check(model, tiny_tokenizer())[0] == "failed"


def test_the_rounding_of_a_push_is_no_error_where_the_stream_is_small_and_nan_is_one() -> None:
    old = torch.full((2, 8), 1e-3, dtype=torch.float64)
    push = torch.linspace(1, 9, 8, dtype=torch.float64)
    rounded = (old + push).bfloat16().double()
    assert _operation_error("add", old, rounded, push, 1.0) < 0.01
    assert _operation_error("add", old, old + 2 * push, push, 1.0) > 0.5
    assert not _operation_error("add", old, old * float("nan"), push, 1.0) <= 1
