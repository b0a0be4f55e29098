"""The residual stream, or another site, of one forward by layer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.layers import EMBED, Layer, Layers, layer_list
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.hooks import check_called, counted_forwards, observe_points, observe_streams
from steerkit.models.model import unwrap
from steerkit.models.site_names import DEFAULT
from steerkit.models.sites import find_sites, layers_with, points_at


@contextlib.contextmanager
def capture_resid(
    model: nn.Module, layers: Layers = "all", *, site: str = DEFAULT
) -> Iterator[dict[Layer, Float[Tensor, "batch pos d_model"]]]:
    """Read the residual stream, or another site, of the one forward that runs inside the `with`.

    Yields a dictionary, filled by that forward: layer -> stream after that block (`resid_post`), before the final norm
    also at the last layer; `"embed"` -> the input of block 0. These tensors are the model's own, not copies; those of
    other sites are copies.

    Args:
        layers: `"all"` (where the site was verified), one layer, or several (list, range, numpy array, torch tensor).
        site: `"resid_post"`, `"resid_pre"`, `"resid_mid"`, `"attn_out"`, `"mlp_out"` or `"z"`, see
            `steerkit.models.sites`.

    Raises:
        ValueError: a layer or a site that the model does not have.
        RuntimeError: a second forward inside the same `with`; a forward that ran no hooks of the blocks.

    Example:
        >>> with torch.no_grad(), sk.capture_resid(model, [8, "embed"]) as streams:
        ...     model(input_ids=ids)
        >>> streams[8].shape  # [batch, pos, d_model]
    """
    blocks = find_blocks(model)
    wanted = resolve_layers(model, blocks, layers, site)
    streams: dict[Layer, Tensor] = {}

    def read(layer: Layer, value: Tensor) -> None:
        if layer in streams:
            raise RuntimeError("expected one forward inside capture_resid; got a second. Use `collect` for many texts.")
        streams[layer] = blocks.kept(value) if site == DEFAULT else value.clone()

    with reading(model, blocks, site, wanted, read) as ran, counted_forwards(unwrap(model)) as forwards:
        yield streams
        if forwards[0]:
            check_called(ran, block_numbers(wanted))


@contextlib.contextmanager
def reading(
    model: nn.Module, blocks: Blocks, site: str, layers: Sequence[Layer], read: Callable[[Layer, Tensor], None]
) -> Iterator[set[int]]:
    """Call `read(layer, value)` for these layers in each forward inside the `with`, after all steering.

    Args:
        layers: what `resolve_layers` returned for this site.
        read: gets the value `[batch, pos, width]`, the model's own tensor.

    Yields:
        The blocks whose hooks have run, for `check_called`.
    """
    ran: set[int] = set()

    def observe(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
        for key, stream in ((EMBED, entered if layer == 0 else None), (layer, left)):
            if stream is not None:
                ran.add(layer)
                if key in layers:
                    read(key, stream)

    def observe_site(place: tuple[str, int], value: Tensor) -> None:
        ran.add(place[1])
        read(place[1], value)

    if site == DEFAULT:
        with observe_streams({layer: blocks.modules[layer] for layer in sorted(block_numbers(layers))}, observe):
            yield ran
    else:
        with observe_points(points_at(model, blocks, [(site, int(layer)) for layer in layers]), observe_site):
            yield ran


def resolve_layers(
    model: nn.Module, blocks: Blocks, layers: Layers, site: str = DEFAULT, warn: bool = True
) -> tuple[Layer, ...]:
    """Return `"all"`, one layer or several as a tuple of block indices (and `"embed"`).

    Args:
        layers: `"all"` are the layers at which the site was verified.
        warn: whether `"all"` warns where it leaves out layers; not where the caller chose `"all"`, not the user.

    Raises:
        ValueError: a layer or a site that the model does not have, no layer, or a layer given twice; `"embed"` at
            another site than `resid_post`, or of a model whose blocks overwrite what they receive.

    Warns:
        UserWarning: `"all"` leaves out layers at which the site was not verified, by number and with a reason.
    """
    if isinstance(layers, str) and layers == "all":
        found = layers_with(model, blocks, site)
        if warn and len(found) < len(blocks):
            reasons = find_sites(model).reasons
            left_out = [layer for layer in blocks.modules if layer not in found]
            warnings.warn(
                f"{site} was verified at {len(found)} of {len(blocks)} layers; layers='all' leaves out {left_out} "
                f"({site} of layer {left_out[0]}: {reasons[site, left_out[0]]}). Name the layers.",
                UserWarning,
                stacklevel=2,
            )
        return tuple(found)
    several = layer_list(layers)
    resolved = tuple(EMBED if isinstance(layer, str) and layer == EMBED else blocks.check(layer) for layer in several)
    if not resolved or len(set(resolved)) != len(resolved):
        raise ValueError(
            f"expected one layer at least, and each once; got {several}. Pass layers='all', or list each layer once."
        )
    if EMBED in resolved and site != DEFAULT:
        raise ValueError(f"expected block indices for the site {site}; got 'embed'. Pass site='resid_pre' at layer 0.")
    if EMBED in resolved and blocks.in_place:
        raise ValueError("expected block indices; got 'embed', which block 0 of this model overwrites. Leave it out.")
    points_at(model, blocks, [(site, int(layer)) for layer in resolved if layer != EMBED])
    return resolved


def block_numbers(layers: Sequence[Layer]) -> set[int]:
    """Return the blocks whose hooks read these layers; `"embed"` is read at the input of block 0."""
    return {0 if layer == EMBED else int(layer) for layer in layers}


def deepest(layers: Sequence[Layer]) -> Layer:
    """Return the layer that a forward reaches last."""
    return max(layers, key=lambda layer: -1 if layer == EMBED else int(layer))
