"""Where a sweep's rows, vectors and table are kept: a run folder or memory."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerkit.capture.activations import Layer
from steerkit.io.files import sha256
from steerkit.io.json import canonical_json, read_json, short_json, write_json
from steerkit.io.ranks import barrier, is_first, rank_and_world
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import CONFIG, ConfigurationChanged, run_folder
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import Prompt, prompt_source
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

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
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

    def settled(self, rows: Sequence[Mapping[str, Any]], rendered: Mapping[str, Prompt]) -> dict[str, Prompt]:
        """The prompts by id as the model reads them: as they were stored first, else as they are rendered now.

        New prompts are stored. A stored one may be rendered otherwise now, where its template writes the date; its
        messages are the same.

        Args:
            rows: prompts as rows, see `steerkit.sweeps.plan.prompt_rows`.
            rendered: the same prompts, rendered now.

        Raises:
            ConfigurationChanged: a known id with another prompt.
        """
        if self.folder is None:
            return dict(rendered)
        stored = self._stored_prompts()
        hashes = {}
        for row in rows:
            prompt = stored.get(row["id"], (rendered[row["id"]], ""))[0]
            hashes[row["id"]] = sha256(canonical_json([prompt_source(row["prompt"]), prompt.ids]))
        if changed := [name for name, made in hashes.items() if name in stored and stored[name][1] != made]:
            raise ConfigurationChanged(
                f"expected the prompts that {self.folder} holds under these ids; got other prompts for {len(changed)}: "
                f"{changed[:8]}. Give new prompts ids of their own, or use another folder."
            )
        if otherwise := [name for name in hashes if name in stored and stored[name][0].ids != rendered[name].ids]:
            warnings.warn(
                f"{len(otherwise)} prompts are rendered otherwise now than when the sweep began, e.g. {otherwise[0]!r} "
                "(a chat template may write the date). The sweep goes on with the stored ones.",
                UserWarning,
                stacklevel=3,
            )
        new = [name for name in hashes if name not in stored]
        if new and is_first():
            lines = [{"id": name, **asdict(rendered[name]), "sha256": hashes[name]} for name in new]
            append_rows(self.folder / PROMPTS, lines)
        return {name: stored[name][0] if name in stored else rendered[name] for name in hashes}

    def _stored_prompts(self) -> dict[str, tuple[Prompt, str]]:
        """The stored prompts by id, each with the hash of its source and ids."""
        file = None if self.folder is None else self.folder / PROMPTS
        rows = read_rows(file) if file is not None and file.is_file() else []
        return {
            row["id"]: (Prompt(row["ids"], row["text"], row["source"], row["n_added"]), row["sha256"]) for row in rows
        }

    def norms(
        self, given: Mapping[Layer, float] | None, measure: Callable[[], dict[Layer, float]], layers: Collection[Layer]
    ) -> dict[Layer, float]:
        """Norms of the stream: as they are stored; for other layers as given or, with none given, as measured.

        New ones are stored. Of several processes the first one measures; all call this.

        Args:
            layers: those that are steered. Nothing is measured where all of them are stored.

        Raises:
            ConfigurationChanged: others are given than those that are stored.
        """
        if self.folder is None:
            return measure() if given is None else dict(given)
        path = self.folder / NORMS
        stored = _read_norms(path)
        if is_first() and (given is not None or not set(layers) <= set(stored)):
            new = measure() if given is None else given
            norms = {**{layer: norm for layer, norm in new.items() if norm > 0}, **stored}
            if norms != stored:
                write_json(path, norms)
        barrier()
        stored = _read_norms(path)
        if given is not None and any(stored[layer] != norm for layer, norm in given.items()):
            raise ConfigurationChanged(
                f"expected the stream_norms that {self.folder} was started with, {short_json(stored)}; got "
                f"{short_json(given)}. Pass none, or use another folder."
            )
        return stored

    def seal(self, result: SweepResult) -> None:
        """Write the finished table."""
        if self.folder is not None:
            result.save(self.folder / TABLE)


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
    _check_version(Path(out), config)
    with run_folder(out, config, provenance) as folder:
        try:
            yield RowStore(folder)
        except KeyboardInterrupt:
            print(f"interrupted: finished rows are in {folder / ROWS}; the same call resumes.", file=sys.stderr)
            raise


def _read_norms(path: Path) -> dict[Layer, float]:
    """The stored norms; none without a file."""
    return {int(layer): norm for layer, norm in read_json(path).items()} if path.is_file() else {}


def _check_version(folder: Path, config: Mapping[str, Any]) -> None:
    """`ConfigurationChanged` for a sweep's folder whose configuration lacks an entry: an earlier version wrote it."""
    stored = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    if isinstance(stored, dict) and "vectors" in stored and "rows" not in stored:
        raise ConfigurationChanged(
            f"expected a sweep of this version in {folder}; got one of an earlier version, in which rows were known by "
            "the names of their vectors, and `ablate` at positions `prompt` and `all` included position 0. Use another "
            "folder."
        )
