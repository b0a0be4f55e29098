"""Memory of weights that are mapped from a file: pages that are not needed for now are given back to the system."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

PLACES, SAMPLES = 4, 4
"""Places of a weight, and numbers at each, that are compared to notice another weight."""
ENTRY = 8  # bytes per page in /proc/self/pagemap
FROM_FILE, SWAPPED, PRESENT = np.uint64(1 << 61), np.uint64(1 << 62), np.uint64(1 << 63)

_RELEASED: set[int] = set()  # addresses; a stale one does no harm


def is_released(tensor: Tensor) -> bool:
    """Whether the pages of a tensor were given back before. They may have come back since."""
    return tensor.device.type == "cpu" and tensor.data_ptr() in _RELEASED


def few_values(tensor: Tensor) -> bytes:
    """Some numbers of a tensor, at `PLACES` places with `SAMPLES` numbers each: enough to notice another weight.

    The system brings back a page with its neighbours, 64 KiB at once, so that more places would bring back much of a
    mapped weight.
    """
    flat = tensor.detach().reshape(-1)
    starts = torch.arange(PLACES) * max(flat.numel() - SAMPLES, 0) // (PLACES - 1)
    chosen = (starts[:, None] + torch.arange(SAMPLES)).flatten().clamp(max=max(flat.numel() - 1, 0))
    return flat[chosen].view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def release_file_pages(tensor: Tensor) -> int:
    """Take a tensor's pages out of this process's memory if they are unchanged pages of a file; returns the bytes.

    A checkpoint is usually mapped: its numbers come from the file when they are first read. After they were copied, the
    pages need not be held twice. They come back, from the system's cache or from the file, when they are read again.
    Nothing is done where a page was written to, for memory that is no file's, and on systems other than Linux.
    """
    held = _unchanged_pages(tensor)
    if not held:
        return 0
    first, count = _whole_pages(tensor)
    page = mmap.PAGESIZE
    try:
        madvise = ctypes.CDLL(None).madvise
        failed = madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(count * page), ctypes.c_int(mmap.MADV_DONTNEED))
    except (AttributeError, OSError):
        return 0
    if failed:
        return 0
    _RELEASED.add(tensor.data_ptr())
    return held * page


def is_unchanged(tensor: Tensor) -> bool:
    """Whether no page that lies within a tensor was written to since it was mapped from a file."""
    return _unchanged_pages(tensor) is not None


def _whole_pages(tensor: Tensor) -> tuple[int, int]:
    """The number of the first page that lies within a tensor, and how many do."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    return first, (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE - first


def _unchanged_pages(tensor: Tensor) -> int | None:
    """How many pages of a tensor are in memory; None if one was written to, is no file's, or the system cannot say."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    first, count = _whole_pages(tensor)
    if count <= 0:
        return None
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * ENTRY)
            entries = np.frombuffer(file.read(count * ENTRY), dtype=np.uint64)
    except (OSError, ValueError):
        return None
    held = entries[(entries & PRESENT) != 0]
    from_file = ((held & FROM_FILE) != 0).all() and not ((entries & SWAPPED) != 0).any()
    return len(held) if from_file and len(entries) == count else None
