"""Settings as frozen dataclasses: `field=value` texts change a copy; values are checked against annotations."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import types
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def override(data: T, settings: Sequence[str]) -> T:
    """Return a copy of a preset, or of any frozen dataclass, with fields replaced.

    Args:
        data: a frozen dataclass, possibly with dataclasses as fields.
        settings: `path=value` texts, e.g. `grpo.steps=60`, `sft.lora=null`, `sft.lora={"r": 8}`, `sft.target=first`.
            Values are JSON, or plain text.

    Raises:
        ValueError: a text without `=`, an unknown field, or a value that does not fit the field's annotation.

    Example:
        >>> override(GRPO(), ["anneal.kind=gated", "steps=60"]).anneal.kind
        'gated'
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"expected field=value; got {setting!r}. Pass e.g. grpo.steps=60.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        data = _with_field(data, path.split("."), value, path)
    return data


def shell(*words: object) -> str:
    """Return the words of a command or of its options as one text that a shell reads as these words.

    Example:
        >>> shell("--set", "sft.keep_at=[25,50]")
        "--set 'sft.keep_at=[25,50]'"
    """
    return shlex.join(map(str, words))


def check_fields(data: Any, **least: float) -> None:
    """Check that the values of a dataclass fit their annotations.

    Args:
        data: a dataclass.
        least: field -> its least value; None is not compared.

    Raises:
        ValueError: a value of another type, one that a `Literal` does not name, a number that is not finite, or one
            below its least value.

    Example:
        >>> check_fields(SFT(), batch=1)
    """
    for name, kind in _hints(type(data)).items():
        fitted(getattr(data, name), kind, name)
    for name, lowest in least.items():
        value = getattr(data, name)
        if value is not None and not value >= lowest:
            raise ValueError(f"expected {name} of {lowest} or more; got {value}. Pass a larger number.")


def check_shares(data: Any, *names: str) -> None:
    """`ValueError` for a field outside 0 and 1; None is not compared."""
    for name in names:
        value = getattr(data, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"expected {name} from 0 to 1; got {value}. Pass a share.")


def check_top_p(top_p: float) -> None:
    """`ValueError` for a nucleus without probability, or with more than all."""
    if not 0 < top_p <= 1:
        raise ValueError(f"expected top_p above 0 and at most 1; got {top_p}. Pass another value.")


def fitted(value: Any, kind: Any, path: str) -> Any:
    """Return a value in the type of an annotation: a list as tuple, an object as dataclass, an integer as float.

    Args:
        value: a value, as JSON gives it or as the annotation says.
        kind: the annotation.
        path: the field's name, for the error.

    Raises:
        ValueError: the value does not fit.

    Example:
        >>> fitted([8, 6], tuple[int, int], "clip")
        (8, 6)
    """
    origin, parts = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = _hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(f"expected fields among {list(hints)} for {path!r}; got {unknown}. Pass these only.")
        given: Any = {name: fitted(one, hints[name], f"{path}.{name}") for name, one in value.items()}
        return kind(**given)  # type: ignore[operator]
    if origin in (Union, types.UnionType):
        for part in parts:
            if isinstance(value, Mapping) and dataclasses.is_dataclass(part):
                return fitted(value, part, path)
            try:
                return fitted(value, part, path)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(kinds) == len(value) and all(map(_is, value, kinds)):
            return tuple(value)
    elif _is(value, kind):
        return float(value) if kind is float and type(value) is int else value
    raise ValueError(f"expected {_described(kind)} for {path!r}; got {value!r}. Pass such a value.")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has the type of an annotation that is no union and no tuple."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_is(one, parts[1]) for one in value.values())
    if kind in (int, float):
        is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return is_number and abs(value) < math.inf
    return kind is Any or isinstance(value, origin or kind)


def _described(kind: Any) -> str:
    """An annotation in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple and parts[-1] is ...:
        return f"a list of {_described(parts[0]).removeprefix('a value of type ').removeprefix('one of ')}"
    if origin is tuple:
        return f"a list of {len(parts)} numbers"
    finite = " (finite)" if kind is float else ""
    return "null" if kind is type(None) else f"a value of type {getattr(origin or kind, '__name__', kind)}{finite}"


def _hints(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _with_field(data: Any, path: Sequence[str], value: Any, full_path: str) -> Any:
    name, *rest = path
    hints = _hints(type(data)) if dataclasses.is_dataclass(data) else {}
    if name not in hints:
        raise ValueError(f"expected a field among {list(hints)} for {full_path!r}; got {name!r}. Pass one of these.")
    if rest:
        value = _with_field(getattr(data, name), rest, value, full_path)
    return dataclasses.replace(data, **{name: fitted(value, hints[name], full_path)})
