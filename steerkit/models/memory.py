"""Memory of weights that are mapped from a file: pages that are not needed for now are given back to the system."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

PLACES, SAMPLES = 4, 4
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
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return 0
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page)
    count = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page - first
    if count <= 0:
        return 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * ENTRY)
            entries = np.frombuffer(file.read(count * ENTRY), dtype=np.uint64)
        held = entries[(entries & PRESENT) != 0]
        if (
            len(entries) < count
            or not len(held)
            or not ((held & FROM_FILE) != 0).all()
            or ((entries & SWAPPED) != 0).any()
        ):
            return 0
        madvise = ctypes.CDLL(None).madvise
        failed = madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(count * page), ctypes.c_int(mmap.MADV_DONTNEED))
    except (AttributeError, OSError, ValueError):
        return 0
    if failed:
        return 0
    _RELEASED.add(tensor.data_ptr())
    return len(held) * page
