"""Commands about vectors: `extract`, `probe` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerkit.cli.inputs import check_output, parse_layers, parse_position, read_pairs_file
from steerkit.cli.options import (
    Checkpoint,
    Json,
    LoadOptions,
    Pairs,
    Position,
    Site,
    load_model,
    with_load_options,
)
from steerkit.models.site_names import DEFAULT, check_name
from steerkit.show.terminal import facts, table


@with_load_options
def extract(
    checkpoint: Checkpoint,
    pairs: Pairs,
    loading: LoadOptions,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path("vector.safetensors"),
    position: Position = "last",
    layers: Annotated[str, typer.Option(help="all, or block indices with commas: 8,12,16.")] = "all",
    site: Site = "resid_post",
    as_json: Json = False,
) -> None:
    """Extract a vector: the difference in means of pairs.

    Example: steerkit extract CHECKPOINT pairs.jsonl --out persona.safetensors
    """
    read_position, read_layers = parse_position(position), parse_layers(layers)
    check_name(site)
    loading.check(checkpoint)
    check_output(out, [".safetensors"], [pairs])
    contrast = read_pairs_file(pairs)
    import steerkit as sk

    model, tokenizer = load_model(checkpoint, loading)
    means = sk.collect_means(model, tokenizer, contrast, layers=read_layers, site=site, position=read_position)
    vector = sk.difference_in_means(means)
    vector.save(out)
    norms = vector.norms()
    values = {"written": out, "layers": list(vector.layers), "d_model": vector.d_model, "norms": norms}
    shown = {"written": out, "vector": repr(vector), **{f"norm at layer {k}": norm for k, norm in norms.items()}}
    facts({**values, "n_pairs": len(contrast), "position": read_position}, as_json, shown)


@with_load_options
def probe(
    checkpoint: Checkpoint,
    pairs: Pairs,
    loading: LoadOptions,
    position: Position = "last",
    site: Site = "resid_post",
    seed: Annotated[int, typer.Option(help="Seed of the folds and of the shuffled labels.")] = 0,
    as_json: Json = False,
) -> None:
    """Print the held-out accuracy of probes by layer.

    Controls: shuffled labels, and length and position alone.

    Example: steerkit probe CHECKPOINT pairs.jsonl --position mean
    """
    read_position = parse_position(position)
    check_name(site)
    loading.check(checkpoint)
    contrast = read_pairs_file(pairs)
    import steerkit as sk
    from steerkit.models.blocks import find_blocks

    model, tokenizer = load_model(checkpoint, loading)
    layers = ["embed", *range(len(find_blocks(model)))] if site == DEFAULT else "all"
    activations = sk.collect(model, tokenizer, contrast, layers=layers, site=site, position=read_position)
    table("held-out accuracy of linear probes, by layer", sk.probe_layers(activations, seed=seed).table, as_json)


def convert(
    source: Annotated[Path, typer.Argument(help="A vector file of this project or another.", metavar="IN")],
    out: Annotated[
        Path, typer.Argument(help="A .safetensors or .gguf file; several vectors become OUT-NAME each.", metavar="OUT")
    ],
    layers: Annotated[str, typer.Option(help="all, or block indices with commas: 8,12,16.")] = "all",
    as_json: Json = False,
) -> None:
    """Convert vectors from and to other formats.

    What the conversion loses is printed.

    Example: steerkit convert agents.pt agents.safetensors
    """
    kept_layers = parse_layers(layers)
    check_output(out, [".safetensors", ".gguf"], [source])
    import warnings

    from steerkit.vectors.convert import missing_fields, read_vectors, write_vectors

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        vectors = read_vectors(source)
        dropped = set()
        if not isinstance(kept_layers, str):
            dropped = {layer for vector in vectors.values() for layer in vector.layers} - set(kept_layers)
            vectors = {name: vector.at(*kept_layers) for name, vector in vectors.items()}
        written = write_vectors(vectors, out)
    losses = list(dict.fromkeys(str(one.message) for one in caught))
    if dropped:
        losses.append(f"the layers {sorted(dropped, key=str)}, which --layers leaves out")
    described = [
        {"name": name, "vector": repr(vector), "written": written[name], "not_recorded": missing_fields(vector)}
        for name, vector in vectors.items()
    ]
    shown = {}
    for name, vector in vectors.items():
        shown[name] = repr(vector)
        shown[f"{name} written"] = str(written[name])
        shown[f"{name} not recorded"] = ", ".join(missing_fields(vector)) or "nothing"
    facts({"vectors": described, "lost": losses}, as_json, {**shown, "lost": " ".join(losses) or "nothing"})
