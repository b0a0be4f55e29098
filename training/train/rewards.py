"""GRPO's rewards, pure functions of a completion: `r = w_fmt R_fmt + w_clip R(y; l)` (arXiv 2604.24881, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from steerkit.text.tags import CONSENSUS, END, tags
from training.problems.answers import read_answer, same

Box = Literal["last", "first"]
KEPT = (CONSENSUS, END)


@dataclass(frozen=True)
class Completion:
    """What the policy wrote.

    Args:
        ids: its tokens, the end-of-sequence token included if it came.
        finished: whether that token came.
    """

    ids: tuple[int, ...]
    finished: bool


def tag_weights(agents: int = 3, rounds: int = 2) -> dict[str, float]:
    """The released script's weight of each tag: 0.3, and 0.5 for `<|Consensus|>`."""
    return {tag: 0.5 if tag == CONSENSUS else 0.3 for tag in tags(agents, rounds)}


def format_reward(text: str, weights: Mapping[str, float]) -> float:
    """`R_fmt`: the sum of the weights of the tags that stand in the text, each once, however often it stands there."""
    return sum(weight for tag, weight in weights.items() if tag in text)


def weighted_format(text: str, weights: Mapping[str, float], w_fmt: float, kept: Sequence[str] = ()) -> float:
    """`w_fmt R_fmt`; tags in `kept` count in full at any `w_fmt`, as the released script's last two (`KEPT`) do."""
    decayed = {tag: weight for tag, weight in weights.items() if tag not in kept}
    whole = {tag: weight for tag, weight in weights.items() if tag in kept}
    return w_fmt * format_reward(text, decayed) + format_reward(text, whole)


def clip_reward(
    completion: Completion,
    clip: int,
    decode: Callable[[Sequence[int]], str],
    gold: str,
    kind: str,
    box: Box = "last",
    must_end: bool = True,
) -> float:
    r"""`R(y; l)`: 1 if the right answer stands in a box within the first `l` tokens, else 0.

    Args:
        clip: `l`, in tokens of the completion.
        decode: ids to text, with the tags in it.
        gold, kind: the right answer and how to read one, as in `training.answers`.
        box: which `\boxed{}` within the first `l` tokens counts. With `"first"` the first agent's answer earns the
            reward, and nothing asks the debate to agree.
        must_end: the whole completion, end-of-sequence included, has to stand within `l`. Without it nothing rewards
            stopping.
    """
    if must_end and (not completion.finished or len(completion.ids) > clip):
        return 0.0
    return float(same(read_answer(decode(completion.ids[:clip]), kind, box=box), gold))
