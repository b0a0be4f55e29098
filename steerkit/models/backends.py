"""Backends: run the forwards of a model by another interpretability package, and read and steer it as usual."""

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
from steerkit.models.model import device_of

Run = Callable[[Sequence[nn.Module], dict[str, Any]], Any]


def through(model: nn.Module, tokenizer: Any, backend: str) -> nn.Module:
    """A copy of a model whose forwards another package runs; that package's hooks read and write the residual stream.

    Use the copy like any model: in `sk.collect`, `sk.generate`, `sk.sweep` and `steering.on`. It shares the weight
    tensors of `model`, hence its fingerprint, and has modules of its own, so `model` does not change. It is always in
    eval mode. Call this again after the modules of `model` have changed.

    Args:
        model: a transformers model, without a PEFT adapter.
        backend: `"transformer_lens"`: its `TransformerBridge`, at `blocks.l.hook_resid_post`; it computes attention
            with the eager kernel, which differs from others in the last bits. `"nnsight"`: its `TransformersModel`, at
            the output of each block.

    Returns:
        A module with the parameters, configuration and forward arguments of `model`.

    Raises:
        ValueError: an unknown backend, or a model with an adapter.
        ImportError: the backend's package is not installed.
        NoResidualStream: run by this package, the stream does not pass unchanged from block to block.

    Example:
        >>> lens = through(model, tokenizer, "transformer_lens")
        >>> sk.collect(lens, tokenizer, ["The sea is"])
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend among {list(BACKENDS)}; got {backend!r}. Pass one of them.")
    if importlib.util.find_spec(backend) is None:
        raise ImportError(
            f"expected the package {backend.replace('_', '-')} for backend {backend!r}; it is not installed. "
            "Install it: pip install 'imad-steerkit[backends]'"
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "expected a model without an adapter, which these packages do not support; got a PEFT model. Merge it: "
            "`model = model.merge_and_unload()`."
        )
    count = len(find_blocks(model))
    weights = {id(parameter): parameter for parameter in model.parameters()}
    modules = copy.deepcopy(model, weights).eval()  # new modules around the same tensors
    run = BACKENDS[backend](modules, tokenizer)
    tapped = _TappedModel(model, modules.config, backend, [_Tap() for _ in range(count)], run)
    find_blocks(tapped)
    return tapped


class _Tap(nn.Module):
    """A block of `_TappedModel`: called with the stream before and after the real block; it returns the latter.

    The hooks of `steerkit.models.hooks` on a tap read and edit the stream after the real block.
    """

    def forward(
        self, entered: Float[Tensor, "batch pos d_model"], left: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return left


class _TappedModel(nn.Module):
    """A model with the parameters of `model`, whose forward is `run` and whose blocks are taps.

    The list of taps is named after the backend, so the field `blocks` of the provenance names the backend.
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
        description = describe(model)
        setattr(self, ORIGIN, {key: description[key] for key in ("checkpoint", "weights")})
        signature = inspect.signature(model.forward)

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(taps, {**signature.bind_partial(*args).arguments, **kwargs})

        setattr(self, "forward", forward)  # noqa: B010  so that it has the signature of the model's forward


def _transformer_lens(model: nn.Module, tokenizer: Any) -> Run:
    """Forwards by transformer_lens' `TransformerBridge`, whose attention expects the mask of the eager kernel."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers.modeling_outputs import CausalLMOutputWithPast

    model.set_attn_implementation("eager")  # type: ignore[operator]
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=copy.deepcopy(model.config)).eval()

    def run(taps: Sequence[nn.Module], inputs: dict[str, Any]) -> Any:
        entered: dict[int, Tensor] = {}

        def before_block(stream: Tensor, hook: Any) -> None:
            entered[hook.layer()] = stream

        def after_block(stream: Tensor, hook: Any) -> Tensor:
            return taps[hook.layer()](entered.pop(hook.layer()), stream)

        points = {"pre": before_block, "post": after_block}
        hooks = [
            (f"blocks.{layer}.hook_resid_{point}", function)
            for layer in range(len(taps))
            for point, function in points.items()
        ]
        ids = inputs.pop("input_ids")
        with bridge.hooks(fwd_hooks=hooks):
            logits, cache = bridge(ids, return_type="logits_and_cache", **inputs)
        return CausalLMOutputWithPast(logits=logits, **{cache_field(CausalLMOutputWithPast): cache})

    return run


def _nnsight(model: nn.Module, tokenizer: Any) -> Run:
    """Forwards by nnsight's `TransformersModel`."""
    from nnsight import TransformersModel

    path = find_blocks(model).path
    traced = TransformersModel(
        model, tokenizer=copy.deepcopy(tokenizer), task="text-generation", device=device_of(model)
    )

    def run(taps: Sequence[nn.Module], inputs: dict[str, Any]) -> Any:
        with traced.trace(**inputs) as tracer:
            for tap, block in zip(taps, traced.get(path), strict=True):
                entered, out = block.input, block.output
                block.output = with_stream(out, tap(entered, stream_of(out)))
            output = tracer.result.save()
        return output  # noqa: RET504  assigned inside the trace, whose body nnsight runs

    return run


BACKENDS: dict[str, Callable[[nn.Module, Any], Run]] = {"transformer_lens": _transformer_lens, "nnsight": _nnsight}
