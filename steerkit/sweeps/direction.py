"""Choose one direction among read positions and layers by what it does to the model's next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.collect import checked_positions, collect_each
from steerkit.capture.layers import EMBED, Layers
from steerkit.capture.pooling import Position
from steerkit.generation.batches import in_batches
from steerkit.generation.engine import Engine, Row
from steerkit.io.progress import progress
from steerkit.models.blocks import find_blocks
from steerkit.models.context import check_vocabulary
from steerkit.steering.steering import Steering
from steerkit.text.prompt import PromptLike, encode_prompt
from steerkit.text.tokens import decode, encode
from steerkit.vectors.extract import difference_in_means
from steerkit.vectors.vector import SteeringVector

Prompts = Mapping[str, Sequence[PromptLike]]


class NoDirection(ValueError):
    """No candidate meets the conditions of `choose_direction`.

    Args:
        message: what was expected, and what the candidates do.
        closest: the candidate of the largest induce, with the table of all candidates in its `meta`.
    """

    def __init__(self, message: str, closest: SteeringVector) -> None:
        super().__init__(message)
        self.closest = closest


def choose_direction(
    model: nn.Module,
    tokenizer: Any,
    train: Prompts,
    validation: Prompts,
    *,
    tokens: Sequence[str],
    positive: str = "harmful",
    negative: str = "harmless",
    positions: Sequence[int] = (-1,),
    layers: Layers = "all",
    max_kl: float = 0.1,
    last_layers: float = 0.2,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> SteeringVector:
    """Return the difference in means, over read positions and layers, that best controls whether the model refuses.

    Each candidate `r` is the difference in means of the training prompts at one position and layer. With `R` the first
    tokens of a refusal and `p(R)` their probability after the prompt, the refusal metric is `log p(R) - log(1 - p(R))`.
    On the validation prompts

        bypass = mean metric of positive prompts, r ablated at all layers and all positions but 0,
        induce = mean metric of negative prompts, r added at its layer and all positions,
        kl     = mean KL(unsteered || r ablated) of the next token of negative prompts, in nats.

    The candidate of the smallest bypass is chosen among those with induce > 0, kl < `max_kl` and a layer before the
    last `last_layers` of the model. Measure its effect on further prompts: these numbers are those of a choice.

    Args:
        train: label -> prompts, from which the candidates are read: strings, chats or `Prompt`s.
        validation: label -> prompts, on which one is chosen; none of the training prompts.
        tokens: how refusals begin, e.g. `["I", "Sorry"]`; the first token of each counts, with and without a space
            before the text. A token of white space alone does not count.
        positive: label of the prompts that the model refuses.
        negative: label of the others.
        positions: read positions from the end of the prompt, e.g. the tokens of the template after the instruction.
        layers: the layers to try.
        max_kl: bound of kl, in nats.
        last_layers: share of the layers, from the last one, that are tried but not chosen.
        chat_template_kwargs: arguments of the chat template.

    Returns:
        The chosen vector at its one layer, as read. `meta["table"]` holds a row per candidate: position, layer, bypass,
        induce, kl, eligible; `meta["unsteered"]` the metric of each label without steering. Ablate it at all layers
        with `vector.at_all(layer)`.

    Raises:
        ValueError: a label without prompts, a validation prompt that is a training prompt too, no tokens, no positions,
            one given twice, or one outside a prompt.
        NoDirection: no candidate meets the conditions; a `ValueError`.

    Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717,
    section 2.3 and appendix C. There the stream before each block and the outputs of attention and MLP are ablated;
    here the stream after each block.

    Example:
        >>> vector = sk.choose_direction(model, tokenizer, train, validation, tokens=["I", "Sorry"])
        >>> pd.DataFrame(vector.meta["table"])
        >>> ablation = sk.Steering(
        ...     vector.at_all(next(iter(vector.layers))), positions="all", operation="ablate", layer="all"
        ... )
    """
    wanted = {positive, negative}
    if any(not wanted <= set(split) or not all(len(split[label]) for label in wanted) for split in (train, validation)):
        raise ValueError(
            f"expected prompts of {positive!r} and {negative!r} in train and validation; got {sorted(train)} and "
            f"{sorted(validation)}. Add them, or name the labels by positive= and negative=."
        )
    if isinstance(tokens, str) or not tokens or not all(tokens):
        raise ValueError(f"expected a list of texts that begin a refusal; got {tokens!r:.80}. Pass e.g. ['I'].")
    positions = checked_positions(positions)
    if not max_kl > 0 or not 0 <= last_layers < 1:
        raise ValueError(
            f"expected max_kl above 0 and last_layers in [0, 1); got {max_kl} and {last_layers}. Correct them."
        )
    held_out = {
        label: [encode_prompt(tokenizer, one, chat_template_kwargs) for one in validation[label]] for label in wanted
    }
    read = {encode_prompt(tokenizer, one, chat_template_kwargs) for label in wanted for one in train[label]}
    if both := sum(ids in read for several in held_out.values() for ids in several):
        raise ValueError(f"expected other prompts for validation; {both} are training prompts too. Remove them.")
    first_tokens = first_tokens_of(tokenizer, tokens)
    check_vocabulary(model, [first_tokens])
    texts = {label: list(train[label]) for label in (positive, negative)}
    activations = collect_each(
        model, tokenizer, texts, positions=positions, layers=layers, chat_template_kwargs=chat_template_kwargs
    )
    n_layers = len(find_blocks(model))
    end = int(n_layers * (1 - last_layers) + 1e-9)
    judge = _Judge(model, held_out[positive], held_out[negative], first_tokens)
    found: dict[tuple[Position, int], SteeringVector] = {}
    table = []
    tried = [layer for layer in next(iter(activations.values())).layers if layer != EMBED]
    with progress("directions", len(positions) * len(tried)) as advance:
        for position in positions:
            vector = difference_in_means(activations[position], positive, negative)
            norms = vector.norms()
            for layer in vector.layers:
                scores = judge(vector.at(layer), n_layers)
                passes = norms[layer] > 0 and scores["induce"] > 0 and scores["kl"] < max_kl and layer < end
                table.append({"position": position, "layer": layer, **scores, "eligible": passes})
                found[position, layer] = vector.at(layer)
                advance(1)
    frame = pd.DataFrame(table)
    about: dict[str, Any] = {"table": table, "unsteered": judge.unsteered(positive, negative), "tokens": list(tokens)}
    about |= {"max_kl": max_kl, "last_layers": last_layers}

    def candidate(row: Any) -> SteeringVector:
        vector = found[row["position"], int(row["layer"])]
        return replace(vector, meta={**vector.meta, **about})

    if not frame["eligible"].any():
        raise NoDirection(
            f"expected a direction with induce > 0, kl < {max_kl:g} and a layer below {end};"
            f" got none of {len(frame)}: {int((frame['induce'] > 0).sum())} have induce > 0 (the largest is "
            f"{frame['induce'].max():.3g}), {int((frame['kl'] < max_kl).sum())} a small kl. Pass other tokens, "
            "positions or bounds.",
            candidate(frame.sort_values("induce", kind="stable").iloc[-1]),
        )
    return candidate(frame[frame["eligible"]].sort_values("bypass", kind="stable").iloc[0])


def first_tokens_of(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The first tokens of texts, with and without a space before each; the token of that space alone is left out.

    Models of some tokenizers (Llama 2's, Mistral's) begin a reply with a space.

    Example:
        >>> first_tokens_of(tokenizer, ["I", "Sorry"])
    """
    plain = {encode(tokenizer, text)[0] for text in texts}
    spaced = {encode(tokenizer, f" {text}")[0] for text in texts}
    return sorted(plain | {token for token in spaced if decode(tokenizer, [token], skip_special=False).strip()})


class _Judge:
    """The scores of candidates on validation prompts.

    Args:
        positive, negative: the prompts as ids.
        tokens: first tokens of a refusal.
    """

    def __init__(
        self, model: nn.Module, positive: Sequence[tuple[int, ...]], negative: Sequence[tuple[int, ...]],
        tokens: Sequence[int],
    ) -> None:  # fmt: skip
        self.model, self.positive, self.negative, self.tokens = model, positive, negative, list(tokens)
        self.plain: list[Tensor] = [torch.empty(0)] * len(negative)
        rows = [Row(ids) for ids in (*negative, *positive)]

        def keep(engine: Engine, numbers: Sequence[int]) -> list[float]:
            logs = _log_probs(engine)
            for row, number in enumerate(numbers):
                if number < len(negative):
                    self.plain[number] = logs[row].cpu().clone()
            return self._metric(logs)

        values = self._run(rows, keep)
        self.of_negative, self.of_positive = values[: len(negative)], values[len(negative) :]

    def __call__(self, candidate: SteeringVector, n_layers: int) -> dict[str, float]:
        """The means bypass, induce and kl of one candidate at its layer; of a zero one those without steering."""
        ((layer, norm),) = candidate.norms().items()
        if norm == 0:
            return {"bypass": _mean(self.of_positive), "induce": _mean(self.of_negative), "kl": 0.0}
        ablate = Steering(candidate.at_all(layer, n_layers), 1.0, "all", "ablate", layer="all")
        add = Steering(candidate, 1.0, "all")
        n, rows = len(self.negative), [Row(ids, (one,)) for one in (ablate, add) for ids in self.negative]
        rows += [Row(ids, (ablate,)) for ids in self.positive]
        kl = [0.0] * n

        def work(engine: Engine, numbers: Sequence[int]) -> list[float]:
            logs = _log_probs(engine)
            for row, number in enumerate(numbers):
                if number < n:
                    plain = self.plain[number].to(logs)
                    kl[number] = float((plain.exp() * (plain - logs[row])).sum())
            return self._metric(logs)

        values = self._run(rows, work)
        return {"bypass": _mean(values[2 * n :]), "induce": _mean(values[n : 2 * n]), "kl": _mean(kl)}

    def unsteered(self, positive: str, negative: str) -> dict[str, float]:
        """The mean metric of each label without steering."""
        return {positive: _mean(self.of_positive), negative: _mean(self.of_negative)}

    def _run(self, rows: Sequence[Row], work: Any) -> list[float]:
        values = [0.0] * len(rows)
        for batch in in_batches(self.model, rows, 1, work):
            for number, value in batch:
                values[number] = value
        return values

    def _metric(self, logs: Float[Tensor, "row vocabulary"]) -> list[float]:
        """`log p(R) - log(1 - p(R))` of each row."""
        others = torch.ones(logs.shape[1], dtype=torch.bool, device=logs.device)
        others[self.tokens] = False
        return (logs[:, self.tokens].logsumexp(-1) - logs[:, others].logsumexp(-1)).tolist()


def _log_probs(engine: Engine) -> Float[Tensor, "row vocabulary"]:
    """Log-probabilities of the token after each prompt, in float64."""
    return engine.forward(engine.last_tokens(), engine.width - 1)[:, -1].double().log_softmax(-1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
