"""Sweeps: vector x layer x coefficient x prompt x sample, all rows in mixed batches, as one tidy, resumable table."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import nn

from steerkit.capture.activations import Layer
from steerkit.generation.engine import Continuation, Row
from steerkit.generation.generate import checked_seed, text_of
from steerkit.generation.generator import Generator, InProcess, Settings
from steerkit.io.files import sha256
from steerkit.io.json import canonical_json
from steerkit.io.progress import progress
from steerkit.io.ranks import barrier, is_first, rank_and_world
from steerkit.models.identity import identity, provenance
from steerkit.steering.dose import relative_dose
from steerkit.steering.operations import Operation
from steerkit.steering.operations import named as operation_named
from steerkit.steering.steering import Steering, at_layers
from steerkit.sweeps.layers import Label, LayerSet, label_of, layer_sets, natural_order
from steerkit.sweeps.result import SweepResult
from steerkit.sweeps.store import open_store, stored_prompts
from steerkit.text.prompt import Prompt, PromptLike, prompt_source, render
from steerkit.vectors.controls import roles_of
from steerkit.vectors.vector import SteeringVector

RESERVED = {
    "vector",
    "role",
    "control_of",
    "layer",
    "coefficient",
    "prompt_id",
    "sample",
    "prompt_ids",
    "ids",
    "text",
    "n_tokens",
    "finished",
    "relative_dose",
    "positions",
    "operation",
    "samples",
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
    "weights",
}
Place = tuple[str, Label]
"""A vector's name and the label of the layers where it is steered."""


@dataclass(frozen=True)
class Cell:
    """One way of steering in a sweep: a vector at its layers with one coefficient; place None is coefficient 0."""

    place: Place | None
    steering: Steering | None

    @property
    def coefficient(self) -> float:
        """The steering's; 0 without one."""
        return 0.0 if self.steering is None else float(self.steering.coefficient)

    @property
    def key(self) -> tuple[str | None, Label | None, float]:
        """What identifies the cell among a sweep's rows on disk."""
        vector, label = self.place or (None, None)
        return vector, label, self.coefficient


def sweep(
    model: nn.Module | None,
    tokenizer: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    prompts: Sequence[PromptLike | Mapping[str, Any]],
    *,
    coefficients: float | Sequence[float],
    layers: int | Literal["all"] | Sequence[LayerSet] | None = None,
    positions: str = "from_last_prompt_token",
    operation: str | Operation = "add",
    samples: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    stream_norms: Mapping[Layer, float] | None = None,
    foreign: bool = False,
    batch_rows: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    engine: Any = None,
) -> SweepResult:
    """Generate every combination of vector, layer, coefficient, prompt and sample; one row of the table each.

    Coefficient 0 is generated once per prompt and sample, and listed in the table under each vector and layer. Random
    streams are keyed by (seed, prompt id, sample) only: all coefficients, layers and controls share their random
    numbers, so that differences between them are paired.

    Args:
        vectors: one (named "vector") or several by name. Controls (`sk.controls`) are vectors like any other; their
            role is shown in the column `role`.
        prompts: strings (verbatim), message lists, `Prompt`s, or rows with `prompt`, and optionally `id`, `reference`
            and `group` (resampled together; default the id); other keys become columns.
        coefficients: multiply the vectors as stored; one or several, a list, array or tensor. 0 is always added.
        layers: where the vectors are steered: a layer, `"all"` (all layers of a vector at once), or a list of these, in
            which a tuple is a set of layers steered at once: `[8, 10, (8, 10)]`. Default: each vector at the one layer
            that it holds.
        samples: 1 is greedy unless a temperature is given; more use temperature 0.7 unless given.
        stream_norms: mean norm of the stream per layer, for `relative_dose`; default: measured on this sweep's own
            unsteered texts.
        foreign: allow vectors that were read from other weights.
        chat_template_kwargs: further arguments of the chat template, e.g. `{"enable_thinking": False}`.
        out: a folder that rows are appended to as they are finished; vectors and table are kept there too. The same
            call resumes an interrupted sweep; another configuration is refused. A resumed sweep reads the prompts as
            they were rendered first, also if the template writes another date now. None keeps everything in memory.
            Processes started together by torchrun share the prompts and the folder; each makes this call, and each
            returns the whole.
        engine: what generates instead of the model in this process: `steerkit.serving.VLLM(...)`, one or several
            addresses of servers that `steerkit serve` has started, or a `steerkit.serving.Server`. The model may then
            be None; where it is given, its weights must be the served ones.

    Returns:
        `SweepResult` with columns vector, role, control_of, layer, coefficient, prompt_id, group, sample, text, ids
        (new token ids, the end token included), n_tokens, finished, relative_dose (`|coefficient| * |v| / mean |h|` at
        that layer; for several layers their mean; NaN for operations other than `add` and `add_normed`), prompt,
        prompt_ids, reference, the settings, and the weights' dtype or quantisation. A row whose logits overflowed has
        no text and no n_tokens.

    Warns:
        UserWarning: rows that overflowed, by name; a device kind or versions other than those the sweep was begun with;
            prompts that are rendered otherwise now.

    Raises:
        TypeError: `vectors` is neither a vector nor several by name.
        ValueError: nothing to do, repeated prompt ids, a vector that does not fit, several layers and no `layers`, a
            setting out of range; `out` is then unchanged.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.

    Example:
        >>> vectors = {"calm": vector, **sk.controls.random({"calm": vector}, n=20)}
        >>> result = sk.sweep(model, tokenizer, vectors, prompts, layers=14, coefficients=[-1, 0, 1], out="runs/calm")
    """
    generator = _generator(model, engine, out)
    named = named_vectors(vectors)
    rows = prompt_rows(prompts)
    seed = checked_seed(seed)
    if not named or isinstance(samples, bool) or not isinstance(samples, Integral) or samples < 1:
        raise ValueError(
            f"expected at least one vector and one sample; got {len(named)} vectors and samples={samples!r}. Add some."
        )
    temperature = (0.0 if samples == 1 else 0.7) if temperature is None else float(temperature)
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"expected a temperature above 0 for {samples} samples; got 0, which makes all samples equal. Raise it."
        )
    steerings = steerings_at(named, layers, positions, operation, foreign)
    cells = cells_of(steerings, coefficients)
    options = Settings(max_new_tokens, temperature, top_p, batch_rows)
    settings = {
        "positions": positions,
        "operation": operation_named(operation).name,
        "samples": int(samples),
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    about = generator.about(tokenizer)
    rendered = _rendered(tokenizer, rows, chat_template_kwargs, stored_prompts(out))
    config = {
        **settings,
        **identity(about),
        "chat_template_kwargs": dict(chat_template_kwargs or {}),
        "cells": [list(cell.key) for cell in cells],
        "vectors": {name: vector.content() for name, vector in named.items()},
        "ends": sorted(generator.ends(tokenizer)),
        "prompts": sha256(canonical_json([{**row, "prompt": prompt_source(row["prompt"])} for row in rows])),
        "prompt_ids": sha256(canonical_json({name: prompt.ids for name, prompt in rendered.items()})),
    }
    keys = [(cell, row, sample) for row in rows for cell in cells for sample in range(samples)]
    tried = [Row(prompt.ids) for prompt in rendered.values()]
    tried += [Row((0,), (steering,)) for steering in steerings.values()]
    generator.check(tried, options)  # before anything is written
    with open_store(out, config, provenance(about)) as store:
        store.keep(named)
        store.keep_prompts(rendered)
        done = store.read()
        mine = _share(rows, out)
        todo = [key for key in keys if key[1]["id"] in mine and row_key(*key) not in done]
        steered = [() if cell.steering is None else (cell.steering,) for cell, _, _ in todo]
        work = [Row(rendered[row["id"]].ids, one) for (_, row, _), one in zip(todo, steered, strict=True)]
        streams = [(seed, row["id"], sample) for _, row, sample in todo]
        found = generator.decode(tokenizer, work, streams, options)
        with progress("sweep", len(todo)) as advance:
            for batch in found:
                store.append(
                    _written_row(row_key(*todo[number]), work[number], continuation, tokenizer)
                    for number, continuation in batch
                )
                advance(len(batch))
        barrier()
        if not is_first():
            barrier()  # for the first process to write the table
            return SweepResult.load(Path(str(out)))
        written = store.read()
        if stream_norms is None:
            layers_read = sorted({layer for steering in steerings.values() for layer in steering.vector.layers})
            plain = [written[row_key(*key)] for key in keys if key[0].steering is None]
            stream_norms = store.norms(lambda: _own_norms(generator, tokenizer, plain, layers_read))
        norms = dict(stream_norms)
        shown = {**settings, "weights": about["weights"]}
        table = _table(keys, written, named, steerings, norms, shown, rendered)
        _warn_of_overflows(table)
        meta = {**about, **settings, "stream_norms": norms, "kind": "sweep", "n_prompts": len(rows)}
        meta |= {"vectors": config["vectors"], "chat_template_kwargs": config["chat_template_kwargs"]}
        result = SweepResult(table, meta)
        store.seal(result)
        barrier()
    return result


def _rendered(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    chat_template_kwargs: Mapping[str, Any] | None,
    stored: Mapping[str, Prompt],
) -> dict[str, Prompt]:
    """The prompts by id as the model reads them: as they were stored when the sweep began, else rendered now.

    A stored prompt is used only if the configuration is the stored one, hence if its messages and the template are.
    """
    rendered = {row["id"]: render(tokenizer, row["prompt"], chat_template_kwargs) for row in rows}
    if set(stored) != set(rendered):
        return rendered
    if changed := [name for name, prompt in rendered.items() if prompt.ids != stored[name].ids]:
        warnings.warn(
            f"{len(changed)} prompts are rendered otherwise now than when the sweep began, e.g. {changed[0]!r} (a chat "
            "template may write the date). The sweep goes on with the stored ones, unless the prompts, the template or "
            "the tokenizer were changed, which is refused.",
            UserWarning,
            stacklevel=3,
        )
    return dict(stored)


def _written_row(key: tuple[Any, ...], row: Row, continuation: Continuation, tokenizer: Any) -> dict[str, Any]:
    """A finished row as it is stored; one whose logits overflowed has neither text nor n_tokens."""
    lost = continuation.overflowed
    return {
        "key": list(key),
        "prompt_ids": list(row.prompt),
        "ids": list(continuation.all_ids),
        "text": None if lost else text_of(tokenizer, continuation),
        "n_tokens": None if lost else continuation.n_tokens,
        "finished": continuation.finished,
    }


def _warn_of_overflows(table: pd.DataFrame) -> None:
    """Warn of rows without a text, by vector, layer and coefficient."""
    lost = table[table["text"].isna()]
    if len(lost):
        places = lost[["vector", "layer", "coefficient"]].drop_duplicates().itertuples(index=False, name=None)
        named = ", ".join(f"{vector!r} at layer {layer}, coefficient {value:g}" for vector, layer, value in places)
        warnings.warn(
            f"the logits of {len(lost)} of {len(table)} rows overflowed; these rows have no text, and their scores are "
            f"NaN: {named}. Lower the coefficient, or load the model in bfloat16 or float32.",
            UserWarning,
            stacklevel=3,
        )


def named_vectors(vectors: SteeringVector | Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Several vectors by name, or one as "vector"; `TypeError` for anything else."""
    named = {"vector": vectors} if isinstance(vectors, SteeringVector) else vectors
    if not isinstance(named, Mapping) or not all(isinstance(vector, SteeringVector) for vector in named.values()):
        raise TypeError(f"expected a SteeringVector, or several by name; got {vectors!r:.80}. Pass {{'name': vector}}.")
    return dict(named)


def prompt_rows(prompts: Sequence[PromptLike | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt as a row with `id`, `group` and `reference`.

    Raises:
        ValueError: no prompts, one without `prompt`, repeated ids, or a column name that the sweep's table uses.
    """
    if isinstance(prompts, str | Mapping) or not len(prompts):
        raise ValueError(f"expected a non-empty list of prompts; got {prompts!r:.80}. Put them in a list.")
    rows = []
    for number, prompt in enumerate(prompts):
        row: dict[str, Any] = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
        if "prompt" not in row:
            raise ValueError(f"expected a 'prompt' in row {number}; got keys {sorted(row)}. Add or rename one.")
        row["id"] = str(row.get("id", number))
        row["group"] = str(row["id"] if row.get("group") is None else row["group"])
        row.setdefault("reference", None)
        if taken := RESERVED & set(row):
            raise ValueError(
                f"expected column names that a sweep's table does not use, row {number}; got {sorted(taken)}. "
                "Rename it."
            )
        rows.append(row)
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})[:5]
        raise ValueError(f"expected prompt ids that differ; got {twice} more than once. Number them.")
    return rows


def steerings_at(
    named: Mapping[str, SteeringVector],
    layers: int | Literal["all"] | Sequence[LayerSet] | None,
    positions: str,
    operation: str | Operation,
    foreign: bool,
) -> dict[Place, Steering]:
    """A steering with coefficient 1 for each vector and place.

    Raises:
        ValueError: a layer that a vector does not hold, or given twice; no `layers` where a vector holds several.
    """
    found: dict[Place, Steering] = {}
    places = None if layers is None else layer_sets(layers)
    for name, vector in named.items():
        if places is None:
            at_layers(vector, None)  # raises where the vector holds several layers
        for place in [next(iter(vector.layers))] if places is None else places:
            layer: Any = place
            found[name, label_of(place)] = Steering(vector, 1.0, positions, operation, foreign, layer=layer)
    return found


def cells_of(steerings: Mapping[Place, Steering], coefficients: float | Sequence[float]) -> list[Cell]:
    """Coefficient 0 once, then each steering with each other coefficient.

    Raises:
        ValueError: no numbers, one given twice, or one that is not finite.
    """
    given: Any = coefficients.tolist() if hasattr(coefficients, "tolist") else coefficients
    listed = [] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    values = [float(c) for c in listed if isinstance(c, Real) and not isinstance(c, bool)]
    if not listed or len(set(values)) < len(listed):
        raise ValueError(
            f"expected at least one coefficient, each a number and given once; got {coefficients!r}. List them."
        )
    steered = [Cell(place, steering.scaled(c)) for place, steering in steerings.items() for c in values if c != 0]
    return [Cell(None, None), *steered]


def row_key(cell: Cell, row: Mapping[str, Any], sample: int) -> tuple[Any, ...]:
    """What identifies a row of a sweep on disk."""
    return (*cell.key, row["id"], sample)


def _share(rows: Sequence[Mapping[str, Any]], out: str | Path | None) -> set[str]:
    """The ids of the prompts that this process generates: all, or its share where torchrun started several."""
    rank, world = rank_and_world()
    if world > 1 and out is None:
        raise ValueError(f"expected a folder as out=, where {world} processes put their rows together; got none.")
    return {row["id"] for row in rows[rank::world]}


def _generator(model: nn.Module | None, engine: Any, out: str | Path | None) -> Generator:
    """What generates: the model, or the engine that was asked for.

    Raises:
        TypeError: neither a model nor an engine.
        ValueError: the engine serves other weights than the given model's.
    """
    if engine is None:
        if model is None:
            raise TypeError("expected a model, or an engine= that serves one; got neither. Load one by `sk.load`.")
        return InProcess(model, out)
    from steerkit.serving.client import remote_of

    served = remote_of(engine)
    if model is not None:
        served.check_model(model)
    return served


def _own_norms(
    generator: Generator,
    tokenizer: Any,
    plain: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
) -> dict[Layer, float]:
    """Mean norms of the stream over the sweep's unsteered continuations; empty where none has a token."""
    if not any(row["ids"] for row in plain):
        return {}
    prompts = [Prompt(row["prompt_ids"], "") for row in plain]
    return generator.norms(tokenizer, prompts, [row["ids"] for row in plain], layers)


def _table(
    keys: Sequence[tuple[Cell, Mapping[str, Any], int]],
    written: Mapping[tuple[Any, ...], Mapping[str, Any]],
    named: Mapping[str, SteeringVector],
    steerings: Mapping[Place, Steering],
    norms: Mapping[Layer, float],
    settings: Mapping[str, Any],
    prompts: Mapping[str, Prompt],
) -> pd.DataFrame:
    """One row per vector, layer, coefficient, prompt and sample; coefficient 0 under each vector and layer."""
    roles = roles_of(named)
    unsteered = {place: steering.scaled(0.0) for place, steering in steerings.items()}
    further = dict.fromkeys(key for _, row, _ in keys for key in row if key not in ("id", "group", "prompt"))
    rows = []
    for cell, row, sample in keys:
        text = written[row_key(cell, row, sample)]
        for place in steerings if cell.place is None else [cell.place]:
            role, control_of = roles[place[0]]
            rows.append(
                {
                    "vector": place[0],
                    "role": role,
                    "control_of": control_of,
                    "layer": place[1],
                    "coefficient": cell.coefficient,
                    "prompt_id": row["id"],
                    "sample": sample,
                    "group": row["group"],
                    "prompt": prompts[row["id"]].text,
                    "prompt_ids": prompts[row["id"]].ids,
                    **{column: row.get(column) for column in further},
                    "text": text["text"],
                    "ids": tuple(text["ids"]),
                    "n_tokens": text["n_tokens"],
                    "finished": text["finished"],
                    "relative_dose": relative_dose(cell.steering or unsteered[place], norms),
                    **{k: v for k, v in settings.items() if k != "samples"},
                }
            )
    vector_order = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in steerings))}
    rows.sort(key=lambda row: (vector_order[row["vector"]], natural_order(row["layer"]), row["coefficient"]))
    return pd.DataFrame(rows)
