"""Where a sweep's rows, vectors and table are kept: a run folder or memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerkit.capture.activations import Layer
from steerkit.io.files import write_text
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.ranks import is_first, rank_and_world
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import run_folder
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import Prompt
from steerkit.vectors.vector import SteeringVector

ROWS = "rows.jsonl"
NORMS = "stream_norms.json"
TABLE = "table.parquet"
VECTORS = "vectors"
ROWS_OF_ALL = "rows*.jsonl"
PROMPTS = "prompts.jsonl"
OF_A_ROW = {"key", "prompt_ids", "ids", "text", "n_tokens", "finished"}


def swept_vectors(run: str | Path) -> dict[str, SteeringVector]:
    """The vectors of a finished sweep by name, as its folder keeps them.

    Raises:
        FileNotFoundError: the folder holds no finished sweep, or not its vectors. Repeating the same sweep into the
            same folder generates nothing and writes them.
    """
    folder = Path(run)
    contents = SweepResult.load(folder).meta.get("vectors", {})
    files = {name: folder / VECTORS / f"{content}.safetensors" for name, content in contents.items()}
    if absent := [name for name, file in files.items() if not file.is_file()]:
        raise FileNotFoundError(
            f"expected the sweep's vectors in {folder / VECTORS}; missing: {absent[:5]}. Repeat the "
            f"same sweep into {folder}: its rows exist, so it only writes the vectors."
        )
    return {name: SteeringVector.load(file) for name, file in files.items()}


class RowStore:
    """Finished rows, vectors and norms of a sweep: in a run folder, or in memory where `folder` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.rows = folder, list[dict[str, Any]]()

    def read(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """The finished rows by their key.

        Raises:
            ValueError: the folder holds rows of something else.
        """
        rows = self.rows
        if self.folder is not None:
            rows = [row for path in sorted(self.folder.glob(ROWS_OF_ALL)) for row in read_rows(path)]
            if any(OF_A_ROW - set(row) for row in rows):
                raise ValueError(
                    f"expected a sweep's rows in {self.folder}, with {sorted(OF_A_ROW)}; got others. Use another "
                    "folder."
                )
        return {tuple(row["key"]): row for row in rows}

    def append(self, rows: Iterator[dict[str, Any]]) -> None:
        """Add finished rows; on disk they are synced before this returns."""
        if self.folder is None:
            self.rows.extend(rows)
        else:
            rank, _ = rank_and_world()
            append_rows(self.folder / (ROWS if rank == 0 else f"rows-{rank}.jsonl"), rows)

    def keep(self, vectors: Mapping[str, SteeringVector]) -> None:
        """Write each vector to a file named by its content, so that the folder can be read alone."""
        for vector in vectors.values() if self.folder is not None and is_first() else ():
            path = self.folder / VECTORS / f"{vector.content()}.safetensors"  # type: ignore[operator]
            if not path.exists():
                vector.save(path)

    def keep_prompts(self, prompts: Mapping[str, Prompt]) -> None:
        """Write the prompts as the model reads them, by id, so that a resumed sweep reads the same ids."""
        if self.folder is not None and is_first() and not (self.folder / PROMPTS).exists():
            rows = [canonical_json({"id": name, **asdict(prompt)}) + "\n" for name, prompt in prompts.items()]
            write_text(self.folder / PROMPTS, "".join(rows))

    def norms(self, measure: Callable[[], dict[Layer, float]]) -> dict[Layer, float]:
        """Mean norms of the stream, measured once: a finished sweep that is repeated runs no forward."""
        if self.folder is None:
            return measure()
        path = self.folder / NORMS
        if not path.exists():
            write_json(path, measure())
        return {int(layer): norm for layer, norm in read_json(path).items()}

    def seal(self, result: SweepResult) -> None:
        """Write the finished table."""
        if self.folder is not None:
            result.save(self.folder / TABLE)


def stored_prompts(out: str | Path | None) -> dict[str, Prompt]:
    """The prompts by id that a sweep in this folder was started with; none for a new folder."""
    file = None if out is None else Path(out) / PROMPTS
    if file is None or not file.is_file():
        return {}
    rows = read_rows(file, complete=True)
    return {row["id"]: Prompt(row["ids"], row["text"], row["source"], row["n_added"]) for row in rows}


@contextlib.contextmanager
def open_store(
    out: str | Path | None, config: Mapping[str, Any], provenance: Mapping[str, Any] | None = None
) -> Iterator[RowStore]:
    """The store of a sweep with this configuration; in memory where `out` is None.

    Args:
        provenance: what may differ in a resumed sweep, with a warning: device kind and versions.

    Raises:
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    if out is None:
        yield RowStore(None)
        return
    with run_folder(out, config, provenance) as folder:
        try:
            yield RowStore(folder)
        except KeyboardInterrupt:
            print(f"interrupted: finished rows are in {folder / ROWS}; the same call resumes.", file=sys.stderr)
            raise
