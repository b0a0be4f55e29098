"""Unembedding: the model's own map from the stream after its last block to logits, applied to any stream."""

from __future__ import annotations

import contextlib
import weakref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.hooks import check_called, edit_streams, observe_streams, skipped
from steerkit.models.kernels import running
from steerkit.models.model import RAISED, device_of, text_config, unwrap

ROWS = 256
"""Streams per forward."""

_verified: weakref.WeakKeyDictionary[nn.Module, tuple[str, bool]] = weakref.WeakKeyDictionary()


def unembed(model: nn.Module, streams: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """Return the logits of streams as if they came from the last block: final norm, unembedding, scale and softcap.

    Nothing is looked up by name: the streams replace the output of the last block in forwards of one-token texts, so
    the model itself does everything that follows. The blocks are skipped where the result is the same, which is
    verified once per model, on a five-token text; so is that the map acts on each position alone.

    Args:
        streams: in the unit and dtype of the residual stream.

    Returns:
        Float32 logits on the model's device.

    Raises:
        ValueError: streams of another width; a model whose logits are not determined by the last stream.

    Example:
        >>> with torch.no_grad(), sk.capture_resid(model, 14) as streams:
        ...     model(input_ids=ids)
        >>> unembed(model, streams[14][0]).argmax(-1)
    """
    blocks = find_blocks(model)
    if streams.ndim != 2 or streams.shape[1] != blocks.d_model:
        raise ValueError(
            f"expected streams [n, {blocks.d_model}]; got {list(streams.shape)}. Flatten batch and position."
        )
    skip = _verify(model, blocks)
    return torch.cat([_unembed(model, blocks, some, skip) for some in streams.split(ROWS)])


def _unembed(model: nn.Module, blocks: Blocks, streams: Tensor, skip: bool) -> Tensor:
    last = len(blocks) - 1
    token = 1 % text_config(model).vocab_size
    ids = torch.full((len(streams), 1), token, device=device_of(model))

    def replaced(_: int, stream: Tensor) -> Tensor:
        return streams[:, None].to(stream)

    with (
        running(model),
        torch.inference_mode(),
        skipped(blocks.modules) if skip else contextlib.nullcontext(),
        edit_streams({last: blocks.modules[last]}, replaced) as ran,
    ):
        logits = model(input_ids=ids, use_cache=False).logits[:, 0]
    check_called(ran, {last})
    return logits.float()


def _verify(model: nn.Module, blocks: Blocks) -> bool:
    """Whether blocks can be skipped; `ValueError` unless the logits of a text are the map of its last streams."""
    base = unwrap(model)
    path, skip = _verified.get(base, ("", False))
    if path == blocks.path:
        return skip
    last, found = len(blocks) - 1, list[Tensor]()
    ids = (torch.arange(1, 6, device=device_of(model)) % text_config(model).vocab_size).unsqueeze(0)
    with (
        running(model),
        torch.inference_mode(),
        observe_streams({last: blocks.modules[last]}, lambda _, __, left: found.append(left)),  # type: ignore[arg-type]
    ):
        wanted = model(input_ids=ids, use_cache=False).logits[0].float()
    limit = 1e-3 if found[0].dtype in (torch.float32, torch.float64) else 0.05
    error = float("nan")
    for skip in (True, False):
        try:
            logits = _unembed(model, blocks, found[0][0], skip)
        except RAISED:
            if not skip:
                raise
            continue
        error = float((logits - wanted).norm() / wanted.norm()) if logits.shape == wanted.shape else float("inf")
        if error <= limit:
            _verified[base] = blocks.path, skip
            return skip
    raise ValueError(
        f"expected logits that the stream after the last block determines, position by position; those of "
        f"{type(base).__name__} differ by {error:.2g} (relative). A logit lens of this model would be wrong: use "
        "another model."
    )
