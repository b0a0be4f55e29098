"""Blocks: the decoder blocks of a model, which read and add to its residual stream (`resid_post` after each).

They are located by a rule and verified by forwards of a short probe.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.models.hooks import edit_streams, observe_streams
from steerkit.models.model import RAISED, device_of, evaluating, text_config, unwrap

_verified_blocks: weakref.WeakKeyDictionary[nn.Module, Blocks] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model.

    Args:
        path: path of the list of blocks in the unwrapped model, e.g. `model.layers`.
        modules: the blocks by layer; the stream of layer l (`resid_post`) is the output of `modules[l]`.
        owner: the module that runs the blocks; its forward gets the cache before any block does.
        d_model: the width of the stream.
        positions: whether `position_ids` may be passed: the model takes them, and its default ones count from 0.
            RoBERTa's family counts from another number, so it gets no `position_ids`.
        in_place: whether a block changes the tensor that it receives and returns it. A stream that is kept has to be a
            copy then: the next block changes it.
    """

    path: str
    modules: dict[int, nn.Module]
    owner: nn.Module
    d_model: int
    positions: bool
    in_place: bool = False

    def kept(self, stream: Tensor) -> Tensor:
        """The stream as a tensor that later blocks do not change."""
        return stream.clone() if self.in_place else stream

    def __len__(self) -> int:
        return len(self.modules)

    def check(self, layer: object) -> int:
        """`layer` as an int; `ValueError` unless it is a layer of the model. -1 is refused, since it is ambiguous."""
        number = int(layer) if isinstance(layer, Integral) and not isinstance(layer, bool) else -1
        if number not in self.modules:
            raise ValueError(
                f"expected a layer from 0 to {len(self) - 1} (the stream after that block); got {layer!r}. "
                f"Pass an integer in that range; the last layer is {len(self) - 1}."
            )
        return number


class NoResidualStream(ValueError):
    """The model has no list of blocks that passes verification."""


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """The model's decoder blocks, verified once per model by four forwards of a five-token probe.

    The candidates are the lists of modules whose length is the configured number of layers, the shallowest first. A
    candidate passes if every block runs once, in order, returns a stream `[batch, pos, d_model]` and receives exactly
    what the block before it returned, if a change of the last block's output changes the logits, and if a change of the
    last token leaves the streams of earlier positions as they are (causality).

    Args:
        model: a causal language model, or a PEFT model.
        path: path of the list of blocks in the unwrapped model, verified too; None applies the rule.

    Raises:
        NoResidualStream: no list passes (the message gives the reason for each candidate), the model needs more inputs
            than token ids, or it has an adapter with learnt prompts.
        ValueError: the model is compiled as a whole.

    Example: `find_blocks(model).path` is `"model.layers"` for Llama.
    """
    base = unwrap(model)
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "is_adaption_prompt", False):
        raise NoResidualStream(
            "expected a model without learnt prompts; got an adapter with learnt prompts, whose virtual tokens are not "
            "tokens of a text. Write the prompt as text, or use an adapter of the weights."
        )
    if path is None and base in _verified_blocks:
        known = _verified_blocks[base]
        if list(base.get_submodule(known.path)) == list(known.modules.values()):
            _refuse_compiled(model, base, known.path)
            return known
    reasons = []
    for candidate in _candidates(base) if path is None else [path]:
        _refuse_compiled(model, base, candidate)
        blocks = _verified(base, candidate)
        if isinstance(blocks, Blocks):
            _verified_blocks[base] = blocks
            return blocks
        reasons.append(f"  {candidate}: {blocks}")
    raise NoResidualStream(
        f"expected a list of decoder blocks in {type(base).__name__}; none passed verification.\n"
        + ("\n".join(reasons) or "  no list of modules is as long as the configuration says the decoder is")
        + '\nPass blocks="path.to.modulelist" to `load` if you know their path. A model whose stream does not pass '
        "unchanged from block to block cannot be steered correctly and is refused."
    )


def _refuse_compiled(model: nn.Module, base: nn.Module, path: str) -> None:
    """`ValueError` if compiled code runs the blocks: it does not call hooks that are registered after compilation."""
    parts = path.split(".")
    parents = [base, *(base.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))]
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in (model, *parents)):
        raise ValueError(
            "expected a model that is not compiled as a whole; got compiled code, which does not call the hooks that "
            "steer it. Compile the blocks one by one instead: `for block in blocks: block.compile()`."
        )


def _candidates(model: nn.Module) -> list[str]:
    """Paths of the lists of modules whose length is the configured number of layers, the shallowest first."""
    config = text_config(model)
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    lengths = {getattr(config, name, None) for name in names} - {None}
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return sorted((name for name, length in lists if length in lengths), key=lambda name: name.count("."))


def _verified(model: nn.Module, path: str) -> Blocks | str:
    """The blocks at `path`, or the reason why they fail the verification."""
    try:
        listed: Any = model.get_submodule(path)
        modules: dict[int, nn.Module] = dict(enumerate(listed))
    except (AttributeError, TypeError):
        return "there is no list of modules"
    if not modules:
        return "the list is empty"
    device = device_of(model)
    ids = (torch.arange(1, 6, device=device) % text_config(model).vocab_size).unsqueeze(0)
    calls: list[tuple[int, Tensor | None, Tensor | None]] = []

    def perturbed(_: int, stream: Tensor) -> Tensor:
        return stream + stream.std() * torch.linspace(-1, 1, stream.shape[-1]).to(stream)

    with evaluating(model), torch.inference_mode():
        try:
            with observe_streams(modules, lambda *call: calls.append(call)):
                plain = model(input_ids=ids, use_cache=False).logits
        except RAISED as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NoResidualStream(
                f"expected a model that forwards ids and nothing else; {type(model).__name__} raises "
                f"{type(error).__name__} ({error}). Use a model whose only input is text."
            ) from error
        if reason := _broken_chain(calls, len(modules), ids.shape[1]):
            return reason
        if reason := _looks_ahead(model, modules, ids, [left for _, _, left in calls]):
            return reason
        last = len(modules) - 1
        with edit_streams({last: modules[last]}, perturbed):
            moved = model(input_ids=ids, use_cache=False).logits
        if torch.equal(plain, moved):
            return "a change of the last block's output does not move the logits"
        positions = _positions_from_zero(model, ids, plain)
    stream = calls[0][2]
    assert stream is not None
    in_place = any(
        entered is not None and left is not None and entered.data_ptr() == left.data_ptr() for _, entered, left in calls
    )
    owner = model.get_submodule(path.rpartition(".")[0])
    return Blocks(path, modules, owner, stream.shape[-1], positions, in_place)


def _looks_ahead(
    model: nn.Module, modules: dict[int, nn.Module], ids: Tensor, plain: list[Tensor | None]
) -> str | None:
    """The reason why the model is not causal: earlier streams move with the last token; None if it is causal."""
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % text_config(model).vocab_size
    moved: list[Tensor | None] = []
    with observe_streams(modules, lambda layer, entered, left: moved.append(left)):
        model(input_ids=other, use_cache=False)
    for layer, (before, after) in enumerate(zip(plain, moved, strict=True)):
        assert before is not None and after is not None
        earlier, same = before[:, :-1].float(), after[:, :-1].float()
        limit = 1e-3 if before.dtype in (torch.float32, torch.float64) else 0.05
        if float((earlier - same).norm()) > limit * float(earlier.norm()):
            return (
                f"the stream after block {layer} at earlier tokens changes with the last token: attention is "
                "bidirectional (an encoder, or a model without is_decoder=True in its configuration), and a causal "
                "model is needed"
            )
    return None


def _positions_from_zero(model: nn.Module, ids: Tensor, plain: Tensor) -> bool:
    """Whether the model takes `position_ids`, and position ids from 0 give the logits of its default ones."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    try:
        given = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    except RAISED:
        return False
    relative_error = float((given - plain).float().norm() / plain.float().norm())
    return relative_error <= (1e-3 if plain.dtype in (torch.float32, torch.float64) else 0.1)


def _broken_chain(calls: list[tuple[int, Tensor | None, Tensor | None]], count: int, width: int) -> str | None:
    """The reason why these calls are not one stream through `count` blocks; None if they are."""
    order = [layer for layer, _, _ in calls]
    if not order:
        return (
            f"expected {count} blocks to run their hooks; none did: the model calls `block.forward(...)`, or another "
            "`__call__` that runs no hooks, or does not use these blocks"
        )
    if order != list(range(count)):
        return f"expected {count} blocks to run once each, in order; they ran as {order[:12]}"
    before: Tensor | None = None
    for layer, entered, left in calls:
        if left is None or left.ndim != 3 or left.shape[:2] != (1, width):
            shape = "no single stream" if left is None else list(left.shape)
            return f"block {layer} returns {shape} for {width} tokens, not [1, {width}, d_model]"
        if before is not None:
            if left.shape != before.shape:
                return f"block {layer} changes the stream's width from {before.shape[-1]} to {left.shape[-1]}"
            if entered is None or entered.shape != before.shape or not torch.equal(entered, before):
                return f"block {layer} does not receive what block {layer - 1} returned"
        before = left
    return None
