"""Rows of sparse autoencoders, as written by sae-lens: decoder rows as vectors, encoder thresholds for conditions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite
from numbers import Integral
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerkit.io.json import read_json
from steerkit.vectors.vector import SteeringVector

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LEVELS = {"standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
"""Architectures whose features have a threshold of their own, and the tensors `[d_sae]` that it is made of."""
ARCHITECTURES = (*LEVELS, "topk", "batchtopk", "matryoshka_batchtopk")
RECTIFIERS = ("relu", "tanh-relu")
"""Activation functions that are above 0 where their input is."""
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn": "activation_fn_str",
}
"""Fields of the first versions of sae-lens."""
HOOKS = {
    r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)": None,
    r"blocks\.(\d+)\.attn\.hook_(z)": None,
    r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)": "resid_post",
}
"""Patterns of hook names (TransformerLens; the path of a block) and, where they do not name it, their site."""


@dataclass(frozen=True, eq=False)
class SaeRow:
    """One feature of a sparse autoencoder: the result of `read_sae`.

    Args:
        index: the row of `W_dec`.
        decoder: the row, `[d_in]`, at the layer and site of the autoencoder: what the feature adds.
        encoder: the column of `W_enc`, `[d_in]`: what the feature reads, for conditions. For an autoencoder of
            `resid_pre` of layer l > 0 it is held at `resid_post` of layer l - 1, the same stream.
        threshold: the feature is active where `h . encoder / |encoder| > threshold`; None where the file does not fix
            one.
        reason: why `threshold` is None.

    Example:
        >>> row = sk.read_sae("sae/blocks.12.hook_resid_post", 431)[431]
        >>> steering = sk.Steering(row.decoder, 40.0, when=sk.Condition(row.encoder, above=row.above))
    """

    index: int
    decoder: SteeringVector
    encoder: SteeringVector
    threshold: float | None
    reason: str = ""

    @property
    def above(self) -> float:
        """The threshold, for `sk.Condition`; `ValueError` with the reason where none is fixed."""
        if self.threshold is None:
            raise ValueError(f"expected a threshold of row {self.index}; {self.reason}. Calibrate one on texts.")
        return self.threshold


def read_sae(path: str | Path, rows: int | Sequence[int]) -> dict[int, SaeRow]:
    """Return features of a sparse autoencoder that sae-lens saved (`sae.save_model(folder)`).

    Only the rows that are asked for are read. With w the encoder column, b its bias and d the decoder's bias, a feature
    of a `standard` autoencoder is active where `(h - d) . w + b > 0`, of `jumprelu` where it is above the row's
    `threshold` t, so along `w / |w|` the threshold is `(t - b + d . w) / |w|` (without d where
    `apply_b_dec_to_input` is false). A `gated` feature is active where gate and magnitude are above 0: `t - b` is then
    `max(-b_gate, -b_mag exp(-r_mag))`.

    Args:
        path: the folder with `cfg.json` and `sae_weights.safetensors`, or a safetensors file with `cfg.json` beside it.
        rows: feature indices.

    Returns:
        Row -> `SaeRow`. The decoder rows carry the layer and site of `hook_name`, and in `meta["source"]` the row and
        the fields of the file. They have no model fingerprint: check that the model is the right one. A model that
        TransformerLens has processed (`fold_ln`, `center_writing_weights`) has other streams than the checkpoint.

    Raises:
        FileNotFoundError: no such folder, `cfg.json` or weights.
        ValueError: a field or tensor that the files lack, by name; a file of another format; a hook that is no site,
            one head, a transcoder; shapes that disagree; a row that does not exist; weights that are not finite.

    Example:
        >>> row = sk.read_sae("sae/blocks.8.hook_resid_pre", 12)[12]
        >>> sk.generate(model, tokenizer, prompts, max_new_tokens=40, steering=sk.Steering(row.decoder, 20.0))

    Source: Bricken et al. 2023, "Towards Monosemanticity"; Rajamanoharan et al. 2024, arXiv 2404.16014 (gated) and
    arXiv 2407.14435 (JumpReLU).
    """
    weights = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    _refuse_arrays(weights)
    if not weights.is_file():
        raise FileNotFoundError(f"expected weights of sae-lens at {weights}; there is no such file. Check the path.")
    config_path = weights.with_name(CONFIG)
    if not config_path.is_file():
        raise FileNotFoundError(
            f"expected the configuration of sae-lens at {config_path}; there is none. It names the hook point: "
            "download it too."
        )
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise ValueError(f"expected an object in {config_path}; got {type(config).__name__}. Download it again.")
    fields = _fields(config)
    layer, site = _place(fields, config_path)
    if fields.get("architecture", "standard") not in ARCHITECTURES:
        raise ValueError(
            f"expected an architecture among {ARCHITECTURES} in {config_path}; got {fields['architecture']!r:.80}. Its "
            "decoder may write elsewhere than it reads: build SteeringVector({layer: row}) yourself."
        )
    wanted = _row_list(rows)
    try:
        with safe_open(weights, framework="pt") as file:
            return {row: _read_row(file, weights, fields, row, layer, site) for row in wanted}
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file at {weights}; got {error}. Download it again.") from error


def _refuse_arrays(weights: Path) -> None:
    """`ValueError` for a file of numpy arrays, or a folder that holds one and no weights of sae-lens."""
    arrays = (
        [weights] if weights.suffix == ".npz" else [] if weights.is_file() else sorted(weights.parent.glob("*.npz"))
    )
    if arrays:
        raise ValueError(
            f"expected a folder of sae-lens, {CONFIG} and {WEIGHTS}; got {arrays[0]}, numpy arrays, as Gemma Scope "
            "publishes them. Convert it: sae_lens.SAE.from_pretrained(release, sae_id).save_model(folder)."
        )


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration; those of versions from 6 on have some in `metadata` (or `meta`)."""
    inner: dict[str, Any] = {}
    for name in ("meta", "metadata"):
        if isinstance(config.get(name), Mapping):
            inner |= config[name]
    found = {**inner, **{name: value for name, value in config.items() if value is not None}}
    return {**{RENAMED[name]: value for name, value in found.items() if name in RENAMED}, **found}


def _place(fields: Mapping[str, Any], path: Path) -> tuple[int, str]:
    """The layer and site of the hook point."""
    hook = fields.get("hook_name")
    if not isinstance(hook, str):
        raise ValueError(
            f"expected hook_name in {path} (at the top, or in metadata); it lacks one. Without it layer and site are "
            'unknown: add it, e.g. "blocks.8.hook_resid_post".'
        )
    if fields.get("hook_head_index") is not None:
        raise ValueError(
            f"expected an autoencoder of whole sites in {path}; hook_head_index is "
            f"{fields['hook_head_index']!r:.20}, one head. Use one of all heads."
        )
    for pattern, site in HOOKS.items():
        if match := re.fullmatch(pattern, hook):
            layer = int(match[1])
            if fields.get("hook_layer") not in (None, layer):
                raise ValueError(
                    f"expected one layer in {path}; hook_name is {hook!r} and hook_layer {fields['hook_layer']!r:.20}. "
                    "Correct it."
                )
            return layer, site or match[2]
    raise ValueError(
        f"expected a hook_name such as 'blocks.8.hook_resid_post' in {path}; got {hook!r:.80}, which is no site that "
        "can be steered. Use an autoencoder of the stream, attn_out, mlp_out or z."
    )


def _row_list(rows: Any) -> list[int]:
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    several = [rows] if isinstance(rows, Integral) else list(rows) if isinstance(rows, Sequence | range) else [rows]
    if not several or any(not isinstance(row, Integral) or isinstance(row, bool) or row < 0 for row in several):
        raise ValueError(f"expected feature indices from 0; got {rows!r:.80}. Pass one integer or several.")
    return [int(row) for row in several]


def _read_row(file: Any, path: Path, fields: Mapping[str, Any], row: int, layer: int, site: str) -> SaeRow:
    names = set(file.keys())
    if missing := sorted({"W_dec", "W_enc"} - names):
        raise ValueError(
            f"expected tensors W_dec [d_sae, d_in] and W_enc [d_in, d_sae] in {path}; it lacks {', '.join(missing)} "
            f"and holds {sorted(names)}. Save it with sae-lens again."
        )
    decoder, encoder = file.get_slice("W_dec"), file.get_slice("W_enc")
    shape = decoder.get_shape()
    features, width = shape if len(shape) == 2 else (0, 0)
    given = [fields.get("d_sae", features), fields.get("d_in", width)]
    if len(shape) != 2 or encoder.get_shape() != [width, features] or given != [features, width]:
        raise ValueError(
            f"expected W_dec [d_sae, d_in] and W_enc [d_in, d_sae] of one shape; got {shape}, "
            f"{encoder.get_shape()} and {given} in {CONFIG}. The files belong to different autoencoders."
        )
    if row >= features:
        raise ValueError(f"expected a row below {features} in {path}; got {row}. Pass an index of a feature.")
    read = encoder[:, row : row + 1][:, 0].double()
    threshold, reason = _threshold(file, names, fields, row, read)
    kept = ("model_name", "hook_name", "architecture", "normalize_activations", "neuronpedia_id", "dataset_path")
    source = {"file": path.name, "row": row, **{name: fields[name] for name in kept if fields.get(name) is not None}}
    meta: dict[str, Any] = {"source": source}
    if isinstance(fields.get("model_name"), str):
        meta["checkpoint"] = fields["model_name"]

    at = ("resid_post", layer - 1) if site == "resid_pre" and layer > 0 else (site, layer)
    adds = SteeringVector({layer: decoder[row].float()}, {**meta, "method": "SAE decoder row"}, site)
    reads = SteeringVector({at[1]: read.float()}, {**meta, "method": "SAE encoder column"}, at[0])
    return SaeRow(row, adds, reads, threshold, reason)


def _threshold(
    file: Any, names: set[str], fields: Mapping[str, Any], row: int, read: Tensor
) -> tuple[float | None, str]:
    """The threshold along the unit encoder direction, or the reason why there is none.

    Raises:
        ValueError: a bias of another shape than the autoencoder's.
    """
    architecture = fields.get("architecture", "standard")
    activation = fields.get("activation_fn_str", RECTIFIERS[0])
    normalized = fields.get("normalize_activations", "none")
    if architecture not in LEVELS or activation == "topk":
        kind = architecture if architecture not in LEVELS else activation
        return None, f"a {kind} autoencoder compares features with each other, not with a threshold"
    if activation not in RECTIFIERS:
        return None, f"its activation function is {activation!r:.40}, none of {RECTIFIERS}"
    if normalized not in ("none", None):
        return None, f"the activations are normalised ({normalized}) before they are read"
    needed = [*LEVELS[architecture], *(["b_dec"] if fields.get("apply_b_dec_to_input", True) else [])]
    if missing := sorted(set(needed) - names):
        return None, f"the file lacks {', '.join(missing)}"
    for name in needed:
        wanted = [len(read)] if name == "b_dec" else file.get_slice("W_dec").get_shape()[:1]
        if file.get_slice(name).get_shape() != wanted:
            raise ValueError(
                f"expected {name} of shape {wanted}; got {file.get_slice(name).get_shape()}. The tensors belong to "
                "different autoencoders, or the file is damaged: download it again."
            )
    if not read.any():
        return None, "its encoder column is zero"
    values = {name: float(file.get_slice(name)[row : row + 1][0]) for name in LEVELS[architecture]}
    if architecture == "gated":
        level = max(-values["b_gate"], -values["b_mag"] * exp(min(-values["r_mag"], 700.0)))
    else:
        level = max(values.get("threshold", 0.0), 0.0) - values["b_enc"]
    offset = float(file.get_tensor("b_dec").double() @ read) if "b_dec" in needed else 0.0
    found = (level + offset) / float(read.norm())
    if not all(isfinite(one) for one in (*values.values(), found)):
        return None, f"its {', '.join(needed)} are not all finite numbers"
    return found, ""
