"""The residual stream of one forward, by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.activations import EMBED, Layer
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.hooks import observe_streams

Layers = str | int | Sequence[Layer]


@contextlib.contextmanager
def capture_resid(
    model: nn.Module, layers: Layers = "all"
) -> Iterator[dict[Layer, Float[Tensor, "batch pos d_model"]]]:
    """Read the residual stream of the one forward that runs inside the `with`.

    Yields a dictionary, filled by that forward: layer -> stream after that block (`resid_post`), before the final norm
    also at the last layer; `"embed"` -> what enters block 0. The tensors are the model's own, not copies.

    Raises:
        ValueError: a layer that the model does not have.
        RuntimeError: a second forward inside the same `with`.
    """
    blocks = find_blocks(model)
    wanted = resolve_layers(blocks, layers)
    streams: dict[Layer, Tensor] = {}

    def see(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
        for key, stream in ((EMBED, entered if layer == 0 else None), (layer, left)):
            if key in wanted and stream is not None:
                if key in streams:
                    raise RuntimeError(
                        "expected one forward inside capture_resid; got a second. Use `collect` for many texts."
                    )
                streams[key] = stream

    with observe_streams(hooked_blocks(blocks, wanted), see):
        yield streams


def resolve_layers(blocks: Blocks, layers: Layers) -> tuple[Layer, ...]:
    """`"all"`, one layer or several as a tuple of block indices (and `"embed"`), each checked, none twice."""
    if isinstance(layers, str) and layers == "all":
        return tuple(blocks.modules)
    several = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    found = tuple(EMBED if isinstance(layer, str) and layer == EMBED else blocks.check(layer) for layer in several)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"expected one layer at least, and each once; got {several}. Say 'all', or list them.")
    return found


def hooked_blocks(blocks: Blocks, layers: Sequence[Layer]) -> dict[int, nn.Module]:
    return {layer: blocks.modules[layer] for layer in sorted({0 if k == EMBED else int(k) for k in layers})}
