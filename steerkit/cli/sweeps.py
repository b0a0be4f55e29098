"""Commands about sweeps: `sweep`, `score` and `report`."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from steerkit.cli.inputs import (
    check_output,
    check_vectors,
    parse_choices,
    parse_coefficients,
    parse_layer_sets,
    read_prompts,
)
from steerkit.cli.options import (
    Checkpoint,
    Foreign,
    Json,
    LoadOptions,
    MaxNewTokens,
    Operation,
    Positions,
    Run,
    Seed,
    TopP,
    load_model,
    with_load_options,
)
from steerkit.show.terminal import DOSE, READING, draw, facts, hint, print_json
from steerkit.steering.positions import parse_positions

NEED_A_MODEL = ("perplexity", "kl")


@with_load_options
def sweep(
    checkpoint: Checkpoint,
    vectors: Annotated[list[Path], typer.Argument(help="Vector files; each vector is named after its file.")],
    loading: LoadOptions,
    prompts: Annotated[
        Path, typer.Option(help='JSON lines of {"prompt": text or messages, "id", "reference", "group", "choices"}.')
    ],
    layers: Annotated[
        str | None,
        typer.Option(
            help="8,12 sweeps two layers; 12+14 steers both at once; all steers all layers of the vector at once. "
            "Omit for vectors that hold one layer."
        ),
    ] = None,
    coefficients: Annotated[
        str | None, typer.Option(help="Numbers with commas; 0 is always added. Default -2,-1,0,1,2 without doses.")
    ] = None,
    doses: Annotated[
        str | None,
        typer.Option(help="Instead of coefficients: norms of the push over that of the stream, signed, with commas."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished sweep is resumed.")] = Path("runs/sweep"),
    random: Annotated[int, typer.Option(help="Random control directions; a rank of 5 % needs 19.", min=0)] = 19,
    positions: Positions = "from_last_prompt_token",
    operation: Operation = "add",
    samples: Annotated[
        int, typer.Option(help="Texts per prompt; 1 is greedy unless a temperature is given.", min=1)
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; default 0 for one sample, 0.7 for several.", min=0)
    ] = None,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    choices: Annotated[
        str | None,
        typer.Option(
            help='Score continuations instead of generating: " (A), (B)", or a JSON list. A prompt may have its own.'
        ),
    ] = None,
    foreign: Foreign = False,
    as_json: Json = False,
) -> None:
    """Generate with each vector, layer and coefficient.

    Random control directions are swept too. The same command resumes an interrupted sweep; with more coefficients,
    layers, vectors, prompts or samples it computes the rows that are missing. With --choices (or "choices" in the
    prompts) nothing is generated: each row is the probability of a given continuation.

    Example: steerkit sweep CHECKPOINT persona.safetensors --prompts prompts.jsonl --layers 10,14 --out runs/persona
    """
    sets = None if layers is None else parse_layer_sets(layers)
    if coefficients is not None and doses is not None:
        raise ValueError("expected --coefficients or --doses; got both. Pass one of them.")
    strengths: dict[str, Any] = {}
    if doses is None:
        strengths["coefficients"] = parse_coefficients("-2,-1,0,1,2" if coefficients is None else coefficients)
    else:
        strengths["doses"] = parse_coefficients(doses)
    parse_positions(positions)
    loading.check(checkpoint)
    check_vectors(vectors)
    rows = read_prompts(prompts)
    given = None if choices is None else parse_choices(choices)
    if given is not None or any(row.get("choices") is not None for row in rows):
        _check_no_generation(
            samples=samples, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
        )
    import steerkit as sk
    from steerkit.sweeps.plan import Cell, prompt_rows, steerings_at

    named = {path.stem: sk.SteeringVector.load(path) for path in vectors}
    prompt_rows(rows, given)
    steerings = steerings_at(named, sets, positions, operation, foreign)
    Cell.each(steerings, strengths.get("coefficients"), strengths.get("doses"))
    named |= sk.controls.random(named, n=random)
    result = sk.sweep(
        *load_model(checkpoint, loading),
        named,
        rows,
        layers=sets,
        out=out,
        positions=positions,
        operation=operation,
        **strengths,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        choices=given,
        foreign=foreign,
    )
    dose = float(result.table["relative_dose"].max())
    table = out / "table.parquet"
    summary = {**result.counts(), "largest_relative_dose": dose, "table": table}
    facts({**summary, "next_command": f"steerkit report {shlex.quote(str(out))}"}, as_json)
    hint(DOSE, as_json)


@with_load_options
def score(
    run: Run,
    loading: LoadOptions,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="rouge_l, rouge_l_symbols, rouge_l_unicode, distance, distinct_2, repeated_4grams, perplexity or kl; "
            "probability and log_prob of choices, which are there already."
        ),
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="Words of a trait with commas between; the score counts them in a text.")
    ] = None,
    choice: Annotated[
        str | None, typer.Option(help='Of choices: the one whose scores are printed, e.g. --choice " (A)".')
    ] = None,
    choice_column: Annotated[
        str | None, typer.Option(help="Of choices: the column of the prompts with the one of each, e.g. matching.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="The sweep's model; perplexity and kl need it.")] = None,
    as_json: Json = False,
) -> None:
    """Add scores to a sweep and print them with their gains.

    The scores are stored in RUN/scored.parquet. After a sweep has grown, earlier scores are kept; the same command
    scores the new rows. Means are printed by layer and coefficient. Gains are over coefficient 0 and over each role of
    controls. A sweep of choices needs --choice or --choice-column: a mean over all choices of a prompt has no meaning.

    Example: steerkit score runs/persona repeated_4grams --words happy,glad,joy
    """
    from steerkit.sweeps.join import without_score
    from steerkit.sweeps.result import OF_CHOICES, PURE, SweepResult, of_words

    names = list(names or [])
    _check_names(names, words, [*PURE, *NEED_A_MODEL, *OF_CHOICES])
    needs_model = [name for name in names if name in NEED_A_MODEL]
    if needs_model and checkpoint is None:
        raise ValueError(f"expected a model for {needs_model}; got none. Pass --checkpoint.")
    if checkpoint is not None:
        loading.check(checkpoint)
    if not needs_model and (checkpoint is not None or loading != LoadOptions()):
        raise ValueError(f"expected no checkpoint or load options for {names}; no score needs a model. Leave them out.")
    table = SweepResult.load(run / "table.parquet")
    stored = [name for name in names if name in OF_CHOICES]
    if absent := [name for name in stored if name not in table.table]:
        raise ValueError(f"expected a sweep of choices for {absent}; got texts. Repeat the sweep with --choices.")
    shown = _rows_of_choice(table.table, choice, choice_column)
    scored = run / "scored.parquet"
    _keep_others(scored, table)
    result = table.with_scores_of(scored)
    models = _models_of(result, run, checkpoint, loading, needs_model) if needs_model else {}
    for name in names:
        if name not in stored:
            result = result.score(name, **models if name in NEED_A_MODEL else {})
    if words is not None:
        result, names = result.score(of_words(words.split(",")), column="words"), [*names, "words"]
    others = [name for name in result.table if name not in (*table.table, *names)]
    added = table.added_since(scored) if others else [False] * len(table.table)
    result.save(scored)
    for name, count in without_score(result.table[added], others).items():
        hint(f"{count} of {len(result.table)} rows have no {name}; rows added since need it again.", as_json)
    result = result.where(shown)
    chosen, every = result.table["prompt_id"].nunique(), table.table["prompt_id"].nunique()
    if chosen < every:
        hint(f"{chosen} of {every} prompts have this choice; the others are left out.", as_json)
    if as_json:
        curves = {name: result.curve(name).to_dict("records") for name in names}
        print_json({"curves": curves, "gains": {name: result.gains(name).to_dict("records") for name in names}})
        return
    from steerkit.show.pivot import pivots

    for title, columns in pivots(result, names).items():
        draw(title, columns, keys=2)
    hint(READING, as_json)


def _check_no_generation(**given: Any) -> None:
    """`ValueError` for options of generation in a sweep of choices, which generates nothing."""
    default = inspect.signature(sweep).parameters
    if changed := [name for name, value in given.items() if value != default[name].default]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(f"expected no {named} for choices, which are scored and not generated. Leave it out.")


def _check_names(names: list[str], words: str | None, known: list[str]) -> None:
    """`ValueError` for no score, or an unknown one."""
    if not names and words is None:
        raise ValueError("expected a score or --words; got neither. Name one.")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected scores among {known}; got {unknown}. Pass some of these.")


def _rows_of_choice(table: Any, choice: str | None, column: str | None) -> Any:
    """Which rows are printed: of choices those of one choice per prompt.

    Raises:
        ValueError: a choice of a sweep without choices, none of a sweep with several, or one that is not there.
    """
    given = [name for name, value in (("--choice", choice), ("--choice-column", column)) if value is not None]
    if "choice" not in table:
        if given:
            raise ValueError(f"expected no {given[0]} for generated texts; got one. Leave it out.")
        return table["vector"].notna()
    if len(given) != 1:
        raise ValueError(
            f"expected one choice per prompt; got {'both' if given else 'no'} options. Pass --choice TEXT, or "
            "--choice-column COLUMN, such as matching."
        )
    if column is not None and column not in table:
        raise ValueError(f"expected a column of the prompts; got {column!r}. Choose among {list(table)}.")
    rows = table["choice"] == (choice if column is None else table[column])
    lacking = sorted(set(table["prompt_id"]) - set(table["prompt_id"][rows]))
    if lacking and (column is not None or not rows.any()):
        raise ValueError(
            f"expected a choice among {table['choice'].unique()[:8].tolist()}; got another by {given[0]}="
            f"{choice or column!r} for the prompts {lacking[:5]}. Pass one with its first space."
        )
    return rows


def _keep_others(scored: Path, table: Any) -> None:
    """Copy the scores of an earlier sweep into this folder whose rows the table lacks, before they are overwritten."""
    from steerkit.io.files import sha256
    from steerkit.sweeps.join import count_of_others
    from steerkit.sweeps.result import SweepResult

    earlier = SweepResult.load(scored) if scored.is_file() else None
    if earlier is not None and (count := count_of_others(table.table, earlier.table)):
        kept = scored.with_name(f"scored-{sha256(scored)[:8]}.parquet")
        earlier.save(kept)
        hint(f"{count} rows of {scored.name} are not in the last sweep; their scores are kept in {kept}.", False)


def _models_of(
    result: Any, run: Path, checkpoint: str | None, loading: LoadOptions, scores: list[str]
) -> dict[str, Any]:
    """The arguments of `SweepResult.score` for scores that need the sweep's model, and for kl its vectors.

    Raises:
        FileNotFoundError: the run folder does not hold the sweep's vectors.
        ValueError: for kl, a model that is not the sweep's.
    """
    from steerkit.sweeps.result import check_swept_model
    from steerkit.sweeps.store import swept_vectors

    vectors = swept_vectors(run) if "kl" in scores else None
    model, tokenizer = load_model(str(checkpoint), loading)
    if "kl" in scores:
        check_swept_model(result.meta, model)
    return {"model": model, "tokenizer": tokenizer, "vectors": vectors}


@with_load_options
def report(
    run: Run,
    loading: LoadOptions,
    out: Annotated[Path | None, typer.Option(help="The page to write; default RUN/report.html.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The sweep's model: shades each token by its projection on the direction.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a sweep as one HTML file.

    It shows each text next to the unsteered one, and the curves of the scores with their controls.

    Example: steerkit report runs/persona --checkpoint CHECKPOINT
    """
    if checkpoint is not None:
        loading.check(checkpoint)
    elif loading != LoadOptions():
        raise ValueError("expected --checkpoint with options that load it; got the options alone. Pass both.")
    if out is not None:
        check_output(out, [".html", ".htm"])
    from steerkit.show.report import report_run
    from steerkit.sweeps.result import SweepResult

    SweepResult.load(run)  # a missing sweep is reported before the model is loaded
    page = report_run(run, out, load_model(checkpoint, loading) if checkpoint else None)
    facts({"page": page, "bytes": page.stat().st_size}, as_json)
