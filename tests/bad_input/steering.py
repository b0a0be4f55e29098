"""Cases: steering and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from steerkit.scores.fluency import kl
from steerkit.steering.steering import Steering
from steerkit.vectors.vector import SteeringVector
from tests.bad_input.cases import LIST, NO_TABLE, PROMPT, TABLE, Case, model, push, tokenizer
from tests.tiny import tiny_tokenizer

STEERINGS: dict[str, tuple[Mapping[str, Any], str, str, str]] = {
    **{
        f"coefficient {value!r}": ({"coefficient": value}, "expected a finite coefficient", f"got {value!r}", "another")
        for value in (float("nan"), float("inf"), 1e39, "2", True, None, 1j)
    },
    **{
        f"dose {value!r}": ({"dose": value}, "expected a finite dose", f"got {value!r}", "Pass another number")
        for value in (float("nan"), float("inf"), "2", True)
    },
    "a coefficient and a dose": (
        {"coefficient": 2.0, "dose": 1.0}, "expected a coefficient or a dose", "got 2.0 and dose=1.0", "Pass one"
    ),
    "a dose to ablate": (
        {"operation": "ablate", "dose": 1.0}, "expected a coefficient for 'ablate'", "got dose=1.0", "Pass a"
    ),
    "a matrix of coefficients": ({"coefficient": torch.ones(2, 2)}, "finite coefficient", "got tensor(", "another"),
    **{
        f"layer {value!r}": ({"layer": value}, f"expected {what}", "got", do)
        for value, what, do in (
            (2, "layers among [1]", "Pass layers that"), ("first", "a layer, several, or", "Pass a number")
        )
    },
    "several layers and no choice": (
        {"vector": SteeringVector({1: torch.ones(4), 2: torch.ones(4)})}, "expected a layer", "[1, 2]", "Pass layer=2"
    ),
    "a NaN among coefficients": (
        {"coefficient": torch.tensor([1.0, float("nan")])}, "expected finite coefficients", "got [1.0, nan]", "Remove"
    ),
    **{
        f"positions {value!r}": ({"positions": value}, "expected positions among", f"got {value!r}", "Choose one")
        for value in ("response", "generated:0", "generated:x", "generated:-1", "generated:1.5", "", None)
    },
    **{
        f"operation {value!r}": ({"operation": value}, "operation among ('add', 'ablate'", f"got {value!r}", "Choose")
        for value in ("multiply", "ADD", None)
    },
    "a vector that is zero, to ablate": (
        {"vector": push() * 0, "operation": "ablate"}, "a direction to ablate", "zero at layers [1]", "Use other layers"
    ),
}  # fmt: skip
BEYOND = Steering(push(), 3e38, "from_last_prompt_token")  # finite in float32, and times the vector it is not
CHOICES = "expected a list of choices that differ", "Pass e.g."
CHOSEN: dict[str, tuple[Mapping[str, Any], str, str, str, type[Exception]]] = {
    "no prompts": ({"prompts": []}, LIST[0], "got []", LIST[1], ValueError),
    "a table of prompts": ({"prompts": TABLE}, "expected a list of prompts", *NO_TABLE, ValueError),
    "None as choices": ({"choices": None}, "expected a list of texts", "got None", "Pass e.g.", ValueError),
    "no choices": ({"choices": []}, "expected a list of texts that continue", "got []", "Pass e.g.", ValueError),
    "one text for choices": ({"choices": " Yes"}, "expected a list of texts", "got ' Yes'", "Pass e.g.", ValueError),
    "a choice given twice": ({"choices": ["a", "a"]}, CHOICES[0], "got ['a', 'a']", CHOICES[1], ValueError),
    "an empty choice": ({"choices": ["a", ""]}, CHOICES[0], "got ['a', '']", CHOICES[1], ValueError),
    "no choices of a prompt": ({"choices": [[]]}, CHOICES[0], "got []", CHOICES[1], ValueError),
    "a number as a choice": ({"choices": [["a", 3]]}, "expected choices as texts", "got 3 (int)", "Pass", TypeError),
    "choices of other prompts": (
        {"choices": [["a"], ["b"]]}, "one list of choices per prompt, 1", "got 2", "Pair them", ValueError
    ),
    "a choice beyond the context": (
        {"choices": ["x" * 300]}, "at most 256 tokens", "got 305", "Cut it", ValueError
    ),
    "a vector of another width": (
        {"steering": Steering(push(width=5))}, "a vector of width 32, the model's", "got 5", "Extract it", ValueError
    ),
    "logits that overflow": ({"steering": BEYOND}, "expected finite logits", "got NaN", "Lower the", ValueError),
}  # fmt: skip
GENERATED: dict[str, tuple[Mapping[str, Any], str, str, str, type[Exception]]] = {
    "no prompts": ({"prompts": []}, LIST[0], "got []", LIST[1], ValueError),
    "one text for a list": ({"prompts": "Hello"}, LIST[0], "got 'Hello'", LIST[1], ValueError),
    "a table of prompts": ({"prompts": TABLE}, "expected a list of prompts", *NO_TABLE, ValueError),
    "an object for a list": ({"prompts": {"prompt": "Hello"}}, LIST[0], "got {", LIST[1], ValueError),
    "an empty prompt": ({"prompts": ["a", ""]}, "at least one character", "got an empty one", "Write one", ValueError),
    "None as a prompt": ({"prompts": [None]}, PROMPT[0], "got None", PROMPT[1], ValueError),
    "bytes as a prompt": ({"prompts": [b"hi"]}, PROMPT[0], "got b'hi'", PROMPT[1], ValueError),
    "no messages": ({"prompts": [[]]}, PROMPT[0], "got []", PROMPT[1], ValueError),
    "a conversation for a list": (
        {"prompts": [{"role": "user", "content": "hi"}]}, PROMPT[0], "got {'role'", PROMPT[1], ValueError
    ),
    "a message of a number": (
        {"prompts": [[{"role": "user", "content": 3}]]}, PROMPT[0], "'content': 3", PROMPT[1], ValueError
    ),
    "half a surrogate pair": (
        {"prompts": ["ab\ud800"]}, "text that UTF-8 can hold", "'\\ud800', at character 2", "Take it out", ValueError
    ),
    "a prompt beyond the context": (
        {"prompts": ["x" * 300]}, "within the model's context of 256", "got 300 + 2", "Shorten either", ValueError
    ),
    "a vector for a steering": (
        {"steering": push()}, "expected a Steering", "got SteeringVector", "Pass Steering(vector", TypeError
    ),
    "a text for a steering": ({"steering": "a"}, "expected a Steering", "got str", "Pass Steering(", TypeError),
    "steerings for other prompts": (
        {"steering": [None, None]}, "expected one steering (or None) per prompt, 1", "got 2", "Pass one per", ValueError
    ),
    "coefficients for other rows": (
        {"steering": Steering(push(), torch.ones(2))}, "one coefficient per row, 1", "got 2", "Pass one", ValueError
    ),
    "a vector of another width": (
        {"steering": Steering(push(width=5))}, "a vector of width 32, the model's", "got 5", "Extract it", ValueError
    ),
    "a vector of another model": (
        {"steering": Steering(push(model_fingerprint="0" * 16, checkpoint="theirs"))},
        "expected a vector read from this model", "('0000000000000000', None) (theirs)", "foreign=True", ValueError,
    ),
    "a vector at a layer beyond": (
        {"steering": Steering(push(4))}, "expected a layer from 0 to 3", "got 4", "the last layer is 3", ValueError
    ),
    "a push beyond all numbers": (
        {"steering": BEYOND}, "expected finite logits", "got NaN", "Lower the coefficient", ValueError
    ),
    "a sampled push beyond all numbers": (
        {"steering": BEYOND, "temperature": 1.0}, "expected finite logits", "got NaN", "Lower", ValueError
    ),
    **{
        f"{setting} {value!r}": ({setting: value}, f"expected {about}", f"got {value!r}", "another", ValueError)
        for setting, about, values in (
            ("max_new_tokens", "max_new_tokens to be an integer from 1", (0, -1, 2.5, "3", True, None)),
            ("temperature", "a finite temperature from 0", (-0.1, float("nan"), float("inf"), "hot")),
            ("top_p", "top_p above 0 and at most 1", (0, 1.5, float("nan"), "all")),
            ("batch_rows", "batch_rows to be an integer from 1, or None", (0, -1, 1.5)),
        )
        for value in values
    },
}  # fmt: skip


def other_tokenizer(**changes: Any) -> Any:
    other = tiny_tokenizer()
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def grown_tokenizer() -> Any:
    grown = tiny_tokenizer()
    grown.add_tokens(["<new>"])
    return grown


def generate(**given: Any) -> object:
    given = {"prompts": ["Hello"], "max_new_tokens": 2, "tokenizer": tokenizer(), **given}
    return sk.generate(model(), given.pop("tokenizer"), given.pop("prompts"), **given)


def score_choices(**given: Any) -> object:
    given = {"prompts": ["Hello"], "choices": [" Yes", " No"], **given}
    return sk.score_choices(model(), tokenizer(), given.pop("prompts"), given.pop("choices"), **given)


def patch(**given: Any) -> object:
    given = {"clean": "The sea is", "corrupted": "The fog is", "answers": ("A", "B"), "layers": 1, **given}
    return sk.patch(model(), tokenizer(), given.pop("clean"), given.pop("corrupted"), given.pop("answers"), **given)


PATCHED: dict[str, tuple[Any, ...]] = {
    "prompts of other lengths": ({"corrupted": "The fogs is"}, "equal length in tokens", "10 and 11", "Replace words"),
    "two equal prompts": (
        {"corrupted": "The sea is"},
        "expected two different prompts in each pair",
        "pair 0 have the same tokens",
        "corrupted one",
    ),
    "an unknown mode": ({"mode": "both"}, "expected mode", "got 'both'", "Pass one"),
    "an unknown method": ({"method": "fast"}, "expected method", "got 'fast'", "Pass one"),
    "an unknown metric": ({"metric": "logit"}, "expected a metric among", "got 'logit'", "Pass one"),
    "an unknown site": ({"sites": "attn"}, "expected a site among", "got 'attn'", "Pass one"),
    "no answers": ({"answers": None}, "expected answers=(right, wrong)", "got none", "Pass two texts"),
    "one answer": ({"answers": ("A",)}, "expected answers as (right, wrong)", "got 'A'", "Pass both"),
    "a position outside": ({"positions": [10]}, "inside a prompt of 10 tokens", "got 10", "Count tokens"),
    "a truth value as position": ({"positions": [True]}, "integers as positions", "got [True]", "Pass e.g."),
    "a metric that is no number": (
        {"metric": lambda logits: logits[:, 0] * float("nan")},
        "expected finite metrics",
        "got nan of the clean and nan of",
        "another metric",
    ),
    **{
        f"batch_rows {value!r}": (
            {"batch_rows": value},
            "batch_rows to be an integer from 1",
            f"got {value!r}",
            "another value",
        )
        for value in (0, -1, 2.5)
    },
    "a position by name": ({"positions": {"a": "b"}}, "expected an index or (start, stop)", "got 'b'", "Pass integers"),
}


def condition(**given: Any) -> object:
    return sk.Condition(**{"direction": push(), "above": 0.0, **given})


def read(label: str = "label", site: str = "resid_post", layer: int = 1) -> sk.Activations:
    """Six items with two labels."""
    items = pd.DataFrame(
        {"text": "", label: ["positive", "negative"] * 3, "group": range(6), "start": 0, "n_tokens": 1}
    )
    resid = torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(0))
    return sk.Activations(resid, (layer,), items, site=site)


def calibrate(**given: Any) -> object:
    given = {"direction": push(), "acts": read(), **given}
    return sk.calibrate_condition(given.pop("direction"), given.pop("acts"), **given)


CONDITIONS: dict[str, tuple[Callable[[], object], str, str, str, type[Exception]]] = {
    **{
        f"above {value!r}": (
            lambda value=value: condition(above=value),
            "a finite number as above=",
            got,
            "Pass one",
            ValueError,
        )
        for value, got in ((None, "got None"), ("0", "got '0'"), (True, "got True"), (1e400, "got inf"), (1j, "got 1j"))
    },
    "bounds in reverse": (lambda: condition(below=-1.0), "above < below", "got 0.0 and -1.0", "Swap them", ValueError),
    "an unknown way to decide": (
        lambda: condition(decide="row"),
        "decide among",
        "got 'row'",
        "Choose one",
        ValueError,
    ),
    "a layer by name": (lambda: condition(layer="1"), "the vector's layers [1]", "got '1'", "Pass layer=", ValueError),
    "a direction that is zero": (
        lambda: condition(direction=push() * 0),
        "a direction",
        "zero at layer 1",
        "another",
        ValueError,
    ),
    "a tensor as direction": (
        lambda: condition(direction=torch.ones(32)),
        "a SteeringVector or a Probe",
        "got Tensor",
        "Load",
        TypeError,
    ),
    "a text as when": (
        lambda: Steering(push(), when="harmful"),
        "expected a Condition as when=",
        "got str",
        "Make one",
        TypeError,
    ),
    "a vector as when": (
        lambda: Steering(push(), when=push()),
        "expected a Condition as when=",
        "got SteeringVector",
        "Make one",
        TypeError,
    ),
    "a condition after the steering": (
        lambda: Steering(push(), when=condition(direction=push(2))),
        "before the steering, which begins at resid_post of layer 1",
        "got one at resid_post of layer 2",
        "Read an earlier",
        ValueError,
    ),
    "a condition of the prompt on all positions": (
        lambda: Steering(push(), positions="all", when=condition()),
        "expected positions 'generated' or",
        "got 'all'",
        "decide='token'",
        ValueError,
    ),
    "a calibration on an unknown label": (
        lambda: calibrate(positive="harmful"),
        "items labelled 'harmful' and others",
        "got labels ['negative', 'positive']",
        "Pass positive=",
        ValueError,
    ),
    "a calibration on an unknown column": (
        lambda: calibrate(label="kind"),
        "expected a column 'kind'",
        "got ['text'",
        "Name one",
        ValueError,
    ),
    "a calibration at a layer that was not read": (
        lambda: calibrate(direction=push(2)),
        "the layers that were read, [1]",
        "got 2",
        "Read it first",
        ValueError,
    ),
    "a calibration at another site": (
        lambda: calibrate(acts=read(site="mlp_out")),
        "activations of resid_post",
        "got mlp_out",
        "Pass site=",
        ValueError,
    ),
    "a calibration of another width": (
        lambda: calibrate(direction=push(width=5)),
        "of width 5, the direction's",
        "got 32",
        "same model",
        ValueError,
    ),
    "a calibration on a list": (
        lambda: calibrate(acts=[1.0]),
        "expected activations",
        "got list",
        "sk.collect",
        TypeError,
    ),
    **{
        f"a calibration with max_false_rate {value!r}": (
            lambda value=value: calibrate(max_false_rate=value),
            "max_false_rate in [0, 1)",
            f"got {value!r}",
            "Pass e.g.",
            ValueError,
        )
        for value in (1, -0.1, float("nan"), "low")
    },
    "rates of a vector": (
        lambda: sk.firing_rates(push(), read()),
        "expected a Condition",
        "got SteeringVector",
        "calibrate",
        TypeError,
    ),
    "rates at another site": (
        lambda: sk.firing_rates(condition(), read(site="attn_out")),
        "activations of resid_post",
        "got attn_out",
        "Pass site=",
        ValueError,
    ),
}


PARTS = {"harmful": ["a"], "harmless": ["b"]}, {"harmful": ["c"], "harmless": ["d"]}
WITHOUT_A_MODEL: dict[str, Callable[[Any], object]] = {
    "generation": lambda m: sk.generate(m, tokenizer(), ["a"], max_new_tokens=1),
    "generation that watches": lambda m: sk.generate(m, tokenizer(), ["a"], max_new_tokens=1, watch={"v": push()}),
    "projections": lambda m: sk.project(m, tokenizer(), ["a"], push()),
    "a logit lens": lambda m: sk.logit_lens(m, tokenizer(), ["a"], ["b"]),
    "a chosen direction": lambda m: sk.choose_direction(m, tokenizer(), *PARTS, tokens=["I"]),
    "reading": lambda m: sk.collect(m, tokenizer(), ["a"]),
    "KL": lambda m: kl(m, tokenizer(), ["a"], ["b"], [None]),
}
WITHOUT_NORMS: dict[str, Callable[[Steering], object]] = {
    "projections": lambda s: sk.project(model(), tokenizer(), ["a"], push(), steering=s),
    "KL": lambda s: kl(model(), tokenizer(), ["a"], ["b"], [s]),
    "plain forwards": lambda s: s.on(model()).__enter__(),
}


def steering_cases() -> Iterator[Case]:
    for name, (act, *says) in CONDITIONS.items():
        yield Case(f"condition: {name}", lambda _, act=act: act(), *says)
    for name, (given, *says) in PATCHED.items():
        yield Case(f"patching with {name}", lambda _, given=given: patch(**given), *says)
    for name, (given, *says) in STEERINGS.items():
        yield Case(f"a steering with {name}", lambda _, given=given: Steering(**{"vector": push(), **given}), *says)
    for what in (torch.ones(32), "v.safetensors", {1: torch.ones(32)}, None):
        name = type(what).__name__
        says = "expected a SteeringVector", f"got {name}", "Load or make one", TypeError
        yield Case(f"a steering with {name} for a vector", lambda _, what=what: Steering(what), *says)
    for name, (given, *says) in GENERATED.items():
        yield Case(f"generation with {name}", lambda _, given=given: generate(**given), *says)
    for name, (given, *says) in CHOSEN.items():
        yield Case(f"choices with {name}", lambda _, given=given: score_choices(**given), *says)
    for name, do in WITHOUT_A_MODEL.items():
        for model_, got in ((None, "None"), ("gpt2", "'gpt2'"), ((model(), tokenizer()), "a tuple")):
            says = "expected a model in this process", f"got {got}", "Load one", TypeError
            yield Case(f"{name} with {got} for a model", lambda _, do=do, model_=model_: do(model_), *says)
    yield Case(
        "choices of neither a model nor an engine", lambda _: sk.score_choices(None, tokenizer(), ["a"], ["b"]),
        "expected a model, or an engine=", "got neither", "Load one", TypeError,
    )  # fmt: skip
    dosed = Steering(push(), dose=0.4)
    for name, do in WITHOUT_NORMS.items():
        says = "expected a coefficient", "got dose=0.4", "Pass steering.resolved(norms)"
        yield Case(f"{name} with a dose and no norms", lambda _, do=do: do(dosed), *says)
    chat = [[{"role": "user", "content": "hi"}]]
    yield Case(
        "messages for a tokenizer without a template",
        lambda _: generate(prompts=chat, tokenizer=other_tokenizer(chat_template=None)),
        "expected a tokenizer with a chat template", "this one has none", "Pass a string",
    )  # fmt: skip
    refusing = "{{ raise_exception('roles must alternate') }}"
    yield Case(
        "messages that the template refuses",
        lambda _: generate(prompts=chat, tokenizer=other_tokenizer(chat_template=refusing)),
        "expected messages that the chat template takes", "roles must alternate", "Change their roles",
    )  # fmt: skip
    yield Case(
        "a template that is none",
        lambda _: generate(prompts=chat, tokenizer=other_tokenizer(chat_template="{% for %}")),
        "expected messages that the chat template takes", "it refuses them", "pass a string",
    )  # fmt: skip
    yield Case(
        "a token that the model has not", lambda _: generate(prompts=["<new>"], tokenizer=grown_tokenizer()),
        "expected tokens among the 260", "got token 260", "Load this model's own tokenizer",
    )  # fmt: skip
    yield Case(
        "a token to read that the model has not", lambda _: sk.collect(model(), grown_tokenizer(), ["<new>"]),
        "expected tokens among the 260", "got token 260", "Load this model's own tokenizer",
    )  # fmt: skip
    for length in (0, -3):
        yield Case(
            f"a prompt length of {length}", lambda _, length=length: told(length),
            "expected a prompt length of at least 1", f"got [{length}]", "Count tokens",
        )  # fmt: skip


def told(length: int) -> None:
    with torch.no_grad(), Steering(push()).on(model(), prompt_length=length):
        model()(input_ids=torch.tensor([[1, 2, 3]]))
