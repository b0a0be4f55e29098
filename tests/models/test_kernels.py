"""Kernels: oneDNN's linear layers equal torch's, give a row the same bits in any batch, and never use a stale copy."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import steerkit as sk
from steerkit.models import kernels
from steerkit.models.identity import describe
from steerkit.models.kernels import kernels_of, set_kernels, use_kernels
from tests.tiny import tiny_model, tiny_tokenizer

needs_onednn = pytest.mark.skipif(kernels.missing() is not None, reason=f"no oneDNN here: {kernels.missing()}")
SHAPES = ((576, 1536), (1536, 576), (33, 17), (1, 1), (64, 2000))


@pytest.fixture
def other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of choices for this test alone."""
    monkeypatch.setattr(kernels, "_file", lambda: tmp_path / "kernels.json")
    return tmp_path / "kernels.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small models are measured too."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    yield


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(inputs)
    layer = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (300,), (2, 2, 129), (0,)])
def test_a_linear_layer_through_onednn_is_that_of_float64(shape, leading, bias) -> None:
    layer, x = linear(*shape, bias), torch.randn(*leading, shape[0], generator=torch.Generator().manual_seed(1))
    truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with use_kernels(layer, "onednn"):
        found = layer(x)
    assert found.shape == truth.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, atol=2e-4, rtol=1e-5)


@needs_onednn
def test_the_linear_layer_of_gpt2_and_one_in_bfloat16_are_those_of_torch() -> None:
    conv, x = Conv1D(48, 32).requires_grad_(False), torch.randn(5, 32)
    half = linear(32, 48).bfloat16()
    plain = conv(x), half(x.bfloat16())
    with use_kernels(conv, "onednn"), use_kernels(half, "onednn"):
        torch.testing.assert_close(conv(x), plain[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(half(x.bfloat16()), plain[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("chosen", ["auto", "onednn"])
def test_a_model_in_bfloat16_takes_torchs_path_where_onednn_does_not_multiply_it(
    chosen, other_file, monkeypatch
) -> None:
    if chosen == "onednn" and kernels.missing() is not None:
        pytest.skip(f"no oneDNN here: {kernels.missing()}")
    monkeypatch.setattr(kernels, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(kernels, "_pack", lambda _: pytest.fail("packed"))
    model, x = linear(1000, 1001).bfloat16(), torch.ones(3, 1000).bfloat16()
    plain = model(x)
    with use_kernels(model, chosen), torch.inference_mode():
        assert torch.equal(model(x), plain)


def test_a_large_model_in_bfloat16_runs_with_the_kernels_of_this_processor(other_file) -> None:
    model, x = linear(1000, 1001).bfloat16(), torch.ones(3, 1000).bfloat16()
    plain = model(x)
    with use_kernels(model), torch.inference_mode():
        torch.testing.assert_close(model(x), plain, atol=0.5, rtol=0.05)


@needs_onednn
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**30), st.sampled_from([(576, 1536), (1536, 576), (896, 4864)]))
def test_a_row_has_the_same_bits_for_any_number_of_other_rows(count: int, seed: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, x = linear(*shape), torch.randn(600, shape[0], generator=generator)
    order = torch.randperm(600, generator=generator)[:count]
    with use_kernels(layer, "onednn"):
        assert torch.equal(layer(x[order]), layer(x)[order])


def test_torch_own_path_gives_a_row_other_bits_in_other_batches_on_this_processor() -> None:
    if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else True:
        pytest.skip("shown on AMD processors, where torch's path is MKL's for other processors")
    layer, x = linear(576, 1536), torch.randn(72, 576, generator=torch.Generator().manual_seed(0))
    whole = layer(x)
    assert any(not torch.equal(layer(x[:count]), whole[:count]) for count in (1, 2, 3, 7))


def in_place(layer: Any) -> None:
    layer.weight.add_(1)


def by_data(layer: Any) -> None:
    layer.weight.data += 1


def by_other_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data + 1


def by_state(layer: Any) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight": layer.weight + 1})


def by_new_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight + 1, requires_grad=False)


def by_optimizer(layer: Any) -> None:
    layer.weight.requires_grad_()
    layer.weight.grad = -torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=1.0).step()
    layer.weight.grad = None
    layer.weight.requires_grad_(False)


def by_dtype(layer: Any) -> None:
    layer.double()
    layer.weight += 1
    layer.float()


@needs_onednn
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "change", [in_place, by_data, by_other_data, by_state, by_new_parameter, by_optimizer, by_dtype]
)
def test_a_changed_weight_is_packed_again(change: Callable[[Any], None], kind: str) -> None:
    layer: Any = linear(24, 40) if kind == "linear" else Conv1D(40, 24).requires_grad_(False)
    x = torch.randn(4, 24)
    with use_kernels(layer, "onednn"):
        before = layer(x)
        change(layer)
        inside = layer(x)
    change_outside = layer(x)
    torch.testing.assert_close(inside, change_outside, atol=1e-4, rtol=1e-4)
    assert (inside - before).abs().max() > 0.1
    change(layer)
    with use_kernels(layer, "onednn"):
        after = layer(x)
    torch.testing.assert_close(after, layer(x), atol=1e-4, rtol=1e-4)


@needs_onednn
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_row_or_a_column_that_is_silenced_through_data_is_packed_again(axis: int, kind: str) -> None:
    layer: Any = linear(240, 400) if kind == "linear" else Conv1D(400, 240).requires_grad_(False)
    x = torch.randn(4, 240)
    for number in (0, 7, 131, 239):
        with use_kernels(layer, "onednn"):
            before = layer(x)
        layer.weight.data.select(axis, number).zero_()
        with use_kernels(layer, "onednn"):
            after = layer(x)
        torch.testing.assert_close(after, layer(x), atol=1e-4, rtol=1e-4)
        assert (after - before).abs().max() > 0.01


@needs_onednn
def test_a_merged_and_an_unmerged_adapter_are_packed_again() -> None:
    peft = pytest.importorskip("peft", reason="the extra `train` is not installed")
    model, ids = tiny_model(), torch.tensor([[1, 2, 3, 4]])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad(), use_kernels(adapted, "onednn"):
        apart = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            bare = adapted(input_ids=ids).logits
        adapted.merge_adapter()
        merged = adapted(input_ids=ids).logits
        adapted.unmerge_adapter()
        unmerged = adapted(input_ids=ids).logits
    torch.testing.assert_close(merged, apart, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(unmerged, apart, atol=1e-4, rtol=1e-4)
    assert (bare - apart).abs().max() > 1e-2


@needs_onednn
def test_gradients_are_those_of_torch() -> None:
    layer, x = linear(12, 20).requires_grad_(), torch.randn(3, 12)
    layer(x).square().sum().backward()
    truth = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    with use_kernels(layer, "onednn"):
        layer(x).square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), truth, strict=True):
        assert torch.equal(parameter.grad, gradient)


@needs_onednn
def test_the_model_is_as_before_after_the_with_also_after_an_error() -> None:
    model = tiny_model()
    types = [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), use_kernels(model, "onednn"):
        assert [type(module) for module in model.modules()] != types
        with use_kernels(model, "torch"):
            assert [type(module) for module in model.modules()] == types
            assert kernels_of(model) == "torch"
        assert kernels_of(model) == "onednn"
        _ = 1 / 0
    assert [type(module) for module in model.modules()] == types
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@needs_onednn
def test_a_deep_copy_made_inside_has_its_own_weights() -> None:
    layer, x = linear(24, 40), torch.randn(4, 24)
    with use_kernels(layer, "onednn"):
        before = layer(x)
        twin = copy.deepcopy(layer)
        twin.weight.add_(1)
        assert torch.equal(layer(x), before) and (twin(x) - before).abs().max() > 0.1


@needs_onednn
def test_packed_copies_are_gone_with_the_model() -> None:
    layer = linear(24, 40)
    with use_kernels(layer, "onednn"):
        layer(torch.randn(4, 24))
    packed = weakref.ref(kernels._COPIES[id(layer)].weight)
    assert packed() is not None
    del layer
    gc.collect()
    assert packed() is None


@needs_onednn
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_texts_activations_and_scores_are_those_of_torch_within_rounding(kind: str) -> None:
    tokenizer, texts = tiny_tokenizer(), ["abc", "a longer text", "x"]
    found = {}
    for name in ("torch", "onednn"):
        model = tiny_model(kind)
        set_kernels(model, name)  # type: ignore[arg-type]
        assert describe(model)["kernels"] == name
        read = sk.collect(model, tokenizer, texts, layers=[0, 2])
        generated = sk.generate(model, tokenizer, texts, max_new_tokens=8, return_details=True)
        found[name] = read.resid, [one.ids for one in generated]
    torch.testing.assert_close(found["torch"][0], found["onednn"][0], atol=1e-4, rtol=1e-4)
    assert found["torch"][1] == found["onednn"][1]


@needs_onednn
def test_every_forward_of_ours_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    set_kernels(model, "onednn")
    calls: list[int] = []
    multiply = kernels.multiply
    monkeypatch.setattr(kernels, "multiply", lambda *given: (calls.append(1), multiply(*given))[1])
    vector = sk.SteeringVector({1: torch.ones(32)})

    def plain() -> None:
        with sk.Steering(vector, 1.0, "all").on(model), torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3]]))

    result = sk.sweep(model, tokenizer, vector, ["ab"], coefficients=[1], max_new_tokens=2)
    jobs: dict[str, Callable[[], Any]] = {
        "generate": lambda: sk.generate(model, tokenizer, ["ab"], max_new_tokens=2),
        "collect": lambda: sk.collect(model, tokenizer, ["ab"], layers=[1]),
        "on": plain,
        "sweep": lambda: sk.sweep(model, tokenizer, vector, ["ab"], coefficients=[1], max_new_tokens=2),
        "perplexity": lambda: result.score("perplexity", model=model, tokenizer=tokenizer),
    }
    for name, job in jobs.items():
        calls.clear()
        job()
        assert len(calls) >= 7, name


def test_the_faster_kernels_are_chosen_and_kept_in_a_file(other_file, measured, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: None)
    spent = {"torch": 1.0, "onednn": 0.5}
    measurements: list[int] = []

    def seconds(weight: torch.Tensor, transposed: bool) -> dict[str, float]:
        measurements.append(1)
        return dict(spent)

    monkeypatch.setattr(kernels, "_seconds", seconds)
    assert kernels_of(tiny_model()) == "onednn" and len(measurements) > 0
    measurements.clear()
    assert kernels_of(tiny_model()) == "onednn" and not measurements  # from the file
    spent["onednn"] = 0.95  # as fast: an Intel processor
    assert kernels_of(tiny_model("gpt2")) == "torch"
    other_file.write_text("not JSON")
    assert kernels_of(tiny_model()) == "torch"
    threads = torch.get_num_threads()
    spent["onednn"] = 0.1
    try:
        torch.set_num_threads(threads + 1)
        assert kernels_of(tiny_model()) == "onednn"  # another number of threads is another machine
    finally:
        torch.set_num_threads(threads)


def test_a_small_model_and_one_on_another_device_take_torchs_path(other_file) -> None:
    assert kernels_of(tiny_model()) == "torch"
    assert kernels_of(tiny_model().to("meta")) == "torch"
    assert not other_file.exists()


def test_without_the_operations_torchs_path_is_taken_or_the_name_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "torch lacks its operations")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert kernels_of(model) == "torch"
    with (
        pytest.raises(ValueError, match=r"torch lacks its operations\. Pass kernels='torch'"),
        use_kernels(model, "onednn"),
    ):
        pass
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="Pass kernels='torch'"):
        sk.load(tmp_path / "m", kernels="onednn")
    with pytest.raises(ValueError, match="expected kernels of"):
        sk.load(tmp_path / "m", kernels="mkl")  # type: ignore[arg-type]


def test_operations_that_compute_something_else_are_not_used(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "multiply", lambda rows, weight, bias: torch.zeros(len(rows), 130))
    monkeypatch.setattr(kernels, "_pack", lambda weight: weight)
    kernels.missing.cache_clear()
    try:
        assert kernels.missing() in (
            "its operations compute something else than a linear layer", "this torch is built without oneDNN",
        )  # fmt: skip
    finally:
        kernels.missing.cache_clear()


@needs_onednn
def test_a_resumed_sweep_uses_the_kernels_that_it_was_started_with(tmp_path, monkeypatch) -> None:
    tokenizer, vector = tiny_tokenizer(), sk.SteeringVector({1: torch.ones(32)})

    def run(model: Any) -> sk.SweepResult:
        return sk.sweep(model, tokenizer, vector, ["ab"], coefficients=[1], max_new_tokens=2, out=tmp_path / "run")

    first = tiny_model()
    set_kernels(first, "onednn")
    run(first)
    second = tiny_model()
    assert kernels_of(second) == "torch"
    run(second)
    assert kernels_of(second) == "onednn"
    third = tiny_model()
    set_kernels(third, "torch")
    with pytest.raises(ValueError, match=r"kernels: .onednn. -> .torch."):
        run(third)
    monkeypatch.setattr(kernels, "missing", lambda: "torch lacks its operations")
    with pytest.raises(ValueError, match="Use a new folder"):
        run(tiny_model())
