"""Cases: reading activations, perplexity and probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

import steerkit as sk
from steerkit.models.blocks import find_blocks
from steerkit.probes.probe import fit_probe, probe_layers
from steerkit.scores.fluency import perplexity
from steerkit.text.pairs import ContrastPair
from tests.bad_input.cases import LABELS, LAYER, NO_TABLE, POSITION, TABLE, Case, acts, model, tokenizer
from tests.tiny import tiny_model

LENS: dict[str, tuple[Mapping[str, Any], str, str, str]] = {
    "no texts": ({"texts": []}, "expected a non-empty list of texts", "got []", "Put them in a list"),
    "one text for a list": ({"texts": "one"}, "expected a non-empty list of texts", "got 'one'", "Put them in a list"),
    "a table of texts": ({"texts": TABLE}, "expected a list of texts", *NO_TABLE),
    "a layer that is not there": ({"layers": 9}, "expected a layer from 0 to 3", "got 9", "Pass an integer"),
    "the embedding": ({"layers": "embed"}, "expected a layer from 0 to 3", "got 'embed'", "Pass an integer"),
    "no token": ({"tokens": []}, "expected a list of tokens", "got []", "Put them in a list"),
    "one token for a list": ({"tokens": "a"}, "expected a list of tokens", "got 'a'", "Put them in a list"),
    "a token of two pieces": ({"tokens": ["ab"]}, "expected one token each", "['a', 'b']", "Pass its first token"),
    "an empty token": ({"tokens": [""]}, "expected one token each", "is 0", "Pass its first token"),
    "a token that is no token": ({"tokens": [1.5]}, "expected one token each", "1.5 is 0", "Pass its first token"),
    "a negative id": ({"tokens": [-1]}, "expected token ids from 0", "got -1", "Pass an id"),
    "an id outside": ({"tokens": [999]}, "expected tokens among the 260", "got token 999", "this model's own"),
    "none of the best": ({"tokens": 0}, "expected 1 or more", "got 0", "Pass a larger number"),
    "a position outside": ({"positions": 4}, "expected positions inside every text", "got 4", "Pass an index nearer"),
    "a position by name": ({"positions": "first"}, "expected positions 'last', 'all'", "got 'first'", "Pass one"),
    "no position": ({"positions": []}, "expected positions 'last', 'all'", "got []", "Pass one"),
}

SPAN = "expected a position inside every span"
TEXTS = ("expected a non-empty list of texts", "Put them in a list")
COLLECTED: dict[str, tuple[Mapping[str, Any], str, str, str, type[Exception]]] = {
    **{
        f"layer {value!r}": ({"layers": value}, LAYER[0], f"got {value!r}", LAYER[1], ValueError)
        for value in (-1, 4, 99, True, 1.5, "1", "middle", None)
    },
    "a list of a list of layers": ({"layers": [[1]]}, LAYER[0], "got [1]", LAYER[1], ValueError),
    "no layers": ({"layers": []}, "expected one layer at least", "got []", "Pass layers='all'", ValueError),
    "a layer twice": ({"layers": [1, 1]}, "each once", "got [1, 1]", "Pass layers='all'", ValueError),
    **{
        f"position {value!r}": ({"position": value}, POSITION, f"got {value!r}", "Pass one of these", ValueError)
        for value in ("middle", 1.0, True, None)
    },
    **{
        f"position {value}": ({"position": value}, SPAN, f"{value} is outside", "Pass an index nearer", ValueError)
        for value in (5, -6)
    },
    "no texts": ({"texts": []}, TEXTS[0], "got []", TEXTS[1], ValueError),
    "one text for a list": ({"texts": "one"}, TEXTS[0], "got 'one'", TEXTS[1], ValueError),
    "a table of texts": ({"texts": TABLE}, "expected a list of texts", *NO_TABLE, ValueError),
    "an object for a list": ({"texts": {"a": "b"}}, TEXTS[0], "got {", TEXTS[1], ValueError),
    "an empty text": ({"texts": ["a", ""]}, "at least one character", "got an empty one", "Write one", ValueError),
    "a number as a text": ({"texts": [3]}, "or ContrastPair as text 0", "got int", "Convert it", TypeError),
    "a text beyond the context": ({"texts": ["x" * 300]}, "at most 256 tokens", "got 300", "Cut it", ValueError),
    "a pair with half a surrogate": (
        {"texts": [ContrastPair("a", "b\udc00", "c")]}, "that UTF-8 can hold", "character 1", "Take it out", ValueError
    ),
}  # fmt: skip


def broken_model() -> Any:
    broken = tiny_model(seed=5)
    find_blocks(broken)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return broken


def collect(**given: Any) -> object:
    given = {"texts": ["four"], **given}
    return sk.collect(model(), tokenizer(), given.pop("texts"), **given)


def lens(**given: Any) -> object:
    given = {"texts": ["four"], "tokens": ["a"], **given}
    return sk.logit_lens(model(), tokenizer(), given.pop("texts"), given.pop("tokens"), **given)


def choose_direction(positions: Any) -> object:
    train, validation = ({"harmful": [f"bad {n}"], "harmless": [f"good {n}"]} for n in range(2))
    return sk.choose_direction(model(), tokenizer(), train, validation, tokens=["I"], positions=positions)


def reading_cases() -> Iterator[Case]:
    for name, (given, *says) in LENS.items():
        yield Case(f"a logit lens with {name}", lambda _, given=given: lens(**given), *says)
    for name, (given, *says) in COLLECTED.items():
        yield Case(f"reading with {name}", lambda _, given=given: collect(**given), *says)
    for name, read in {"activations": sk.collect, "means": sk.collect_means}.items():
        yield Case(
            f"{name} of a model with NaN in its weights", lambda _, r=read: r(broken_model(), tokenizer(), ["four"]),
            "expected finite activations", "got NaN or infinity", "Load the model in float32",
        )  # fmt: skip
    for value in ([], [-1, -1], "last", -1):
        says = "expected a list of read positions that differ", f"got {value!r}", "Pass e.g. [-2, -1]"
        yield Case(
            f"reading at the positions {value!r}",
            lambda _, value=value: sk.collect_each(model(), tokenizer(), ["four"], positions=value), *says,
        )  # fmt: skip
        yield Case(f"choosing a direction at {value!r}", lambda _, value=value: choose_direction(value), *says)
    pair = "expected one text (and steering) per prompt, 2"
    yield Case(
        "perplexity of fewer texts than prompts", lambda _: perplexity(model(), tokenizer(), ["a", "b"], ["c"]),
        pair, "got [1]", "Pair them",
    )  # fmt: skip
    yield Case(
        "perplexity of None", lambda _: perplexity(model(), tokenizer(), ["a"], [None]),
        "expected a text or token ids", "got None (NoneType)", "Drop or convert it", TypeError,
    )  # fmt: skip
    yield Case(
        "a probe of one class", lambda _: fit_probe(torch.ones(3, 2), ["a"] * 3),
        "expected two classes at least", "got ['a']", "another class",
    )  # fmt: skip
    yield Case(
        "a probe of missing labels", lambda _: fit_probe(torch.ones(3, 2), ["a", "b", None]),
        "expected a label for every item", "item 2 has none", "Drop that item",
    )  # fmt: skip
    yield Case(
        "a probe of NaN", lambda _: fit_probe(torch.full((2, 2), float("nan")), ["a", "b"]),
        "expected finite x", "got NaN or infinity", "Drop those items",
    )  # fmt: skip
    yield Case(
        "a probe of fewer labels than items", lambda _: fit_probe(torch.ones(3, 2), ["a", "b"]),
        "expected x of shape [2 labels, d_model]", "got [3, 2]", "Pass a row per label",
    )  # fmt: skip
    yield Case(
        "a probe of penalty 0", lambda _: fit_probe(torch.eye(2), ["a", "b"], c=0), "expected c above 0", "got 0", "1.0"
    )
    many = LABELS * 6
    yield Case(
        "probes of one group", lambda _: probe_layers(acts(many, ["g"] * 12)),
        "as many groups as folds", "got 5 folds and 1 groups", "Read more groups",
    )  # fmt: skip
    yield Case(
        "probes of two folds", lambda _: probe_layers(acts(many), folds=2),
        "expected 3 folds at least", "got 2 folds", "change folds",
    )  # fmt: skip
    yield Case(
        "probes of a column that is not there", lambda _: probe_layers(acts(many), label="agent"),
        "expected columns ['agent']", "got ['label'", "Add them or name others",
    )  # fmt: skip
    yield Case(
        "probes of no layer", lambda _: probe_layers(acts(many), layers=[]),
        "expected one layer at least", "got none", "Pass layers='all'",
    )  # fmt: skip
