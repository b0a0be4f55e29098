"""Commands that steer single prompts: `steer` and `play`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from steerkit.cli.inputs import check_coefficient, check_port, check_vectors, parse_layer
from steerkit.cli.options import (
    Checkpoint,
    Foreign,
    Json,
    LoadOptions,
    MaxNewTokens,
    Operation,
    Positions,
    Seed,
    TopP,
    load_model,
    with_load_options,
)
from steerkit.show.terminal import DOSE, hint, print_json, side_by_side
from steerkit.steering.positions import parse_positions


@with_load_options
def steer(
    checkpoint: Checkpoint,
    vector: Annotated[Path, typer.Argument(help="A vector file.")],
    prompt: Annotated[str, typer.Argument(help="A question; the chat template is applied if there is one.")],
    loading: LoadOptions,
    layer: Annotated[
        str | None,
        typer.Option(help="Block after which the vector acts; 12+14 or all for several; omit if it holds one layer."),
    ] = None,
    coefficient: Annotated[float, typer.Option(help="Multiplies the vector with its norm; see the relative dose.")] = 1,
    dose: Annotated[
        float | None, typer.Option(help="Instead of a coefficient: norm of the push over that of the stream, signed.")
    ] = None,
    positions: Positions = "from_last_prompt_token",
    operation: Operation = "add",
    max_new_tokens: MaxNewTokens = 80,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.", min=0)] = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    verbatim: Annotated[bool, typer.Option("--verbatim", help="Use the prompt without the chat template.")] = False,
    foreign: Foreign = False,
    as_json: Json = False,
) -> None:
    """Generate from one prompt without and with steering.

    Both texts are printed side by side, with the relative dose. With a temperature both draw the same random numbers.

    Example: steerkit steer CHECKPOINT persona.safetensors "How do tides work?" --layer 14 --coefficient 1.5
    """
    layers = None if layer is None else parse_layer(layer)
    check_coefficient(coefficient)
    parse_positions(positions)
    loading.check(checkpoint)
    check_vectors([vector])
    import steerkit as sk
    from steerkit.steering.dose import median_norms, relative_dose

    held = sk.SteeringVector.load(vector)
    steering = sk.Steering(held, coefficient, positions, operation, foreign, layer=layers, dose=dose)
    model, tokenizer = load_model(checkpoint, loading)
    chat = not verbatim and bool(getattr(tokenizer, "chat_template", None))
    asked = sk.render(tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "return_details": True,
    }
    plain = sk.generate(model, tokenizer, [asked], **options)[0]
    norms = median_norms(model, [(asked.ids, plain.ids)], None, positions, str(steering.operation), str(steering.site))
    if dose is not None and not norms:
        raise ValueError(
            f"expected a steered position beyond the first for a dose; {positions!r} has none after a prompt of "
            f"{len(asked.ids)} tokens. Pass --coefficient, or other --positions."
        )
    steering = steering.resolved(norms)
    changed = sk.generate(model, tokenizer, [asked], steering=steering, **options)[0]  # draws the same numbers
    unsteered, steered = plain.text, changed.text
    steered_layers = list(steering.vector.layers)
    coefficient, dose = float(steering.coefficient), relative_dose(steering, norms)
    if as_json:
        values = {"unsteered": unsteered, "steered": steered, "coefficient": coefficient, "relative_dose": dose}
        print_json({**values, "layer": steered_layers[0] if len(steered_layers) == 1 else steered_layers})
        return
    label = "+".join(map(str, steered_layers))
    shown = f"coefficient {coefficient:g}" + ("" if math.isnan(dose) else f", dose {dose:.2f}")
    shown += "" if operation == "add" else f", {operation}"
    side_by_side({"unsteered": unsteered, f"layer {label}, {shown}": steered})
    hint(DOSE, as_json)


@with_load_options
def play(
    checkpoint: Checkpoint,
    loading: LoadOptions,
    vectors: Annotated[Path, typer.Option(help="A folder of vector files, or one file.")],
    port: Annotated[
        int, typer.Option(help="Port on this machine; no other machine can connect.", min=1, max=65535)
    ] = 8765,
    foreign: Foreign = False,
) -> None:
    """Serve a local page whose sliders steer the model.

    Both texts are streamed side by side. Needs the extra `play`.

    Example: steerkit play CHECKPOINT --vectors vectors/
    """
    loading.check(checkpoint)
    files = sorted(vectors.glob("*.safetensors")) if vectors.is_dir() else [vectors]
    if not files:
        raise FileNotFoundError(f"expected *.safetensors in {vectors}; there are none. Check the path.")
    check_vectors(files)
    check_port("127.0.0.1", port)
    import steerkit as sk
    from steerkit.show.play import play as serve

    named = {path.stem: sk.SteeringVector.load(path) for path in files}
    serve(*load_model(checkpoint, loading), named, port, foreign)
