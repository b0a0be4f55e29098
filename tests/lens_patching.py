"""Activation patching by the hooks of TransformerLens, one forward per place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, int, int, int]
"""Site, layer, head (-1 for a site without heads), position."""
HOOKS = {
    "resid_pre": "hook_resid_pre", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post", "z": "attn.hook_z",
}  # fmt: skip


def lens_effects(
    model: Any,
    clean: Sequence[int],
    corrupted: Sequence[int],
    answers: tuple[int, int],
    mode: str,
    layers: Sequence[int],
    positions: Sequence[int],
) -> dict[Key, float]:
    """The effects of all sites, with the difference of two logits as the metric.

    Their bridge changes `hook_resid_mid` at the input of the second norm only, which misses the residual connection.
    So `resid_mid` is written as the `attn_out` that gives it: the other run's `resid_mid` minus the own `resid_pre`.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    base, other = (
        torch.tensor([list(ids)]) for ids in ((corrupted, clean) if mode == "denoising" else (clean, corrupted))
    )
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=copy.deepcopy(model.config)).eval()
    heads = model.config.num_attention_heads

    def metric(logits: Tensor) -> float:
        return float(logits[0, -1, answers[0]] - logits[0, -1, answers[1]])

    found: dict[Key, float] = {}
    with torch.no_grad():
        _, own = bridge.run_with_cache(base)
        _, cache = bridge.run_with_cache(other)
        m_base, m_other = metric(bridge(base)), metric(bridge(other))

        def effect(key: str, new: Tensor, position: int, head: int = -1) -> float:
            def write(value: Tensor, hook: Any) -> Tensor:
                value = value.clone()
                if head < 0:
                    value[:, position] = new[:, position]
                else:
                    wide, wanted = (one.reshape(*one.shape[:2], heads, -1) for one in (value, new))
                    wide[:, position, head] = wanted[:, position, head]
                    value = wide.reshape(value.shape)
                return value

            patched = metric(bridge.run_with_hooks(base, fwd_hooks=[(key, write)]))
            return (patched - m_base) / (m_other - m_base)

        for layer in layers:
            at = {site: f"blocks.{layer}.{name}" for site, name in HOOKS.items()}
            mid = cache[at["resid_pre"]] + cache[at["attn_out"]] - own[at["resid_pre"]]
            for position in positions:
                for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
                    found[site, layer, -1, position] = effect(at[site], cache[at[site]], position)
                found["resid_mid", layer, -1, position] = effect(at["attn_out"], mid, position)
                for head in range(heads):
                    found["z", layer, head, position] = effect(at["z"], cache[at["z"]], position, head)
    return found


def effects_of(table: Any) -> dict[Key, float]:
    """The effects of `PatchResult.table` by place."""
    heads = table["head"].fillna(-1).astype(int)
    return dict(
        zip(zip(table["site"], table["layer"], heads, table["position"], strict=True), table["effect"], strict=True)
    )
