"""Solvers of the probe: many L2-regularised logistic regressions in one batch, and scikit-learn as the reference.

Names in the mathematics, with f fits, k classes, n items and d features (the last feature is the constant 1):
`x` [n, d] features; `w` [f, k, d] weights; `z` [f, k, n] logits; `p` [f, k, n] probabilities.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT32_STEPS = 300
LINE_SEARCH_STEPS = 30
SOLVERS = ("steerkit", "scikit-learn")

Fitted = tuple[Tensor, Tensor, Tensor]
"""Weights `[fit, class, d_model]` and intercepts `[fit, class]` in the raw space, and the probabilities of all items
`[fit, class, item]`, in float64."""
Fit = Callable[[Tensor, Tensor, int, float, float, int], Fitted]
"""`fit(labels [fit, item], train [fit, item], n_classes, c, tol, max_iter)` on the features that it was made for."""


def solver_for(raw: Float[Tensor, "item d_model"], solver: str) -> Fit:
    """Return the function that fits probes on these raw features.

    Raises:
        ValueError: an unknown solver.
    """
    if solver == "steerkit":
        return functools.partial(fit_batch, standardised(raw))
    if solver == "scikit-learn":
        return functools.partial(fit_with_scikit_learn, raw.detach().cpu().double())
    raise ValueError(f"expected a solver among {list(SOLVERS)}; got {solver!r}. Pass one of them.")


@dataclass(frozen=True, eq=False)
class Features:
    """Standardised features, and the eigendecomposition of their Gram matrix for the preconditioner.

    Args:
        x: `[item, d_model + 1]`; the last column is 1.
        center: `[d_model]`, the mean of the raw features.
        scale: `[d_model]`, their standard deviation; 1 for a constant feature.
        eigenvalues: `[rank]`, with `X'X = V diag(eigenvalues) V'`.
        eigenvectors: V, `[d_model, rank]`.
    """

    x: Float[Tensor, "item feature"]
    center: Float[Tensor, " d_model"]
    scale: Float[Tensor, " d_model"]
    eigenvalues: Float[Tensor, " rank"]
    eigenvectors: Float[Tensor, "d_model rank"]


def standardised(raw: Float[Tensor, "item d_model"]) -> Features:
    """Return the features standardised over all items, in float64 on the CPU."""
    x = raw.detach().cpu().double()
    center = x.mean(0)
    scale = x.std(0, correction=0)
    scale[scale <= len(x) * torch.finfo(x.dtype).eps * center.abs()] = 1  # constant, up to the rounding of its mean
    x = (x - center) / scale
    if len(x) >= x.shape[1]:
        # float32 is enough for a preconditioner
        eigenvalues, eigenvectors = torch.linalg.eigh(x.float().T @ x.float())
    else:
        eigenvalues, left = torch.linalg.eigh(x @ x.T)
        kept = eigenvalues > 1e-12 * eigenvalues[-1]
        eigenvalues = eigenvalues[kept]
        eigenvectors = x.T @ left[:, kept] / eigenvalues.sqrt()
    with_constant = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return Features(with_constant, center, scale, eigenvalues.clamp_min(0), eigenvectors)


def fit_with_scikit_learn(
    raw: Float[Tensor, "item d_model"],
    labels: Tensor,
    train: Tensor,
    n_classes: int,
    c: float,
    tol: float,
    max_iter: int,
) -> Fitted:
    """Fit `LogisticRegression(C=c)` after `StandardScaler`, once per row of `labels` and `train`: the reference.

    `tol` is not used: scikit-learn's bounds the gradient and not the loss, so it is set to 1e-8. A feature that is
    constant in the training items has weight 0.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    _check_penalty(c)
    x = raw.numpy()
    weights = torch.zeros(len(labels), n_classes, x.shape[1], dtype=torch.float64)
    bias = torch.zeros(len(labels), n_classes, dtype=torch.float64)
    for number in range(len(labels)):
        kept = train[number].numpy()
        scaler = StandardScaler().fit(x[kept])
        is_constant = torch.from_numpy(scaler.var_ <= (len(x) * 2**-52 * scaler.mean_) ** 2)
        standard = scaler.transform(x[kept])
        standard[:, is_constant.numpy()] = 0
        fitted = LogisticRegression(C=c, tol=1e-8, max_iter=max_iter).fit(standard, labels[number].numpy()[kept])
        w = torch.from_numpy(fitted.coef_) / torch.from_numpy(scaler.scale_)
        w[:, is_constant] = 0
        b = torch.from_numpy(fitted.intercept_) - w @ torch.from_numpy(scaler.mean_)
        if n_classes == 2:  # scikit-learn gives one vector w, here the rows are -w/2 and w/2
            w = torch.cat([-w, w]) / 2
            b = torch.cat([-b, b]) / 2
        weights[number] = w
        bias[number] = b
    return weights, bias, torch.softmax(weights @ raw.T + bias[:, :, None], 1)


def _check_penalty(c: float) -> None:
    if not c > 0:
        raise ValueError(f"expected c above 0; got {c}. It divides the penalty; pass 1.0, the usual value.")


def fit_batch(
    features: Features, labels: Tensor, train: Tensor, n_classes: int, c: float, tol: float = 1e-5, max_iter: int = 1000
) -> tuple[Float[Tensor, "fit class d_model"], Float[Tensor, "fit class"], Float[Tensor, "fit class item"]]:
    """Fit many probes in one batch, of `labels` `[fit, item]` on the items where `train` `[fit, item]`.

    Each fit's own standardisation `(x - mean) / std` is folded into its weights, so one matrix product serves all fits.
    The descent runs in float32 for at most 300 steps, then in float64.

    Returns:
        Raw-space weights and intercepts, and the probabilities of all items.

    Warns:
        RuntimeWarning: a fit did not converge in `max_iter` steps.
    """
    _check_penalty(c)
    x = features.x
    mask = train.double()[:, None]
    mean = mask @ x / mask.sum(2, keepdim=True)
    std = (mask @ x.square() / mask.sum(2, keepdim=True) - mean.square()).clamp_min(0).sqrt()
    std[std < 1e-6] = 1  # constant within the fold, up to rounding
    mean[..., -1] = 0
    std[..., -1] = 1
    target = torch.nn.functional.one_hot(labels, n_classes).transpose(1, 2) * mask
    ridge = (2 if n_classes == 2 else 1) / c
    w = torch.zeros(len(labels), n_classes, x.shape[1], dtype=x.dtype)
    for dtype, steps in ((torch.float32, min(FLOAT32_STEPS, max_iter)), (torch.float64, max_iter)):
        problem = _Problem(
            x=x.to(dtype),
            eigenvalues=features.eigenvalues.to(dtype),
            eigenvectors=features.eigenvectors.to(dtype),
            mask=mask.to(dtype),
            target=target.to(dtype),
            mean=mean.to(dtype),
            std=std.to(dtype),
            ridge=ridge,
        )
        w, z, converged, norm = _descend(problem, w.to(dtype), tol, steps)
    if not converged.all():
        warnings.warn(
            f"expected convergence in {max_iter} steps; got gradient norms up to {float(norm[~converged].max()):.2g} "
            f"in {int((~converged).sum())} of {len(labels)} fits. Raise max_iter or tol, or lower c.",
            RuntimeWarning,
            stacklevel=3,
        )
    scaled = w / std
    weights = scaled[..., :-1] / features.scale
    bias = scaled[..., -1] - (scaled * mean).sum(2) - weights @ features.center
    return weights, bias, torch.softmax(z, 1)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The loss of a batch of fits, `-sum log p + ridge |w|^2 / 2` without a penalty on the intercepts, in one dtype.

    Args:
        x: `[item, feature]`, shared by all fits.
        eigenvalues: see `Features`.
        eigenvectors: see `Features`.
        mask: `[fit, 1, item]`, 1 for training items.
        target: `[fit, class, item]`, 1 for the class of a training item.
        mean: `[fit, 1, feature]`, of the training items; 0 for the constant feature.
        std: `[fit, 1, feature]`, of the training items; 1 for the constant feature.
        ridge: weight of the penalty.
    """

    x: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    mask: Tensor
    target: Tensor
    mean: Tensor
    std: Tensor
    ridge: float

    @property
    def penalty(self) -> Tensor:
        """`[fit, 1, feature]`: the ridge, and 0 for the intercept."""
        return torch.cat([torch.full_like(self.std[..., :-1], self.ridge), torch.zeros_like(self.std[..., -1:])], dim=2)

    def logits(self, w: Tensor) -> Tensor:
        scaled = w / self.std
        return _times(scaled, self.x.T) - (scaled * self.mean).sum(2, keepdim=True)

    def probabilities(self, z: Tensor) -> Tensor:
        """Probabilities of the training items; 0 for the others."""
        return torch.softmax(z, 1) * self.mask

    def gradient(self, w: Tensor, p: Tensor, penalty: Tensor) -> Tensor:
        raw = _times(p - self.target, self.x)
        return (raw - raw[..., -1:] * self.mean) / self.std + w * penalty

    def loss(self, w: Tensor, z: Tensor, penalty: Tensor) -> Tensor:
        cross_entropy = _dot(self.mask, z.logsumexp(1, keepdim=True)) - _dot(self.target, z)
        return cross_entropy + _dot(w * penalty, w) / 2

    def least_curvature(self, p: Tensor, penalty: Tensor) -> Tensor:
        """The smallest curvature of the loss along each weight: the ridge, and for the intercept its mean curvature."""
        intercept = _dot(p, self.mask - p).clamp_min(torch.finfo(p.dtype).eps) / (p.shape[1] - 1)
        return torch.cat([penalty[..., :-1], intercept], dim=2)

    def preconditioned(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """`(a X'X + ridge)^-1 gradient`, with a the items' mean curvature, in the coordinates shared by all fits."""
        shared = (gradient * self.std)[..., :-1]
        rotated = _times(shared, self.eigenvectors)
        step = _times(
            rotated / (curvature[..., -1:] / self.x.shape[0] * self.eigenvalues + self.ridge), self.eigenvectors.T
        )
        if self.eigenvectors.shape[0] > self.eigenvectors.shape[1]:  # outside the span of the items only the ridge acts
            step += (shared - _times(rotated, self.eigenvectors.T)) / self.ridge
        return torch.cat([step * self.std[..., :-1], (gradient / curvature)[..., -1:]], dim=2)


def _descend(problem: _Problem, w: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimise by preconditioned conjugate gradients (Polak and Ribiere), restarted when the curvature changes by 2.

    Returns:
        Weights, logits, whether each fit converged, and the norm of its gradient.
    """
    penalty = problem.penalty
    w = w - w.mean(1, keepdim=True)
    z = problem.logits(w)
    p = problem.probabilities(z)
    curvature = penalty
    direction = torch.zeros_like(w)
    last_step = torch.zeros_like(w)
    last_decrease = torch.ones_like(w[:, :1, :1])
    stuck = torch.zeros_like(last_decrease, dtype=torch.bool)
    for iteration in range(max_iter + 1):
        gradient = problem.gradient(w, p, penalty)
        loss = problem.loss(w, z, penalty)
        current = problem.least_curvature(p, penalty)
        converged = _dot(gradient / current, gradient) / 2 <= tol * loss
        finished = converged | stuck
        if finished.all() or iteration == max_iter:
            break
        restart = ((current > 2 * curvature) | (2 * current < curvature)).any(2, keepdim=True)
        curvature = torch.where(restart, current, curvature)
        step = problem.preconditioned(gradient, curvature)
        momentum = torch.where(restart, 0, _dot(gradient, step - last_step).clamp_min(0) / last_decrease)
        direction = momentum * direction - step
        direction = torch.where(_dot(gradient, direction) < 0, direction, -step)
        last_step = step
        last_decrease = _dot(gradient, step)
        slope = _dot(gradient, direction)
        dz = problem.logits(direction)
        length, p, accepted = _line_search(problem, (w, z, p), (direction, dz), slope, penalty, finished)
        w = w + length * direction
        z = z + length * dz
        stuck = stuck | ~accepted | (-slope * length <= 1e-3 * torch.finfo(w.dtype).eps * loss)
    return w, z, converged, _dot(gradient, gradient).sqrt()


def _line_search(
    problem: _Problem,
    state: tuple[Tensor, Tensor, Tensor],
    along: tuple[Tensor, Tensor],
    slope: Tensor,
    penalty: Tensor,
    finished: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's method on the loss along a direction, kept in a bracket, until the slope has fallen to a tenth.

    Args:
        state: weights, logits and probabilities at length 0.
        along: the direction, and its logits.
        slope: the slope of the loss at length 0.
        finished: fits that keep length 0.

    Returns:
        The length of each fit's step, the probabilities there, and whether the slope is small enough.
    """
    w, z, p = state
    direction, dz = along
    linear = _dot(w * penalty, direction)
    quadratic = _dot(direction * penalty, direction)
    first_slope = slope
    length = torch.zeros_like(slope)
    low = torch.zeros_like(slope)
    high = torch.full_like(slope, torch.inf)
    accepted = finished
    for _ in range(LINE_SEARCH_STEPS):
        weighted = p * dz
        curvature = _dot(weighted, dz) - weighted.sum(1, keepdim=True).square().sum(2, keepdim=True) + quadratic
        newton = length - slope / curvature
        bisection = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        length = torch.where(accepted, length, torch.where((low < newton) & (newton < high), newton, bisection))
        p = problem.probabilities(z + length * dz)
        slope = _dot(p - problem.target, dz) + linear + length * quadratic
        accepted = finished | (slope.abs() <= 0.1 * first_slope.abs())
        if accepted.all():
            break
        low = torch.where(slope < 0, length, low)
        high = torch.where(slope > 0, length, high)
    return length, p, accepted


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each fit, `[fit, 1, 1]`."""
    return (a * b).sum((1, 2), keepdim=True)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """`a [fit, class, m] @ b [m, n]` where the classes of a sum to 0: the last class is minus the sum of the others."""
    head = (a[:, :-1].reshape(-1, a.shape[2]) @ b).view(len(a), a.shape[1] - 1, -1)
    return torch.cat([head, -head.sum(1, keepdim=True)], dim=1)
