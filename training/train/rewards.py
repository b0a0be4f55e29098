r"""Rewards of GRPO as pure functions of a completion (Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3).

The reward of a completion y is

    r(y) = w_fmt * R_fmt(y) + w_clip * R(y; l)

`R_fmt` rewards the tags of a debate, `R(y; l)` a correct answer within the first l tokens. With a gated schedule the
second term is the mean of `R(y; l)` and `R(y; l')`, with l' the limit of the next step. `training.train.schedules`
has `w_fmt` and `l` over the course of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from steerkit.text.tags import CONSENSUS, END, tags
from training.problems.answers import read_answer, same

Box = Literal["last", "first"]
KEPT = (CONSENSUS, END)
"""The two tags whose weight never decays in the released script."""


@dataclass(frozen=True)
class Completion:
    """Tokens written by the policy.

    Args:
        ids: token ids, with the end-of-sequence token if it was generated.
        finished: whether the end-of-sequence token was generated.
    """

    ids: tuple[int, ...]
    finished: bool


def tag_weights(agents: int = 3, rounds: int = 2) -> dict[str, float]:
    """Return the weight of each tag of a debate in `R_fmt`: 0.5 for `<|Consensus|>`, 0.3 for every other tag.

    Source: the script released with arXiv 2604.24881.

    Example:
        >>> round(sum(tag_weights(agents=3, rounds=2).values()), 3)  # nine tags at 0.3, one at 0.5
        3.2
    """
    return {tag: 0.5 if tag == CONSENSUS else 0.3 for tag in tags(agents, rounds)}


def format_reward(text: str, weights: Mapping[str, float]) -> float:
    r"""Return `R_fmt(y) = sum over tags t in y of weights[t]`; repeated tags count once.

    Args:
        text: decoded completion, tags included.
        weights: tag -> weight, see `tag_weights`.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3.

    Example:
        >>> format_reward("<|Consensus|> 14 <|Consensus|>", tag_weights())
        0.5
    """
    return sum(weight for tag, weight in weights.items() if tag in text)


def weighted_format(text: str, weights: Mapping[str, float], w_fmt: float, kept: Sequence[str] = ()) -> float:
    r"""Return `w_fmt * R_fmt(y)`, with the tags in `kept` at full weight for every `w_fmt`.

    Args:
        text: decoded completion, tags included.
        weights: tag -> weight, see `tag_weights`.
        w_fmt: weight of the format reward at the current step.
        kept: tags without decay; the paper has none, its released script has `KEPT`.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3, and its released script.

    Example:
        >>> weighted_format("<|Agent 1 Solution|>: 14 <|Consensus|>", tag_weights(), w_fmt=0.5, kept=KEPT)
        0.65
    """
    decayed = {tag: weight for tag, weight in weights.items() if tag not in kept}
    undecayed = {tag: weight for tag, weight in weights.items() if tag in kept}
    return w_fmt * format_reward(text, decayed) + format_reward(text, undecayed)


def clip_reward(
    completion: Completion,
    clip: int,
    decode: Callable[[Sequence[int]], str],
    gold: str,
    kind: str,
    box: Box = "last",
    must_end: bool = False,
) -> float:
    r"""Return the clip reward `R(y; l)`: 1 if a box within the first `l` tokens has the correct answer, else 0.

    Args:
        completion: the policy's output y.
        clip: `l` in tokens.
        decode: token ids -> text, tags included.
        gold: correct answer in canonical form (`training.problems.answers`).
        kind: kind of the answer, one of `training.problems.answers.KINDS`.
        box: which `\boxed{}` within the first `l` tokens counts. With `"first"`, the first agent's answer earns the
            reward, whether or not the debate agrees on it.
        must_end: also require that the whole completion, end-of-sequence included, has at most `l` tokens. The paper
            does not require this; without it, no term rewards ending the text.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3.

    Example:
        >>> completion = Completion(tuple(tokenizer.encode(r"\boxed{14}")), finished=True)
        >>> clip_reward(completion, clip=500, decode=tokenizer.decode, gold="14", kind="number")
        1.0
    """
    if must_end and (not completion.finished or len(completion.ids) > clip):
        return 0.0
    return float(same(read_answer(decode(completion.ids[:clip]), kind, box=box), gold))
