"""Sites: the tensors of a block that can be read and written, located by a rule and verified on the model.

`resid_pre` is the stream that enters a block, `attn_out` what attention adds to it, `mlp_out` what the MLP adds,
`resid_mid` = `resid_pre + attn_out`, `resid_post` the stream that leaves the block, `z` the outputs of the attention
heads, side by side, before the output projection. In a block with a recurrent layer or a convolution in the place of
attention, `attn_out` is what that layer adds.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steerkit.models.active import suspended
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.hooks import (
    HookPoint,
    edit_points,
    edit_streams,
    observe_modules,
    observe_points,
    stream_of,
)
from steerkit.models.model import RAISED, device_of, evaluating, text_config, unwrap
from steerkit.models.site_names import DEFAULT, SITES, Place, check_name


class NoSite(ValueError):
    """The model does not have a site, or it could not be verified."""


@dataclass(frozen=True, eq=False)
class Sites:
    """The sites of a model.

    Args:
        points: (site, layer) -> where it is read and written, for every place that passed verification.
        reasons: (site, layer) -> why it did not pass.
        paths: (site, layer) -> path of the hooked module in its block, `""` for the block.
        heads: layer -> number of heads in `z`, and the width of each.
    """

    points: Mapping[Place, HookPoint]
    reasons: Mapping[Place, str]
    paths: Mapping[Place, str]
    heads: Mapping[int, tuple[int, int]]

    def layers(self, site: str) -> list[int]:
        """The layers at which a site was verified."""
        return sorted(layer for name, layer in self.points if name == site)


_found: weakref.WeakKeyDictionary[nn.Module, Sites] = weakref.WeakKeyDictionary()


def points_at(model: nn.Module, blocks: Blocks, places: Iterable[Place]) -> dict[Place, HookPoint]:
    """Where these places are read and written.

    Raises:
        NoSite: the model does not have one of them, or it could not be verified; the message gives the reason.
        ValueError: an unknown site or layer.
    """
    points: dict[Place, HookPoint] = {}
    for site, layer in places:
        blocks.check(layer)
        if check_name(site) == DEFAULT:
            points[site, layer] = HookPoint(blocks.modules[layer], "output", blocks.modules[layer])
            continue
        sites = find_sites(model, (site, layer))
        if (site, layer) not in sites.points:
            known = ", ".join(name for name in SITES if (name, layer) in sites.points or name == DEFAULT)
            raise NoSite(
                f"expected a verified site at layer {layer}; {site} is refused: {sites.reasons[site, layer]}. "
                f"Use one that was verified there: {known}."
            )
        points[site, layer] = sites.points[site, layer]
    return points


def layers_with(model: nn.Module, blocks: Blocks, site: str) -> list[int]:
    """The layers at which a site was verified, one at least.

    Raises:
        NoSite: there is none; the message gives the reason at layer 0.
    """
    if check_name(site) == DEFAULT:
        return list(blocks.modules)
    layers = find_sites(model).layers(site)
    if not layers:
        points_at(model, blocks, [(site, layer) for layer in blocks.modules])  # raises, with the reason
    return layers


def width_of(model: nn.Module, blocks: Blocks, site: str, layers: Iterable[int]) -> int:
    """The width of the vectors at a site: `d_model`, for `z` the number of heads times their width.

    Raises:
        NoSite: see `points_at`.
        ValueError: these layers have heads of different widths.
    """
    layers = list(layers)
    points_at(model, blocks, [(site, layer) for layer in layers])
    if site != "z":
        return blocks.d_model
    heads = find_sites(model).heads
    widths = {layer: heads[layer][0] * heads[layer][1] for layer in layers}
    if len(set(widths.values())) > 1:
        raise ValueError(f"expected layers with equal widths of z; got {widths}. Pass layers of one width.")
    return next(iter(widths.values()))


@contextlib.contextmanager
def edit_places(
    model: nn.Module, blocks: Blocks, places: Iterable[Place], edit: Callable[[Place, Tensor], Tensor | None]
) -> Iterator[set[Place]]:
    """Replace the value at each place by `edit((site, layer), value)`.

    Args:
        edit: gets the value `[batch, pos, width]`; returns a new tensor of this shape, or None for no change.

    Yields:
        The set of places whose hooks have run, for `check_called`.

    Raises:
        NoSite, ValueError: see `points_at`.
    """
    points = points_at(model, blocks, places)
    streams = {layer: blocks.modules[layer] for site, layer in points if site == DEFAULT}
    inner = {place: point for place, point in points.items() if place[0] != DEFAULT}
    called: set[Place] = set()

    def edit_place(place: Place, value: Tensor) -> Tensor | None:
        called.add(place)
        return edit(place, value)

    with edit_streams(streams, lambda layer, stream: edit_place((DEFAULT, layer), stream)):
        if not inner:
            yield called
            return
        with edit_points(inner, edit_place):
            yield called


def find_sites(model: nn.Module, place: Place | None = None) -> Sites:
    """The model's sites, each verified once per model, on a probe of five tokens.

    A rule proposes the modules, and identities decide. Of all pairs of modules whose outputs a and m satisfy
    `resid_pre + s a + t m = resid_post` with constants s and t, the outermost pair with s = t = 1 if there is one:
    where a norm follows a sublayer, its output is the one that adds up. The output projection is the last linear layer
    that a comes from and whose input holds `heads * head width` numbers. A place is verified if in the block, run
    again,

    - a part (`attn_out` or `mlp_out`) at a position depends on earlier ones, and none where `attn_out` is zero;
    - zeros written to a part, and values of the stream's size, arrive in `resid_post = resid_pre + attn_out + mlp_out`;
    - another `resid_mid` gives `resid_post = resid_mid + mlp_out`, and `mlp_out` depends on nothing else; in parallel
      blocks, whose MLP does not read `attn_out`, there is no `resid_mid`;
    - another `resid_pre` arrives as the stream that is added to;
    - another `z` in the slice of each head changes `attn_out`, and zeros in all slices leave a constant.

    Sums hold at each element up to the rounding of the stream's dtype there, so a part that is small beside the stream
    is verified too, see `_Rounding`.

    Args:
        place: what is asked for; modules are searched again if the one of this place (default: of any) was replaced.

    Returns:
        `Sites`.
    """
    base = unwrap(model)
    blocks = find_blocks(model)
    known = _found.get(base)
    places: Iterable[Place] = [] if known is None else known.paths if place is None else {place} & known.paths.keys()
    if known is None or any(
        blocks.modules[layer].get_submodule(known.paths[site, layer]) is not known.points[site, layer].module
        for site, layer in places
    ):
        known = _found[base] = _searched(base, blocks)
    return known


@dataclass(eq=False)
class _Call:
    """One call of a module inside a block."""

    path: str
    module: nn.Module
    entered: Tensor | None
    left: Tensor | None = None


@dataclass(eq=False)
class _Run:
    """A block's forward: its arguments, the streams before and after it, the calls of its modules in their order."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entered: Tensor
    left: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)

    def again(
        self, points: Mapping[str, HookPoint], edits: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of the block, run again with edits of these points, and the values of all points after them."""
        read: dict[str, Tensor] = {}
        edited = {name: points[name] for name in edits}
        with (
            edit_points(edited, lambda name, value: edits[name](value)),
            observe_points(points, lambda name, value: read.__setitem__(name, value.clone())),
        ):
            out = stream_of(self.block(*self.args, **self.kwargs))
        assert out is not None
        return out.clone(), read


def _searched(model: nn.Module, blocks: Blocks) -> Sites:
    points: dict[Place, HookPoint] = {}
    reasons: dict[Place, str] = {}
    paths: dict[Place, str] = {}
    heads: dict[int, tuple[int, int]] = {}
    shared = _shared_modules(blocks)
    with suspended(model), evaluating(model), torch.no_grad():  # a steering would be taken for a part of the block
        for layer, run in _recorded(model, blocks, shared).items():
            found, why, of_z = _sites_of(run, _head_counts(model, layer))
            for site in SITES[:-1]:
                if site in found:
                    path, point = found[site]
                    points[site, layer], paths[site, layer] = point, path
                else:
                    reasons[site, layer] = why.get(site, "no module of the block holds it")
            if of_z:
                heads[layer] = of_z
    return Sites(points, reasons, paths, heads)


def _recorded(model: nn.Module, blocks: Blocks, shared: set[nn.Module]) -> dict[int, _Run]:
    """The forward of each block on the probe, without the calls of modules that several blocks share."""
    device = device_of(model)
    ids = (torch.arange(1, 6, device=device) % text_config(model).vocab_size).unsqueeze(0)
    modules = {
        (layer, path): module
        for layer, block in blocks.modules.items()
        for path, module in block.named_modules()
        if not path or module not in shared
    }
    runs: dict[int, _Run] = {}

    def before(key: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, path = key
        entered = stream_of(args) if args else stream_of(kwargs.get("hidden_states"))
        entered = None if entered is None else entered.clone()
        if path:
            runs[layer].calls.append(_Call(path, modules[key], entered))
            return
        assert entered is not None  # as in the verification of the blocks
        args = (entered, *args[1:]) if args else args
        kwargs = kwargs if args else {**kwargs, "hidden_states": entered}
        runs[layer] = _Run(modules[key], args, kwargs, entered)

    def after(key: tuple[int, str], out: Any) -> None:
        layer, path = key
        left = stream_of(out)
        left = None if left is None else left.clone()
        if path:
            call = next(one for one in reversed(runs[layer].calls) if one.path == path)
            call.left = left
        else:
            runs[layer].left = left

    with observe_modules(modules, before, after):
        model(input_ids=ids, use_cache=False)
    return runs


def _head_counts(model: nn.Module, layer: int) -> tuple[int, set[int]]:
    """The configured number of attention heads of a layer and the widths that one may have."""
    config = text_config(model)
    config = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
    count = next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), 0)
    width = next((getattr(config, name, None) for name in ("hidden_size", "d_model", "n_embd")), None)
    widths = {getattr(config, name, None) for name in ("head_dim", "v_head_dim", "kv_channels", "d_kv")}
    if count and isinstance(width, int):
        widths.add(width // count)
    return count, {one for one in widths if isinstance(one, int) and one > 0}


def _shared_modules(blocks: Blocks) -> set[nn.Module]:
    """Modules that several blocks hold."""
    seen: set[nn.Module] = set()
    shared: set[nn.Module] = set()
    for block in blocks.modules.values():
        modules = set(block.modules())
        shared |= seen & modules
        seen |= modules
    return shared


Found = dict[str, tuple[str, HookPoint]]


def _sites_of(run: _Run, heads: tuple[int, set[int]]) -> tuple[Found, dict[str, str], tuple[int, int] | None]:
    """The verified sites of one block, the reasons for the others, and the number of heads and the width of `z`."""
    assert run.left is not None
    block, rounding = run.block, _Rounding.of(run.entered, run.left)
    found: Found = {"resid_pre": ("", HookPoint(block, "input", block))}
    reasons: dict[str, str] = {}
    if getattr(block, "_compiled_call_impl", None) is not None:
        return {}, dict.fromkeys(SITES[:-1], "the block is compiled, and its modules run no hooks"), None
    try:
        same, _ = run.again({}, {})
    except RAISED as error:
        reason = f"the block cannot be run by itself ({type(error).__name__}: {error!s:.80})"
        return {}, dict.fromkeys(SITES[:-1], reason), None
    if not rounding.near(same, run.left, run.left):
        return {}, dict.fromkeys(SITES[:-1], "the block run again returns another stream"), None
    why: list[str] = []
    for parts in _summands(run, rounding):
        verified = _verified(run, parts, rounding)
        if not isinstance(verified, str):
            found |= verified
            break
        why.append(verified)
    if len(found) == 1:
        reason = [*why, "no two modules of the block have outputs that add up to what it adds to the stream"][0]
        return _pre_alone(run, rounding), dict.fromkeys(SITES[1:-1], reason), None
    if "attn_out" not in found:
        return found, dict.fromkeys(("z", "attn_out", "resid_mid"), "the block has no attention"), None
    if "mlp_out" not in found:
        reasons |= dict.fromkeys(("resid_mid", "mlp_out"), "the block adds one output to the stream, not two")
    elif "resid_mid" not in found:
        reasons["resid_mid"] = "the MLP does not read it: attention and MLP of the block read the same stream"
    z, reason = _heads(run, found["attn_out"], heads, rounding)
    if z is None:
        reasons["z"] = reason
        return found, reasons, None
    path, point, width = z
    found["z"] = path, point
    return found, reasons, (heads[0], width // heads[0])


def _pre_alone(run: _Run, rounding: _Rounding) -> Found:
    """`resid_pre`, of a block whose other sites are unknown: what is written there is what the block reads."""
    point = HookPoint(run.block, "input", run.block)
    moved = _moved(run.entered)
    written, _ = run.again({"resid_pre": point}, {"resid_pre": lambda _: moved})
    args = (moved, *run.args[1:]) if run.args else run.args
    kwargs = run.kwargs if run.args else {**run.kwargs, "hidden_states": moved}
    given = stream_of(run.block(*args, **kwargs))
    assert given is not None and run.left is not None
    arrived = rounding.alike(written, given) and not rounding.alike(written, run.left)
    return {"resid_pre": ("", point)} if arrived else {}


@dataclass(frozen=True)
class _Rounding:
    """Which differences are explained by rounding to the dtype of a block's stream.

    Args:
        unit: the distance from 1 to the next number of the dtype.
        smallest: the smallest number of full precision.
    """

    unit: float
    smallest: float

    @classmethod
    def of(cls, *streams: Tensor) -> _Rounding:
        """The rounding of the coarsest of these streams."""
        about = [torch.finfo(stream.dtype) for stream in streams]
        return cls(max(one.eps for one in about), max(one.smallest_normal for one in about))

    def near(self, first: Tensor, second: Tensor, *operands: Tensor) -> bool:
        """Whether each element of two results differs by at most four units of the sum of its operands' sizes."""
        size = sum((_wide(one).abs() for one in operands), torch.zeros((), dtype=torch.float64))
        return bool(((_wide(first) - _wide(second)).abs() <= 4 * self.unit * (size + self.smallest)).all())

    def adds_up(self, total: Tensor, *parts: Tensor) -> bool:
        """Whether the parts add up to the total at each element."""
        return self.near(total, sum((_wide(one) for one in parts), torch.zeros((), dtype=torch.float64)), *parts)

    def alike(self, *outputs: Tensor) -> bool:
        """Whether the first two of these outputs of a sublayer, `[..., pos, width]`, are equal at each position.

        Rounding of what the sublayer reads grows on its way through it: to 1e-4 of the largest norm there, in 16 bits
        to eight units of it.
        """
        wide = [_wide(one) for one in outputs]
        size = torch.stack([one.norm(dim=-1) for one in wide]).amax(0)
        return bool(((wide[0] - wide[1]).norm(dim=-1) <= max(1e-4, 8 * self.unit) * size).all())


def _wide(value: Tensor) -> Tensor:
    return value.cpu().double()


def _moved(stream: Tensor) -> Tensor:
    """Another stream: at each position a multiple of a ramp is added, of the size of the stream there."""
    wide = stream.float()
    ramp = torch.linspace(-1, 1, stream.shape[-1], device=stream.device).roll(1)
    steps = torch.linspace(0.5, 1.5, stream.shape[-2], device=stream.device)[:, None]
    size = wide.std(dim=-1, keepdim=True)
    return (wide + size.where(size > 0, 1.0) * steps * ramp).to(stream.dtype)


def _summands(run: _Run, rounding: _Rounding) -> Iterable[Found]:
    """The modules whose outputs could be `attn_out` and `mlp_out`, the most likely first."""
    flat_shape = (run.entered.shape[0] * run.entered.shape[1], run.entered.shape[-1])
    counts = {call.path: sum(other.path == call.path for other in run.calls) for call in run.calls}
    candidates: list[tuple[_Call, Tensor]] = []
    for call in sorted(run.calls, key=lambda one: one.path.count(".")):
        out = call.left
        if out is None or counts[call.path] > 1 or not out.is_floating_point():
            continue
        if out.shape not in (run.entered.shape, flat_shape):
            continue
        value = _wide(out).reshape(run.entered.shape)
        if float(value.norm()) > 0 and not any(torch.equal(value, other) for _, other in candidates):
            candidates.append((call, value))
    place = {call.path: number for number, call in enumerate(run.calls)}

    def point(call: _Call, scale: float, adds: bool = False) -> tuple[str, HookPoint]:
        assert call.left is not None
        return call.path, HookPoint(call.module, "output", run.block, scale, adds, call.left.ndim == 2)

    options: list[tuple[tuple[Any, ...], Found]] = []
    for first, second in itertools.combinations(candidates, 2):
        (a, m) = sorted((first, second), key=lambda one: place[one[0].path])
        scales = _scales(run, (a[1], m[1]), rounding)
        if scales is None:
            continue
        depth = a[0].path.count(".") + m[0].path.count(".")
        for earlier, later, (s, t) in ((a[0], m[0], scales), (m[0], a[0], scales[::-1])):
            parts = {
                "attn_out": point(earlier, s),
                "mlp_out": point(later, t),
                "resid_mid": point(earlier, s, adds=True),
            }
            swapped = earlier is m[0]
            options.append(((scales != (1.0, 1.0), swapped, depth), parts))
    for call, value in candidates:
        single = _scales(run, (value,), rounding)
        if single is not None:
            options.append(((True, True, call.path.count(".")), {"attn_out": point(call, single[0])}))
    return [parts for _, parts in sorted(options, key=lambda one: one[0])]


def _scales(run: _Run, parts: Sequence[Tensor], rounding: _Rounding) -> tuple[float, ...] | None:
    """The factors with which the parts, each of them needed, add up to what the block adds; None where there are none.

    They are 1 where that is enough, else fitted by least squares, each element in units of its rounding.
    """
    assert run.left is not None
    entered, left = _wide(run.entered), _wide(run.left)
    if rounding.adds_up(left, entered, *parts):
        return (1.0,) * len(parts)
    weight = 1 / (entered.abs() + left.abs() + rounding.smallest).flatten()
    columns = torch.stack([part.flatten() * weight for part in parts], 1)
    factors = torch.linalg.lstsq(columns, ((left - entered).flatten() * weight)[:, None]).solution[:, 0].tolist()
    scaled = [part * factor for part, factor in zip(parts, factors, strict=True)]
    if not rounding.adds_up(left, entered, *scaled):
        return None
    if any(rounding.adds_up(left, entered, *scaled[:number], *scaled[number + 1 :]) for number in range(len(scaled))):
        return None
    return tuple(factors)


def _verified(run: _Run, parts: Found, rounding: _Rounding) -> Found | str:  # noqa: C901  one identity after another
    """These parts, if every identity holds (without `resid_mid` in a parallel block), or the one that does not."""
    points = {"resid_pre": HookPoint(run.block, "input", run.block), **{name: one for name, (_, one) in parts.items()}}
    added = [name for name in parts if name != "resid_mid"]

    def again(**edits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return run.again(points, {name: partial(_written, new) for name, new in edits.items()})

    def adds_up(out: Tensor, read: Mapping[str, Tensor]) -> bool:
        return rounding.adds_up(out, *(read[name] for name in ("resid_pre", *added)))

    entered, moved = run.entered, _moved(run.entered)
    shift, zeros = moved - entered, torch.zeros_like(entered)
    half = entered.shape[1] // 2
    other_start = torch.cat([moved[:, :half].roll(entered.shape[-1] // 2, -1), entered[:, half:]], 1)
    plain = again()[1]
    inner = _Rounding.of(*plain.values())  # coarser than the stream's in models whose sublayers compute in 16 bits

    def reads_earlier(**edits: Tensor) -> bool:
        """Whether a part in the second half of the positions depends on the stream in the first."""
        one, other = again(**edits)[1], again(resid_pre=other_start, **edits)[1]
        return not all(inner.alike(one[name][:, half:], other[name][:, half:], plain[name][:, half:]) for name in added)

    if not reads_earlier():
        single = next(iter(parts.values()))
        return "no position reads an earlier one" if len(added) > 1 else {"mlp_out": single}
    if reads_earlier(attn_out=zeros):
        return "positions read earlier ones also where attn_out is zero"
    out, read = again(resid_pre=moved)
    if not adds_up(out, read) or not torch.equal(read["resid_pre"], moved):
        return "another resid_pre does not arrive in the sum"
    for name in added:
        for new in (zeros, shift):
            out, read = again(**{name: new})
            if not adds_up(out, read) or not inner.near(read[name], new, new, plain[name]):
                return f"another {name} does not arrive in the sum"
    if len(added) == 1:
        return parts
    if inner.alike(again(attn_out=shift)[1]["mlp_out"], plain["mlp_out"]):
        return {name: part for name, part in parts.items() if name != "resid_mid"}
    out, read = again(resid_mid=moved)
    arrived = inner.near(read["resid_mid"], moved, moved, plain["resid_mid"], entered)
    if not arrived or not rounding.adds_up(out, read["resid_mid"], read["mlp_out"]):
        return "another resid_mid does not arrive in the sum"
    first, second = _coarse(shift), _coarse(shift.roll(entered.shape[-1] // 2, -1))  # their sum is exact in every dtype
    whole, halves = again(resid_pre=first + second, attn_out=zeros)[1], again(resid_pre=first, attn_out=second)[1]
    if not inner.alike(whole["mlp_out"], halves["mlp_out"]):
        return "mlp_out is no function of resid_mid"
    return parts


def _written(new: Tensor, _: Tensor) -> Tensor:
    """A copy of what is written: a block may add in place to what its modules return."""
    return new.clone()


def _coarse(stream: Tensor) -> Tensor:
    """A stream rounded, at each position, to multiples of a power of 2 that is a 32nd of the largest value or more."""
    step = torch.exp2(stream.float().abs().amax(dim=-1, keepdim=True).log2().ceil() - 5)
    return ((stream.float() / step).round() * step).to(stream.dtype)


def _heads(
    run: _Run,
    attn_out: tuple[str, HookPoint],
    heads: tuple[int, set[int]],
    rounding: _Rounding,
) -> tuple[tuple[str, HookPoint, int] | None, str]:
    """The path, point and width of `z`, or the reason why there is none."""
    count, head_widths = heads
    widths = {count * one for one in head_widths}
    last = max(number for number, call in enumerate(run.calls) if call.path == attn_out[0])
    if not count:
        return None, "the configuration names no attention heads"
    reason = f"no linear layer before attn_out reads {count} heads of a configured width"
    inside = attn_out[0] + "." if any(c.path.startswith(attn_out[0] + ".") for c in run.calls) else ""
    for call in reversed(run.calls):
        number = run.calls.index(call)
        if number > last and not call.path.startswith(inside or "\0"):
            continue
        if not (isinstance(call.module, nn.Linear | Conv1D) or hasattr(call.module, "base_layer")):
            continue
        if hasattr(_around(run.block, call.path), "base_layer"):  # the adapter around it reads its input, too
            continue
        z, out = call.entered, call.left
        if z is None or out is None or z.shape[-1] not in widths or out.shape[-1] != run.entered.shape[-1]:
            continue
        if any(isinstance(one, nn.Conv1d) for one in _around(run.block, call.path).modules()):
            continue
        point = HookPoint(call.module, "input", run.block, flat=z.ndim == 2)
        if why := _broken_heads(run, point, z, attn_out[1], count, rounding):
            reason = why
            continue
        return (call.path, point, int(z.shape[-1])), ""
    return None, reason


def _around(block: nn.Module, path: str) -> nn.Module:
    """The module that holds the one at this path."""
    return block.get_submodule(path.rpartition(".")[0])


def _broken_heads(
    run: _Run, point: HookPoint, z: Tensor, attn_out: HookPoint, count: int, rounding: _Rounding
) -> str | None:
    """The identity that does not hold for `z`; None if all do.

    What one head changes is read after the output projection alone: the block is run twice, whatever the number of
    heads.
    """
    points = {"z": point, "attn_out": attn_out}
    plain = run.again(points, {})[1]["attn_out"]
    constant = run.again(points, {"z": torch.zeros_like})[1]["attn_out"]
    if not rounding.alike(constant, constant[:, :1].expand_as(constant)) or rounding.alike(constant, plain):
        return "zeros written before the output projection leave attn_out different between positions"
    projected = point.module(z.clone())
    for head in range(count):
        without = z.clone().unflatten(-1, (count, -1))
        without[..., head, :] = 0
        if torch.equal(point.module(without.flatten(-2)), projected):
            return f"attn_out does not depend on head {head}"
    return None
