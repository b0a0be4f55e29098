"""Growth: time and peak memory against the size of the job, with their slopes on logarithmic axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

import steerkit as sk
from benchmarks import decoding, inputs
from benchmarks.timing import seconds
from steerkit.engine import Row

NEW = 16


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _peak(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call, and by how many MiB it raised the process' resident memory at its highest."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    took = seconds(work)
    return took, max(_status("VmHWM") - before, 0.0)


def jobs() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """What grows, how large it is, and the job."""
    model, tokenizer = inputs.model()
    vector = inputs.vector().at(decoding.LAYER)
    steering = sk.Steering(vector, positions="from_last_prompt_token")
    prompts = decoding.prompt_ids(8)
    for rows in (8, 16, 32, 64, 128):
        work = [Row(prompts[i % 8], ((steering, 0.01 * (i + 1)),)) for i in range(rows)]
        yield "rows of a sweep", rows, lambda work=work: decoding.run(model, tokenizer, work, NEW)
    for new in (8, 16, 32, 64, 128):
        work = [Row(prompt, ((steering, 1.0),)) for prompt in prompts]
        yield "new tokens", new, lambda work=work, new=new: decoding.run(model, tokenizer, work, new)
    for length in (64, 128, 256, 512):
        work = [Row(prompt[:1] * (length - len(prompt)) + prompt, ((steering, 1.0),)) for prompt in prompts]
        yield "prompt tokens", length, lambda work=work: decoding.run(model, tokenizer, work, 4)
    for count in (64, 128, 256, 512):
        some = inputs.texts(count)
        yield "texts of a capture", count, lambda some=some: sk.collect_means(model, tokenizer, some, position="mean")
    some = inputs.texts(128)
    for depth in (2, 4, 8, 16, 30):
        layers = list(range(depth))
        yield "layers of a capture", depth, lambda layers=layers: sk.collect(model, tokenizer, some, layers=layers)


def table() -> pd.DataFrame:
    """Columns `grows`, `size`, `seconds` (lesser of two runs), `mib`."""
    model, tokenizer = inputs.model()
    sk.collect_means(model, tokenizer, inputs.texts(256), position="mean")
    rows = []
    with decoding.endless():
        for grows, size, work in jobs():
            runs = [_peak(work) for _ in range(2)]
            rows.append((grows, size, min(t for t, _ in runs), max(m for _, m in runs)))
    return pd.DataFrame(rows, columns=["grows", "size", "seconds", "mib"])


def slopes(found: pd.DataFrame) -> pd.DataFrame:
    """Per job the least-squares slope of log seconds over log size, over all sizes and over the two largest."""
    rows = []
    for grows, part in found.groupby("grows", sort=False):
        x, y = np.log(part["size"]), np.log(part["seconds"])
        rows.append(
            {
                "grows": grows,
                "from": part["size"].min(),
                "to": part["size"].max(),
                "slope": np.polyfit(x, y, 1)[0],
                "last slope": float(np.diff(y)[-1] / np.diff(x)[-1]),
                "seconds": f"{part['seconds'].iloc[0]:.2f} to {part['seconds'].iloc[-1]:.2f}",
                "peak MiB": f"{part['mib'].iloc[0]:.0f} to {part['mib'].iloc[-1]:.0f}",
            }
        )
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame, folder: Path) -> None:
    """`growth.png` and `growth.pdf`: seconds over size, both logarithmic, with a line of slope 1 beside each."""
    from matplotlib.figure import Figure

    names = list(found["grows"].unique())
    figure = Figure(figsize=(2.1 * len(names), 2.3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        part = found[found["grows"] == name]
        size, took = part["size"].to_numpy(), part["seconds"].to_numpy()
        axes.loglog(size, took, "o-", color="#0072B2", lw=1.2, ms=3)
        axes.loglog(size, took[-1] * size / size[-1], color="#8A8A8A", lw=0.8, ls="--")
        axes.set_xlabel(name, size=7)
        axes.set_xticks(size, [str(s) for s in size], size=6)
        axes.minorticks_off()
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds (dashed: slope 1)", size=7)
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"growth.{suffix}", dpi=200)
