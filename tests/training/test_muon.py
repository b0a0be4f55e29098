"""Claims about Muon in float32, compared with torch's in bfloat16 and with the singular value decomposition."""

import pytest
import torch

from training.toy.muon import Float32Muon, muon, orthogonal


def trained(make, steps: int = 20) -> list[torch.Tensor]:
    """Weights after some steps of least squares through two matrices, on a new batch in each."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(*shape, generator=generator) / 8) for shape in ((48, 32), (32, 40))]
    optimizer = make(weights)
    for _ in range(steps):
        inputs, wanted = (torch.randn(100, width, generator=generator) for width in (48, 40))
        optimizer.zero_grad()
        ((inputs @ weights[0] @ weights[1] - wanted) ** 2).mean().backward()
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


@pytest.mark.parametrize("steps", [1, 20])
def test_float32_muon_takes_torchs_steps_up_to_bfloat16s_rounding(steps):
    how = {"lr": 0.02, "weight_decay": 0.01}
    ours = trained(lambda weights: Float32Muon(weights, **how), steps)
    torchs = trained(lambda weights: torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **how), steps)
    started = trained(lambda weights: Float32Muon(weights, **how), steps=0)
    for our, other, start in zip(ours, torchs, started, strict=True):
        assert (our - other).norm() < 0.05 * (other - start).norm()


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_orthogonal_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonal(matrix) @ right.T
    values = inner.diagonal()
    assert values.min() > 0.5 and values.max() < 1.5
    assert (inner - torch.diag(values)).abs().max() < 1e-4


def test_a_matrix_without_gradient_stays_and_a_closure_is_refused():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Float32Muon([weight], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected no closure"):
        optimizer.step(lambda: 0.0)


def test_torchs_muon_is_used_where_the_processor_multiplies_bfloat16(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(2, 3))]
    for has, kind in ((True, torch.optim.Muon), (False, Float32Muon)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert type(muon(weights, 0.1, 0.01)) is kind
