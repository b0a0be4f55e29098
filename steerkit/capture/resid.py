"""The residual stream of one forward, by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.layers import EMBED, Layer, Layers, layer_list
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.hooks import check_called, counted_forwards, observe_streams
from steerkit.models.model import unwrap


@contextlib.contextmanager
def capture_resid(
    model: nn.Module, layers: Layers = "all"
) -> Iterator[dict[Layer, Float[Tensor, "batch pos d_model"]]]:
    """Read the residual stream of the one forward that runs inside the `with`.

    Yields a dictionary, filled by that forward: layer -> stream after that block (`resid_post`), before the final norm
    also at the last layer; `"embed"` -> the input of block 0. The tensors are the model's own, not copies.

    Args:
        layers: `"all"`, one layer, or several (list, range, numpy array, torch tensor).

    Raises:
        ValueError: a layer that the model does not have.
        RuntimeError: a second forward inside the same `with`; a forward that ran no hooks of the blocks.

    Example:
        >>> with torch.no_grad(), sk.capture_resid(model, [8, "embed"]) as streams:
        ...     model(input_ids=ids)
        >>> streams[8].shape  # [batch, pos, d_model]
    """
    blocks = find_blocks(model)
    wanted = resolve_layers(blocks, layers)
    streams: dict[Layer, Tensor] = {}

    def read(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
        for key, stream in ((EMBED, entered if layer == 0 else None), (layer, left)):
            if key in wanted and stream is not None:
                if key in streams:
                    raise RuntimeError(
                        "expected one forward inside capture_resid; got a second. Use `collect` for many texts."
                    )
                streams[key] = stream

    hooked = hooked_blocks(blocks, wanted)
    with observe_streams(hooked, read), counted_forwards(unwrap(model)) as forwards:
        yield streams
        if forwards[0]:
            check_called({0 if key == EMBED else int(key) for key in streams}, set(hooked))


def resolve_layers(blocks: Blocks, layers: Layers) -> tuple[Layer, ...]:
    """Return `"all"`, one layer or several as a tuple of block indices (and `"embed"`).

    Raises:
        ValueError: a layer that the model does not have, no layer, or a layer given twice.
    """
    if isinstance(layers, str) and layers == "all":
        return tuple(blocks.modules)
    several = layer_list(layers)
    resolved = tuple(EMBED if isinstance(layer, str) and layer == EMBED else blocks.check(layer) for layer in several)
    if not resolved or len(set(resolved)) != len(resolved):
        raise ValueError(
            f"expected one layer at least, and each once; got {several}. Pass layers='all', or list each layer once."
        )
    return resolved


def hooked_blocks(blocks: Blocks, layers: Sequence[Layer]) -> dict[int, nn.Module]:
    """Return the blocks whose hooks read these layers; `"embed"` is read at the input of block 0."""
    return {layer: blocks.modules[layer] for layer in sorted({0 if k == EMBED else int(k) for k in layers})}
