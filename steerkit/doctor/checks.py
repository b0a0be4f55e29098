"""A check-up of a checkpoint: what can be read and steered in it, each claim tried on this very model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerkit.capture.collect import collect
from steerkit.capture.resid import capture_resid
from steerkit.generation.engine import exact
from steerkit.generation.generate import generate
from steerkit.models.blocks import find_blocks
from steerkit.models.context import context_length
from steerkit.models.identity import describe
from steerkit.models.model import accepts, evaluating, unwrap
from steerkit.steering.steering import Steering
from steerkit.text.prompt import encode_prompt, render
from steerkit.vectors.vector import SteeringVector

State = Literal["ok", "note", "failed"]
TEXTS = ("The sea is calm today.", "One two three four five six seven eight nine ten.", "Yes.")
QUESTION = [{"role": "user", "content": "How do tides work?"}]


@dataclass(frozen=True)
class Finding:
    """One claim about a model.

    Args:
        check: what was looked at.
        state: `ok`; `note`, what one has to know; or `failed`.
        said: in plain words, with the figure.
    """

    check: str
    state: State
    said: str


def examine(model: nn.Module, tokenizer: Any) -> list[Finding]:
    """All findings; a check that breaks is a failed one, with its reason, and those that need it are left out."""
    found = [_run("residual stream", lambda: _blocks(model))]
    if found[0].state == "failed":
        return found
    found += [_weights(model), _tokenizer(model, tokenizer)]
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("hidden states", lambda: _hidden_states(model, tokenizer)),
        ("padding", lambda: _padding(model, tokenizer)),
        ("coefficient 0", lambda: _zero(model, tokenizer)),
        ("cache", lambda: _cache(model, tokenizer)),
        ("first new token", lambda: _first_token(model, tokenizer)),
        ("adapter", lambda: _adapter(model, tokenizer)),
    ]
    return [*found, *(_run(name, check) for name, check in checks)]


def _run(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        return Finding(name, "failed", str(error))


def _blocks(model: nn.Module) -> Finding:
    blocks = find_blocks(model)
    said = (
        f"{len(blocks)} blocks at {blocks.path}, d_model {blocks.d_model}; each receives what the one before returned"
    )
    return Finding("residual stream", "ok", said)


def _weights(model: nn.Module) -> Finding:
    about = describe(model, None)
    said = f"{about['dtype']}, attention {about['attention']}, context {context_length(model) or 'unknown'}"
    if about["dtype"] == "float16":
        return Finding("weights", "note", f"{said}; float16 overflows in some models: prefer bfloat16 or float32")
    return Finding("weights", "ok", said)


def _tokenizer(model: nn.Module, tokenizer: Any) -> Finding:
    said = []
    if not getattr(tokenizer, "chat_template", None):
        said.append("no chat template: give prompts as text, messages are refused")
    else:
        rendered = encode_prompt(tokenizer, render(tokenizer, QUESTION))
        bos = tokenizer.bos_token_id
        twice = bos is not None and list(rendered[:2]) == [bos, bos]
        said.append("the chat template doubles the first token" if twice else "chat template there")
    if tokenizer.pad_token_id is None:
        said.append("no pad token, and none is needed")
    sizes = (len(tokenizer), int(unwrap(model).get_input_embeddings().weight.shape[0]))
    if sizes[0] > sizes[1]:
        said.append(f"{sizes[0]} tokens for {sizes[1]} embeddings: some tokens have no embedding")
        return Finding("tokenizer", "failed", "; ".join(said))
    return Finding("tokenizer", "ok" if getattr(tokenizer, "chat_template", None) else "note", "; ".join(said))


def _hidden_states(model: nn.Module, tokenizer: Any) -> Finding:
    ids = _ids(model, tokenizer, TEXTS[1])
    count = len(find_blocks(model))
    with torch.inference_mode(), evaluating(unwrap(model)), capture_resid(model) as streams:
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states

    def inner(first: int) -> float:
        return max((_off(streams[layer], states[layer + first]) for layer in range(count - 1)), default=0.0)

    if inner(1) > 1e-6 and inner(0) <= 1e-6:
        said = "inner layers equal output_hidden_states, which begins after block 0 and not with the embedding"
        return Finding("hidden states", "note", said)
    if inner(1) > 1e-6:
        return Finding("hidden states", "failed", f"inner layers differ from output_hidden_states by {inner(1):.1e}")
    if states[-1].shape != streams[count - 1].shape:
        widths = f"{streams[count - 1].shape[-1]} wide where its last entry is {states[-1].shape[-1]}"
        return Finding("hidden states", "note", f"inner layers equal output_hidden_states; the stream is {widths}")
    last = _off(streams[count - 1], states[-1])
    if last > 1e-6:
        said = "inner layers equal output_hidden_states; its last entry is after the final norm, ours before it"
        return Finding("hidden states", "note", said)
    return Finding("hidden states", "ok", "all layers equal output_hidden_states")


def _padding(model: nn.Module, tokenizer: Any) -> Finding:
    with warnings.catch_warnings():  # the mean over every position, the attention sink included, is compared here
        warnings.filterwarnings("ignore", "position='mean' includes position 0")
        together = collect(model, tokenizer, TEXTS, position="mean", batch_tokens=10_000).resid
        alone = torch.cat([collect(model, tokenizer, [text], position="mean").resid for text in TEXTS])
    off = _off(together, alone)
    state: State = "ok" if off < _tolerance(model) else "failed"
    return Finding("padding", state, f"a text alone and in a padded batch differ by {off:.1e} of their size")


def _zero(model: nn.Module, tokenizer: Any) -> Finding:
    ids = _ids(model, tokenizer, TEXTS[0])
    plain = _logits(model, ids)
    with Steering(_push(model), 0.0, "all", foreign=True).on(model):
        zero = _logits(model, ids)
    with Steering(_push(model), 1.0, "all", foreign=True).on(model):
        moved = _off(_logits(model, ids), plain)
    if not torch.equal(zero, plain):
        return Finding("coefficient 0", "failed", "steering with coefficient 0 changes the logits")
    if moved == 0:
        return Finding("coefficient 0", "failed", "steering with coefficient 1 does not move the logits")
    return Finding(
        "coefficient 0", "ok", f"changes nothing, bit for bit; coefficient 1 moves the logits by {moved:.0%}"
    )


def _cache(model: nn.Module, tokenizer: Any) -> Finding:
    ways = exact(model)
    positions = "from_last_prompt_token" if accepts(model, "past_key_values") else "all"
    steering = Steering(_push(model), _as_long(model, tokenizer), positions, foreign=True)
    new = 8
    with torch.inference_mode(), evaluating(unwrap(model)):
        slow = [_greedy(model, tokenizer, text, steering, new) for text in TEXTS]
    fast = generate(model, tokenizer, list(TEXTS), max_new_tokens=new, steering=[steering] * len(TEXTS))
    same = sum(a == b for a, b in zip(slow, fast, strict=True))
    plain = generate(model, tokenizer, list(TEXTS), max_new_tokens=new)
    moved = sum(a != b for a, b in zip(slow, plain, strict=True))
    said = (
        f"{same} of {len(TEXTS)} steered texts are the same with a cache in a batch and without either, {moved} of "
        "them others than without steering"
    )
    if same < len(TEXTS) and _tolerance(model) < 1e-3:
        return Finding("cache", "failed", said)
    if same < len(TEXTS):
        return Finding("cache", "note", f"{said}; in {describe(model, None)['dtype']} ties may fall either way")
    if not moved:
        return Finding("cache", "note", f"{said}: nothing is shown")
    if not ways.padded:
        said += "; batched by length, since it cannot be padded on the left"
    if not ways.chunks:
        said += "; scored token by token, as its layers need"
    return Finding("cache", "ok", said)


def _first_token(model: nn.Module, tokenizer: Any) -> Finding:
    steering = Steering(_push(model), 50.0, "generated", foreign=True)
    texts = generate(model, tokenizer, [TEXTS[0]] * 2, max_new_tokens=1, steering=[None, steering])
    if texts[0] != texts[1]:
        return Finding("first new token", "failed", "positions 'generated' change the first new token")
    said = "decided at the last prompt position: positions 'generated' cannot change it, 'from_last_prompt_token' can"
    return Finding("first new token", "note", said)


def _adapter(model: nn.Module, tokenizer: Any) -> Finding:
    if not hasattr(model, "peft_config"):
        return Finding("adapter", "ok", "none")
    ids = _ids(model, tokenizer, TEXTS[1])
    on = _logits(model, ids)
    with model.disable_adapter():  # type: ignore[operator]
        off = _logits(model, ids)
    moved = _off(on, off)
    names = ", ".join(model.peft_config)  # type: ignore[arg-type]
    if moved == 0:
        return Finding(
            "adapter", "failed", f"{names}: the logits are those of the base model; it is not active or empty"
        )
    return Finding("adapter", "ok", f"{names}: moves the logits by {moved:.1%}")


def _greedy(model: nn.Module, tokenizer: Any, text: str, steering: Steering, new: int) -> str:
    """One prompt, no cache, the whole text anew for every token: slow and plain."""
    ids = _ids(model, tokenizer, text)
    start = ids.shape[1]
    ends = _ends(model, tokenizer)
    with steering.on(model, prompt_length=start):
        while ids.shape[1] < start + new:
            token = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            if int(token) in ends:
                break
    kept = [token for token in ids[0, start:].tolist() if token not in ends]
    return str(tokenizer.decode(kept, skip_special_tokens=True))


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    from steerkit.generation.generate import ends_of

    return set(ends_of(model, tokenizer))


def _ids(model: nn.Module, tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([encode_prompt(tokenizer, text)], device=next(unwrap(model).parameters()).device)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode(), evaluating(unwrap(model)):
        return model(input_ids=ids, use_cache=False).logits


def _push(model: nn.Module) -> SteeringVector:
    """A fixed direction at the middle layer, as long as the stream is wide: enough to be seen."""
    blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({len(blocks) // 2: torch.randn(blocks.d_model, generator=generator)})


def _as_long(model: nn.Module, tokenizer: Any) -> float:
    """The coefficient that makes `_push` as long as the stream at its layer, so that it changes what is said."""
    ((layer, vector),) = _push(model).layers.items()
    with capture_resid(model, layer) as streams:
        _logits(model, _ids(model, tokenizer, TEXTS[1]))
    return float(streams[layer][0, 1:].float().norm(dim=-1).mean() / vector.norm())  # the first token is a sink


def _off(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-30))


def _tolerance(model: nn.Module) -> float:
    return 1e-4 if next(unwrap(model).parameters()).dtype in (torch.float32, torch.float64) else 0.05
