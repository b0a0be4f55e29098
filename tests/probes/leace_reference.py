"""What the package concept-erasure erases of fixed items, for tests/probes/test_erasure.py.

`pip install --no-deps concept-erasure==0.2.4`, then `python tests/probes/leace_reference.py` writes the file beside it.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def case(classes: int) -> dict[str, Any]:
    """Correlated items whose class moves the mean, and the items without it."""
    from concept_erasure import LeaceFitter  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(classes)
    codes = torch.arange(60) % classes
    means, mix = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (classes, 6))
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64) @ mix + 3 * means[codes] + 5
    fitter = LeaceFitter(6, classes, dtype=torch.float64, shrinkage=False)
    fitter.update(x, torch.nn.functional.one_hot(codes, classes).double())
    return {"x": x.tolist(), "codes": codes.tolist(), "erased": fitter.eraser(x).tolist()}


if __name__ == "__main__":
    found = {"package": f"concept-erasure {metadata.version('concept-erasure')}", "cases": {k: case(k) for k in (2, 3)}}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n")
