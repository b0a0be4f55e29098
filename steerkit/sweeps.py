"""Sweeps: vector x layer x coefficient x prompt x sample, all rows in mixed batches, to one tidy, resumable table."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import nn

from steerkit import artifacts, folders, models, ranks
from steerkit.activations import Layer
from steerkit.capture import stream_norms as norms_of
from steerkit.engine import Row, check_rows
from steerkit.generation import check_settings, decode, ends_of, text_of
from steerkit.plans import Cell, LayerSet, cells_of, named_vectors, prompt_rows, relative_dose, steerings_at
from steerkit.progress import progress
from steerkit.results import SweepResult
from steerkit.steering import taken_over
from steerkit.texts import Prompt, encode_prompt, render
from steerkit.vectors import SteeringVector

ROWS, NORMS, TABLE, VECTORS = "rows.jsonl", "stream_norms.json", "table.parquet", "vectors"
ROWS_OF_ALL = "rows*.jsonl"


def sweep(
    model: nn.Module,
    tokenizer: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    prompts: Sequence[Prompt | Mapping[str, Any]],
    *,
    coefficients: Sequence[float],
    layers: Sequence[LayerSet] | None = None,
    positions: str = "generated",
    operation: Literal["add", "ablate"] = "add",
    samples: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    stream_norms: Mapping[Layer, float] | None = None,
    foreign: bool = False,
    batch_rows: int | None = None,
    out: str | Path | None = None,
) -> SweepResult:
    """Generate every combination of vector, layer, coefficient, prompt and sample; one row of the table each.

    Coefficient 0 is generated once per prompt and sample, whatever the vectors, and stands in the table under each of
    them. Random streams are keyed by (seed, prompt id, sample) only, so all coefficients, layers and controls share
    their random numbers and differences between them are paired.

    Args:
        vectors: one (named "vector") or several by name; controls are vectors like any other.
        prompts: strings (verbatim), message lists, or rows with `prompt`, and optionally `id`, `reference` and `group`
            (what is resampled together; default the id); other keys become columns.
        coefficients: multiply the vectors as stored; 0 is added if it is not among them.
        layers: each an index, or a tuple steered together; default: every vector at all layers that it holds, together.
        samples: 1 is greedy unless a temperature is given; more use temperature 0.7 and top_p 0.9 unless given.
        stream_norms: mean norm of the stream per layer, for `relative_dose`; default: measured on this sweep's own
            unsteered texts.
        foreign: allow vectors that were read from other weights.
        out: a folder that rows are appended to as they come, the vectors are kept in and the table is sealed in; an
            interrupted sweep goes on there, and another configuration is refused. None keeps everything in memory.
            Processes that torchrun has started together share the prompts and the folder; each has to make this call,
            and returns the whole.

    Returns:
        `SweepResult` with columns vector, layer, coefficient, prompt_id, group, sample, text, n_tokens, finished,
        relative_dose (`|coefficient| * |v| / mean |h|` at that layer; for several layers their mean; NaN for
        `"ablate"`, where the length does not matter), prompt, reference, the settings, and what the weights are (a
        dtype, or a quantisation they were in).

    Raises:
        TypeError: something else than vectors by name.
        ValueError: nothing to do, repeated prompt ids, a vector that does not fit, a setting out of range; `out` is
            then as it was.
        ConfigurationChanged, RunFolderBusy: see `steerkit.folders.run_folder`.
    """
    with taken_over(model) as active:
        if active:
            raise ValueError("expected no steering on during a sweep, which steers by itself; leave the `with` first.")
    named = named_vectors(vectors)
    rows = prompt_rows(prompts)
    if not named or isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(
            f"expected one vector and one sample at least; got {len(named)} vectors and samples={samples!r}. Add some."
        )
    temperature = (0.0 if samples == 1 else 0.7) if temperature is None else float(temperature)
    top_p = (0.9 if temperature > 0 else 1.0) if top_p is None else float(top_p)
    if samples > 1 and temperature == 0:
        raise ValueError(f"expected a temperature above 0 for {samples} samples, else all are equal; got 0. Raise it.")
    steerings = steerings_at(named, layers, positions, operation, foreign)
    cells = cells_of(steerings, coefficients)
    settings = {
        "positions": positions, "operation": operation, "samples": samples, "temperature": temperature, "top_p": top_p,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    about = models.describe(model, tokenizer)
    config = {
        **settings,
        **{
            key: about[key]
            for key in ("model_fingerprint", "adapter_fingerprint", "dtype", "attention", "template_sha256")
        },
        "cells": [[cell.vector, cell.layer, cell.coefficient] for cell in cells],
        "vectors": {name: vector.content() for name, vector in named.items()},
        "ends": sorted(ends_of(model, tokenizer)),
        "vocabulary": artifacts.sha256(artifacts.canonical_json(tokenizer.get_vocab())),
        "prompts": artifacts.sha256(artifacts.canonical_json(rows)),
    }
    keys = [(cell, row, sample) for row in rows for cell in cells for sample in range(samples)]
    prompt_ids = {row["id"]: encode_prompt(tokenizer, row["prompt"]) for row in rows}
    tried = [*map(Row, prompt_ids.values()), *(Row((0,), ((steering, 1.0),)) for steering in steerings.values())]
    check_settings(model, tried, max_new_tokens, temperature, top_p, batch_rows)
    check_rows(model, tried)  # before anything is written
    with _place(out, config) as log:
        log.keep(named)
        done = log.read()
        mine = _share(rows, out)
        todo = [key for key in keys if key[1]["id"] in mine and _identity(*key) not in done]
        work = [
            Row(prompt_ids[row["id"]], () if c.vector is None else ((steerings[c.vector, c.layer], c.coefficient),))
            for c, row, _ in todo
        ]
        streams = [(seed, row["id"], sample) for _, row, sample in todo]
        found = decode(
            model, tokenizer, work, streams, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            batch_rows=batch_rows,
        )  # fmt: skip
        with progress("sweep", len(todo)) as advance:
            for batch in found:
                log.append(
                    {
                        "key": list(_identity(*todo[number])),
                        "text": text_of(tokenizer, continuation),
                        "n_tokens": continuation.n_tokens,
                        "finished": continuation.finished,
                    }
                    for number, continuation in batch
                )
                advance(len(batch))
        ranks.wait()
        if not ranks.is_first():
            ranks.wait()  # for the first to seal it
            return SweepResult.load(Path(str(out)))
        written = log.read()
        if stream_norms is None:
            stream_norms = log.norms(lambda: _own_norms(model, tokenizer, keys, written, steerings))
        norms = dict(stream_norms)
        said = {**settings, "weights": about["weights"]}
        table = _table(keys, written, cells, steerings, norms, said, tokenizer)
        meta = {**about, **settings, "stream_norms": norms, "kind": "sweep", "n_prompts": len(rows)}
        meta["vectors"] = config["vectors"]
        result = SweepResult(table, meta)
        log.seal(result)
        ranks.wait()
    return result


def _share(rows: Sequence[Mapping[str, Any]], out: str | Path | None) -> set[str]:
    """The prompts that this process generates: every one, or its share where torchrun has started several."""
    rank, world = ranks.place()
    if world > 1 and out is None:
        raise ValueError(f"expected a folder as out=, where {world} processes put their rows together; got none.")
    return {row["id"] for row in rows[rank::world]}


def swept_vectors(run: str | Path) -> dict[str, SteeringVector]:
    """The vectors of a finished sweep by name, as its folder keeps them.

    Raises:
        FileNotFoundError: the folder holds no finished sweep, or not its vectors. The same sweep once more, into the
            same folder, generates nothing and puts them there.
    """
    folder = Path(run)
    contents = SweepResult.load(folder).meta.get("vectors", {})
    files = {name: folder / VECTORS / f"{content}.safetensors" for name, content in contents.items()}
    if absent := [name for name, file in files.items() if not file.is_file()]:
        raise FileNotFoundError(
            f"expected the sweep's vectors in {folder / VECTORS}; missing: {absent[:5]}. Run the same sweep into "
            f"{folder} once more: its rows are there, so it only adds them."
        )
    return {name: SteeringVector.load(file) for name, file in files.items()}


def _identity(cell: Cell, row: Mapping[str, Any], sample: int) -> tuple[Any, ...]:
    return (cell.vector, cell.layer, cell.coefficient, row["id"], sample)


class _Log:
    """Where finished rows go: a file, or memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.rows = folder, list[dict[str, Any]]()

    def read(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        rows = self.rows
        if self.folder is not None:
            rows = [row for path in sorted(self.folder.glob(ROWS_OF_ALL)) for row in artifacts.read_rows(path)]
            if any({"key", "text", "n_tokens", "finished"} - set(row) for row in rows):
                raise ValueError(f"expected a sweep's rows in {self.folder}; got others. Use another folder.")
        return {tuple(row["key"]): row for row in rows}

    def append(self, rows: Iterator[dict[str, Any]]) -> None:
        if self.folder is None:
            self.rows.extend(rows)
        else:
            rank, _ = ranks.place()
            artifacts.append_rows(self.folder / (ROWS if rank == 0 else f"rows-{rank}.jsonl"), rows)

    def keep(self, vectors: Mapping[str, SteeringVector]) -> None:
        """The vectors, each in a file named by its content: who reads the sweep later needs no other folder."""
        for vector in vectors.values() if self.folder is not None and ranks.is_first() else ():
            path = self.folder / VECTORS / f"{vector.content()}.safetensors"  # type: ignore[operator]
            if not path.exists():
                vector.save(path)

    def norms(self, measure: Callable[[], dict[Layer, float]]) -> dict[Layer, float]:
        """The stream's norms, measured once: a finished sweep that is asked for again runs no forward."""
        if self.folder is None:
            return measure()
        path = self.folder / NORMS
        if not path.exists():
            artifacts.write_json(path, measure())
        return {int(layer): norm for layer, norm in artifacts.read_json(path).items()}

    def seal(self, result: SweepResult) -> None:
        if self.folder is not None:
            artifacts.write_table(self.folder / TABLE, result.table, result.meta)


@contextlib.contextmanager
def _place(out: str | Path | None, config: Mapping[str, Any]) -> Iterator[_Log]:
    if out is None:
        yield _Log(None)
        return
    with folders.run_folder(out, config) as folder:
        try:
            yield _Log(folder)
        except KeyboardInterrupt:
            print(
                f"interrupted: finished rows are safe in {folder / ROWS}; the same call goes on there.", file=sys.stderr
            )
            raise


def _own_norms(model: nn.Module, tokenizer: Any, keys: Any, written: Any, steerings: Any) -> dict[Layer, float]:
    plain = [(row["prompt"], written[_identity(cell, row, s)]["text"]) for cell, row, s in keys if cell.vector is None]
    layers = sorted({layer for steering in steerings.values() for layer in steering.vector.layers})
    if not any(text for _, text in plain):
        return {}
    return norms_of(model, tokenizer, [p for p, _ in plain], [t for _, t in plain], layers)


def _table(
    keys: Any,
    written: Any,
    cells: Sequence[Cell],
    steerings: Any,
    norms: Any,
    settings: Mapping[str, Any],
    tokenizer: Any,
) -> pd.DataFrame:
    by_place: dict[tuple[str | None, str | None], list[Cell]] = {}
    for cell in cells[1:]:
        by_place.setdefault((cell.vector, cell.layer), []).append(cell)
    for place in steerings:
        by_place.setdefault(place, [])
    rows = []
    for cell, row, sample in keys:
        text = written[_identity(cell, row, sample)]
        for place in by_place if cell.vector is None else [(cell.vector, cell.layer)]:
            rows.append(
                {
                    "vector": place[0],
                    "layer": place[1],
                    "coefficient": cell.coefficient,
                    "prompt_id": row["id"],
                    "sample": sample,
                    "group": row["group"],
                    "prompt": render(tokenizer, row["prompt"]),
                    "chat": not isinstance(row["prompt"], str),
                    **{k: v for k, v in row.items() if k not in ("id", "group", "prompt")},
                    "text": text["text"],
                    "n_tokens": text["n_tokens"],
                    "finished": text["finished"],
                    "relative_dose": relative_dose(steerings[place], cell.coefficient, norms),
                    **{k: v for k, v in settings.items() if k != "samples"},
                }
            )
    table = pd.DataFrame(rows)
    if not table["layer"].str.contains("+", regex=False).any():
        table["layer"] = table["layer"].astype(int)
    names = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in steerings))}
    order = table["vector"].map(names)
    return table.assign(_order=order).sort_values(
        ["_order", "layer", "coefficient"], kind="stable"
    ).drop(columns="_order").reset_index(drop=True)  # fmt: skip
