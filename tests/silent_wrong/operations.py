"""Wrong operations: another formula with the same name, another row's operation, another function's rows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from unittest import mock

import torch
from torch import Tensor

import steerkit as sk
from steerkit.steering import operations
from steerkit.steering import rows as compiled
from steerkit.steering.operations import named
from steerkit.steering.rows import RowSteering
from tests.steering.test_operations import NAMES, PLACE, reflect, slowly
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

Change = Callable[[Tensor, Tensor, float], Tensor]
"""`change(stream [pos, d_model], vector [d_model], coefficient)` returns the changed stream."""


def check_formula(operation: str) -> Callable[[Change, Path], None]:
    """Every position of a stream, for three coefficients, against the operation written for one position in float64."""

    def check(change: Change, _: Path) -> None:
        v = vector(tiny_model(), 1).layers[1]
        stream = 3 * torch.randn(6, len(v), generator=torch.Generator().manual_seed(3))
        stream = torch.cat([stream, stream[:1] + 3 * v, stream[:1] - 3 * v])  # beyond every bound
        for c in (0.5, -0.3, 1.0):
            truth = torch.stack([slowly(operation, h, v, c) for h in stream]).float()
            torch.testing.assert_close(change(stream, v, c), truth, rtol=1e-4, atol=1e-4)

    return check


def ours(operation: str) -> Change:
    def change(stream: Tensor, v: Tensor, c: float) -> Tensor:
        steering = sk.Steering(sk.SteeringVector({1: v}), c, "all+0", operation)
        edited = RowSteering([[steering]], [(0, len(stream))]).edit(PLACE, stream[None])
        assert edited is not None
        return edited[0]

    return change


def turned_by_a_share_of_the_angle(stream: Tensor, v: Tensor, c: float) -> Tensor:
    """Interpolates between h and |h| u, then restores the norm: c = 1 is onto u, not one radian."""
    norm = stream.norm(dim=-1, keepdim=True)
    new = (1 - c) * stream + c * norm * v / v.norm()
    return new / new.norm(dim=-1, keepdim=True) * norm


def scaled_to_the_mean_norm(stream: Tensor, v: Tensor, c: float) -> Tensor:
    new = stream + c * v
    return new / new.norm(dim=-1, keepdim=True) * stream.norm(dim=-1).mean()


def clamped_along_the_stored_vector(stream: Tensor, v: Tensor, c: float) -> Tensor:
    """The projection in units of |v|, where the interval is in units of the stream."""
    along = (stream @ v / v.norm() ** 2)[:, None]
    return stream + c * (along.clamp(-0.5, 0.5) - along) * v


def clamped_by_setting(stream: Tensor, v: Tensor, c: float) -> Tensor:
    """Leaves projections that exceed the value."""
    unit = v / v.norm()
    return stream + c * (v.norm() - (stream @ unit).clamp(max=float(v.norm())))[:, None] * unit


def without_the_norm(stream: Tensor, v: Tensor, c: float) -> Tensor:
    """Ablates with the stored vector, which removes `|v|^2` times the component."""
    return stream - c * (stream @ v)[:, None] * v


def with_the_norm_left_out(stream: Tensor, v: Tensor, c: float) -> Tensor:
    """Adds the unit direction, where the coefficient multiplies the stored vector."""
    return stream + c * v / v.norm()


Batch = Callable[[Tensor, Sequence[sk.Steering]], Tensor]


def check_rows_keep_their_operation(edit: Batch, _: Path) -> None:
    v = vector(tiny_model(), 1)
    stream = torch.randn(len(NAMES), 3, v.d_model, generator=torch.Generator().manual_seed(2))
    found = edit(stream, [sk.Steering(v, 0.6, "all+0", name) for name in NAMES])
    for row, name in enumerate(NAMES):
        truth = torch.stack([slowly(name, h, v.layers[1], 0.6) for h in stream[row]]).float()
        torch.testing.assert_close(found[row], truth, rtol=1e-4, atol=1e-4)


def each_its_own(stream: Tensor, rows: Sequence[sk.Steering]) -> Tensor:
    edited = RowSteering([[one] for one in rows], [(0, stream.shape[1])] * len(rows)).edit(PLACE, stream)
    assert edited is not None
    return edited


def the_first_rows(stream: Tensor, rows: Sequence[sk.Steering]) -> Tensor:
    return each_its_own(stream, [sk.Steering(one.vector, 0.6, "all+0", rows[0].operation) for one in rows])


def reflect_twice(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream - 4 * strength * (stream * direction).sum(-1, keepdim=True) * direction


Register = Callable[[Callable[..., Tensor]], sk.Operation]


def check_an_edited_function_makes_other_rows(register: Register, folder: Path) -> None:
    """The texts of a sweep that is called again with an edited function are the edited function's."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = []
    for number, function in enumerate((reflect, reflect_twice)):
        fresh, resumed = (
            sk.sweep(
                model, tokenizer, vector(model, 1), ["ab", "c"], coefficients=[1], operation=register(function),
                max_new_tokens=6, out=out / register(function).name.replace("@", "-"),
            )
            for out in (folder / f"fresh-{number}", folder)
        )  # fmt: skip
        assert list(resumed.table["ids"]) == list(fresh.table["ids"])
        texts.append(list(fresh.table["ids"]))
    assert texts[0] != texts[1]


def with_its_source(function: Callable[..., Tensor]) -> sk.Operation:
    return sk.Operation("mirror", function)


def by_name_only(function: Callable[..., Tensor]) -> sk.Operation:
    operation = sk.Operation("mirror", function)
    object.__setattr__(operation, "name", "mirror")
    assert named("mirror") is operation
    return operation


def writing(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """Adds in place, and leaves another direction behind."""
    stream += strength * direction
    direction *= 0
    return stream


def check_a_function_that_writes_into_its_arguments(operate: Callable[..., Tensor], _: Path) -> None:
    """As registered by other means than `sk.Operation`, which refuses it: unsteered positions and the caller's stream
    stay, and a second forward is steered as the first.
    """
    v = vector(tiny_model(), 1)
    own = operations._builtin("writing@0", writing, unit=False)
    stream = torch.randn(2, 5, v.d_model, generator=torch.Generator().manual_seed(4))
    before = stream.clone()
    with (
        mock.patch.dict(operations._registered, {own.name: own}),
        mock.patch.object(compiled, "operate", operate),
    ):
        rows = RowSteering([[sk.Steering(v, 1.0, operation=own.name)]] * 2, [(0, 4)] * 2)
        for _ in range(2):
            edited = rows.edit(PLACE, stream)
            assert edited is not None and torch.equal(stream, before)
            assert torch.equal(edited[:, :3], before[:, :3])
            torch.testing.assert_close(edited[:, 3:], before[:, 3:] + v.layers[1])


def on_the_arguments_themselves(
    operation: sk.Operation, stream: Tensor, vectors: Tensor, strength: Tensor, push: Tensor
) -> Tensor:
    return operation.function(stream.float(), vectors.float(), strength).to(stream.dtype)


def once(stream: Tensor, direction: Tensor, strength: Tensor, *, times: float = 1.0) -> Tensor:
    return stream + times * strength * direction


def twice() -> Callable[..., Tensor]:
    """The same function with another default of a keyword."""
    function = FunctionType(once.__code__, once.__globals__, once.__name__)
    function.__kwdefaults__ = {"times": 2.0}
    return function


def check_two_functions_have_two_names_or_are_refused(register: Register, _: Path) -> None:
    names = []
    for function in (once, twice()):
        with contextlib.suppress(ValueError):
            names.append(register(function).name)
    assert len(set(names)) == len(names)


def by_the_source_of_what_is_written(function: Callable[..., Tensor]) -> sk.Operation:
    with mock.patch.object(operations, "_source_of", lambda _, given: inspect.getsource(given)):
        return sk.Operation("times", function)


SILENT: dict[str, tuple[Callable[..., None], object, object]] = {
    "add multiplies the vector as stored": (check_formula("add"), ours("add"), with_the_norm_left_out),
    "ablate is along the unit direction": (check_formula("ablate"), ours("ablate"), without_the_norm),
    "rotate turns by an angle": (check_formula("rotate"), ours("rotate"), turned_by_a_share_of_the_angle),
    "add_normed keeps the norm of each position": (
        check_formula("add_normed"), ours("add_normed"), scaled_to_the_mean_norm
    ),
    "clamp is in units of the stream": (
        check_formula("clamp:-0.5:0.5"), ours("clamp:-0.5:0.5"), clamped_along_the_stored_vector
    ),
    "clamp lowers too large projections": (check_formula("clamp"), ours("clamp"), clamped_by_setting),
    "rows of a batch keep their operation": (check_rows_keep_their_operation, each_its_own, the_first_rows),
    "an edited operation makes other rows": (
        check_an_edited_function_makes_other_rows, with_its_source, by_name_only
    ),
    "a function that writes into its arguments changes steered positions only": (
        check_a_function_that_writes_into_its_arguments, operations.operate, on_the_arguments_themselves
    ),
    "two functions never share a name": (
        check_two_functions_have_two_names_or_are_refused, with_its_source, by_the_source_of_what_is_written
    ),
}  # fmt: skip
VERIFIES = {
    "add multiplies the vector as stored": ("add", "resid_post"),
    "ablate is along the unit direction": ("ablate", "resid_post"),
    "rotate turns by an angle": ("rotate", "resid_post"),
    "add_normed keeps the norm of each position": ("add_normed", "resid_post"),
    "clamp lowers too large projections": ("clamp", "resid_post"),
    "a function that writes into its arguments changes steered positions only": ("sk.Operation", "resid_post"),
}
