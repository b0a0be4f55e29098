"""Devices: how fast and how large they are, for an estimate of the hours of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Speed and memory of a device.

    Args:
        name: its name.
        flops: floating-point operations per second of matrix products: bfloat16 without sparsity on a GPU, float32 on
            a CPU.
        bandwidth: bytes per second that are read from its memory.
        memory_gib: size of its memory; None if it is not known.
    """

    name: str
    flops: float
    bandwidth: float
    memory_gib: float | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether it is a CPU."""
        return self.name == "cpu"


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("a100", 312e12, 2.0e12, 80),
        Device("h100", 989e12, 3.35e12, 80),
        Device("h200", 989e12, 4.8e12, 141),
    )
}
"""GPUs with the figures of their data sheets (NVIDIA; SXM versions)."""


def this_device() -> Device:
    """Return this machine's first GPU, or its CPU, with speeds measured in about a second.

    The best of three products of matrices of 1,024 rows on a CPU (8,192 on a GPU), and of three copies.

    Example:
        >>> this_device().flops / 1e9
    """
    on_gpu = torch.cuda.is_available()
    where, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    side = 8192 if on_gpu else 1024
    matrix = torch.ones(side, side, device=where, dtype=dtype)
    source = torch.empty(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    flops = 2 * side**3 / _fastest(lambda: matrix @ matrix)
    bandwidth = 2 * source.numel() / _fastest(lambda: target.copy_(source))
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None
    return Device(torch.cuda.get_device_name() if on_gpu else "cpu", flops, bandwidth, memory)


def _fastest(work: Callable[[], object]) -> float:
    """Return the least seconds of three runs, after one that is not counted."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
