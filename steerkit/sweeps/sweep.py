"""Sweeps: vector x layer x coefficient x prompt x sample, all rows in mixed batches, as one tidy, resumable table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from steerkit.capture.activations import Layer
from steerkit.generation.choices import choice_ids, warn_of_merged
from steerkit.generation.engine import Row
from steerkit.generation.generate import checked_seed
from steerkit.generation.generator import Generator, InProcess, Settings
from steerkit.io.progress import progress
from steerkit.io.ranks import barrier, is_first, rank_and_world
from steerkit.models.identity import identity, provenance
from steerkit.models.site_names import DEFAULT
from steerkit.steering.conditions import Condition, described
from steerkit.steering.operations import Operation
from steerkit.steering.operations import named as operation_named
from steerkit.steering.positions import steered_columns
from steerkit.sweeps.layers import LayerSet
from steerkit.sweeps.plan import Cell, Planned, checked_norms, named_vectors, prompt_rows, resolved, steerings_at
from steerkit.sweeps.result import SweepResult
from steerkit.sweeps.store import open_store
from steerkit.sweeps.table import scored_row, sweep_table, warn_of_overflows, written_row
from steerkit.text.prompt import Prompt, PromptLike, render
from steerkit.text.tokens import special_tokens
from steerkit.vectors.vector import SteeringVector


def sweep(
    model: nn.Module | None,
    tokenizer: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    prompts: Sequence[PromptLike | Mapping[str, Any]],
    *,
    coefficients: float | Sequence[float] | None = None,
    doses: float | Sequence[float] | None = None,
    layers: int | Literal["all"] | Sequence[LayerSet] | None = None,
    positions: str = "from_last_prompt_token",
    operation: str | Operation = "add",
    site: str | None = None,
    when: Condition | None = None,
    samples: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    choices: Sequence[str] | None = None,
    stream_norms: Mapping[Layer, float] | None = None,
    foreign: bool = False,
    batch_rows: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    engine: Any = None,
) -> SweepResult:
    """Generate every combination of vector, layer, coefficient, prompt and sample; one row of the table each.

    With `choices` nothing is generated: each row is a given continuation with its log-probability.

    Coefficient 0 is generated once per prompt and sample, and listed in the table under each vector and layer. Random
    streams are keyed by (seed, prompt id, sample) only: all coefficients, layers and controls share their random
    numbers, so that differences between them are paired.

    Args:
        vectors: one (named "vector") or several by name. Controls (`sk.controls`) are vectors like any other; their
            role is shown in the column `role`.
        prompts: strings (verbatim), message lists, `Prompt`s, or rows with `prompt`, and optionally `id`, `reference`
            and `group` (resampled together; default the id); other keys become columns.
        coefficients: multiply the vectors as stored; one or several, a list, array or tensor. 0 is always added.
        doses: instead of coefficients: the norm of the push over that of the stream, signed, for `add` and
            `add_normed`. The coefficient of a vector at a layer is `dose * norm_l / |v|` (of several layers, that whose
            mean relative dose is the dose). 0 is always added. Scores are then over the column `dose`.
        layers: where the vectors are steered: a layer, `"all"` (all layers of a vector at once), or a list of these, in
            which a tuple is a set of layers steered at once: `[8, 10, (8, 10)]`. Default: each vector at the one layer
            that it holds.
        when: a `Condition` on which every vector acts, controls too; the table then has the columns `when` and
            `share_steered`.
        samples: 1 is greedy unless a temperature is given; more use temperature 0.7 unless given.
        choices: continuations whose probabilities are computed instead of texts, see `sk.score_choices`; a prompt row
            may have its own under the key `choices`. All settings of generated texts are then without effect.
        site: where in a block the vectors act, see `Steering`; default: where they were read, the same for all.
        stream_norms: norm of the stream (of the site) per layer, for doses and `relative_dose`. Default: the median
            over the steered positions of this sweep's own unsteered prompts and continuations, without position 0. It
            is measured once and stored with the run, so that a grown sweep keeps its scale; layers without a stored
            norm are measured when they are first steered, and further ones may be given then.
        foreign: allow vectors that were read from other weights.
        chat_template_kwargs: further arguments of the chat template, e.g. `{"enable_thinking": False}`.
        out: a folder that rows are appended to as they are finished; vectors and table are kept there too. Rows are
            known by content: the vector at the steered layers, coefficient, prompt id, and sample or choice. Another
            call into the folder computes only the rows that are not there: after an interruption, or with further
            vectors, layers, coefficients, prompts, samples or choices. The result, and the table in the folder, hold
            the rows of the last call. Another model, template, position, operation, length or seed, or another prompt
            under a known id, is refused. Prompts are read as they were rendered first, also if the template writes
            another date now. None keeps everything in memory. Processes started together by torchrun share the
            prompts and the folder; each makes this call, and each returns the whole.
        engine: what generates instead of the model in this process: `steerkit.serving.VLLM(...)`, one or several
            addresses of servers that `steerkit serve` has started, or a `steerkit.serving.Server`. The model may then
            be None; where it is given, its weights must be the served ones.

    Returns:
        `SweepResult` with columns vector, role, control_of, layer, coefficient, prompt_id, group, sample, text, ids
        (new token ids, the end token included), n_tokens, finished, relative_dose (`|coefficient| * |v| / norm` at that
        layer; for several layers their mean; NaN for operations other than `add` and `add_normed`), prompt, prompt_ids,
        messages (JSON, where prompts are chats), reference, the settings, and the weights' dtype or quantisation. A row
        whose logits overflowed has no text and no n_tokens. With `when` also share_steered: the share of the positions
        that decided a row's tokens (the last one of the prompt, and all new tokens, or those of the choice, but the
        last) where the steering acted; 0 at coefficient 0. With `choices` also choice, log_prob and probability (among
        the choices of a prompt); `text` is the choice, `sample` its index. Select one choice per prompt for curves and
        gains: `result.where(result.table["choice"] == ...)`.

    Warns:
        UserWarning: rows that overflowed, by name; a device kind or versions other than those the sweep was begun with;
            prompts that are rendered otherwise now; choices that have other tokens together with their prompt.

    Raises:
        TypeError: `vectors` is neither a vector nor several by name.
        ValueError: nothing to do, repeated prompt ids, a vector that does not fit, several layers and no `layers`, a
            setting out of range; `out` is then unchanged.
        ConfigurationChanged: `out` was started with other settings or by an earlier version, or a prompt was changed.
        RunFolderBusy: another process holds `out`.

    Example:
        >>> vectors = {"calm": vector, **sk.controls.random({"calm": vector}, n=20)}
        >>> result = sk.sweep(model, tokenizer, vectors, prompts, layers=14, coefficients=[-1, 0, 1], out="runs/calm")
        >>> result = sk.sweep(model, tokenizer, vectors, prompts, layers=14, coefficients=[1], choices=[" (A)", " (B)"])
        >>> result.where(result.table["choice"] == " (A)").gains("probability")
    """
    generator = generator_of(model, engine, out)
    named = named_vectors(vectors)
    rows = prompt_rows(prompts, choices)
    texts = {choice: choice_ids(tokenizer, choice) for row in rows for choice in row["choices"] or ()}
    settings = _settings(samples, temperature, top_p, max_new_tokens, seed) if not texts else {}
    steerings = steerings_at(named, layers, positions, operation, foreign, site, when)
    site = next(str(steering.site) for steering in steerings.values())
    cells = Cell.each(steerings, coefficients, doses)
    layers_used = {layer for steering in steerings.values() for layer in steering.vector.layers}
    given = checked_norms(stream_norms)
    options = Settings(
        max(map(len, texts.values()), default=max_new_tokens), settings.get("temperature", 0.0), top_p, batch_rows
    )
    about = generator.about(tokenizer)
    rendered = _rendered(tokenizer, rows, texts, chat_template_kwargs)
    where = {
        "positions": positions,
        "operation": operation_named(operation).name,
        **({} if site == DEFAULT else {"site": site}),
        **({} if when is None else {"when": str(when)}),
    }
    config = {
        **where,
        **{name: value for name, value in settings.items() if name != "samples"},
        "steers_position_0": steered_columns(positions, 0, 2, where["operation"])[0] == 0,
        "rows": "choices" if texts else "generated texts",
        **identity(about),
        "chat_template_kwargs": dict(chat_template_kwargs or {}),
        "ends": None if texts else sorted(generator.ends(tokenizer)),
    }
    tried = [
        *(Row(prompt.ids) for prompt in rendered.values()),
        *(Row((max(ids),)) for ids in texts.values()),  # whether the model has their tokens
        *(Row((0,), (steering,)) for steering in steerings.values()),
    ]
    generator.check(tried, options)  # before anything is written
    with open_store(out, config, provenance(about)) as store:
        rendered = store.settled(rows, rendered)
        store.keep(named)
        if when is not None:
            store.keep({"when": SteeringVector({when.place[1]: when.weights}, described(when) or {}, when.site)})
        mine = _share(rows, out)

        def computed(todo: Sequence[Planned]) -> Iterator[list[dict[str, Any]]]:
            steered = [() if one.cell.steering is None else (one.cell.steering,) for one in todo]
            ids = [rendered[one.prompt["id"]].ids for one in todo]
            work = [Row(prompt, several) for prompt, several in zip(ids, steered, strict=True)]
            if texts:
                scored = [texts[str(one.choice)] for one in todo]
                for values in generator.score(tokenizer, work, scored, options):
                    yield [scored_row(todo[i], ids[i], scored[i], value) for i, value in values]
                return
            streams = [(seed, one.prompt["id"], one.sample) for one in todo]
            for batch in generator.decode(tokenizer, work, streams, options):
                yield [written_row(todo[i], ids[i], found, tokenizer) for i, found in batch]

        def compute(plan: Sequence[Planned]) -> None:
            done = store.read()
            todo = {one.key: one for one in plan if one.prompt["id"] in mine and one.key not in done}
            with progress("sweep", len(todo)) as advance:
                for batch in computed(list(todo.values())):
                    store.append(batch)
                    advance(len(batch))
            barrier()

        @cache
        def measure() -> dict[Layer, float]:
            written = store.read()
            plain = [written[one.key] for one in Planned.each(cells[:1], rows, samples)]
            read = [(row["prompt_ids"], row["ids"]) for row in plain]
            return generator.norms(read, positions, where["operation"], site)

        if doses is not None:
            compute(Planned.each(cells[:1], rows, samples))
            cells = resolved(cells, store.norms(given, measure, layers_used))
        plan = Planned.each(cells, rows, samples)
        compute(plan)
        norms = store.norms(given, measure, layers_used)
        if not is_first():
            barrier()  # for the first process to write the table
            return SweepResult.load(Path(str(out)))
        written = store.read()
        shown = {**where, **settings, "weights": about["weights"]}
        table = sweep_table(plan, written, named, steerings, norms, shown, rendered)
        warn_of_overflows(table)
        meta = {
            **about,
            **where,
            **settings,
            "stream_norms": norms,
            "kind": "sweep",
            "n_prompts": len(rows),
            "rows": config["rows"],
            "chat_template_kwargs": config["chat_template_kwargs"],
            "special_tokens": special_tokens(tokenizer, (prompt.ids for prompt in rendered.values())),
            "vectors": {name: vector.content() for name, vector in named.items()},
            "control_of": {name: of for name, one in named.items() if (of := one.meta.get("control_of", name)) != name},
            **({} if when is None else {"when": described(when)}),
        }
        result = SweepResult(table, meta)
        store.seal(result)
        barrier()
    return result


def _rendered(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    texts: Mapping[str, tuple[int, ...]],
    chat_template_kwargs: Mapping[str, Any] | None,
) -> dict[str, Prompt]:
    """The prompts by id as the model reads them; `texts` holds the token ids of their choices."""
    rendered = {row["id"]: render(tokenizer, row["prompt"], chat_template_kwargs) for row in rows}
    warn_of_merged(tokenizer, ((rendered[row["id"]], one, texts[one]) for row in rows for one in row["choices"] or ()))
    return rendered


def _settings(samples: Any, temperature: Any, top_p: float, max_new_tokens: int, seed: Any) -> dict[str, Any]:
    """The settings of generated texts, with their defaults."""
    if isinstance(samples, bool) or not isinstance(samples, int | np.integer) or samples < 1:
        raise ValueError(f"expected at least one sample; got samples={samples!r}. Add some.")
    temperature = (0.0 if samples == 1 else 0.7) if temperature is None else float(temperature)
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"expected a temperature above 0 for {samples} samples; got 0, which makes all samples equal. Raise it."
        )
    return {
        "samples": int(samples),
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": checked_seed(seed),
    }


def _share(rows: Sequence[Mapping[str, Any]], out: str | Path | None) -> set[str]:
    """The ids of the prompts that this process generates: all, or its share where torchrun started several."""
    rank, world = rank_and_world()
    if world > 1 and out is None:
        raise ValueError(f"expected a folder as out=, where {world} processes put their rows together; got none.")
    return {row["id"] for row in rows[rank::world]}


def generator_of(model: nn.Module | None, engine: Any, out: str | Path | None = None) -> Generator:
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
