"""Activations: vectors read from the residual stream, with their labels and groups."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.layers import EMBED, Layer, layer_index
from steerkit.io.files import sha256
from steerkit.models.identity import other_model
from steerkit.models.site_names import DEFAULT

SHOWN_LAYERS = 6
SHOWN_LABELS = 6
SHOWN_ITEMS = 5


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """One vector per item and layer, read from the residual stream.

    `==` and `hash` compare identity: two objects are equal only if they are the same object.

    Args:
        resid: `[item, layer, d_model]` in float32 on the CPU. `resid[i, j]` is the stream after block `layers[j]`
            (`resid_post`, before the final norm), or another site of that block, pooled over the item's span.
            `"embed"` is the input of block 0.
        layers: the layers, in the order of the second axis; 0-based block indices or `"embed"`.
        items: one row per item, in the order of the first axis; the index is replaced by 0, 1, ... Columns:
            `text`: index of the text that the item was read from.
            `label`: `positive` or `negative` for contrast pairs, else the label of the span or text.
            `group`: group id; a group stays on one side of a split.
            `start`: token index of the span in its text.
            `n_tokens`: length of the span in tokens.
            `token`: the text of the token that was read; None for `position="mean"`, which reads several.
        meta: provenance: model, read position, versions.
        site: what was read of each block, see `collect`.

    Raises:
        ValueError: the shapes disagree, or an activation is NaN or infinite.

    Example:
        >>> acts = sk.collect(model, tokenizer, pairs, layers=[8, 14])
        >>> acts.at(14).shape, acts.items["label"].tolist()
    """

    resid: Float[Tensor, "item layer d_model"]
    layers: tuple[Layer, ...]
    items: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)
    site: str = DEFAULT

    def __post_init__(self) -> None:
        if self.resid.ndim != 3 or self.resid.shape[:2] != (len(self.items), len(self.layers)):
            raise ValueError(
                f"expected resid of shape [{len(self.items)} items, {len(self.layers)} layers, d_model]; "
                f"got {list(self.resid.shape)}. Pass one row of `items` per item and one entry of `layers` per layer."
            )
        finite = torch.isfinite(self.resid).all(dim=-1)
        if not finite.all():
            item, column = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"expected finite activations; got NaN or infinity in item {item} at layer {self.layers[column]}. "
                "Load the model in float32 or bfloat16 (float16 overflows), or drop that text."
            )
        object.__setattr__(self, "items", self.items.reset_index(drop=True))

    @classmethod
    def merge(cls, parts: Sequence[Activations]) -> Activations:
        """Return the items of several activations of one model, in order.

        Items with one group id are one group, also of different parts. The default ids of `collect` count the texts of
        each call from 0: pass `groups=` to `collect`, or set the groups of pairs, so that other texts have other ids.

        Args:
            parts: at least one. `meta` keeps what they share, and has the sum of their `n_texts` and a hash of their
                `data_sha256`; the column `text` counts through all parts.

        Raises:
            ValueError: no parts, or other layers, sites, widths, read positions, models or adapters.

        Example:
            >>> acts = sk.Activations.merge([sk.collect(model, tokenizer, pairs), sk.collect(model, tokenizer, more)])
        """
        if isinstance(parts, Activations) or not len(parts):
            raise ValueError(f"expected a list of activations, one at least; got {parts!r:.80}. Put them in a list.")
        first = parts[0]
        for other in parts[1:]:
            _check_alike(first, other)
        counts = [int(part.items["text"].max()) + 1 if len(part) and "text" in part.items else 0 for part in parts]
        items = [
            part.items.assign(text=part.items["text"] + sum(counts[:number])) if counts[number] else part.items
            for number, part in enumerate(parts)
        ]
        metas = [part.meta for part in parts]
        meta = {key: value for key, value in first.meta.items() if all(one.get(key) == value for one in metas)}
        if len(parts) > 1 and all("data_sha256" in one for one in metas):
            meta["data_sha256"] = sha256("\n".join(one["data_sha256"] for one in metas))
        if all("n_texts" in one for one in metas):
            meta["n_texts"] = sum(one["n_texts"] for one in metas)
        return cls(torch.cat([part.resid for part in parts]), first.layers, pd.concat(items), meta, first.site)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Activations({', '.join(f'{name} {value}' for name, value in self._summary().items())})"

    def _repr_html_(self) -> str:
        """Return the summary and the first items as HTML, for notebooks; all texts are escaped."""
        return facts_html("Activations", self._summary()) + self.items.head(SHOWN_ITEMS).to_html(escape=True)

    def _summary(self) -> dict[str, str]:
        summary = {"items": str(len(self)), "layers": shown_layers(self.layers), "d_model": str(self.resid.shape[-1])}
        if self.site != DEFAULT:
            summary["site"] = self.site
        if "read_position" in self.meta:
            summary["position"] = repr(self.meta["read_position"])
        if "token" in self.items and self.items["token"].notna().any():
            tokens = self.items["token"].dropna().map(repr).value_counts()
            if len(tokens) <= SHOWN_LABELS:
                summary["tokens"] = shown_counts(dict(zip(tokens.index.tolist(), tokens.tolist(), strict=True)))
        if "label" in self.items:
            counts = self.items["label"].value_counts(sort=False)
            summary["labels"] = shown_counts(dict(zip(counts.index.tolist(), counts.tolist(), strict=True)))
        return summary

    def at(self, layer: Layer) -> Float[Tensor, "item d_model"]:
        """Return the items' vectors at one layer, `[item, d_model]`.

        Raises:
            ValueError: the layer was not read.
        """
        return self.resid[:, layer_index(self.layers, layer)]

    def where(self, keep: Sequence[bool] | np.ndarray | pd.Series) -> Activations:
        """Return the items for which `keep` (one boolean per item) is true.

        Example:
            >>> acts.where(acts.items["label"] == "harmful")
        """
        kept = np.asarray(keep)
        if kept.dtype != bool or kept.shape != (len(self),):
            got = f"{kept.dtype} of shape {kept.shape}"
            raise ValueError(f"expected {len(self)} booleans, one per item; got {got}. Compare a column of items.")
        return replace(self, resid=self.resid[torch.tensor(kept)], items=self.items[kept])


def _check_alike(first: Activations, other: Activations) -> None:
    """`ValueError` where two activations are not of one kind."""
    kinds = [
        {
            "layers": list(one.layers),
            "site": one.site,
            "width": one.resid.shape[-1],
            "read position": one.meta.get("read_position"),
        }
        for one in (first, other)
    ]
    differ = {name: [kind[name] for kind in kinds] for name in kinds[0] if kinds[0][name] != kinds[1][name]}
    differ |= {name: [first.meta.get(name), value] for name, value in other_model(other.meta, first.meta).items()}
    if differ:
        raise ValueError(f"expected activations of one kind; got {differ!r:.200}. Read all from one model alike.")


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMeans:
    """Means of the residual stream per label: the averages of `Activations`, in memory independent of their number.

    `==` and `hash` compare identity.

    Args:
        mean: `[label, layer, d_model]` in float64.
        counts: number of spans of each mean.
        labels: the labels, in the order of the first axis.
        layers: the layers, in the order of the second axis.
        meta: provenance.
        site: what was read of each block.
    """

    mean: Float[Tensor, "label layer d_model"]
    counts: tuple[int, ...]
    labels: tuple[str, ...]
    layers: tuple[Layer, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    site: str = DEFAULT

    def __repr__(self) -> str:
        counts = shown_counts(dict(zip(self.labels, self.counts, strict=True)))
        return f"ActivationMeans(layers {shown_layers(self.layers)}, d_model {self.mean.shape[-1]}, labels {counts})"

    def of(self, label: str) -> Float[Tensor, "layer d_model"]:
        """Return the mean of one label at every layer, `[layer, d_model]`.

        Raises:
            ValueError: no span has that label.
        """
        if label not in self.labels:
            raise ValueError(f"expected one of the labels {list(self.labels)}; got {label!r}. Name one of those.")
        return self.mean[self.labels.index(label)]


def shown_layers(layers: Sequence[Layer]) -> str:
    """Return layers as a short text: `0-29`, `embed, 8, 14` or `0, ..., 28 (15 layers)`."""
    first, last = layers[0], layers[-1]
    if EMBED not in layers and len(layers) > 2 and list(layers) == list(range(int(first), int(first) + len(layers))):
        return f"{first}-{last}"
    if len(layers) <= SHOWN_LAYERS:
        return ", ".join(map(str, layers))
    return f"{first}, ..., {last} ({len(layers)} layers)"


def shown_counts(counts: Mapping[Any, int]) -> str:
    """Return labels with their counts as a short text: `harmful 8, harmless 8`."""
    shown = [f"{label!s:.40} {count}" if str(label) else f"'' {count}" for label, count in counts.items()]
    rest = [f"... ({len(shown)} labels)"] if len(shown) > SHOWN_LABELS else []
    return ", ".join(shown[:SHOWN_LABELS] + rest)


def facts_html(title: str, facts: Mapping[str, str]) -> str:
    """Return a title and named facts as one HTML paragraph, escaped."""
    parts = ", ".join(f"{html.escape(name)} {html.escape(value)}" for name, value in facts.items())
    return f"<p><b>{html.escape(title)}</b>: {parts}</p>"
