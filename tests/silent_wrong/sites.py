"""Sites that are read where nothing of the kind is added to the stream, or written where it does not arrive."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import steerkit as sk
from steerkit.capture.resid import capture_resid
from steerkit.models import sites as site_search
from steerkit.models.blocks import find_blocks
from steerkit.models.hooks import HookPoint, edit_points, observe_points
from steerkit.models.site_names import SITES
from steerkit.models.sites import Sites, find_sites, points_at
from steerkit.steering.operations import OPERATIONS
from steerkit.steering.steering import Steering
from steerkit.vectors.vector import SteeringVector
from tests.silent_wrong import plain
from tests.steering.test_operations import reflect, slowly
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 17, 200, 33, 8]])
Read = Callable[[Any, int], Tensor]
Write = Callable[[Any, int, Tensor], Any]


def check_the_parts_add_up(read: Read) -> None:
    model = tiny_model("gemma2")
    streams = {}
    for site in ("resid_pre", "mlp_out", "resid_post"):
        with torch.no_grad(), capture_resid(model, 1, site=site) as found:
            model(input_ids=IDS)
        streams[site] = found[1]
    total = streams["resid_pre"] + read(model, 1) + streams["mlp_out"]
    torch.testing.assert_close(total, streams["resid_post"])


def what_is_added(model: Any, layer: int) -> Tensor:
    with torch.no_grad(), capture_resid(model, layer, site="attn_out") as found:
        model(input_ids=IDS)
    return found[layer]


def what_attention_returns(model: Any, layer: int) -> Tensor:
    """The output of `self_attn`, which Gemma normalises before it is added."""
    block = model.model.layers[layer]
    found: dict[int, Tensor] = {}
    with torch.no_grad(), observe_points({0: HookPoint(block.self_attn, "output", block)}, found.__setitem__):
        model(input_ids=IDS)
    return found[0]


def check_a_written_middle_arrives(write: Write) -> None:
    """With `resid_mid` of the last block set to m, its output is m plus the MLP of m."""
    model = tiny_model("llama")
    block = model.model.layers[3]
    middle = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), write(model, 3, middle), capture_resid(model, 3) as found:
        model(input_ids=IDS)
    expected = middle + block.mlp(block.post_attention_layernorm(middle))
    torch.testing.assert_close(found[3], expected.detach())


@contextlib.contextmanager
def through_the_sum(model: Any, layer: int, middle: Tensor) -> Iterator[None]:
    with edit_points(points_at(model, find_blocks(model), [("resid_mid", layer)]), lambda _, __: middle):
        yield


@contextlib.contextmanager
def at_the_second_norm(model: Any, layer: int, middle: Tensor) -> Iterator[None]:
    """At the input of the norm before the MLP, where the residual connection has branched off already."""
    block = model.model.layers[layer]
    with edit_points({0: HookPoint(block.post_attention_layernorm, "input", block)}, lambda _, __: middle):
        yield


def check_a_vector_acts_where_it_was_read(steer: Callable[[SteeringVector], Steering]) -> None:
    model = tiny_model("llama")
    acts = sk.collect(model, tiny_tokenizer(), {"a": ["one", "two"], "b": ["six", "ten"]}, site="mlp_out", layers=1)
    v = sk.difference_in_means(acts, "a", "b")
    with torch.no_grad(), capture_resid(model, 1, site="mlp_out") as before:
        model(input_ids=IDS)
    with torch.no_grad(), steer(v).on(model), capture_resid(model, 1, site="mlp_out") as after:
        model(input_ids=IDS)
    torch.testing.assert_close(after[1], before[1] + v.layers[1])


def at_its_site(v: SteeringVector) -> Steering:
    return Steering(v, 1.0, "all")


def after_the_block(v: SteeringVector) -> Steering:
    return Steering(SteeringVector(v.layers, v.meta), 1.0, "all")


def check_sites_do_not_depend_on_a_steering(search: Callable[[Any], Sites]) -> None:
    model = tiny_model("llama")
    vector = SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    with Steering(vector, 2.0, "all").on(model):
        found = search(model)
    assert found.layers("mlp_out") == found.layers("resid_mid") == [0, 1, 2, 3]


def with_the_steering_on(model: Any) -> Sites:
    """The steering's addition is taken for a part of the block."""
    with mock.patch.object(site_search, "suspended", lambda _: contextlib.nullcontext([])):
        return find_sites(model)


Steer = Callable[[SteeringVector, str], Steering]


@functools.cache
def serial() -> Any:
    """A model with every site."""
    return tiny_model("llama")


def check_an_operation_acts_at(site: str, operation: str, steer: Steer, _: Path) -> None:
    """The value that is read at the site is the formula's, position by position."""
    name = sk.Operation("reflect", reflect).name if operation == "sk.Operation" else operation
    v = SteeringVector({1: 4 * torch.randn(32, generator=torch.Generator().manual_seed(1))}, site=site)
    with torch.no_grad(), capture_resid(serial(), 1, site=site) as before:
        serial()(input_ids=IDS)
    with torch.no_grad(), steer(v, name).on(serial()), capture_resid(serial(), 1, site=site) as after:
        serial()(input_ids=IDS)
    truth = torch.stack([slowly(name, h, v.layers[1], 0.7) for h in before[1][0]]).float()
    torch.testing.assert_close(after[1][0], truth, rtol=1e-4, atol=1e-4)


def by_the_vectors_site(v: SteeringVector, operation: str) -> Steering:
    return Steering(v, 0.7, "all+0", operation)


def by_the_block(v: SteeringVector, operation: str) -> Steering:
    """Acts on the stream after the block, whatever the site."""
    return Steering(v, 0.7, "all+0", operation, site="resid_post")


ACTS = {
    f"{operation} acts at {site}": (operation, site)
    for site in SITES[:-1]
    for operation in (*OPERATIONS, "sk.Operation")
}
SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "the parts of a block add up": (plain(check_the_parts_add_up), what_is_added, what_attention_returns),
    "a vector acts where it was read": (plain(check_a_vector_acts_where_it_was_read), at_its_site, after_the_block),
    "sites do not depend on a steering": (
        plain(check_sites_do_not_depend_on_a_steering), find_sites, with_the_steering_on
    ),
    "a written middle arrives": (plain(check_a_written_middle_arrives), through_the_sum, at_the_second_norm),
    **{
        name: (
            functools.partial(check_an_operation_acts_at, site, operation), by_the_vectors_site,
            functools.partial(by_the_block),
        )
        for name, (operation, site) in ACTS.items()
    },
}  # fmt: skip
VERIFIES = ACTS
