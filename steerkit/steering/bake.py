"""Bake: write a steering into the weights, where that is exact, as a plain checkpoint."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steerkit.io.json import write_json
from steerkit.models.active import suspended
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.checkpoint import quiet
from steerkit.models.hooks import observe_modules, stream_of
from steerkit.models.identity import fingerprint
from steerkit.models.model import device_of, evaluating, text_config, unwrap
from steerkit.models.sites import find_sites
from steerkit.steering.positions import parse_positions
from steerkit.steering.steering import Steering
from steerkit.vectors.vector import SteeringVector

RECORD = "steerkit_bake.json"
BIAS_OPTIONS = ("mlp_bias", "attention_bias", "use_bias")
"""Options of configurations that give an output projection a bias."""
LIMIT, LIMIT_16 = 1e-4, 0.05
"""Largest relative difference of the logits from the steered model's: in float32 and float64, and in 16 bits."""
SHARE = 0.1
"""Largest difference in units of the steering's own effect on the logits."""
IN_THE_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Sites where nothing is left of a direction that no matrix writes."""


class NotExact(ValueError):
    """The steering cannot be written into the weights of this model exactly."""


@dataclass(frozen=True)
class _Output:
    """A linear layer whose output reaches the stream as it is, times `scale`."""

    path: str
    module: nn.Linear | Conv1D
    scale: float


def bake(model: nn.Module, tokenizer: Any, steering: Steering | Sequence[Steering], out: str | Path) -> Path:
    """Write a steering into the weights and save a plain checkpoint, which `AutoModelForCausalLM` loads alone.

    Exact are, and everything else is refused with the reason:

    - `add` with positions `"all"`: the bias of the output projection becomes `b + c v`. For `resid_post` of layer l
      this is the MLP's, for `resid_mid` the attention's. A model without this bias gets one where its configuration has
      an option for it (`mlp_bias` of Llama); all other new biases are zero.
    - `ablate` of one direction u with coefficient 1 and positions `"all+0"`, at `resid_pre`, `resid_mid` and
      `resid_post` of all layers: every matrix and bias that writes to the stream is projected, `W - u u' W`, the
      embeddings too. A tied unembedding is stored apart, unprojected, since the final norm scales each dimension.

    The written checkpoint is loaded again, and its logits are compared with the steered model's, before `out` appears.
    They may differ by a tenth of the effect, the difference of the steered from the unsteered logits, at most: in 16
    bits a weak steering is lost in the rounding of the weights.

    Args:
        model: a model of transformers without adapter and unquantised. It is not changed.
        tokenizer: saved beside it.
        steering: one, or several that act together, each with one number as coefficient.
        out: the folder to write. It must not exist, or be empty.

    Returns:
        The folder. It also holds `steerkit_bake.json`, with what was baked, its effect on the logits and their
        difference from the steered model's, both relative to the norm of the logits.

    Raises:
        NotExact: a ValueError; the message gives the reason.
        ValueError: a steering that does not fit the model.
        FileExistsError: `out` is a file, or a folder that holds something.

    Example:
        >>> sk.bake(model, tokenizer, sk.Steering(vector, 1.0, "all", layer=14), "calm-model")
        >>> AutoModelForCausalLM.from_pretrained("calm-model")

    Source: Arditi et al. 2024, arXiv 2406.11717, section 4.1 (weight orthogonalization).
    """
    folder = Path(out)
    several = list(steering) if isinstance(steering, Sequence) else [steering]
    if not several or not all(isinstance(one, Steering) for one in several):
        raise TypeError(f"expected a Steering, or several; got {steering!r:.80}. Pass Steering(vector, 1.0, 'all').")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):  # before anything is computed
        raise FileExistsError(f"expected a new or empty folder at {folder}; it holds something. Name another.")
    _check_model(model)
    blocks, weights = find_blocks(model), fingerprint(model)
    for one in several:
        one.check(model, blocks, weights)
        _check_form(one)
    with suspended(model) as active, evaluating(model), torch.no_grad():
        if active:
            raise NotExact(
                "expected a model without an active steering; one is on. Pass all that is to be baked, outside `with`."
            )
        config, state = _baked(model, blocks, several)
    _save(model, tokenizer, several, config, state, folder)
    return folder


def ablated_everywhere(
    model: nn.Module, vector: SteeringVector, coefficient: float = 1.0, foreign: bool = False
) -> list[Steering]:
    """Return the ablations of one direction wherever a model's stream can be read, as `bake` needs them.

    Args:
        vector: its one layer gives the direction.

    Returns:
        One `Steering` per site, at all layers and positions: `resid_pre`, `resid_mid` (not in parallel blocks),
        `resid_post`.

    Raises:
        ValueError: a vector of several layers.

    Example:
        >>> sk.bake(model, tokenizer, ablated_everywhere(model, vector.at(14)), "ablated-model")
    """
    if len(vector.layers) != 1:
        raise ValueError(f"expected a vector of one layer; got {list(vector.layers)}. Pass vector.at(layer).")
    blocks, sites = find_blocks(model), find_sites(model)
    (direction,) = vector.layers.values()
    places = {
        "resid_pre": list(blocks.modules),
        "resid_mid": sites.layers("resid_mid"),
        "resid_post": list(blocks.modules),
    }
    return [
        Steering(
            SteeringVector(dict.fromkeys(layers, direction), vector.meta, site),
            coefficient, "all+0", "ablate", foreign, layer="all",
        )
        for site, layers in places.items()
        if layers
    ]  # fmt: skip


def _check_model(model: nn.Module) -> None:
    if unwrap(model) is not model:
        raise NotExact(
            "expected a model without an adapter; got a PEFT model. Merge it first: model = model.merge_and_unload()."
        )
    if not isinstance(model, PreTrainedModel):
        raise NotExact(f"expected a model of transformers; got {type(model).__name__}. Load it without backend=.")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise NotExact("expected weights that are not quantised; got quantised ones. Load the model without bits=.")


def _check_form(one: Steering) -> None:
    """`NotExact` unless the operation, the positions and the coefficient can be exact for some model."""
    name, limit = parse_positions(one.positions)
    if getattr(one, "when", None) is not None:
        raise NotExact("expected a steering without a condition, which weights cannot have. Drop when=.")
    if one.operation not in ("add", "ablate"):
        raise NotExact(f"expected operation add or ablate; got {one.operation!r}, which is no linear map. Use those.")
    if isinstance(one.coefficient, Tensor):
        raise NotExact("expected one number as coefficient; got one per row. Bake one at a time.")
    if name != "all" or limit < 2**62:
        raise NotExact(
            f"expected positions 'all', since weights act at every position; got {one.positions!r}. Steer at 'all'."
        )
    if one.operation == "ablate" and (one.coefficient != 1 or one.positions != "all+0"):
        raise NotExact(
            "expected an ablation with coefficient 1 and positions 'all+0', position 0 included, since weights act "
            f"there too; got coefficient {one.coefficient:g} and {one.positions!r}. Pass those."
        )


def _baked(model: Any, blocks: Blocks, several: Sequence[Steering]) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the weights with the steerings in them."""
    adds = [one for one in several if one.operation == "add"]
    ablations = [one for one in several if one.operation == "ablate"]
    if adds and ablations:
        raise NotExact(
            "expected additions alone or ablations alone, since their order would matter; got both. Bake one kind."
        )
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    outputs = _Outputs(model, blocks)
    if ablations:
        _project(model, blocks, outputs, config, state, _direction(blocks, outputs, ablations))
    for one in adds:
        for layer, vector in one.vector.layers.items():
            output = outputs.before(str(one.site), layer)
            if output.scale != 1:
                raise NotExact(
                    f"expected an output that reaches the stream unscaled; that of {output.path} is scaled by "
                    f"{output.scale:g} in {type(model).__name__}. Steer at run time."
                )
            config, state = _with_bias(model, config, state, output)
            name = f"{output.path}.bias"
            bias = state[name]
            state[name] = (bias.double() + float(one.coefficient) * vector.to(bias.device).double()).to(bias.dtype)
    return config, state


class _Outputs:
    """The linear layers that write to the stream, found by running a probe."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.model, self.blocks, self.sites = model, blocks, find_sites(model)
        self.names = {module: name for name, module in model.named_modules()}
        self.wrote: dict[nn.Module, list[Tensor]] = {}
        self.streams: dict[int, Tensor] = {}
        entering = {block: layer for layer, block in blocks.modules.items()}

        def before(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if module in entering:
                stream = stream_of(args) if args else stream_of(kwargs.get("hidden_states"))
                assert stream is not None
                self.streams[entering[module]] = stream.clone()

        def after(module: nn.Module, out: Any) -> None:
            left = stream_of(out)
            if left is not None and module not in entering:
                self.wrote.setdefault(module, []).append(left.clone())

        with observe_modules({module: module for module in self.names if module is not model}, before, after):
            model(input_ids=_probe(model)[:1, :5], use_cache=False)

    def at(self, site: str, layer: int) -> _Output:
        """The linear layer whose output is this site (`attn_out` or `mlp_out`), up to a scale."""
        point = self.sites.points.get((site, layer))
        if point is None:
            raise NotExact(
                f"expected a verified {site} at layer {layer} of {type(self.model).__name__}; "
                f"{self.sites.reasons[site, layer]}. Steer at run time."
            )
        value = self.wrote[point.module][-1]
        for module in point.module.modules():
            written = self.wrote.get(module, [])
            if not isinstance(module, nn.Linear | Conv1D) or len(written) != 1:
                continue
            if written[0].numel() == value.numel() and torch.equal(written[0].reshape(value.shape), value):
                return _Output(self.names[module], module, point.scale)
        kind = type(point.module).__name__
        reason = (
            f"a norm ({self.names[point.module]}) comes between the output projection and the stream"
            if "Norm" in kind
            else f"{site} is no output of one linear layer (it is that of {kind}, {self.names[point.module]})"
        )
        raise NotExact(
            f"expected a linear layer that writes {site} of layer {layer}; in {type(self.model).__name__} {reason}. "
            "Steer at run time."
        )

    def has_one(self, layer: int) -> bool:
        """Whether the block adds one output to the stream (a recurrent layer's), not two."""
        return ("attn_out", layer) in self.sites.points and ("mlp_out", layer) not in self.sites.points

    def before(self, site: str, layer: int) -> _Output:
        """The linear layer whose bias is added right where a steering of this site adds."""
        if site == "resid_pre" and layer > 0:
            return self.before("resid_post", layer - 1)
        if site in ("resid_post", "mlp_out"):
            return self.at("attn_out" if site == "resid_post" and self.has_one(layer) else "mlp_out", layer)
        if site in ("resid_mid", "attn_out"):
            return self.at("attn_out", layer)
        raise NotExact(
            f"expected a site right after an output projection; got {site} of layer {layer}. Steer resid_mid or "
            "resid_post."
        )

    def embeddings(self) -> list[nn.Embedding]:
        """The embeddings whose outputs add up to the stream that enters block 0."""
        inside = {module for block in self.blocks.modules.values() for module in block.modules()}
        stream = self.streams[0].double().cpu()
        found = [
            module
            for module, written in self.wrote.items()
            if isinstance(module, nn.Embedding) and module not in inside and written[0].shape[-1] == stream.shape[-1]
        ]
        if found:
            parts = [self.wrote[module][0].double().cpu() for module in found]
            columns = torch.stack([part.expand(stream.shape).flatten() for part in parts], 1)
            factors = torch.linalg.lstsq(columns, stream.flatten()[:, None]).solution[:, 0]
            rest = stream.flatten() - columns @ factors
            if float(rest.norm()) <= 1e-2 * float(stream.norm()):
                return found
        raise NotExact(
            f"expected embeddings that add up to the stream before block 0; those of {type(self.model).__name__} do "
            "not (a norm or a matrix follows them). Steer at run time."
        )


def _direction(blocks: Blocks, outputs: _Outputs, ablations: Sequence[Steering]) -> Float[Tensor, " d_model"]:
    """The unit direction of the ablations, in float64.

    Raises:
        NotExact: several directions, or places of the stream where it is not ablated.
    """
    vectors = [v.double() / v.double().norm() for one in ablations for v in one.vector.layers.values()]
    unit = vectors[0]
    if any(1 - abs(float(unit @ other)) > 1e-6 for other in vectors):
        raise NotExact("expected one direction at all layers; got several. Pass vector.at_all(layer).")
    done = {(str(one.site), layer) for one in ablations for layer in one.vector.layers}
    if other := sorted({site for site, _ in done if site not in IN_THE_STREAM}):
        raise NotExact(
            f"expected ablations at sites among {IN_THE_STREAM}; got {other[0]}, which other weights write. Drop it, "
            "or steer at run time."
        )
    done |= {("resid_pre", layer + 1) for site, layer in done if site == "resid_post"}
    done |= {("resid_post", layer - 1) for site, layer in done if site == "resid_pre"}
    wanted = {(site, layer) for layer in blocks.modules for site in ("resid_pre", "resid_post")}
    wanted |= {place for place in outputs.sites.points if place[0] == "resid_mid"}
    if missing := sorted(wanted - done):
        shown = ", ".join(f"{site} of layer {layer}" for site, layer in missing[:4])
        raise NotExact(
            f"expected the ablation at resid_pre, resid_mid and resid_post of all layers; {len(missing)} are missing: "
            f"{shown}. Pass a Steering for each site, with a vector at all layers."
        )
    return unit


def _project(
    model: Any, blocks: Blocks, outputs: _Outputs, config: Any, state: dict[str, Tensor], unit: Tensor
) -> None:
    """Project all that writes to the stream, in `state`; untie the unembedding in `config` and `state`."""
    embeddings = outputs.embeddings()
    writers = []
    for layer in blocks.modules:
        writers.append(outputs.at("attn_out", layer))
        if not outputs.has_one(layer):
            writers.append(outputs.at("mlp_out", layer))
    head = model.get_output_embeddings()
    if head is not None and any(head.weight is one.weight for one in embeddings):
        _set(config, "tie_word_embeddings", False)
        state[f"{outputs.names[head]}.weight"] = head.weight.detach().clone()
    for embedding in embeddings:
        name = f"{outputs.names[embedding]}.weight"
        state[name] = _without(state[name], unit, -1)
    for one in writers:
        name = f"{one.path}.weight"
        state[name] = _without(state[name], unit, -1 if isinstance(one.module, Conv1D) else 0)
        if f"{one.path}.bias" in state:
            state[f"{one.path}.bias"] = _without(state[f"{one.path}.bias"], unit, 0)


def _without(weight: Tensor, unit: Tensor, dim: int) -> Tensor:
    """`W - u (u . W)` along a dimension, computed in float64."""
    wide, u = weight.double().movedim(dim, -1), unit.to(weight.device)
    return (wide - (wide @ u)[..., None] * u).movedim(-1, dim).to(weight.dtype).contiguous()


def _set(config: Any, name: str, value: Any) -> None:
    """Set an option of a configuration and of its text part."""
    for one in {id(one): one for one in (config, config.get_text_config(decoder=True))}.values():
        if hasattr(one, name):
            setattr(one, name, value)


def _with_bias(model: Any, config: Any, state: dict[str, Tensor], output: _Output) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and weights in which an output projection has a bias."""
    name = f"{output.path}.bias"
    if name in state:
        return config, state
    for option in BIAS_OPTIONS:
        if getattr(config.get_text_config(decoder=True), option, None) is not False:
            continue
        changed = copy.deepcopy(config)
        _set(changed, option, True)
        like = output.module.weight
        shapes = _empty(type(model), changed, like.dtype).state_dict()
        new = set(shapes) - set(state)
        if name in new and all(one.endswith(".bias") for one in new):
            zeros = {one: torch.zeros(shapes[one].shape, dtype=like.dtype, device=like.device) for one in new}
            return changed, {**state, **zeros}
    raise NotExact(
        f"expected a bias at {output.path}, to which the vector is added; {type(model).__name__} has none there, and "
        "its configuration has no option for one. Steer at run time."
    )


def _empty(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model without storage."""
    with torch.device("meta"):
        return kind._from_config(config, dtype=dtype)


def _probe(model: nn.Module) -> Int[Tensor, "row pos"]:
    """Three texts of nine tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, text_config(model).vocab_size, (3, 9), generator=generator)
    return ids.to(device_of(model))


def _save(
    model: Any, tokenizer: Any, several: Sequence[Steering], config: Any, state: dict[str, Tensor], folder: Path
) -> None:
    """Write the checkpoint beside `folder`, compare its logits with the steered model's, and rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(folder) as temporary:
        baked = _empty(type(model), config, model.dtype)
        baked.load_state_dict(state, assign=True)
        baked.generation_config = model.generation_config
        with quiet():
            baked.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del baked
        error, effect = _differences(model, several, temporary)
        limit = LIMIT if model.dtype in (torch.float32, torch.float64) else LIMIT_16
        if not error <= limit:
            raise NotExact(
                f"expected logits of the baked model within {limit:g} of the steered model's; they differ by "
                f"{error:.2g} (relative). {type(model).__name__} does something else to the stream. Steer at run time."
            )
        if effect and not error <= SHARE * effect:
            raise NotExact(
                f"expected logits of the baked model within {SHARE:g} of the steering's effect; they differ by "
                f"{error:.2g} from the steered model's, where the steering changes them by {effect:.2g} (relative): "
                f"weights are rounded to {str(model.dtype).removeprefix('torch.')}. Load the model in float32, or "
                "steer at run time."
            )
        about = {"steerings": [_record(one) for one in several], "difference": error, "effect": effect}
        write_json(temporary / RECORD, about)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, removed at the end if it still has its name."""
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _differences(model: Any, several: Sequence[Steering], written: Path) -> tuple[float, float]:
    """Relative differences of logits from the steered model's: the written checkpoint's, and the unsteered model's."""
    with quiet():
        baked: Any = AutoModelForCausalLM.from_pretrained(written, dtype=model.dtype)
    baked = baked.to(device_of(model)).eval()
    ids = _probe(model)
    with torch.inference_mode(), evaluating(model):
        plain, found = (one(input_ids=ids, use_cache=False).logits.double() for one in (model, baked))
        with contextlib.ExitStack() as stack:
            for one in several:
                stack.enter_context(one.on(model))
            steered = model(input_ids=ids, use_cache=False).logits.double()
    error, effect = (float((one - steered).norm() / steered.norm()) for one in (found, plain))
    return error, effect


def _record(one: Steering) -> dict[str, Any]:
    return {
        "operation": str(one.operation),
        "site": str(one.site),
        "layers": list(one.vector.layers),
        "coefficient": float(one.coefficient),
        "positions": one.positions,
        "vector": one.vector.content(),
        "meta": dict(one.vector.meta),
    }
