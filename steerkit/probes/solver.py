"""The probe's solver: many L2-regularised logistic regressions in one batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def standardised(raw: Float[Tensor, "item d_model"]) -> tuple[Tensor, ...]:
    """Standardised features and a last one of 1, their mean and scale, and the spectrum e, V: `X'X = V diag(e) V'`."""
    x = raw.detach().to("cpu", torch.float64)
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale[scale <= len(x) * torch.finfo(x.dtype).eps * mean.abs()] = 1  # constant, up to the rounding of its mean
    x = (x - mean) / scale
    if len(x) >= x.shape[1]:
        e, v = torch.linalg.eigh(x.float().T @ x.float())  # only preconditions: float32 will do
    else:
        e, u = torch.linalg.eigh(x @ x.T)
        kept = e > 1e-12 * e[-1]
        e, v = e[kept], x.T @ u[:, kept] / e[kept].sqrt()
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1), mean, scale, e.clamp_min(0), v


def fit_batch(
    features: tuple[Tensor, ...], y: Tensor, train: Tensor, k: int, c: float, tol: float = 1e-5, max_iter: int = 1000
) -> tuple[Float[Tensor, "fit class d_model"], Float[Tensor, "fit class"], Float[Tensor, "fit class item"]]:
    """Many fits in one batch, of labels `[fit, item]` where `train`: raw weights, intercepts, all items' probabilities.

    Each fit's own `(x - mean) / std` is folded into its weights: one matrix product serves all. They descend in float32
    as far as it goes, in 300 steps at most, and from there in float64.
    """
    if not c > 0:
        raise ValueError(f"expected c above 0; got {c}. It divides the penalty; 1.0 is usual.")
    (x, center, scale, e, v), mask = features, train.double()[:, None]
    mean = mask @ x / mask.sum(2, keepdim=True)
    std = (mask @ x.square() / mask.sum(2, keepdim=True) - mean.square()).clamp_min(0).sqrt()
    std[std < 1e-6] = 1  # constant within the fold, up to rounding
    mean[..., -1], std[..., -1] = 0, 1
    target = torch.nn.functional.one_hot(y, k).transpose(1, 2) * mask
    w = torch.zeros(len(y), k, x.shape[1], dtype=x.dtype)
    for dtype, steps in ((torch.float32, min(300, max_iter)), (torch.float64, max_iter)):
        problem = [t.to(dtype) for t in (x, e, v, mask, target, mean, std)]
        w, z, done, norm = _descend(w.to(dtype), problem, (2 if k == 2 else 1) / c, tol, steps)
    if not done.all():
        what = f"expected convergence in {max_iter} steps; got gradient norms up to {float(norm[~done].max()):.2g} in"
        advice = f"{int((~done).sum())} of {len(y)} fits. Raise max_iter or tol, or lower c."
        warnings.warn(f"{what} {advice}", RuntimeWarning, stacklevel=3)
    u = w / std
    weights = u[..., :-1] / scale
    return weights, u[..., -1] - (u * mean).sum(2) - weights @ center, torch.softmax(z, 1)


def _descend(w: Tensor, problem: Sequence[Tensor], ridge: float, tol: float, max_iter: int) -> tuple[Tensor, ...]:
    """Weights, logits, whether converged, gradient norm, by Polak and Ribiere's preconditioned conjugate gradients.

    The classes' weights sum to zero: the last class is left out of the products. The preconditioner is
    `(a X'X + ridge)^-1`, `a` the items' mean curvature by then; the line search is Newton's, kept in a bracket.
    """
    x, e, v, mask, target, mean, std = problem

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2), keepdim=True)

    def times(a: Tensor, b: Tensor) -> Tensor:
        head = (a[:, :-1].reshape(-1, a.shape[2]) @ b).view(len(a), a.shape[1] - 1, -1)
        return torch.cat([head, -head.sum(1, keepdim=True)], dim=1)

    def logits(w: Tensor) -> Tensor:
        return times(w / std, x.T) - (w / std * mean).sum(2, keepdim=True)

    penalty = torch.cat([torch.full_like(std[..., :-1], ridge), torch.zeros_like(std[..., -1:])], dim=2)
    w = w - w.mean(1, keepdim=True)
    z = logits(w)
    p = torch.softmax(z, 1) * mask
    least, d, last, fell = penalty, torch.zeros_like(w), torch.zeros_like(w), torch.ones_like(w[:, :1, :1])
    stuck = torch.zeros_like(fell, dtype=torch.bool)
    for iteration in range(max_iter + 1):
        g = times(p - target, x)
        g = (g - g[..., -1:] * mean) / std + w * penalty
        loss = dot(mask, z.logsumexp(1, keepdim=True)) - dot(target, z) + dot(w * penalty, w) / 2
        intercept = dot(p, mask - p).clamp_min(torch.finfo(w.dtype).eps) / (w.shape[1] - 1)
        now = torch.cat([penalty[..., :-1], intercept], dim=2)  # the least curvature of each weight
        done = dot(g / now, g) / 2 <= tol * loss
        if (over := done | stuck).all() or iteration == max_iter:
            break
        moved = ((now > 2 * least) | (2 * now < least)).any(2, keepdim=True)  # renews the preconditioner, and restarts
        least = torch.where(moved, now, least)
        f = (g * std)[..., :-1]  # in the units that all fits share
        s = times(times(f, v) / (least[..., -1:] / x.shape[0] * e + ridge), v.T)
        if v.shape[0] > v.shape[1]:
            s += (f - times(times(f, v), v.T)) / ridge
        s = torch.cat([s * std[..., :-1], (g / least)[..., -1:]], dim=2)
        d = torch.where(moved, 0, dot(g, s - last).clamp_min(0) / fell) * d - s
        d = torch.where(dot(g, d) < 0, d, -s)
        last, fell, slope0 = s, dot(g, s), dot(g, d)
        dz, wd, dd, slope = logits(d), dot(w * penalty, d), dot(d * penalty, d), slope0
        t, low, high, ok = torch.zeros_like(fell), torch.zeros_like(fell), torch.full_like(fell, torch.inf), over
        for _ in range(30):
            q = p * dz
            step = t - slope / (dot(q, dz) - q.sum(1, keepdim=True).square().sum(2, keepdim=True) + dd)
            other = torch.where(high.isinf(), 2 * t, (low + high) / 2)
            t = torch.where(ok, t, torch.where((low < step) & (step < high), step, other))
            p = torch.softmax(z + t * dz, 1) * mask
            slope = dot(p - target, dz) + wd + t * dd
            ok = over | (slope.abs() <= 0.1 * slope0.abs())
            if ok.all():
                break
            low, high = torch.where(slope < 0, t, low), torch.where(slope > 0, t, high)
        w, z = w + t * d, z + t * dz
        stuck = stuck | ~ok | (-slope0 * t <= 1e-3 * torch.finfo(w.dtype).eps * loss)
    return w, z, done, dot(g, g).sqrt()
