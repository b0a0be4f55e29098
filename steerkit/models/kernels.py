"""Kernels: what computes a model's linear layers on a CPU, torch's own path or oneDNN with packed weights.

torch sends float32 linear layers to MKL, which does not use the widest instructions of processors that are not Intel's.
oneDNN does, and with weights packed once it also gives a row the same bits for any number of rows. The names of these
operations in torch are private (`torch.ops.mkldnn`); the public `torch.utils.mkldnn.to_mkldnn` replaces modules by
TorchScript ones without packed weights, and `torch.compile` needs a compiler. They are used in `multiply` and `_pack`
only, are checked before their first use, and torch's path takes over where they are missing or wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steerkit.io.files import write_text
from steerkit.io.json import read_json
from steerkit.io.run_folder import CONFIG
from steerkit.models.memory import PLACES, SAMPLES, is_released, is_unchanged, release_file_pages
from steerkit.models.model import evaluating, unwrap

Kernels = Literal["auto", "onednn", "torch"]
BLOCK = 256
"""More rows than these are multiplied block by block, since the bits of a row may depend on larger numbers of rows."""
GAIN = 0.9
"""oneDNN is chosen where it takes less than this share of torch's time."""
TYPES = {torch.float32: ctypes.c_int32, torch.bfloat16: ctypes.c_int16}
SMALL = 1_000_000
"""A model with fewer numbers in its linear layers gains nothing and is not measured."""
TRIED_ROWS, ROUNDS = 32, 3


@contextlib.contextmanager
def use_kernels(model: nn.Module, kernels: Kernels | None = None) -> Iterator[str]:
    """Compute the linear layers of every forward of a model inside the `with` by these kernels.

    For one linear layer, `y = x W^T + b`. Weights are packed when they are first used, as a second copy that is kept
    for later uses, until the weight changes or is gone. torch does not count edits of `weight.data`: of these, one is
    noticed if it changes a whole row or column (a neuron, a head), and otherwise by chance; edit under
    `torch.no_grad()` instead. Forwards that need gradients take torch's path.

    Args:
        model: a model on a CPU in float32, or in bfloat16 on a processor for which oneDNN multiplies it (AVX-512 or
            AVX-NE-CONVERT); any other takes torch's path.
        kernels: `"onednn"`, `"torch"`, or `"auto"`: what is faster on this machine for the shapes of the model's
            layers, measured once per machine and library versions (under a second). Default: the choice of an outer
            `with`, else what `sk.load` was given, else `"auto"`.

    Yields:
        `"onednn"` or `"torch"`.

    Raises:
        ValueError: `"onednn"`, where torch has no such operations or they compute something else.

    Example:
        >>> with sk.use_kernels(model, "onednn"):
        ...     ids = model.generate(**inputs)
    """
    chosen, base = kernels_of(model, kernels), unwrap(model)
    if chosen == "onednn":
        others = {module: _PACKED[type(module)] for module in model.modules() if type(module) in _PACKED}
        others = {module: kind for module, kind in others.items() if _can_pack(module)}
    else:
        others = {module: _PLAIN[type(module)] for module in model.modules() if type(module) in _PLAIN}
    before = {module: type(module) for module in others}
    outer = _ACTIVE.get(base)
    if chosen == "onednn" and outer is None:
        _forget_changed(others)
    _ACTIVE[base] = chosen
    for module, kind in others.items():
        module.__class__ = kind
    try:
        yield chosen
    finally:
        for module, kind in before.items():
            module.__class__ = kind
        _ACTIVE.pop(base)
        if outer is not None:
            _ACTIVE[base] = outer


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """How every forward of ours is run: in eval mode, by the model's kernels."""
    with evaluating(unwrap(model)), use_kernels(model):
        yield


def kernels_of(model: nn.Module, kernels: Kernels | None = None) -> str:
    """What `use_kernels` would take: `"onednn"` or `"torch"`. Errors are those of `use_kernels`."""
    base = unwrap(model)
    check_kernels(kernels)
    kernels = _ACTIVE.get(base) or _CHOSEN.get(base, "auto") if kernels is None else kernels
    if kernels != "auto":
        return kernels
    if missing():
        return "torch"
    if base not in _MEASURED:
        _MEASURED[base] = _faster(base)
    return _MEASURED[base]


def check_kernels(kernels: Kernels | None) -> None:
    """`ValueError` for an unknown name, and for `"onednn"` where it cannot be used."""
    if kernels is not None and kernels not in get_args(Kernels):
        raise ValueError(f"expected kernels of {get_args(Kernels)}; got {kernels!r}. Pass one of these.")
    if kernels == "onednn" and (reason := missing()):
        raise ValueError(
            f"expected a torch with oneDNN's linear layers; {reason}. Pass kernels='torch', which gives other bits."
        )


def set_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Set what every job on this model uses from now on."""
    _CHOSEN[unwrap(model)] = kernels


def resume_kernels(model: nn.Module, folder: str | Path | None) -> None:
    """Use the kernels that a run in this folder was started with, where the model's are `"auto"`.

    Raises:
        ValueError: the run was started with kernels that cannot be used here; the message says what to do.
    """
    stored = None
    with contextlib.suppress(OSError, ValueError):
        config = read_json(Path(folder) / CONFIG) if folder is not None else {}
        parts = (config, *config.values()) if isinstance(config, dict) else ()
        stored = next((part["kernels"] for part in parts if _names_kernels(part)), None)
    if stored == "onednn" and (reason := missing()):
        raise ValueError(
            f"expected oneDNN's linear layers, with which the run in {folder} was started; {reason}. Use a new folder, "
            "or resume it where they exist."
        )
    if stored is not None:
        _MEASURED[unwrap(model)] = stored


def _names_kernels(part: Any) -> bool:
    return isinstance(part, dict) and part.get("kernels") in ("onednn", "torch")


def packed_bytes(model: nn.Module) -> int:
    """The size of the packed copies of a model's weights when all of them are packed."""
    weights = {m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


# Packed weights


@dataclass(frozen=True)
class _Packed:
    """A packed copy of a weight, and what the weight was like.

    Args:
        weight: the copy, in oneDNN's layout.
        version: torch's count of in-place changes.
        pointer: where the weight's numbers are.
        places: numpy view of some of its numbers.
        values: these numbers, as bytes.
        marks: a number of each of its rows and columns, see `_marks`.
    """

    weight: Tensor
    version: int
    pointer: int
    places: Any
    values: bytes
    marks: bytes


def _forward(self: Any, x: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows output"]:
    """The forward of both kinds of linear layer: their weights are packed alike."""
    weight, bias = self._parameters["weight"], self._parameters["bias"]  # `self.weight` is a slow search
    if (
        (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        or x.dtype is not weight.dtype
        or not weight.is_cpu
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        plain: Tensor = _PLAIN[type(self)].forward(self, x)
        return plain
    packed = _packed(self, weight)
    shape = x.shape
    rows = x.reshape(prod(shape[:-1]), shape[-1])
    y = multiply(rows, packed, bias) if 2 <= rows.shape[0] <= BLOCK else _in_blocks(rows, packed, bias)
    return y.view(*shape[:-1], y.shape[-1])


class _OneDNNLinear(nn.Linear):
    """`nn.Linear` through oneDNN."""

    forward = _forward  # type: ignore[assignment]


class _OneDNNConv1D(Conv1D):
    """GPT-2's linear layer through oneDNN."""

    forward = _forward


_PACKED: dict[type, type] = {nn.Linear: _OneDNNLinear, Conv1D: _OneDNNConv1D}
_PLAIN: dict[type, Any] = {packed: plain for plain, packed in _PACKED.items()}
_CHOSEN: weakref.WeakKeyDictionary[nn.Module, Kernels] = weakref.WeakKeyDictionary()
_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_MEASURED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_COPIES: dict[int, _Packed] = {}
"""By id of a module; an entry goes when its module does. A dictionary of weak keys takes ten times as long."""


def _can_pack(module: Any) -> bool:
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and module._parameters.get("weight") is weight
        and weight.device.type == "cpu"
        and weight.dtype in TYPES
        and (weight.dtype is not torch.bfloat16 or _multiplies_bfloat16())
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.numel() > 0
    )


def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 on this processor; packing raises an error where it does not."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(module: Any, weight: Tensor) -> Tensor:
    """The packed copy of a module's weight, made again if the weight has changed."""
    copy = _COPIES.get(id(module))
    version = -1 if weight.is_inference() else weight._version
    if (
        copy is not None
        and (copy.version, copy.pointer) == (version, weight.data_ptr())
        and copy.places.tobytes() == copy.values
    ):
        return copy.weight
    places = _sampled(weight)
    of_rows = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T.contiguous()
    marks = _marks(weight)
    copy = _Packed(_pack(of_rows), version, weight.data_ptr(), places, places.tobytes(), marks)
    release_file_pages(weight)
    if id(module) not in _COPIES:
        weakref.finalize(module, _COPIES.pop, id(module), None).atexit = False
    _COPIES[id(module)] = copy
    return copy.weight


def _forget_changed(modules: Iterable[nn.Module]) -> None:
    """Drop the packed copies of weights of which a row or a column has changed."""
    for module in modules:
        copy = _COPIES.get(id(module))
        weight: Any = module.weight
        if copy is None or (is_released(weight) and is_unchanged(weight)):
            continue
        if copy.marks != _marks(weight):
            _COPIES.pop(id(module))


def _marks(weight: Tensor) -> bytes:
    """Numbers of a matrix along its diagonal, wrapped around: at least one of each row and of each column."""
    rows, columns = weight.shape
    places = torch.arange(max(rows, columns))
    return weight.detach()[places % rows, places % columns].view(torch.uint8).numpy().tobytes()


def _sampled(weight: Tensor) -> Any:
    """A view of some of a weight's numbers that does not keep them in memory: valid while the pointer is the same.

    They are compared at each call, since torch does not count edits of `weight.data`.
    """
    count = weight.numel()
    numbers = np.ctypeslib.as_array((TYPES[weight.dtype] * count).from_address(weight.data_ptr()))
    if count <= PLACES * SAMPLES:
        return numbers
    step = (count - SAMPLES) // (PLACES - 1)  # few places: each keeps 64 KiB of a mapped file in memory
    return np.lib.stride_tricks.as_strided(numbers, (PLACES, SAMPLES), (step * numbers.itemsize, numbers.itemsize))


def _in_blocks(rows: Float[Tensor, "row input"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "row output"]:
    """`multiply` by at most `BLOCK` rows at once and never one alone, so that a row's bits are always the same."""
    count = rows.shape[0]
    if 2 <= count <= BLOCK:
        return multiply(rows, weight, bias)
    if count == 1:
        return multiply(rows.expand(2, -1), weight, bias)[:1]
    if count == 0:
        return rows.new_empty(0, weight.shape[0])
    out = rows.new_empty(count, weight.shape[0])
    for start in range(0, count, BLOCK):
        block = rows[start : start + BLOCK]
        out[start : start + BLOCK] = _in_blocks(block, weight, bias)
    return out


def _pack(weight: Float[Tensor, "output input"]) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    return packed


def multiply(rows: Float[Tensor, "row input"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "row output"]:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


@cache
def missing() -> str | None:
    """Why oneDNN's linear layers cannot be used here; None if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((70, 96), (130, 96), (130,)))
    try:
        with torch.inference_mode():
            packed = _pack(weight)
            for rows in (2, 7, 70):
                for added in (bias, None):
                    found = multiply(x[:rows], packed, added)
                    if not torch.allclose(found, nn.functional.linear(x[:rows], weight, added), atol=1e-4):
                        return "its operations compute something else than a linear layer"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} lacks its operations ({str(error).splitlines()[0]:.80})"
    return None


# The choice


def _faster(model: nn.Module) -> str:
    """Which kernels are faster for the shapes of a model, from a file of this machine or measured now."""
    layers: list[Any] = [m for m in model.modules() if type(m) in (*_PACKED, *_PLAIN) and _can_pack(m)]
    if sum(layer.weight.numel() for layer in layers) < SMALL:
        return "torch"
    shapes = Counter((tuple(layer.weight.shape), type(layer) in (Conv1D, _OneDNNConv1D)) for layer in layers)
    key = _key(shapes, str(layers[0].weight.dtype))
    file = _file()
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(read_json(file))
    if known.get(key) in ("onednn", "torch"):
        return known[key]
    seconds = {"torch": 0.0, "onednn": 0.0}
    for (shape, transposed), count in shapes.items():
        layer = next(one for one in layers if tuple(one.weight.shape) == shape)
        for name, spent in _seconds(layer.weight.detach(), transposed).items():
            seconds[name] += count * spent
    known[key] = "onednn" if seconds["onednn"] < GAIN * seconds["torch"] else "torch"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(known, indent=1))
    return known[key]


def _seconds(weight: Tensor, transposed: bool) -> dict[str, float]:
    """The shortest time of each kernel for one layer, in interleaved rounds."""
    of_rows = weight.T if transposed else weight
    rows = torch.ones(TRIED_ROWS, of_rows.shape[1], dtype=weight.dtype)
    packed = _pack(of_rows.contiguous())
    calls = {"torch": lambda: nn.functional.linear(rows, of_rows), "onednn": lambda: multiply(rows, packed, None)}
    spent = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                spent[name] = min(spent[name], time.perf_counter() - start)
    return spent


def _key(shapes: Counter[Any], dtype: str) -> str:
    """What a measured choice holds for: the processor, its threads, torch, and the model's layers."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(next(line for line in lines if line.startswith(name)) for name in ("model name", "flags"))
    about = [
        processor,
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
        dtype,
        sorted(map(str, shapes.items())),
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "steerkit" / "kernels.json"
