"""steerkit: read, steer and measure the residual stream of causal language models.

The public names are imported when they are first used, so that `import steerkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit.activations import ActivationMeans as ActivationMeans
    from steerkit.activations import Activations as Activations
    from steerkit.capture import capture_resid as capture_resid
    from steerkit.capture import collect as collect
    from steerkit.capture import collect_each as collect_each
    from steerkit.capture import collect_means as collect_means
    from steerkit.convert import read_vectors as read_vectors
    from steerkit.convert import write_vector as write_vector
    from steerkit.generation import generate as generate
    from steerkit.models import load as load
    from steerkit.pairs import ContrastPair as ContrastPair
    from steerkit.pairs import read_pairs as read_pairs
    from steerkit.pairs import write_pairs as write_pairs
    from steerkit.probes import ProbeResult as ProbeResult
    from steerkit.probes import fit_probe as fit_probe
    from steerkit.probes import probe_layers as probe_layers
    from steerkit.results import SweepResult as SweepResult
    from steerkit.steering import Steering as Steering
    from steerkit.sweeps import sweep as sweep
    from steerkit.texts import SpannedText as SpannedText
    from steerkit.traces import DebateTrace as DebateTrace
    from steerkit.traces import read_traces as read_traces
    from steerkit.traces import write_traces as write_traces
    from steerkit.vectors import SteeringVector as SteeringVector
    from steerkit.vectors import difference_in_means as difference_in_means
    from steerkit.vectors import logistic as logistic
    from steerkit.vectors import one_against_others as one_against_others
    from steerkit.vectors import pca as pca
    from steerkit.vectors import random_like as random_like

_HOME = {
    "activations": ("Activations", "ActivationMeans"),
    "capture": ("capture_resid", "collect", "collect_each", "collect_means"),
    "convert": ("read_vectors", "write_vector"),
    "generation": ("generate",),
    "models": ("load",),
    "pairs": ("ContrastPair", "read_pairs", "write_pairs"),
    "probes": ("ProbeResult", "fit_probe", "probe_layers"),
    "results": ("SweepResult",),
    "steering": ("Steering",),
    "sweeps": ("sweep",),
    "texts": ("SpannedText",),
    "traces": ("DebateTrace", "read_traces", "write_traces"),
    "vectors": ("SteeringVector", "difference_in_means", "logistic", "one_against_others", "pca", "random_like"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'steerkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"steerkit.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
