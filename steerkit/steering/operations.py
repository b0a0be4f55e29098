"""Operations: what a steering does to the stream, as plain functions of (stream, direction, strength)."""

from __future__ import annotations

import builtins
import dis
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

OPERATIONS = ("add", "ablate", "add_normed", "clamp", "rotate")
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Operation:
    """A pure function of the stream: `h <- function(h, direction, strength)` at every steered position.

    The coefficient of a `Steering` is the strength. Coefficient 0 never calls the function: it changes no bit. Making
    an operation registers it, so that its name can be passed wherever an operation is named.

    Args:
        name: a word that is no operation of steerkit. The full name, `word@hash`, holds the SHA-256 of the function's
            source: rows of a sweep with an edited function are other rows.
        function: gets the stream `[row, pos, d_model]` in float32, the directions `[row, 1, d_model]` and the strengths
            `[row, 1, 1]`; returns the new stream, and writes into none of them. Each position must depend on its own
            stream alone, for any number of rows and positions and any width, and strength 0 must return the stream. It
            may read torch and modules of the standard library, which the file imports, and no other variables outside
            itself: its source must determine it.
        unit: whether the direction is `v / |v|`, or the vector as stored.

    Raises:
        ValueError: a name that is taken or no word; a function whose source cannot be read or does not determine it;
            one that raises, changes the shape or its arguments, mixes rows or positions, or changes the stream at
            strength 0; a full name that another function has.

    Example:
        >>> def reflect(stream, direction, strength):
        ...     return stream - 2 * strength * (stream * direction).sum(-1, keepdim=True) * direction
        >>> steering = sk.Steering(vector, 1.0, operation=sk.Operation("reflect", reflect), layer=14)
    """

    name: str
    function: Change
    unit: bool = True

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in OPERATIONS:
            raise ValueError(f"expected a word other than {OPERATIONS} as name; got {self.name!r}. Choose another.")
        digest = hashlib.sha256(f"{self.unit} {_source_of(self.name, self.function)}".encode()).hexdigest()[:12]
        _check(self)
        word, full = self.name, f"{self.name}@{digest}"
        known: Any = _registered[full].function if full in _registered else self.function
        if _behaviour(known.__code__) != _behaviour(self.function.__code__):
            raise ValueError(
                f"expected one function of the source of {full}; got two, as where several share a line or a file was "
                "edited after its import. Write each on lines of its own, or import the file again."
            )
        object.__setattr__(self, "name", full)
        _registered[word] = _registered[full] = self

    def __str__(self) -> str:
        return self.name


def _source_of(name: str, function: Any) -> str:
    """The source of a plain function, with the modules that it reads: torch and the standard library.

    Raises:
        ValueError: it cannot be read, or does not determine the function.
    """
    advice = "Write a function in a file that reads only its arguments, torch and the standard library."
    plain = isinstance(function, FunctionType)
    if not plain or function.__closure__ or function.__defaults__ or function.__kwdefaults__:
        raise ValueError(
            f"expected a plain function without closure or defaults as {name!r}; got {function!r}. {advice}"
        )
    codes = list(_codes(function.__code__))
    if imported := sorted({one.argval for code in codes for one in dis.get_instructions(code) if _imports(one)}):
        raise ValueError(f"expected {name!r} to import nothing inside; it imports {imported}. Import in its file.")
    names = sorted({used for code in codes for used in _globals_of(code)})
    modules = {one: function.__globals__[one].__name__ for one in names if _is_module(function.__globals__.get(one))}
    if own := [module for module in modules.values() if module.partition(".")[0] not in STABLE]:
        raise ValueError(
            f"expected {name!r} to read no modules but torch and the standard library; it reads {own}, whose edits "
            f"would not change its name. {advice}"
        )
    other = [one for one in names if one not in modules]
    if variables := [one for one in other if one in function.__globals__ or not hasattr(builtins, one)]:
        raise ValueError(f"expected {name!r} to read no variables outside itself; it reads {variables}. {advice}")
    try:
        source = inspect.getsource(function.__code__)
    except (OSError, TypeError) as error:
        raise ValueError(f"expected the source of {name!r} to be readable; got {error}. {advice}") from error
    return f"{source}{modules}" if modules else source


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _globals_of(code: CodeType) -> Iterator[str]:
    """The names that a code reads, or writes, outside its function; attributes are none."""
    for one in dis.get_instructions(code):
        if one.opname.removesuffix("_GLOBAL") in ("LOAD", "STORE", "DELETE") or one.opname == "LOAD_NAME":
            yield one.argval


def _is_module(value: Any) -> bool:
    return isinstance(value, ModuleType)


STABLE = sys.stdlib_module_names | {"torch"}
"""Packages that an operation may read: they change with their version alone."""


def _imports(one: dis.Instruction) -> bool:
    return one.opname == "IMPORT_NAME"


def _behaviour(code: CodeType) -> tuple[Any, ...]:
    """What a code computes, whatever its file and line."""
    constants = [_behaviour(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return code.co_code, tuple(constants), code.co_names, code.co_varnames, code.co_argcount


SHAPES = ((2, 3, 8), (1, 1, 64), (3, 2, 24), (1, 300, 16), (2, 5000, 4))
"""Rows, positions and widths at which an operation is checked when it is registered."""


def _check(operation: Operation) -> None:
    """`ValueError` unless the function acts position by position, changes none of its arguments, and is the identity
    at strength 0.
    """
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        rows, length, width = shape
        stream = torch.randn(shape, generator=generator)
        vectors = torch.nn.functional.normalize(torch.randn(rows, 1, width, generator=generator), dim=-1)
        strength = torch.linspace(0.5, -0.25, rows)[:, None, None]
        new = _called(operation, stream, vectors, strength)
        places = {(row, pos) for row in {0, rows - 1} for pos in {0, 1, length // 2, length - 1} if pos < length}
        for row, pos in sorted(places):
            one = (stream[row : row + 1, pos : pos + 1], vectors[row : row + 1], strength[row : row + 1])
            if not torch.allclose(_called(operation, *one)[0, 0], new[row, pos], atol=1e-5):
                raise ValueError(
                    f"expected {operation.name!r} to change each position by itself; at a stream of shape {shape} it "
                    "mixes rows or positions, depends on the shape, or is random. Use the last dimension only."
                )
        if not torch.allclose(_called(operation, stream, vectors, 0 * strength), stream, atol=1e-5):
            raise ValueError(f"expected {operation.name!r} to be the identity at strength 0. Multiply by the strength.")


def _called(operation: Operation, *arguments: Tensor) -> Tensor:
    """What the function returns for stream, direction and strength; `ValueError` if it is no stream or changes them."""
    given = [one.clone() for one in arguments]
    shape = list(arguments[0].shape)
    try:
        new = operation.function(*given)
    except Exception as error:  # a user's function may raise anything
        raise ValueError(
            f"expected {operation.name!r} to return a stream of any shape; given one of shape {shape} it raises "
            f"{type(error).__name__}: {error!s:.200}. Use the last dimension only, whatever its size."
        ) from error
    if not isinstance(new, Tensor) or new.shape != arguments[0].shape:
        raise ValueError(f"expected {operation.name!r} to return a stream of the same shape, {shape}. Return one.")
    if not all(torch.equal(one, before) for one, before in zip(given, arguments, strict=True)):
        raise ValueError(
            f"expected {operation.name!r} to leave its arguments as they are; it writes into one. Return a new tensor."
        )
    return new


def _along(stream: Tensor, unit: Tensor) -> Tensor:
    return (stream * unit).sum(-1, keepdim=True)


def _ablate(stream: Tensor, unit: Tensor, strength: Tensor) -> Tensor:
    """`h - c (h . u) u`."""
    return stream - strength * _along(stream, unit) * unit


def _add(stream: Tensor, vector: Tensor, strength: Tensor) -> Tensor:
    """`h + c v`."""
    return stream + strength * vector


def _add_normed(stream: Tensor, vector: Tensor, strength: Tensor) -> Tensor:
    """`(h + c v) |h| / |h + c v|`; `h` where `h + c v` is zero."""
    new = stream + strength * vector
    norm = new.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, new * (stream.norm(dim=-1, keepdim=True) / norm), stream)


def _clamp(stream: Tensor, unit: Tensor, strength: Tensor, low: float, high: float) -> Tensor:
    """`h + c (clip(h . u, low, high) - h . u) u`."""
    along = _along(stream, unit)
    return stream + strength * (along.clamp(low, high) - along) * unit


def _clamp_to_norm(stream: Tensor, vector: Tensor, strength: Tensor) -> Tensor:
    """`h + c (|v| - h . u) u` with `u = v / |v|`."""
    norm = vector.norm(dim=-1, keepdim=True)
    unit = vector / norm
    return stream + strength * (norm - _along(stream, unit)) * unit


def _rotate(stream: Tensor, unit: Tensor, strength: Tensor) -> Tensor:
    """Turn h by c radians towards u, in the plane of both, not beyond u (or -u for c < 0); |h| stays."""
    along = _along(stream, unit)
    across = stream - along * unit
    width, norm = across.norm(dim=-1, keepdim=True), stream.norm(dim=-1, keepdim=True)
    angle = (torch.atan2(width, along) - strength).clamp(0, math.pi)
    new = norm * (angle.cos() * unit + angle.sin() * across / width)
    return torch.where(width > 1e-6 * norm, new, stream)  # parallel to u there is no plane


def _builtin(name: str, function: Change, unit: bool) -> Operation:
    operation = object.__new__(Operation)
    for field, value in (("name", name), ("function", function), ("unit", unit)):
        object.__setattr__(operation, field, value)
    return operation


_registered: dict[str, Operation] = {
    "add": _builtin("add", _add, unit=False),
    "ablate": _builtin("ablate", _ablate, unit=True),
    "add_normed": _builtin("add_normed", _add_normed, unit=False),
    "clamp": _builtin("clamp", _clamp_to_norm, unit=False),
    "rotate": _builtin("rotate", _rotate, unit=True),
}


def registered(name: str, function: Change) -> Operation:
    """Register a parametrised operation, whose full name determines the function, and return it."""
    return _registered.setdefault(name, _builtin(name, function, unit=True))


def named(operation: Any) -> Operation:
    """The operation of this name, e.g. `"rotate"`, `"clamp:2"` or `"clamp:-1:1"`; an `Operation` is returned as is.

    Raises:
        ValueError: no operation has this name.
    """
    if isinstance(operation, Operation):
        return operation
    if isinstance(operation, str):
        if operation in _registered:
            return _registered[operation]
        word, *numbers = operation.split(":")
        if word == "clamp" and 1 <= len(numbers) <= 2:
            return _clamp_at(operation, numbers)
    known = (*OPERATIONS, *(name for name in _registered if name.isidentifier() and name not in OPERATIONS))
    raise ValueError(f"expected an operation among {known}; got {operation!r}. Choose one.")


def _clamp_at(operation: str, numbers: list[str]) -> Operation:
    try:
        low, high = float(numbers[0]), float(numbers[-1])
    except ValueError:
        low, high = math.nan, math.nan
    if not -math.inf < low <= high < math.inf:
        raise ValueError(
            f"expected 'clamp:value' or 'clamp:low:high' with low <= high; got {operation!r}. Pass numbers."
        )
    name = f"clamp:{low!r}" if len(numbers) == 1 else f"clamp:{low!r}:{high!r}"
    return _builtin(name, partial(_clamp, low=low, high=high), unit=True)


def check_vector(operation: str | Operation, vector: Any, site: str) -> None:
    """`ValueError` unless the operation reads this vector at this site; an erasure belongs to one vector."""
    own = getattr(named(operation).function, "vector", None)
    if own is not None and (vector != own or site != own.site):
        raise ValueError(
            f"expected the vector of the erasure for {named(operation).name!r}, which reads no other; got "
            f"{vector!r} at {site}. Pass sk.erase(eraser, layer); as a control the eraser of shuffled labels, "
            "sk.leace(sk.controls.shuffle_labels(acts, seed, balanced=True))."
        )


def needs_direction(operation: str | Operation) -> bool:
    """Whether the operation has no meaning for a zero vector."""
    return named(operation).name not in ("add", "add_normed")


def direction_of(operation: str | Operation, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """What an operation reads of a vector: the vector itself (`add`), or its unit direction in float32 (`ablate`)."""
    if not named(operation).unit:
        return vector
    wide = vector.double()
    return (wide / wide.norm()).float()


def operate(
    operation: Operation,
    stream: Tensor,
    vectors: Tensor,
    strength: Tensor,
    push: Tensor,
) -> Tensor:
    """The changed stream: `add` in the stream's dtype, all else computed in float32, a user's function on copies.

    Args:
        stream: `[row, pos, d_model]`.
        vectors: `[row, 1, d_model]`, what `direction_of` returned.
        strength: `[row, 1, 1]`, the coefficient c of each row.
        push: `[row, 1, d_model]`, `strength * vectors` in the stream's dtype, computed once for all forwards.

    Shapes are not checked at run time, since compiled blocks call this.
    """
    if operation.name == "add":
        return stream + push
    if "@" in operation.name:  # a function that writes into its arguments would change unsteered positions
        copies = (one.to(torch.float32, copy=True) for one in (stream, vectors, strength))
        return operation.function(*copies).to(stream.dtype)
    return operation.function(stream.float(), vectors.float(), strength).to(stream.dtype)
