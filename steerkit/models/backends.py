"""Backends: a model whose forwards another interpretability package runs, to be read and steered like any other."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from steerkit.models.blocks import find_blocks
from steerkit.models.cache_argument import cache_field
from steerkit.models.hooks import stream_of, with_stream
from steerkit.models.identity import ORIGIN, describe

Run = Callable[[Sequence[nn.Module], dict[str, Any]], Any]


def through(model: nn.Module, tokenizer: Any, backend: str) -> nn.Module:
    """The same model, its forwards run by another package and its residual stream read and written by that one's hooks.

    What is returned stands wherever a model does: `sk.collect`, `sk.generate`, `sk.sweep`, `steering.on`. It has the
    weights of `model` (the tensors themselves: no second copy in memory), hence its fingerprint, but modules of its
    own, so that `model` stays as it is; it is always in eval mode. Make it anew when the modules of `model` change.

    Args:
        model: a transformers model, without a PEFT adapter.
        backend: `"transformer_lens"`: its `TransformerBridge`, at `blocks.l.hook_resid_post`; it computes attention
            with the eager kernel, which differs from others in the last bits. `"nnsight"`: its `TransformersModel`, at
            the output of each block.

    Raises:
        ValueError: an unknown backend, or a model with an adapter.
        ImportError: the backend's package is not installed.
        NoResidualStream: through this package the stream does not pass unchanged from block to block.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend among {list(BACKENDS)}; got {backend!r}.")
    if importlib.util.find_spec(backend) is None:
        raise ImportError(
            f"expected the package {backend.replace('_', '-')} for backend {backend!r}; it is not installed. "
            "Do: pip install 'imad-steerkit[backends]'"
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "expected a model without an adapter, which these packages do not know; got one. Merge it: "
            "`model = model.merge_and_unload()`."
        )
    count = len(find_blocks(model))
    weights = {id(parameter): parameter for parameter in model.parameters()}
    own = copy.deepcopy(model, weights).eval()  # modules anew around the same tensors
    run = BACKENDS[backend](own, tokenizer)
    tapped = _Tapped(model, own.config, backend, [_Tap() for _ in range(count)], run)
    find_blocks(tapped)
    return tapped


class _Tap(nn.Module):
    """A block of `_Tapped`: the stream that entered the real block and the one that left it; the latter goes on."""

    def forward(
        self, entered: Float[Tensor, "batch pos d_model"], left: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return left


class _Tapped(nn.Module):
    """A model by another name: parameters and configuration of `model`, forwards by `run`, taps in place of blocks.

    The list of taps is named after the backend, so that `blocks` in the provenance of what is read says it.
    """

    def __init__(self, model: nn.Module, config: Any, backend: str, taps: Sequence[nn.Module], run: Run) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.add_module(backend, nn.ModuleList(taps))
        self.training = False
        self.config = config
        self.generation_config = getattr(model, "generation_config", None)
        self.get_input_embeddings: Any = model.get_input_embeddings
        about = describe(model)
        setattr(self, ORIGIN, {key: about[key] for key in ("checkpoint", "weights")})
        signature = inspect.signature(model.forward)

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(taps, {**signature.bind_partial(*args).arguments, **kwargs})

        setattr(self, "forward", forward)  # noqa: B010  what it takes is what the model takes


def _transformer_lens(model: nn.Module, tokenizer: Any) -> Run:
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers.modeling_outputs import CausalLMOutputWithPast

    model.set_attn_implementation("eager")  # type: ignore[operator]  # its own attention expects the mask of this kernel
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=copy.deepcopy(model.config)).eval()

    def run(taps: Sequence[nn.Module], inputs: dict[str, Any]) -> Any:
        entering: dict[int, Tensor] = {}

        def enter(stream: Tensor, hook: Any) -> None:
            entering[hook.layer()] = stream

        def leave(stream: Tensor, hook: Any) -> Tensor:
            return taps[hook.layer()](entering.pop(hook.layer()), stream)

        ends = {"pre": enter, "post": leave}
        hooks = [(f"blocks.{layer}.hook_resid_{end}", ends[end]) for layer in range(len(taps)) for end in ends]
        ids = inputs.pop("input_ids")
        with bridge.hooks(fwd_hooks=hooks):
            logits, cache = bridge(ids, return_type="logits_and_cache", **inputs)
        return CausalLMOutputWithPast(logits=logits, **{cache_field(CausalLMOutputWithPast): cache})

    return run


def _nnsight(model: nn.Module, tokenizer: Any) -> Run:
    from nnsight import TransformersModel

    device = next(model.parameters()).device
    path = find_blocks(model).path
    traced = TransformersModel(model, tokenizer=copy.deepcopy(tokenizer), task="text-generation", device=device)

    def run(taps: Sequence[nn.Module], inputs: dict[str, Any]) -> Any:
        with traced.trace(**inputs) as tracer:
            for tap, block in zip(taps, traced.get(path), strict=True):
                entered, out = block.input, block.output
                block.output = with_stream(out, tap(entered, stream_of(out)))
            output = tracer.result.save()
        return output  # noqa: RET504  bound inside the trace, whose body runs elsewhere

    return run


BACKENDS: dict[str, Callable[[nn.Module, Any], Run]] = {"transformer_lens": _transformer_lens, "nnsight": _nnsight}
