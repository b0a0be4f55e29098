"""Commands about a checkpoint: `inspect`, `doctor`, `lens` and `bake`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steerkit.cli.inputs import check_coefficient, check_new_folder, check_vectors, parse_layer, parse_layers
from steerkit.cli.options import Checkpoint, Foreign, Json, LoadOptions, load_model, with_load_options
from steerkit.show.terminal import facts, table

if TYPE_CHECKING:
    from steerkit.doctor.report import Finding


@with_load_options
def inspect(checkpoint: Checkpoint, loading: LoadOptions, as_json: Json = False) -> None:
    """Print what a checkpoint is and where it can be steered.

    Example: steerkit inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    loading.check(checkpoint)
    from steerkit.models.identity import describe

    about = describe(*load_model(checkpoint, loading))
    versions = " ".join(f"{package} {version}" for package, version in about["versions"].items())
    facts(about, as_json, shown={**about, "versions": versions})


@with_load_options
def doctor(checkpoint: Checkpoint, loading: LoadOptions, as_json: Json = False) -> None:
    """Test on this checkpoint what steering relies on.

    The checkpoint may be a hub id, a folder, a GGUF file, or the address of a server that `steerkit serve` has started.
    The exit code is 1 if a check fails.

    Example: steerkit doctor HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from dataclasses import asdict

    def progress(check: str) -> None:
        print(f"checking {check} ...", file=sys.stderr)

    def finished(finding: Finding) -> None:
        print(f"  {finding.state}: {finding.detail}", file=sys.stderr)

    if checkpoint.startswith(("http://", "https://")):
        from steerkit.doctor.served import examine_served

        if loading != LoadOptions():
            raise ValueError("expected no options of loading for a server; got some. Leave them out.")
        findings = examine_served(checkpoint, progress, finished)
    else:
        loading.check(checkpoint)
        from steerkit.doctor.report import examine

        findings = examine(*load_model(checkpoint, loading), progress, finished)
    import pandas as pd

    table(f"doctor: {checkpoint}", pd.DataFrame([asdict(finding) for finding in findings]), as_json)
    failed = [finding.check for finding in findings if finding.state == "failed"]
    if not as_json:
        print(f"Failed checks: {', '.join(failed)}." if failed else "All checks passed.")
    if failed:
        sys.exit(1)


@with_load_options
def lens(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Argument(help="The text, verbatim; its last token is read.")],
    loading: LoadOptions,
    token: Annotated[
        list[str] | None,
        typer.Option(
            help="A token to look up, with its space: ' Paris'. Repeat it for several. Default: the best one."
        ),
    ] = None,
    layers: Annotated[str, typer.Option(help="all, or block indices with commas: 8,12,16.")] = "all",
    as_json: Json = False,
) -> None:
    """Print by layer the next token (logit lens).

    Its rank and probability, if that layer were the last.

    Example: steerkit lens CHECKPOINT "The capital of France is" --token " Paris" --token " Rome"
    """
    read_layers = parse_layers(layers)
    loading.check(checkpoint)
    import steerkit as sk

    model, tokenizer = load_model(checkpoint, loading)
    found = sk.logit_lens(model, tokenizer, [text], token or 1, layers=read_layers)
    table("logit lens", found[["layer", "target", "target_id", "rank", "log_prob", "prob"]], as_json)


@with_load_options
def bake(
    checkpoint: Checkpoint,
    vector: Annotated[Path, typer.Argument(help="A vector file.")],
    loading: LoadOptions,
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    layer: Annotated[
        str | None,
        typer.Option(help="Block after which the vector acts; 12+14 or all for several; omit if it holds one layer."),
    ] = None,
    coefficient: Annotated[float, typer.Option(help="Multiplies the vector with its norm (add).")] = 1,
    operation: Annotated[
        Literal["add", "ablate"],
        typer.Option(help="add at the layer; ablate the direction of one layer everywhere, position 0 included."),
    ] = "add",
    foreign: Foreign = False,
    as_json: Json = False,
) -> None:
    """Write a steering into the weights.

    The checkpoint loads without steerkit. Where this is not exact it is refused with the reason.

    Example: steerkit bake CHECKPOINT persona.safetensors --layer 14 --out calm-model
    """
    layers = None if layer is None else parse_layer(layer)
    check_coefficient(coefficient)
    check_new_folder(out)
    loading.check(checkpoint)
    check_vectors([vector])
    import steerkit as sk
    from steerkit.steering.bake import ablated_everywhere

    steering = sk.Steering(sk.SteeringVector.load(vector), coefficient, "all", foreign=foreign, layer=layers)
    model, tokenizer = load_model(checkpoint, loading)
    several = [steering] if operation == "add" else ablated_everywhere(model, steering.vector, coefficient, foreign)
    sk.bake(model, tokenizer, several, out)
    facts({"written": out, "operation": operation, "layers": list(steering.vector.layers)}, as_json)
