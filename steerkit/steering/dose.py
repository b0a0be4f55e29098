"""Relative dose: the norm of a push over the mean norm of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping

from steerkit.capture.activations import Layer
from steerkit.steering.steering import Steering


def relative_dose(steering: Steering, norms: Mapping[Layer, float]) -> float:
    """`|coefficient| * |v_l| / mean |h_l|`, averaged over the steered layers.

    Args:
        steering: its coefficient is one number.
        norms: mean norm of the stream per layer, e.g. from `steerkit.capture.norms.stream_norms`.

    Returns:
        NaN for operations that do not add the vector, whose effect has no fixed norm, and where `norms` lacks a
        steered layer.
    """
    vector = steering.vector
    if steering.operation not in ("add", "add_normed") or not all(layer in norms for layer in vector.layers):
        return float("nan")
    mean = sum(norm / norms[layer] for layer, norm in vector.norms().items()) / len(vector.layers)
    return abs(float(steering.coefficient)) * mean
