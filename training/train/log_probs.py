"""Log-probabilities of target tokens on a CPU: fewer passes over the logits than TRL's function makes there.

With hidden states h, output embeddings W and temperature T, the logits of a token are `z = W h / T`, and

    log p(t) = z_t - log sum_v exp(z_v),        H = log sum_v exp(z_v) - sum_v p_v z_v.

The logits are never held at once: the forward pass computes them for some tokens at a time, the backward pass again for
a part of the vocabulary at a time, so that each row of dW is written once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NUMBERS = 8_000_000
"""Logits that are held at once. Larger blocks are returned to the system and asked for again at every step."""
OUTPUTS = {"log_probs", "entropy", "is_top1"}


class TokenLogProbs(torch.autograd.Function):
    """TRL's `ChunkedLogProbFunction` with its arguments and results, for models without a cap on their logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        factor = scale / temperature
        rows = max(1, NUMBERS // len(weight))
        logs, log_sums, entropies, hits = [], [], [], []
        for start in range(0, len(hidden), rows):
            z = _logits(hidden[start : start + rows], weight, bias, factor)
            chosen = targets[start : start + rows, None]
            log_sum = z.logsumexp(-1, keepdim=True)
            logs.append(z.gather(-1, chosen) - log_sum)
            log_sums.append(log_sum)
            if "is_top1" in outputs:
                hits.append(z.argmax(-1) == chosen[:, 0])
            if "entropy" in outputs:
                p = z.sub_(log_sum).exp()
                entropies.append(-p.mul_(z).sum(-1))
        log_sum = torch.cat(log_sums)
        entropy = torch.cat(entropies) if entropies else None
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum, log_sum[:, 0] if entropy is None else entropy)
        ctx.factor = factor
        is_top1 = torch.cat(hits) if hits else None
        if is_top1 is not None:
            ctx.mark_non_differentiable(is_top1)
        return torch.cat(logs)[:, 0], entropy, None, None, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum, entropy = ctx.saved_tensors
        of_logs, of_entropy = grads[0], grads[1]
        needs = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        grad_weight = torch.empty_like(weight) if needs[1] else None
        grad_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
        size = max(1, NUMBERS // len(hidden))
        for start in range(0, len(weight), size):
            part = slice(start, start + size)
            z = _logits(hidden, weight[part], None if bias is None else bias[part], ctx.factor).sub_(log_sum)  # log p
            bent = None if of_entropy is None else (z + entropy[:, None]).mul_(of_entropy[:, None])
            p = z.exp_()
            bent = None if bent is None else bent.mul_(p)
            if of_logs is None:
                p.zero_()
            else:
                p.mul_(-of_logs[:, None])
                here = ((targets >= start) & (targets < start + size)).nonzero()[:, 0]
                p[here, targets[here] - start] += of_logs[here]
            if bent is not None:
                p.sub_(bent)
            if ctx.factor != 1:
                p.mul_(ctx.factor)
            if grad_hidden is not None:
                grad_hidden += p @ weight[part]
            if grad_weight is not None:
                grad_weight[part] = p.t() @ hidden
            if grad_bias is not None:
                grad_bias[part] = p.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    z = hidden @ weight.t()
    if bias is not None:
        z.add_(bias)
    return z if factor == 1 else z.mul_(factor)


@contextlib.contextmanager
def fast_log_probs() -> Iterator[None]:
    """Let TRL's trainers call `TokenLogProbs` inside the `with`, where it computes the same.

    It stands for TRL's own function in float32 on a CPU. TRL has no option for this, so its module's name is replaced;
    a TRL without the name keeps its own function.
    """
    from trl.trainer import utils

    name = "_ChunkedLogProbFunction"
    original: Any = getattr(utils, name, None)
    if original is None:
        yield
        return

    class Chosen:
        """Takes the place of TRL's function."""

        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
            softcap, outputs = (rest[2] if len(rest) > 2 else None), (rest[4] if len(rest) > 4 else ())
            fits = hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.float32
            ours = fits and softcap is None and set(outputs) <= OUTPUTS and not torch.is_autocast_enabled("cpu")
            return (TokenLogProbs if ours else original).apply(hidden, weight, bias, targets, *rest)

    setattr(utils, name, Chosen)
    try:
        yield
    finally:
        setattr(utils, name, original)
