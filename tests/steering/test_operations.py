"""Operations against slow references written for one position, in mixed batches, caches and sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import steerkit as sk
from steerkit.generation.generate import generate
from steerkit.models.blocks import find_blocks
from steerkit.serving.remote import specification
from steerkit.steering import operations
from steerkit.steering.operations import OPERATIONS, named, operate
from steerkit.steering.rows import RowSteering
from steerkit.text.prompt import encode_prompt
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer
from tests.verified import verifies

PROMPTS = ["Hello", "A rather longer prompt than that", "x = 1; y = 2", "?"]
PLACE = ("resid_post", 1)
EVERY = (*OPERATIONS, "sk.Operation")
NAMES = ["add", "ablate", "add_normed", "clamp", "clamp:2.0", "clamp:-0.5:0.5", "rotate"]


def reflect(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream - 2 * strength * (stream * direction).sum(-1, keepdim=True) * direction


def slowly(operation: str, h: Tensor, v: Tensor, c: float) -> Tensor:
    """The changed stream `[d_model]` of one position, in float64."""
    h, v = h.double(), v.double()
    u = v / v.norm()
    a = float(h @ u)
    if operation == "add":
        return h + c * v
    if operation == "ablate":
        return h - c * a * u
    if operation == "add_normed":
        return (h + c * v) / (h + c * v).norm() * h.norm()
    if operation == "rotate":
        e = (h - a * u) / (h - a * u).norm()
        angle = math.acos(max(-1.0, min(1.0, a / float(h.norm()))))
        turned = min(max(angle - c, 0.0), math.pi)
        return h.norm() * (math.cos(turned) * u + math.sin(turned) * e)
    if operation.startswith("reflect"):
        return h - 2 * c * a * u
    low, high = {"clamp": (float(v.norm()),) * 2, "clamp:2.0": (2.0, 2.0), "clamp:-0.5:0.5": (-0.5, 0.5)}[operation]
    return h + c * (min(max(a, low), high) - a) * u


def greedy(model: Any, ids: Sequence[int], new: int, operation: str, v: Tensor, c: float) -> list[int]:
    """One prompt, no cache, no batch: steered from the last position of the prompt on, position by position."""
    ids, start = list(ids), len(ids) - 1

    def hook(_: Any, __: Any, out: Any) -> Any:
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        for column in range(start, stream.shape[1]):
            stream[0, column] = slowly(operation, stream[0, column], v, c).float()
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    handle = find_blocks(model).modules[1].register_forward_hook(hook)
    try:
        for _ in range(new):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    finally:
        handle.remove()
    return ids[start + 1 :]


@verifies("formula", "zero", operations=EVERY)
@pytest.mark.parametrize("name", [*NAMES, "reflect"])
def test_an_operation_is_its_formula_per_row_and_position_and_coefficient_zero_changes_no_bit(name: str) -> None:
    sk.Operation("reflect", reflect)
    model = tiny_model()
    v = vector(model, 1)
    stream = torch.randn(4, 5, v.d_model, generator=torch.Generator().manual_seed(1))
    coefficients = [0.7, -0.4, 0.0, 4.0]
    rows = [[sk.Steering(v, c, "all+0", name)] for c in coefficients]
    edited = RowSteering(rows, [(0, 5)] * 4).edit(PLACE, stream)
    assert edited is not None and torch.equal(edited[2], stream[2])
    for row, c in enumerate(coefficients):
        for pos in range(5):
            expected = slowly(name, stream[row, pos], v.layers[1], c).float()
            torch.testing.assert_close(edited[row, pos], expected, rtol=1e-4, atol=1e-4)


@verifies("batch", operations=EVERY)
@pytest.mark.parametrize("name", [*NAMES, "reflect"])
def test_cached_batched_and_padded_generation_is_the_slow_one(name: str) -> None:
    sk.Operation("reflect", reflect)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.eos_token_id = None
    model.generation_config.eos_token_id = None
    v = vector(model, 1)
    steering = sk.Steering(v, 0.8, operation=name)
    batched = generate(model, tokenizer, PROMPTS, max_new_tokens=6, steering=steering)
    one_by_one = [generate(model, tokenizer, [one], max_new_tokens=6, steering=steering)[0] for one in PROMPTS]
    slow = [greedy(model, encode_prompt(tokenizer, one), 6, name, v.layers[1], 0.8) for one in PROMPTS]
    assert batched == one_by_one == [tokenizer.decode(ids, skip_special_tokens=True) for ids in slow]


@verifies("mixed", operations=EVERY)
def test_rows_of_a_batch_have_operations_of_their_own() -> None:
    sk.Operation("reflect", reflect)
    names, v = [*NAMES, "reflect"], vector(tiny_model(), 1)
    stream = torch.randn(len(names), 3, v.d_model, generator=torch.Generator().manual_seed(2))
    mixed = RowSteering([[sk.Steering(v, 0.6, "all+0", name)] for name in names], [(0, 3)] * len(names)).edit(
        PLACE, stream
    )
    assert mixed is not None
    for row, name in enumerate(names):
        alone = RowSteering([[sk.Steering(v, 0.6, "all+0", name)]], [(0, 3)]).edit(PLACE, stream[row : row + 1])
        assert alone is not None and torch.equal(mixed[row], alone[0])


def test_the_norm_stays_and_a_stream_along_the_direction_is_finite() -> None:
    v = vector(tiny_model(), 1)
    along = torch.stack([v.layers[1], -v.layers[1], 0 * v.layers[1]])[None]
    for name in ("rotate", "add_normed"):
        for c in (0.5, -1.0, 1.0):
            new = RowSteering([[sk.Steering(v, c, "all+0", name)]], [(0, 3)]).edit(PLACE, along)
            assert new is not None and torch.isfinite(new).all()
            torch.testing.assert_close(new.norm(dim=-1), along.norm(dim=-1))


def test_a_wrong_rotation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant adds and restores the norm, which also keeps the norm and is no rotation by the angle."""
    mutant = operations._builtin("rotate", operations._add_normed, unit=True)
    monkeypatch.setitem(operations._registered, "rotate", mutant)
    with pytest.raises(AssertionError):
        test_an_operation_is_its_formula_per_row_and_position_and_coefficient_zero_changes_no_bit("rotate")


def test_half_precision_streams_are_changed_in_float32() -> None:
    stream = torch.randn(1, 2, 8).bfloat16()
    unit = torch.nn.functional.normalize(torch.randn(1, 1, 8), dim=-1)
    new = operate(named("rotate"), stream, unit, torch.full((1, 1, 1), 0.3), unit)
    expected = named("rotate").function(stream.float(), unit, torch.full((1, 1, 1), 0.3)).bfloat16()
    assert torch.equal(new, expected)


@verifies("resume", operations=EVERY)
def test_a_sweep_names_the_operation_in_its_rows_and_resumes(tmp_path: Path) -> None:
    own = sk.Operation("reflect", reflect)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for operation, name in ((own, own.name), ("clamp:2", "clamp:2.0"), *((one, one) for one in OPERATIONS)):
        options: dict[str, Any] = {"coefficients": [0, 1], "operation": operation, "max_new_tokens": 3}
        out = tmp_path / name.replace(":", "-").replace("@", "-")
        first = sk.sweep(model, tokenizer, vector(model, 1), PROMPTS[:2], out=out, **options)
        rows = (out / "rows.jsonl").read_text().splitlines(keepends=True)
        (out / "rows.jsonl").write_text("".join(rows[:-2]))  # as if it had been interrupted
        (out / "table.parquet").unlink()
        again = sk.sweep(model, tokenizer, vector(model, 1), PROMPTS[:2], out=out, **options)
        assert set(first.table["operation"]) == {name}
        pd.testing.assert_frame_equal(again.table, first.table)
        assert len((out / "rows.jsonl").read_text().splitlines()) == len(rows)


def leaky(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + strength * stream.mean(1, keepdim=True)


def always(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + direction


def global_reader(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + strength * len(NAMES) * direction


def in_place(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream.add_(strength * direction)


def in_place_on_the_direction(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + direction.mul_(strength)


def in_long_streams(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + strength * direction * (stream.shape[1] > 100)


def in_batches(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + strength * direction * (stream.shape[0] > 1)


def of_one_width(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + strength * (stream @ torch.eye(32))


def with_a_keyword(stream: Tensor, direction: Tensor, strength: Tensor, *, scale: float = 2.0) -> Tensor:
    return stream + scale * strength * direction


def unresolved(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + strength * (direction if bool(strength.any()) else not_defined_yet)  # noqa: F821


def setting_a_global(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    global LAST
    LAST = stream
    return stream + strength * direction


norm = 2.0
LAST: Any = None
helper: Any = ModuleType("helper")
helper.gain = 1.0


def by_method(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """Its attribute `norm` is not the variable of this module, and `abs` is a builtin."""
    return stream + abs(strength) * stream.norm(dim=-1, keepdim=True) * torch.sign(direction)


def test_names_of_attributes_and_builtins_are_no_variables_of_the_module() -> None:
    assert sk.Operation("by_method", by_method).name.startswith("by_method@")


def test_two_functions_never_share_a_full_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (lambda h, u, c: h + c * u, lambda h, u, c: h - c * u)  # one line, so one source
    sk.Operation("line", one)
    with pytest.raises(ValueError, match="expected one function of the source of line@"):
        sk.Operation("line", two)
    assert named("line").function is one
    name = sk.Operation("by_method", by_method).name
    other = ModuleType("other")
    other.sign = torch.sign  # type: ignore[attr-defined]
    monkeypatch.setitem(by_method.__globals__, "torch", other)  # another module of the same name in the source
    with pytest.raises(ValueError, match=r"it reads \['other'\]"):
        sk.Operation("by_method", by_method)
    monkeypatch.setitem(by_method.__globals__, "torch", math)  # of the standard library
    monkeypatch.setattr(math, "sign", other.sign, raising=False)
    assert sk.Operation("by_method", by_method).name != name


def by_helper(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    return stream + strength * helper.gain * direction


def by_import(stream: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    import math

    return stream + math.pi * strength * direction


def test_a_function_that_reads_a_module_which_may_be_edited_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch and the standard library; it reads \['helper'\], whose edits"):
        sk.Operation("by_helper", by_helper)
    with pytest.raises(ValueError, match=r"import nothing inside; it imports \['math'\]"):
        sk.Operation("by_import", by_import)


def test_a_function_that_is_no_operation_is_refused() -> None:
    scale = 2.0
    refused: list[tuple[str, Callable[..., Any], str]] = [
        ("leaky", leaky, "mixes rows or positions"),
        ("always", always, "identity at strength 0"),
        ("global_reader", global_reader, "NAMES"),
        ("closed", lambda h, u, c: h + scale * c * u, "closure"),
        ("made", eval("lambda h, u, c: h + c * u"), "source"),
        ("add", reflect, "Choose another"),
        ("in_place", in_place, "writes into one"),
        ("in_place_on_the_direction", in_place_on_the_direction, "writes into one"),
        ("in_long_streams", in_long_streams, r"shape \(1, 300, 16\) it mixes rows or positions, depends on the shape"),
        ("in_batches", in_batches, "depends on the shape"),
        ("of_one_width", of_one_width, r"shape \[2, 3, 8\] it raises RuntimeError: mat1 and mat2"),
        ("with_a_keyword", with_a_keyword, "without closure or defaults"),
        ("unresolved", unresolved, r"reads \['not_defined_yet'\]"),
        ("setting_a_global", setting_a_global, r"reads \['LAST'\]"),
    ]
    for name, function, message in refused:
        with pytest.raises(ValueError, match=message):
            sk.Operation(name, function)
    for operation in ("clamp:x", "clamp:2:1", "clamp:nan", "turn"):
        with pytest.raises(ValueError, match="expected"):
            sk.Steering(vector(tiny_model(), 1), operation=operation)


def test_an_edited_function_has_another_name() -> None:
    one = sk.Operation("same", reflect)
    assert one.name == sk.Operation("same", reflect).name != sk.Operation("same", reflect, unit=False).name
    assert str(one).startswith("same@")


@pytest.mark.parametrize("operation", ["add_normed", "clamp", "clamp:1:2", "rotate", "leace"])
def test_vllm_refuses_by_name_the_operations_that_it_does_not_serve(operation: str) -> None:
    push = sk.SteeringVector({1: torch.ones(32)})
    steering = sk.Steering(push, 1.0, operation=operation) if operation != "leace" else erasing()
    with pytest.raises(
        ValueError, match=rf"among \('add', 'ablate'\) through vLLM; got '{operation.partition(':')[0]}"
    ):
        specification(steering)


def erasing() -> sk.Steering:
    """The erasure of two labels at layer 1."""
    items = pd.DataFrame({"text": "", "label": ["a", "b"] * 30, "group": range(60), "start": 0, "n_tokens": 1})
    resid = torch.randn(60, 1, 32, generator=torch.Generator().manual_seed(0))
    return sk.erase(sk.leace(sk.Activations(resid, (1,), items)), 1)
