"""steerkit: read, steer and measure the residual stream of causal language models.

Public names and subpackages are imported on first use, so that `import steerkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit.capture.activations import ActivationMeans as ActivationMeans
    from steerkit.capture.activations import Activations as Activations
    from steerkit.capture.collect import collect as collect
    from steerkit.capture.collect import collect_each as collect_each
    from steerkit.capture.collect import collect_means as collect_means
    from steerkit.capture.resid import capture_resid as capture_resid
    from steerkit.generation.generate import Generation as Generation
    from steerkit.generation.generate import generate as generate
    from steerkit.generation.logit_lens import logit_lens as logit_lens
    from steerkit.generation.projections import project as project
    from steerkit.models.kernels import use_kernels as use_kernels
    from steerkit.models.load import load as load
    from steerkit.patching.patch import patch as patch
    from steerkit.patching.result import PatchResult as PatchResult
    from steerkit.probes.erasure import Eraser as Eraser
    from steerkit.probes.erasure import leace as leace
    from steerkit.probes.erasure import probe_erased as probe_erased
    from steerkit.probes.probe import Probe as Probe
    from steerkit.probes.probe import ProbeResult as ProbeResult
    from steerkit.probes.probe import fit_probe as fit_probe
    from steerkit.probes.probe import probe_layers as probe_layers
    from steerkit.scores.judge import judge as judge
    from steerkit.stats.latex import latex_table as latex_table
    from steerkit.steering.bake import bake as bake
    from steerkit.steering.calibration import Calibration as Calibration
    from steerkit.steering.calibration import calibrate_condition as calibrate_condition
    from steerkit.steering.calibration import firing_rates as firing_rates
    from steerkit.steering.conditions import Condition as Condition
    from steerkit.steering.erase import erase as erase
    from steerkit.steering.operations import Operation as Operation
    from steerkit.steering.steering import Steering as Steering
    from steerkit.sweeps.choices import score_choices as score_choices
    from steerkit.sweeps.direction import choose_direction as choose_direction
    from steerkit.sweeps.result import SweepResult as SweepResult
    from steerkit.sweeps.sweep import sweep as sweep
    from steerkit.text.ab import read_ab as read_ab
    from steerkit.text.pairs import ContrastPair as ContrastPair
    from steerkit.text.pairs import read_pairs as read_pairs
    from steerkit.text.pairs import write_pairs as write_pairs
    from steerkit.text.prompt import Prompt as Prompt
    from steerkit.text.prompt import render as render
    from steerkit.text.spans import SpannedText as SpannedText
    from steerkit.text.traces import DebateTrace as DebateTrace
    from steerkit.text.traces import read_traces as read_traces
    from steerkit.text.traces import write_traces as write_traces
    from steerkit.vectors.controls import random_like as random_like
    from steerkit.vectors.convert import read_vectors as read_vectors
    from steerkit.vectors.convert import write_vector as write_vector
    from steerkit.vectors.convert.sae_file import SaeRow as SaeRow
    from steerkit.vectors.convert.sae_file import read_sae as read_sae
    from steerkit.vectors.extract import difference_in_means as difference_in_means
    from steerkit.vectors.extract import logistic as logistic
    from steerkit.vectors.extract import one_against_others as one_against_others
    from steerkit.vectors.extract import pca as pca
    from steerkit.vectors.vector import SteeringVector as SteeringVector

_PUBLIC = {  # module -> the public names in it
    "capture.activations": ("Activations", "ActivationMeans"),
    "capture.collect": ("collect", "collect_each", "collect_means"),
    "capture.resid": ("capture_resid",),
    "generation.generate": ("Generation", "generate"),
    "generation.logit_lens": ("logit_lens",),
    "generation.projections": ("project",),
    "models.kernels": ("use_kernels",),
    "models.load": ("load",),
    "patching.patch": ("patch",),
    "patching.result": ("PatchResult",),
    "probes.erasure": ("Eraser", "leace", "probe_erased"),
    "probes.probe": ("Probe", "ProbeResult", "fit_probe", "probe_layers"),
    "scores.judge": ("judge",),
    "stats.latex": ("latex_table",),
    "steering.calibration": ("Calibration", "calibrate_condition", "firing_rates"),
    "steering.conditions": ("Condition",),
    "steering.bake": ("bake",),
    "steering.erase": ("erase",),
    "steering.operations": ("Operation",),
    "steering.steering": ("Steering",),
    "sweeps.choices": ("score_choices",),
    "sweeps.direction": ("choose_direction",),
    "sweeps.result": ("SweepResult",),
    "sweeps.sweep": ("sweep",),
    "text.ab": ("read_ab",),
    "text.pairs": ("ContrastPair", "read_pairs", "write_pairs"),
    "text.prompt": ("Prompt", "render"),
    "text.spans": ("SpannedText",),
    "text.traces": ("DebateTrace", "read_traces", "write_traces"),
    "vectors.controls": ("random_like",),
    "vectors.convert": ("read_vectors", "write_vector"),
    "vectors.convert.sae_file": ("SaeRow", "read_sae"),
    "vectors.extract": ("difference_in_means", "logistic", "one_against_others", "pca"),
    "vectors.vector": ("SteeringVector",),
}
_MODULES = {
    "controls": "vectors.controls",
    "plots": "show.plots",
    "scores": "scores",
    "serving": "serving",
    "stats": "stats",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    value: Any
    if name in _MODULES:
        value = importlib.import_module(f"steerkit.{_MODULES[name]}")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"steerkit.{_MODULE_OF[name]}"), name)
    elif name == "__version__":
        from importlib import metadata

        value = metadata.version("imad-steerkit")
    else:
        raise AttributeError(f"module 'steerkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
