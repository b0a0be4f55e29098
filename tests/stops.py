"""`python -m tests.stops`: the stops of a coefficient from the command line to the hook, and of a trace to a vector.

One real call is profiled. A function receives the value where one of its arguments is the value or holds it. A stop is
a function, or a class, that receives the value and passes it on to the end: it is on the call stack of the end, or what
it returns is an argument of a later stop. Methods count as their class, nested functions as the function around them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

DEPTH, WIDTH = 6, 64
"""Arguments are searched down to this depth, and this many entries of each list."""


@dataclasses.dataclass
class Call:
    """A call that received the value.

    Args:
        stop: module and function, or module and class.
        function: the name of the function or method that was called.
        parent: the number of the innermost call around it that received the value, too; None without one.
        received: identities of the argument objects that hold the value.
        returned: identities of the objects in its result that hold the value.
    """

    stop: tuple[str, str]
    function: str
    parent: int | None
    received: set[int]
    returned: set[int] = dataclasses.field(default_factory=set)


def parts_of(value: Any) -> Iterator[Any]:
    """The entries of a list, tuple or mapping, or the attributes of one of our objects."""
    if isinstance(value, list | tuple):
        yield from value[:WIDTH]
    elif isinstance(value, dict):
        yield from list(value.values())[:WIDTH]
    elif type(value).__module__.startswith("steerkit.") and not isinstance(value, type):
        if dataclasses.is_dataclass(value):
            yield from (getattr(value, field.name, None) for field in dataclasses.fields(value))
        else:
            yield from vars(value).values() if hasattr(value, "__dict__") else ()


def holders(value: Any, is_value: Callable[[Any], bool], depth: int = 0) -> list[Any]:
    """The objects at or inside `value` that hold the traced value; numbers alone are left out."""
    below = [found for part in parts_of(value) for found in holders(part, is_value, depth + 1)] if depth < DEPTH else []
    return [value, *below] if below or is_value(value) else []


def stop_of(frame: FrameType) -> tuple[str, str]:
    """Module and outermost function, or module and class, of a frame."""
    owner = frame.f_locals.get("self")
    name = frame.f_code.co_qualname.split(".")[0] if owner is None else type(owner).__name__
    module = frame.f_globals["__name__"] if owner is None else type(owner).__module__
    return module.removeprefix("steerkit."), name


class Tracer:
    """Records the calls inside steerkit that receive the traced value, while its `with` is open."""

    def __init__(self, is_value: Callable[[Any], bool]) -> None:
        self.is_value = is_value
        self.calls: list[Call] = []
        self._open: dict[int, int] = {}  # frame -> number of its call
        self._kept: list[Any] = []  # alive, so that identities stay unique

    def __enter__(self) -> Tracer:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _identities(self, value: Any) -> set[int]:
        found = [held for held in holders(value, self.is_value) if not isinstance(held, int | float)]
        self._kept += found
        return {id(held) for held in found}

    def _profile(self, frame: FrameType, event: str, result: Any) -> None:
        if not str(frame.f_globals.get("__name__")).startswith("steerkit."):
            return
        if event == "call":
            code = frame.f_code
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
            arguments = [frame.f_locals[name] for name in code.co_varnames[:count] if name in frame.f_locals]
            if any(holders(argument, self.is_value) for argument in arguments):
                self._open[id(frame)] = len(self.calls)
                self.calls.append(Call(stop_of(frame), code.co_name, self._parent(frame), self._identities(arguments)))
        elif event == "return" and id(frame) in self._open:
            call = self.calls[self._open.pop(id(frame))]
            created = frame.f_code.co_name in ("__init__", "__post_init__")
            call.returned |= self._identities(frame.f_locals["self"] if created else result)

    def _parent(self, frame: FrameType) -> int | None:
        outer = frame.f_back
        while outer is not None and id(outer) not in self._open:
            outer = outer.f_back
        return None if outer is None else self._open[id(outer)]

    def stops(self, end: tuple[str, str]) -> list[tuple[str, str]]:
        """The stops up to the first call of `end`, in the order in which they first receive the value.

        Args:
            end: a function or class, and the name of the function or method that is called.
        """
        last = next(number for number, call in enumerate(self.calls) if (call.stop[1], call.function) == end)
        chosen, needed = {last}, set(self.calls[last].received)
        parents = {self.calls[last].parent}
        for number in range(last - 1, -1, -1):
            call = self.calls[number]
            if number in parents or call.returned & needed:
                chosen.add(number)
                needed |= call.received
                parents.add(call.parent)
        return list(dict.fromkeys(self.calls[number].stop for number in sorted(chosen)))


COEFFICIENT = 7.8125


def coefficient_stops(folder: Path) -> list[tuple[str, str]]:
    """Run `steerkit sweep` on a tiny saved model; the stops of its coefficient up to the call by the hook."""
    import torch
    from typer.testing import CliRunner

    import steerkit as sk
    from steerkit.cli.main import app
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    sk.SteeringVector({1: torch.linspace(-6, 6, 32)}).save(folder / "v.safetensors")
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n')

    def is_value(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() < WIDTH and value.is_floating_point() and bool((value == COEFFICIENT).any())
        return (
            value == str(COEFFICIENT) if isinstance(value, str) else isinstance(value, float) and value == COEFFICIENT
        )

    command = ["sweep", folder / "model", folder / "v.safetensors", "--prompts", folder / "prompts.jsonl"]
    command += ["--layers", 1, "--coefficients", COEFFICIENT, "--random", 0, "--max-new-tokens", 3]
    with Tracer(is_value) as tracer:
        done = CliRunner().invoke(app, [*map(str, command), "--out", str(folder / "run")])
    if done.exit_code:
        raise RuntimeError(f"expected the sweep to succeed; got {done.output} {done.exception!r}.")
    return tracer.stops(("RowSteering", "edit"))


WORD = "zebra"


def trace_stops(folder: Path) -> list[tuple[str, str]]:
    """Read traces, capture the stream at each turn and take means; the stops of a turn's text up to a vector."""
    import torch

    import steerkit as sk
    from steerkit.text.traces import Turn
    from tests.tiny import tiny_model, tiny_tokenizer

    turns = [Turn(agent, number, f"agent {agent} {WORD} {number}") for number in (1, 2) for agent in (1, 2)]
    sk.write_traces(folder / "traces.jsonl", [sk.DebateTrace.of(f"question {i}", turns, "yes") for i in range(4)])
    model, tokenizer = tiny_model(context=1024), tiny_tokenizer()
    word = tuple(tokenizer(WORD)["input_ids"])

    def is_value(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.is_floating_point() and value.shape[-1:] == (32,) and value.ndim > 1
        if isinstance(value, str | bytes):
            return (WORD if isinstance(value, str) else WORD.encode()) in value
        if isinstance(value, list | tuple) and all(isinstance(part, int) for part in value):
            return any(tuple(value[i : i + len(word)]) == word for i in range(len(value)))
        return isinstance(value, sk.Activations)

    with Tracer(is_value) as tracer:
        traces = sk.read_traces(folder / "traces.jsonl")
        activations = sk.collect(model, tokenizer, [trace.spans() for trace in traces], position="last")
        sk.one_against_others(activations)
    return tracer.stops(("one_against_others", "one_against_others"))


FLOWS = {"coefficient": coefficient_stops, "trace": trace_stops}

if __name__ == "__main__":
    stops = {}
    for name, flow in FLOWS.items():
        with tempfile.TemporaryDirectory() as folder:
            stops[name] = flow(Path(folder))
    print(json.dumps(stops, indent=1))
