"""Timing on a device: synchronised, interleaved pairs, the ratio with its interval; peak memory."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Figure = dict[str, Any]
"""A line of the results: `figure`, `value`, `unit`, and where they apply `low`, `high`, `n`, `limit`, `holds`."""
Way = Callable[[], Callable[[], Any]]
"""Prepares one run, outside of the timing, and returns the work that is timed."""
T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20}
"""Two-sided 95 % quantiles of Student's t by the number of values."""


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, the device's queue emptied before and after."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(ways: Mapping[str, Way], device: torch.device, pairs: int) -> dict[str, list[float]]:
    """Seconds of each way, `pairs` times in turn (A B C A B C ...), after one uncounted run of each."""
    for prepare in ways.values():
        seconds(prepare(), device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(pairs):
        for name, prepare in ways.items():
            times[name].append(seconds(prepare(), device))
    return times


def ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """Geometric mean of the ratios of paired times, with a 95 % t interval on their logarithms.

    Returns:
        `ratio`, `low`, `high`, `n`.
    """
    logs = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    mean, n = statistics.mean(logs), len(logs)
    half = T_975.get(n, 1.96) * statistics.stdev(logs) / math.sqrt(n) if n > 1 else math.nan
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "n": float(n)}


def bandwidth(device: torch.device, numel: int) -> float:
    """Bytes per second of a device-to-device copy, bytes read and written counted."""
    source = torch.empty(numel, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(4))
    return 2 * numel / best


class PeakMemory:
    """GiB that torch has allocated on the device: `before` the `with`, and the peak inside it; NaN on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before, self.gib = device, math.nan, math.nan

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**30
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated(self.device) / 2**30


def synchronize(device: torch.device) -> None:
    """Wait for the queue of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
