"""Projections: the component of each token's stream along a direction, while a model writes and in given texts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.batches import forward_padded
from steerkit.models.active import suspended
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.context import check_fits, check_vocabulary
from steerkit.models.hooks import StopForward, check_called
from steerkit.models.identity import fingerprint
from steerkit.models.site_names import Place, place_order
from steerkit.models.sites import edit_places
from steerkit.steering.rows import RowSteering
from steerkit.steering.steering import Steering, steerings_per_row
from steerkit.text.prompt import PromptLike, encode_prompt, listed
from steerkit.text.tokens import Ids, continuation_ids
from steerkit.vectors.vector import SteeringVector

COLUMNS = ["text", "vector", "layer", "position", "token_id", "token", "in_prompt", "prompt_end", "before", "after"]


class Reader(Protocol):
    """Gets the value of some places in each forward, `[batch, pos, width]`, before and after its steering."""

    @property
    def places(self) -> Sequence[Place]: ...
    def read(self, place: Place, before: Tensor, after: Tensor) -> None: ...


class Projector:
    """Reads, in each forward, the projection `h . v / |v|` of the stream on directions, in the unit of the stream.

    Args:
        vectors: name -> vector. A vector that holds several layers has a projection at each of them.

    Raises:
        TypeError: a value that is no SteeringVector.
        ValueError: no vector, or one that is zero at a layer.
    """

    def __init__(self, vectors: Mapping[str, SteeringVector]) -> None:
        if not isinstance(vectors, Mapping) or not vectors:
            raise ValueError(
                f"expected vectors by name, at least one; got {vectors!r:.80}. Pass e.g. {{'mood': vector.at(16)}}."
            )
        if other := [name for name, vector in vectors.items() if not isinstance(vector, SteeringVector)]:
            kind = type(vectors[other[0]]).__name__
            raise TypeError(f"expected a SteeringVector as {other[0]!r}; got {kind}. Load or make one.")
        self.vectors = dict(vectors)
        self.keys = [(name, layer) for name, vector in vectors.items() for layer in vector.layers]
        units = {name: vector.unit().layers for name, vector in vectors.items()}
        at_place = {key: (vectors[key[0]].site, key[1]) for key in self.keys}
        self.places = sorted(set(at_place.values()))
        self._names = {place: [key[0] for key in self.keys if at_place[key] == place] for place in self.places}
        self._units = {at: torch.stack([units[name][at[1]] for name in self._names[at]], 1) for at in self.places}
        self._read: dict[Place, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        """`ValueError` unless the vectors fit the model; its weights may be others than those they were read from."""
        blocks, weights = find_blocks(model), fingerprint(model)
        for vector in self.vectors.values():
            Steering(vector, foreign=True, layer="all").check(model, blocks, weights)

    def read(self, place: Place, before: Tensor, after: Tensor) -> None:
        """Project the value of a place, `[batch, pos, width]`, before and after its steering.

        Shapes are not checked at run time, since compiled blocks call this.
        """
        units = self._units[place] = self._units[place].to(before.device)
        plain = before.float() @ units
        steered = plain if after is before else after.float() @ units
        self._read[place] = torch.stack([plain, steered], -1)

    def take(self) -> Float[Tensor, "batch pos direction 2"]:
        """The projections of the last forward, on the CPU, in the order of `keys`: before and after the steering."""
        of = {
            (name, at[1]): self._read[at][..., i, :].cpu()
            for at in self.places
            for i, name in enumerate(self._names[at])
        }
        self._read.clear()
        return torch.stack([of[key] for key in self.keys], 2)


class Monitor(Projector):
    """A `Projector` that keeps the projections of each new token of the rows of one batch.

    A token's values are those of the stream at that token, which the forward after its choice computes. So a decoded
    row needs one more forward, of its last token.

    Args:
        vectors: name -> vector with one layer.
        rows: number of rows of the batch.
    """

    def __init__(self, vectors: Mapping[str, SteeringVector], rows: int) -> None:
        super().__init__(vectors)
        for name, vector in self.vectors.items():
            if len(vector.layers) > 1:
                layers = list(vector.layers)
                raise ValueError(
                    f"expected one layer of each watched vector; {name!r} holds {layers}. Pass "
                    f"{name}.at({layers[len(layers) // 2]})."
                )
        self.rows: list[list[list[list[float]]]] = [[] for _ in range(rows)]

    def keep(self, rows: Sequence[int]) -> None:
        """Append what the last forward read at its last column: row i of the batch is row `rows[i]`."""
        for row, values in zip(rows, self.take()[:, -1].tolist(), strict=True):
            self.rows[row].append(values)


@contextlib.contextmanager
def steered(
    model: nn.Module, blocks: Blocks, compiled: RowSteering, reader: Reader | None = None, read_only: bool = False
) -> Iterator[None]:
    """Steer and read the forwards inside the `with`; each place is read right before and after its steering.

    Args:
        read_only: whether a forward ends when the reader has read its last place.
    """
    read = set() if reader is None else set(reader.places)
    last = max(read, key=place_order) if read_only else None
    places = {one for one in {*compiled.places, *read} if last is None or place_order(one) <= place_order(last)}

    def edit(place: Place, stream: Tensor) -> Tensor | None:
        edited = compiled.edit(place, stream)
        if reader is not None and place in read:
            reader.read(place, stream, stream if edited is None else edited)
        if place == last:
            raise StopForward
        return edited

    with edit_places(model, blocks, sorted(places), edit) as ran, contextlib.suppress(StopForward):
        yield
    check_called(ran, places)


def project(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[PromptLike | Ids],
    vectors: Mapping[str, SteeringVector] | SteeringVector,
    *,
    prompts: Sequence[PromptLike] | None = None,
    steering: Steering | Sequence[Steering | None] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return the projection of the stream on a direction, `h . v / |v|`, at each token of given texts.

    The stream h is the one at the token itself, after the block of the vector's layer, in the unit of the stream. At
    the tokens of a generated continuation the values are those of `sk.generate(..., watch=)`.

    Args:
        texts: strings, chats or `Prompt`s. With `prompts` the continuations: strings, or token ids such as
            `Generation.ids` (the text of generated ids may encode to other ids).
        vectors: name -> vector, or one vector, named `"vector"`. Each of its layers is read. The vectors must fit the
            model; its weights may be others than those they were read from, for instance a fine-tuned model's.
        prompts: what each text continues. Without them a whole text is prompt.
        steering: as for `sk.generate`; steerings that `with steering.on(model)` set are applied too. Pass one with a
            dose as `steering.resolved(norms)`.
        chat_template_kwargs: further arguments of the chat template.

    Returns:
        One row per text, vector, layer and token: text (index), vector, layer, position (of the token, from 0),
        token_id, token (decoded alone), in_prompt, prompt_end (true at the last token of the prompt, where the first
        new token is decided), before and after (the steering of that layer; equal where nothing is steered).

    Raises:
        ValueError: no text, a text longer than the context, another number of prompts than texts, or a vector or
            steering that does not fit the model.

    Warns:
        UserWarning: a stream that is not finite, whose projections are NaN or infinite.

    Example:
        >>> sk.project(model, tokenizer, ["The sea is calm."], {"mood": vector.at(16)})
        >>> sk.project(model, tokenizer, [" calm."], vector.at(16), prompts=["The sea is"])

    Source: Chen et al. 2025, "Persona Vectors", arXiv 2507.21509 (monitoring by projection).
    """
    texts = listed(texts, "texts")
    reader = Projector({"vector": vectors} if isinstance(vectors, SteeringVector) else vectors)
    rows = _ids_of(tokenizer, texts, prompts, chat_template_kwargs)
    check_vocabulary(model, [ids for ids, _ in rows])
    check_fits(model, [ids for ids, _ in rows])
    reader.check(model)
    blocks, weights = find_blocks(model), fingerprint(model)
    frames: dict[int, pd.DataFrame] = {}
    with suspended(model) as active:
        each = steerings_per_row(steering, active, len(rows))
        for one in {id(one): one for row in each for one in row}.values():
            one.check(model, blocks, weights)

        def forward(batch: Sequence[int], inputs: Mapping[str, Any]) -> None:
            compiled = RowSteering([each[i] for i in batch], [(0, rows[i][1]) for i in batch])
            with steered(model, blocks, compiled, reader, read_only=True):
                model(**inputs)

        for batch in forward_padded(model, blocks, [ids for ids, _ in rows], forward):
            for number, values in zip(batch, reader.take(), strict=True):
                frames[number] = _frame(tokenizer, number, *rows[number], reader.keys, values)
    table = pd.concat([frames[number] for number in range(len(rows))], ignore_index=True)
    warn_of_overflow(table[~np.isfinite(table[["before", "after"]]).all(axis=1)], "projections")
    return table


def warn_of_overflow(rows: pd.DataFrame, values: str) -> None:
    """Warn once of the texts and layers of these rows, whose stream is not finite."""
    if len(rows):
        texts, layers = (rows[name].drop_duplicates().tolist() for name in ("text", "layer"))
        warnings.warn(
            f"expected finite streams; got NaN or infinity in the texts {texts[:8]} at the layers {layers}, which have "
            f"no {values}. Lower the coefficient, or load the model in bfloat16 or float32.",
            UserWarning,
            stacklevel=3,
        )


def _ids_of(
    tokenizer: Any,
    texts: Sequence[PromptLike | Ids],
    prompts: Sequence[PromptLike] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[tuple[tuple[int, ...], int]]:
    """The token ids of each text with its prompt, and the length of the prompt."""
    if prompts is None:
        whole = [encode_prompt(tokenizer, text, chat_template_kwargs) for text in texts]  # type: ignore[arg-type]
        return [(ids, len(ids)) for ids in whole]
    if isinstance(prompts, str | Mapping) or len(prompts) != len(texts):
        raise ValueError(f"expected a list of one prompt per text, {len(texts)}; got {prompts!r:.80}. Pair them.")
    beginnings = [encode_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    new = [continuation_ids(tokenizer, text) for text in texts]  # type: ignore[arg-type]
    return [((*ids, *added), len(ids)) for ids, added in zip(beginnings, new, strict=True)]


def _frame(
    tokenizer: Any, number: int, ids: Sequence[int], n_prompt: int, keys: Sequence[tuple[str, int]], values: Tensor
) -> pd.DataFrame:
    tokens = [tokenizer.decode([token]) for token in ids]
    rows = [
        (number, name, layer, i, token, tokens[i], i < n_prompt, i == n_prompt - 1, *values[i, key].tolist())
        for key, (name, layer) in enumerate(keys)
        for i, token in enumerate(ids)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)
