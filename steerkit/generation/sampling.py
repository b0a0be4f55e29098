"""Sampling: one token per row, greedy or by inverse cumulative distribution with keyed random numbers."""

from __future__ import annotations

import hashlib
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit.models.model import widest_float

OVERFLOWED = -1
"""In place of a token: the logits of the row are not finite."""
FIRST_CANDIDATES = 256  # tokens that a nucleus is first looked for in


def random_stream(key: Any, count: int) -> Float[np.ndarray, " count"]:
    """`count` uniform numbers in [0, 1) that depend on `key` alone: Philox, keyed by the SHA-256 of its text."""
    digest = hashlib.sha256(repr(_plain(key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


def _plain(key: Any) -> Any:
    """A key in which numpy's integers are Python's: their text differs, and so would the numbers."""
    if isinstance(key, tuple):
        return tuple(map(_plain, key))
    return int(key) if isinstance(key, Integral) and not isinstance(key, bool) else key


def likeliest(logits: Float[Tensor, "batch v"]) -> Int[Tensor, " batch"]:
    """The most likely token of each row; `OVERFLOWED` where a logit is NaN or infinite, which argmax would choose."""
    token = logits.argmax(-1)
    return torch.where(torch.isfinite(logits.gather(-1, token[:, None])[:, 0]), token, OVERFLOWED)


def sample(
    logits: Float[Tensor, "batch v"], uniform: Float[Tensor, " batch"], temperature: float, top_p: float
) -> Int[Tensor, " batch"]:
    """One token per row by the inverse of the cumulative distribution at `uniform`.

    The distribution is softmax(logits / temperature), restricted to its nucleus of `top_p`; it is summed in the order
    of the token ids, so that rows with nearly equal logits and the same number choose the same token. A token is in
    the nucleus if the probability of all likelier tokens is below `top_p`; tokens as likely as its last are included.
    Sums are in float64 (float32 on MPS, which has no float64).

    Args:
        uniform: one number in [0, 1) per row.

    Returns:
        Token ids; `OVERFLOWED` for a row with a logit that is NaN or infinite.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (nucleus).
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    finite = torch.isfinite(probabilities[:, 0])  # one NaN in a row makes the whole row NaN
    wide = widest_float(logits.device)
    if top_p < 1:
        likely, ids = probabilities.topk(min(FIRST_CANDIDATES, probabilities.shape[-1]), dim=-1)
        least = _least_likely(likely, top_p)
        token = _inverted(likely, ids, least, uniform)
        beyond = (least <= likely[:, -1:])[:, 0]
        if likely.shape[-1] < probabilities.shape[-1] and bool(beyond.any()):  # of these rows, all tokens are sorted
            likely, ids = probabilities[beyond].sort(dim=-1, descending=True)
            token[beyond] = _inverted(likely, ids, _least_likely(likely, top_p), uniform[beyond])
    else:
        token = _chosen(probabilities.to(wide), uniform).squeeze(-1)
    return torch.where(finite, token, OVERFLOWED)


def _inverted(
    likely: Float[Tensor, "batch n"],
    ids: Int[Tensor, "batch n"],
    least: Float[Tensor, "batch 1"],
    uniform: Float[Tensor, " batch"],
) -> Int[Tensor, " batch"]:
    """The tokens of a nucleus, given the likeliest ones in falling order and the probability of its last token."""
    kept = torch.where(likely >= least, likely, 0).to(widest_float(likely.device))
    ids, order = ids.sort(dim=-1)
    return ids.gather(-1, _chosen(kept.gather(-1, order), uniform)).squeeze(-1)


def _chosen(weights: Float[Tensor, "batch n"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, "batch 1"]:
    """The column of each row at which the cumulative weight passes the number's share of the sum."""
    cumulative = weights.cumsum(-1)
    target = (uniform.to(cumulative) * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)


def _least_likely(likely: Float[Tensor, "batch n"], top_p: float) -> Float[Tensor, "batch 1"]:
    """The probability of the nucleus' last token, given the likeliest ones in falling order."""
    wide = likely.to(widest_float(likely.device))
    last = (wide.cumsum(-1) - wide < top_p).sum(-1, keepdim=True).clamp(min=1) - 1  # 0 in a row of NaN
    return likely.gather(-1, last)
