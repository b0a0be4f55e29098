"""Options that several commands share, and the one function that loads a model for a command."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from steerkit.cli.inputs import check_adapter, check_checkpoint
from steerkit.io.progress import spinner
from steerkit.show.terminal import plain

Checkpoint = Annotated[str, typer.Argument(help="A hub id, a local folder, or a .gguf file.")]
Pairs = Annotated[
    Path,
    typer.Argument(help='JSON lines of {"prompt", "positive", "negative"} and optionally "group".'),
]
Run = Annotated[Path, typer.Argument(help="The folder of a finished sweep.")]
Position = Annotated[
    str,
    typer.Option(
        help="Tokens to read: last, first, mean, letter (A of an answer (A)), or an index into the continuation."
    ),
]
Site = Annotated[
    str, typer.Option(help="What is read of a block: resid_post, resid_pre, resid_mid, attn_out, mlp_out or z (heads).")
]
Positions = Annotated[
    str,
    typer.Option(
        help="Steered positions: generated, from_last_prompt_token, prompt or all; with :k only the first k of them. "
        "ablate leaves position 0 out, unless it is prompt+0 or all+0."
    ),
]
Operation = Annotated[
    str,
    typer.Option(
        help="add, ablate, add_normed, clamp, clamp:value, clamp:low:high, or rotate (coefficient in radians)."
    ),
]
Foreign = Annotated[bool, typer.Option("--foreign", help="Allow vectors that were read from other weights.")]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of new tokens per text.", min=1)]
TopP = Annotated[
    float, typer.Option(help="Nucleus sampling: probability mass of the tokens sampled from.", min=0, max=1)
]
Seed = Annotated[int, typer.Option(help="Sampling seed.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True)
class LoadOptions:
    """How to load the model: the options of every command that loads one (see `steerkit.load`)."""

    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter, as a hub id or a folder.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, or auto for several devices.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="Type of the weights; default float32 on a CPU, the checkpoint's own elsewhere."),
    ] = None
    bits: Annotated[
        int | None, typer.Option(help="4 or 8: quantise the weights; needs a GPU and the package bitsandbytes.")
    ] = None
    kernels: Annotated[
        Literal["auto", "onednn", "torch"],
        typer.Option(help="What computes linear layers on a CPU; auto measures which one is faster."),
    ] = "auto"
    backend: Annotated[
        Literal["transformer_lens", "nnsight"] | None,
        typer.Option(help="Run the model with this package instead of transformers."),
    ] = None

    def check(self, checkpoint: str) -> None:
        """Check everything that can be checked without importing torch.

        Raises:
            FileNotFoundError: no checkpoint or adapter at a local path.
            ValueError: bits that are neither 4 nor 8.
        """
        if self.bits not in (None, 4, 8):
            raise ValueError(f"expected bits to be 4 or 8; got {self.bits}. Pass one of these, or omit --bits.")
        check_checkpoint(checkpoint)
        if self.adapter is not None:
            check_adapter(self.adapter)


def with_load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `LoadOptions`; it receives them as its parameter `loading`."""
    hints = get_type_hints(LoadOptions, include_extras=True)
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "loading"]
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(LoadOptions)
    ]

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        loading = {field.name: options.pop(field.name) for field in fields(LoadOptions) if field.name in options}
        command(*args, loading=LoadOptions(**loading), **options)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    setattr(run, "__signature__", signature.replace(parameters=[*parameters, *added]))  # noqa: B010  not in its type
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
    return run


def load_model(checkpoint: str, loading: LoadOptions) -> tuple[Any, Any]:
    """Load `(model, tokenizer)` for a command, with a spinner on a terminal or one line in a log."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    activity = f"loading {' '.join(plain(checkpoint, ' ').split())}"
    with spinner(activity):
        from steerkit.models.load import load
    return load(checkpoint, **asdict(loading))
