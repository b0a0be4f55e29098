"""Blocks: where a model's residual stream stands, found by a rule and verified by running it."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.models.hooks import edit_streams, observe_streams
from steerkit.models.model import evaluating, text_config, unwrap

_found: weakref.WeakKeyDictionary[nn.Module, Blocks] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model.

    Args:
        path: where the list of blocks stands in the unwrapped model, e.g. `model.layers`.
        modules: the blocks by layer; the stream of layer l (`resid_post`) is the output of `modules[l]`.
        owner: the module that runs the blocks; its forward sees the cache before any block does.
        d_model: the width of the stream.
        positions: whether the model takes `position_ids`, and counts a text's positions from 0 when it is given none.
            RoBERTa's family takes them and counts from another number: it is left to count by itself.
    """

    path: str
    modules: dict[int, nn.Module]
    owner: nn.Module
    d_model: int
    positions: bool

    def __len__(self) -> int:
        return len(self.modules)

    def check(self, layer: object) -> int:
        """`layer` if it is one of the model's, else `ValueError`; -1 is refused, since it would be ambiguous."""
        number = int(layer) if isinstance(layer, Integral) and not isinstance(layer, bool) else -1
        if number not in self.modules:
            raise ValueError(
                f"expected a layer from 0 to {len(self) - 1} (the stream after that block); got {layer!r}. "
                f"Give a whole number in that range; the last layer is {len(self) - 1}."
            )
        return number


class NoResidualStream(ValueError):
    """The model has no list of blocks that passes verification."""


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """The model's decoder blocks, verified once per model by three forwards of a five-token probe.

    The rule: a list of modules as long as the configuration says the decoder has layers (the shallowest such list), in
    which every block runs once, in order, returns a stream of shape `[batch, pos, d_model]`, and receives exactly what
    the block before it returned; and a change of the last block's output moves the logits. No table of names.

    Raises:
        NoResidualStream: no list passes; the message gives the reason for each candidate, and the override. Or the
            model does not forward a text alone.
    """
    base = unwrap(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise NoResidualStream(
            "expected a model, or one with an adapter on its weights; got one with learnt prompts, whose virtual "
            "tokens have no place in a text. Write the prompt in words."
        )
    if path is None and base in _found:
        known = _found[base]
        if list(base.get_submodule(known.path)) == list(known.modules.values()):
            _refuse_compiled(model, base, known.path)
            return known
    reasons = []
    for candidate in _candidates(base) if path is None else [path]:
        _refuse_compiled(model, base, candidate)
        blocks = _verified(base, candidate)
        if isinstance(blocks, Blocks):
            _found[base] = blocks
            return blocks
        reasons.append(f"  {candidate}: {blocks}")
    raise NoResidualStream(
        f"expected a list of decoder blocks in {type(base).__name__}; none passed verification.\n"
        + ("\n".join(reasons) or "  no list of modules is as long as the configuration says the decoder is")
        + '\nIf you know where they are, say blocks="path.to.modulelist" when loading. A model whose stream does not '
        "pass unchanged from block to block cannot be steered rightly and is refused."
    )


def _refuse_compiled(model: nn.Module, base: nn.Module, path: str) -> None:
    """`ValueError` if code that was compiled as a whole runs the blocks: it does not call hooks that came later."""
    parts = path.split(".")
    above = [base, *(base.get_submodule(".".join(parts[:n])) for n in range(1, len(parts)))]
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in (model, *above)):
        raise ValueError(
            "expected a model that is not compiled as a whole: compiled code never calls the hooks that steer it. "
            "Compile its blocks instead, one by one: `for block in blocks: block.compile()`."
        )


def _candidates(model: nn.Module) -> list[str]:
    config = text_config(model)
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    lengths = {getattr(config, name, None) for name in names} - {None}
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return sorted((name for name, length in lists if length in lengths), key=lambda name: name.count("."))


def _verified(model: nn.Module, path: str) -> Blocks | str:
    """The blocks at `path`, or why they are no residual stream."""
    try:
        found: Any = model.get_submodule(path)
        modules: dict[int, nn.Module] = dict(enumerate(found))
    except (AttributeError, TypeError):
        return "there is no list of modules"
    if not modules:
        return "the list is empty"
    device = next(model.parameters()).device
    ids = (torch.arange(1, 6, device=device) % text_config(model).vocab_size).unsqueeze(0)
    calls: list[tuple[int, Tensor | None, Tensor | None]] = []

    def perturbed(_: int, stream: Tensor) -> Tensor:
        return stream + stream.std() * torch.linspace(-1, 1, stream.shape[-1]).to(stream)

    with evaluating(model), torch.inference_mode():
        try:
            with observe_streams(modules, lambda *call: calls.append(call)):
                plain = model(input_ids=ids, use_cache=False).logits
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NoResidualStream(
                f"expected a model that forwards ids and nothing else; {type(model).__name__} raises "
                f"{type(error).__name__} ({error}). One that needs more than a text cannot be read here."
            ) from error
        if reason := _broken_chain(calls, len(modules), ids.shape[1]):
            return reason
        last = len(modules) - 1
        with edit_streams({last: modules[last]}, perturbed):
            moved = model(input_ids=ids, use_cache=False).logits
        if torch.equal(plain, moved):
            return "a change of the last block's output does not move the logits"
        counted = _from_zero(model, ids, plain)
    stream = calls[0][2]
    assert stream is not None
    return Blocks(path, modules, model.get_submodule(path.rpartition(".")[0]), stream.shape[-1], counted)


def _from_zero(model: nn.Module, ids: Tensor, plain: Tensor) -> bool:
    """Whether positions that are given, from 0 on, are those that the model counts by itself."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    try:
        given = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    off = float((given - plain).float().norm() / plain.float().norm())
    return off <= (1e-3 if plain.dtype in (torch.float32, torch.float64) else 0.1)


def _broken_chain(calls: list[tuple[int, Tensor | None, Tensor | None]], count: int, width: int) -> str | None:
    """Why these calls are not one stream through `count` blocks; None if they are."""
    if [layer for layer, _, _ in calls] != list(range(count)):
        return (
            f"expected {count} blocks to run once each, in order; they ran as {[layer for layer, _, _ in calls][:12]}"
        )
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
