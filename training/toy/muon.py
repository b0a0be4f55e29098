"""Muon for matrices, in the number format in which the processor is fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration; those of `torch.optim.Muon`."""


def muon(matrices: Sequence[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return Muon with updates of AdamW's size: torch's, which uses bfloat16, or ours in float32.

    A processor without bfloat16 products emulates them: then torch's takes more time than the rest of a training step.

    Args:
        matrices: parameters with two dimensions.
        lr: learning rate.
        weight_decay: decoupled, as in AdamW.
    """
    if torch.cpu._is_avx512_bf16_supported() or any(matrix.is_cuda for matrix in matrices):
        return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return Float32Muon(matrices, lr, weight_decay)


class Float32Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with Nesterov momentum, orthogonalised in float32.

    Per step, with gradient g, learning rate r and b = `momentum`: m becomes b m + (1 - b) g, then the weights w of a
    matrix with p rows and q columns become w (1 - r weight_decay) - 0.2 sqrt(max(p, q)) r orthogonal((1 - b) g + b m).
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change every matrix that has a gradient."""
        if closure is not None:
            raise ValueError("expected no closure; got one. Compute the gradients before the call.")
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(matrix.grad.lerp(state["momentum"], momentum))
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(update, alpha=-lr * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return a matrix with the same singular vectors and singular values near 1 (about 0.7 to 1.2), by Newton-Schulz.

    Args:
        matrix: two dimensions, float32.
        steps: of the iteration.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=1e-7)  # the spectral norm is at most 1
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.size(0) > matrix.size(1) else wide
