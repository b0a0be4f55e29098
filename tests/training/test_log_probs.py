"""Log-probabilities of target tokens: values, entropies and gradients are those of the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.trainer import utils

from training.train import log_probs
from training.train.log_probs import TokenLogProbs, fast_log_probs

OUTPUTS = ("log_probs", "entropy", "is_top1")


def plain(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, scale: float) -> tuple[Any, Any, Any]:
    z = hidden @ weight.t() + (0 if bias is None else bias)
    logs = (z * scale / temperature).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, targets[:, None])[:, 0], entropy, logs.argmax(-1) == targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("graded", ["logs", "entropy", "both"])
def test_values_and_gradients_are_those_of_the_plain_formula(
    bias: bool, temperature: float, graded: str, monkeypatch
) -> None:
    monkeypatch.setattr(log_probs, "NUMBERS", 130)  # blocks of four tokens, and of eleven rows of the output embeddings
    generator = torch.Generator().manual_seed(0)
    hidden, weight, one = (torch.randn(*shape, generator=generator) for shape in ((11, 6), (30, 6), (30,)))
    targets = torch.randint(0, 30, (11,), generator=generator)
    g, h = torch.randn(2, 11, generator=generator)
    single = [x.clone().requires_grad_() for x in ((hidden, weight, one) if bias else (hidden, weight))]
    double = [x.double().requires_grad_() for x in ((hidden, weight, one) if bias else (hidden, weight))]
    found = TokenLogProbs.apply(*(single if bias else [*single, None]), targets, temperature, 99, None, 1.3, OUTPUTS)
    truth = plain(*(double if bias else [*double, None]), targets, temperature, 1.3)
    for ours, theirs in zip((found[0], found[1], found[4]), truth, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-5)
    for outputs in (found, truth):
        terms = {"logs": (outputs[0] * g).sum(), "entropy": (outputs[1] * h).sum()}
        (terms["logs"] + terms["entropy"] if graded == "both" else terms[graded]).backward()
    for ours, theirs in zip(single, double, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


def test_trl_s_function_gives_the_same_and_is_in_its_place_again_afterwards() -> None:
    original = utils._ChunkedLogProbFunction
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    arguments = (hidden, weight, None, torch.arange(7), 0.9, 8, None, 1.0, OUTPUTS)
    theirs = original.apply(*arguments)
    with fast_log_probs():
        assert utils._ChunkedLogProbFunction is not original
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    assert utils._ChunkedLogProbFunction is original
    assert "TokenLogProbs" in str(ours[0].grad_fn) and "TokenLogProbs" not in str(theirs[0].grad_fn)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["softcap", "float64", "outputs"])
def test_what_it_does_not_compute_goes_to_trl_s_function(change: str) -> None:
    dtype = torch.float64 if change == "float64" else torch.float32
    hidden, weight = torch.randn(7, 6, dtype=dtype, requires_grad=True), torch.randn(30, 6, dtype=dtype)
    outputs = ("log_probs", "mean_logits") if change == "outputs" else ("log_probs",)
    softcap = 5.0 if change == "softcap" else None
    with fast_log_probs():
        found = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.arange(7), 1.0, 8, softcap, 1.0, outputs
        )
    assert "TokenLogProbs" not in str(found[0].grad_fn)


def test_without_trl_s_name_nothing_is_replaced(monkeypatch) -> None:
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with fast_log_probs():
        assert not hasattr(utils, "_ChunkedLogProbFunction")
