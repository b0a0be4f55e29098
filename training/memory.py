"""Memory of a training step and of generation, counted from the model's configuration; no weights are allocated."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from training.train.checkpoints import LoRA, with_adapter
from training.train.log_probs import NUMBERS

MARGIN = 1.1
"""Factor of an estimate, for the allocator and small tensors; benchmarks/TRAINING_MEMORY.md shows what it leaves."""
KEPT = 2.7
"""On a CPU: how much larger a process is than its memory in use at most, as measured in the same table."""
CHUNK = 2048
"""Prompt tokens that the engine forwards at once on a CPU; on a GPU it forwards the prompts of a batch together."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the peak of a training step.

    Args:
        weights: all weights, adapter included, and a copy of the model as reference if there is one.
        optimizer: gradients and Adam's two moments of the trained weights.
        activations: tensors that the backward pass of the blocks reads.
        backward: tensors of the backward pass: the logits that are held at once, the gradients of the last hidden
            states and of a trained output matrix, and those in one block.
    """

    weights: int
    optimizer: int
    activations: int
    backward: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.optimizer + self.activations + self.backward

    @property
    def held(self) -> int:
        """What stays between two steps: the weights and Adam's two moments."""
        return self.weights + self.optimizer * 2 // 3


def blank(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a causal language model whose weights have shapes and no values (device "meta").

    Example:
        >>> blank(AutoConfig.from_pretrained("meta-llama/Llama-3.1-8B-Instruct")).num_parameters()
        8030261248
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def training_step(
    config: Any,
    lora: LoRA | None,
    rows: int,
    tokens: int,
    *,
    train_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    reference: bool = False,
    checkpointing: bool = False,
) -> StepMemory:
    """Return the memory of a training step on `rows` texts of `tokens` tokens each.

    The activations are counted, not estimated from a formula: the model's own code runs on tensors without values, with
    one and with two blocks, and the tensors that autograd keeps are added up. The difference of the two is a block.
    With N = rows x tokens, V rows of embeddings, d = d_model and inner width f, the backward pass holds min(N V, 8
    million) logits three times, 2 N d numbers of gradients of the last hidden states, V d more where the output matrix
    is trained, and N (4 d + 3 f) in one block. With gradient checkpointing, each block keeps its input of N d numbers.
    The backward pass then holds the larger of two: the logits with what belongs to them, or all tensors of one block.

    Args:
        config: configuration of a causal language model of transformers.
        lora: the adapter; None trains all weights.
        rows: texts per backward pass (micro-batch).
        tokens: tokens of each text, prompt included.
        train_embeddings: whether the embeddings are trained beside the adapter, as SFT on new tags does.
        dtype: data type of the weights that are not trained; trained ones are float32.
        autocast: whether the products are computed in bfloat16 (always on a GPU).
        checkpointing: whether only the inputs of the blocks are kept, and one block's tensors at a time.
        reference: whether a second copy of all weights is held (GRPO with `beta > 0` and without an adapter).

    Raises:
        ValueError: no rows or tokens; a mixture of experts in float32, which cannot be counted.

    Example:
        >>> training_step(LlamaConfig(), LoRA(), rows=4, tokens=2048, dtype=torch.bfloat16, autocast=True).total / 2**30
    """
    if min(rows, tokens) < 1:
        raise ValueError(f"expected at least one row of one token; got {rows} x {tokens}. Pass positive numbers.")
    text = config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    one, two = (
        _counted(_with_layers(config, layers), lora, train_embeddings, rows, tokens, dtype, autocast)
        for layers in (1, 2)
    )
    weights, trained, activations = (a + (depth - 1) * (b - a) for a, b in zip(one, two, strict=True))
    n = rows * tokens
    table = text.vocab_size * text.hidden_size
    logits = 12 * min(n * text.vocab_size, NUMBERS) + 8 * n * text.hidden_size
    logits += 4 * table if lora is None or train_embeddings else 0
    of_block = dtype.itemsize * n * _block_numbers(text)
    if checkpointing:
        block = two[2] - one[2]
        stream = 4 if lora is None else dtype.itemsize  # weights that are all trained are float32
        activations = one[2] - block + depth * n * text.hidden_size * stream
        backward = max(logits, block + of_block)
    else:
        backward = logits + of_block
    copies = 2 if reference and lora is None else 1
    return StepMemory(copies * weights, 3 * trained, activations, backward)


def generation(
    config: Any, rows: int, prompt: int, new: int, dtype: torch.dtype = torch.float32, cpu: bool = True
) -> int:
    """Return the bytes that generation needs beside the weights.

    With L layers, K keys and values per token and layer, V rows of embeddings, d_model d, inner width f, w bytes per
    number and C tokens that are forwarded together:

        w rows (prompt + new) L K  +  12 rows V  +  w C (4 d + 3 f)

    Args:
        config: configuration of a causal language model of transformers.
        rows: texts generated at once.
        prompt: tokens of a prompt.
        new: new tokens of a text.
        dtype: data type of the weights and of the cache.
        cpu: whether the engine runs on a CPU, where it forwards at most `CHUNK` prompt tokens at once.

    Example:
        >>> generation(LlamaConfig(), rows=256, prompt=200, new=1024, dtype=torch.bfloat16, cpu=False) / 2**30
    """
    text = config.get_text_config(decoder=True)
    width = torch.finfo(dtype).bits // 8
    forwarded = min(CHUNK, rows * prompt) if cpu else rows * prompt
    cache = width * rows * (prompt + new) * text.num_hidden_layers * kv_width(config)
    return int(cache + 12 * rows * text.vocab_size + width * forwarded * _block_numbers(text))


def rollouts(
    config: Any,
    lora: LoRA | None,
    step: StepMemory,
    rows: int,
    prompt: int,
    new: int,
    dtype: torch.dtype = torch.float32,
    cpu: bool = True,
) -> int:
    """Return the bytes while GRPO generates its completions.

    They are what a training step leaves, what generation needs, and on a GPU a copy of the weights that the adapter is
    merged into (`training.train.rollouts.merged`).

    Args:
        config: configuration of a causal language model of transformers.
        lora: the adapter; None trains all weights.
        step: a training step of the policy.
        rows: completions generated at once.
        prompt: tokens of a prompt.
        new: new tokens of a completion.
        dtype: data type of the weights and of the cache.
        cpu: whether the engine runs on a CPU.

    Example:
        >>> step = training_step(LlamaConfig(), LoRA(), rows=4, tokens=2200)
        >>> rollouts(LlamaConfig(), LoRA(), step, rows=4, prompt=200, new=2000) / 2**30
    """
    copied = 0 if cpu or lora is None else _adapted_weights(config, lora, dtype)
    return step.held + copied + generation(config, rows, prompt, new, torch.float32 if lora is None else dtype, cpu)


def _adapted_weights(config: Any, lora: LoRA, dtype: torch.dtype) -> int:
    """Return the bytes of the weights that have an adapter beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def of(layers: int) -> int:
        model = _adapted(blank(_with_layers(config, layers), dtype), lora, train_embeddings=False)
        bases: set[Any] = {module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)}
        weights = [weight for base in bases for name, weight in base.named_parameters(recurse=False) if name != "bias"]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    one, two = of(1), of(2)
    return int(one + (config.get_text_config(decoder=True).num_hidden_layers - 1) * (two - one))


def _adapted(model: Any, lora: LoRA | None, train_embeddings: bool) -> Any:
    """`with_adapter`, without its warning: the training itself gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_adapter(model, lora, train_embeddings)


def kv_width(config: Any) -> int:
    """Return how many numbers a cache holds per token and layer: keys and values of all their heads."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * heads * head_width)


def _block_numbers(text: Any) -> int:
    """Return the numbers per token that one block computes with at once, about: 4 d + 3 f."""
    return int(4 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size))


def _with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a configuration with fewer layers."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shallow


def _counted(
    config: Any, lora: LoRA | None, train_embeddings: bool, rows: int, tokens: int, dtype: torch.dtype, autocast: bool
) -> tuple[int, int, int]:
    """Return the bytes of all weights, of the trained ones, and of what autograd keeps in a forward of padded texts."""
    model = _adapted(blank(config, dtype), lora, train_embeddings).train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _without_values(model)
        storages = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in storages:
                kept.setdefault(storage, tensor)
            return tensor

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        decoder = (model.get_base_model() if lora is not None else model).get_decoder()
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                log.setLevel(logging.CRITICAL)  # torch logs what is raised, with its traceback
                decoder(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
            except RuntimeError as error:  # of transformers' experts on a CPU
                raise ValueError(
                    f"expected a {config.model_type} whose forward runs without values in {dtype}; got {error!s:.100}. "
                    "A mixture of experts is counted in bfloat16 only: with an adapter, on a --device that is a GPU."
                ) from error
            finally:
                log.setLevel(level)
        return weights, trained, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _without_values(model: nn.Module) -> None:
    """Give every weight a tensor of the active fake mode, on a CPU; tied weights stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in made:
                    made[weight] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                module._parameters[name] = made[weight]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
