"""Patched rounds: does an answer follow the activations at the first round of another debate?

Two texts of a checkpoint, each up to the tag after its first round, are paired where their first rounds have turns of
the same agents, as many tokens, and the same tag after them. The stream at the positions of round 1 in one text is
replaced by the other text's, at one layer, and the model continues greedily. `analysis transplant` replaces the text
itself; the stream that enters block 0 does the same here. A later layer shows what later positions still read there:
what they have read in earlier layers stays the own text's.

Beside it: an equal number of positions of round 1 and of the question; and, at one place, the text's own activations,
which must change nothing. The stream after the last block is read by no later position, so that its effect is 0 by
definition. The question is no null control: a model that answers from the question follows there.

What follows round 1 decides what is asked of the model. After a second round's tag it has to revise; after the tag of
the consensus it has to copy the agents' answer. The two are counted apart. An agent that can check the other question's
turn, such as a sum, has to reject it when it revises: few answers that follow there do not mean that it is not read.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from analysis.inputs import IMAD, SFT, inputs_of_run
from analysis.paper.transplant import donors, first_round, logged
from analysis.published import published
from analysis.stored import stored_parts
from steerkit.io.files import sha256
from steerkit.io.json import read_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.models.blocks import find_blocks
from steerkit.models.ends import ends_of
from steerkit.models.hooks import check_called
from steerkit.models.kernels import running
from steerkit.models.model import device_of
from steerkit.models.site_names import DEFAULT, Place
from steerkit.models.sites import edit_places
from steerkit.patching.runs import Patch, values_of
from steerkit.stats.mean import accuracy_interval
from steerkit.text.prompt import render
from steerkit.text.tags import CONSENSUS, TAG
from steerkit.text.tokens import encode
from steerkit.text.traces import read_traces
from training.debates.answerers import LocalModel, Request, Sampling
from training.imad import Run
from training.presets import get_preset
from training.problems.answers import read_answer, same

OWN_TEXT, DEBATE = "own text", "debate"
ROUND, PART, QUESTION, OWN = "round 1", "round 1, as many as question", "question", "own activations"
ANSWERS = ("answer", "donated", "patched")
DECIDED = re.compile(re.escape(CONSENSUS) + r".*?\\boxed\{[^{}]*\}", re.DOTALL)
"""A consensus up to its first closed box, which has the answer."""


@dataclass(frozen=True)
class Case:
    """A text up to the tag that follows its first round, as token ids.

    Args:
        ids: tokens of question, round 1 and the tag.
        start: first token of round 1.
        stop: the token after round 1.
        kind: what two texts must share: agents, tokens of round 1, and the tag.
        then: `round 2` or `consensus`, by the tag.
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    kind: tuple[Any, ...]
    then: str


def case_of(tokenizer: Any, question: str, text: str) -> Case | None:
    """The case of a tagged text; None without a turn in round 1, or if no tag follows it."""
    first = first_round(text)
    if first is None:
        return None
    tag = TAG.match(text, len(first.text))
    assert tag is not None
    prompt = render(tokenizer, f"Problem: {question}\n\n")
    whole = prompt.followed_by(tokenizer, first.text)
    length = len(whole.ids) - len(prompt.ids)
    ids = (*whole.ids, *encode(tokenizer, tag.group()))
    return Case(ids, len(prompt.ids), len(whole.ids), (first.agents, length, tag.group()), first.then)


class Decided(StoppingCriteria):
    """Ends a row as soon as it has a consensus with a closed box."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.closing = torch.tensor([number for token, number in tokenizer.get_vocab().items() if "}" in token])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Whether each row has ended, `[batch]`; only a row whose last token closes a brace is decoded."""
        closed = torch.isin(input_ids[:, -1], self.closing.to(input_ids.device)).tolist()
        ended = [
            one and bool(DECIDED.search(self.tokenizer.decode(row))) for one, row in zip(closed, input_ids, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)


def continuations(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    rows: Sequence[Sequence[tuple[Patch, Tensor]]],
    max_new_tokens: int,
) -> list[str]:
    """Continue a text greedily, once per row, each with its values put in while the text is read.

    A row ends at the first closed box of its consensus.

    Args:
        ids: token ids of the text.
        rows: per row its patches, each with the values `[pos, width]` of its positions; an empty one changes nothing.
        max_new_tokens: of each continuation.

    Returns:
        The texts that follow `ids`, tags included.
    """
    blocks = find_blocks(model)
    by_place: dict[Place, list[tuple[int, Patch, Tensor]]] = {}
    for number, row in enumerate(rows):
        for patch, values in row:
            by_place.setdefault(patch.place, []).append((number, patch, values))

    def edit(place: Place, value: Tensor) -> Tensor | None:
        if value.shape[1] != len(ids):
            return None
        value = value.clone()
        for number, patch, values in by_place[place]:
            value[number, patch.start : patch.stop] = values.to(value.device, value.dtype)
        return value

    given = torch.tensor([list(ids)] * len(rows), device=device_of(model))
    ends = sorted(ends_of(model, tokenizer))
    with running(model), torch.inference_mode(), edit_places(model, blocks, by_place, edit) as called:
        out = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=max_new_tokens,
            pad_token_id=ends[0], eos_token_id=ends, repetition_penalty=1.0,
            stopping_criteria=StoppingCriteriaList([Decided(tokenizer)]),
        )  # fmt: skip
    check_called(called, set(by_place))
    return [tokenizer.decode(row[len(ids) :], skip_special_tokens=False) for row in out]


def patched_pair(
    model: Any, tokenizer: Any, own: Case, donor: Case, places: Sequence[Place], seed: int, max_new_tokens: int
) -> list[tuple[str, Place | None, int, str]]:
    """Continuations of one text, unpatched and with the other's activations.

    Returns:
        `(part, place, positions, text)`: first the unpatched one (part `""`, place None), then each part at each place;
        of the text's own activations that at the middle place alone.
    """
    middle = places[len(places) // 2]
    given, kept = values_of(model, donor.ids, places), values_of(model, own.ids, [middle])[middle]
    length, before = own.stop - own.start, min(own.start, donor.start)
    count = min(length, before)
    drawn = sorted(random.Random(seed).sample(range(length), count))
    rows: list[list[tuple[Patch, Tensor]]] = [[]]
    about: list[tuple[str, Place | None, int]] = [("", None, 0)]
    for place in places:

        def span(start: int, stop: int, values: Tensor, place: Place = place) -> tuple[Patch, Tensor]:
            return Patch(place, start, stop), values

        new = given[place]
        parts = {
            ROUND: [span(own.start, own.stop, new[donor.start : donor.stop])],
            PART: [
                span(own.start + one, own.start + one + 1, new[donor.start + one : donor.start + one + 1])
                for one in drawn
            ],
            QUESTION: [span(own.start - count, own.start, new[donor.start - count : donor.start])],
        }
        if place == middle:
            parts[OWN] = [span(own.start, own.stop, kept[own.start : own.stop])]
        for part, row in parts.items():
            rows.append(row)
            about.append((part, place, sum(patch.stop - patch.start for patch, _ in row)))
    texts = continuations(model, tokenizer, own.ids, rows, max_new_tokens)
    return [(*what, text) for what, text in zip(about, texts, strict=True)]


def patched_rounds(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    kind: str,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    max_new_tokens: int = 100,
    most: int | None = None,
    log: Path | None = None,
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Answers with round 1 of another text put in, at each layer.

    Args:
        texts: question and tagged text of each debate.
        kind: kind of the answers, see `training.problems.answers.read_answer`.
        layers: whose output is patched, besides the input of block 0; None for all.
        seed: of the pairing and of the drawn positions.
        max_new_tokens: of each continuation.
        most: largest number of pairs.
        log: JSON-lines file of the finished pairs' texts, which a killed call resumes from; None keeps nothing.

    Returns:
        One row per pair, part and place: pair (index of the text), then (what follows round 1: `round 2` or
        `consensus`), part (`round 1`, `round 1, as many as question`, `question`; at one place `own activations`),
        site, layer, positions (their number), answer (unpatched), donated (of the other text, unpatched), patched. And
        the numbers of texts, of those with a round 1, and of pairs.
    """
    cases = [case_of(tokenizer, question, text) for question, text in texts]
    with_round = {index: case for index, case in enumerate(cases) if case is not None}
    given = donors([None if case is None else case.kind for case in cases], seed)
    pairs = [(index, donor) for index, donor in enumerate(given) if donor is not None][:most]
    blocks = find_blocks(model)
    places: list[Place] = [
        ("resid_pre", 0),
        *((DEFAULT, one) for one in (blocks.modules if layers is None else layers)),
    ]

    def patched(number: int) -> list[tuple[str, Place | None, int, str]]:
        index, donor = pairs[number]
        own, other = with_round[index], with_round[donor]
        return patched_pair(model, tokenizer, own, other, places, seed + index, max_new_tokens)

    keys = [[index, with_round[index].ids, with_round[donor].ids] for index, donor in pairs]
    lines = stored_parts(log, keys, patched)
    answers = {index: read_answer(found[0][-1], kind) for (index, _), found in zip(pairs, lines, strict=True)}
    rows = []
    for (index, donor), found in zip(pairs, lines, strict=True):
        if donor not in answers:  # cut off by `most`
            ids = with_round[donor].ids
            answers[donor] = read_answer(continuations(model, tokenizer, ids, [[]], max_new_tokens)[0], kind)
        for part, place, positions, text in found[1:]:
            rows.append(
                {
                    "pair": index, "then": with_round[index].then, "part": part, "site": place[0], "layer": place[1],
                    "positions": positions, "answer": answers[index], "donated": answers[donor],
                    "patched": read_answer(text, kind),
                }
            )  # fmt: skip
    columns = ["pair", "then", "part", "site", "layer", "positions", *ANSWERS]
    counts = {"texts": len(texts), "with round 1": len(with_round), "pairs": len(pairs)}
    return pd.DataFrame(rows, columns=columns), counts


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """How often an answer changes and follows, over the pairs whose own and donated answers were read and differ.

    Returns:
        One row per then, part and place: then, part, site, layer, positions (mean number), quantity (`follows`: the
        patched answer is the donated one; `changed`: it is not the own one, or none was read; `chance`: the patched
        answer is the one donated to another pair, mean over the other pairs), share, low, high (95 % interval of Wilson
        over pairs; NaN for `chance`), n (pairs).
    """
    both = table["answer"].notna() & table["donated"].notna()
    differ = [not same(a, b) for a, b in zip(table["answer"], table["donated"], strict=True)]
    some = table[both & pd.Series(differ, index=table.index, dtype=bool)]
    rows: list[tuple[Any, ...]] = []
    for (then, part, site, layer), group in some.groupby(["then", "part", "site", "layer"], sort=False):
        about = (then, part, site, layer, group["positions"].mean())
        hits = {
            "follows": [same(a, b) for a, b in zip(group["patched"], group["donated"], strict=True)],
            "changed": [not same(a, b) for a, b in zip(group["patched"], group["answer"], strict=True)],
        }
        for quantity, values in hits.items():
            found = accuracy_interval([float(value) for value in values])
            rows.append((*about, quantity, found.mean, found.low, found.high, found.n))
        nan, count = float("nan"), len(group)
        any_of = sum(same(a, b) for a in group["patched"] for b in group["donated"])
        chance = (any_of - sum(hits["follows"])) / (count * (count - 1)) if count > 1 else nan
        rows.append((*about, "chance", chance, nan, nan, count))
    columns = ["then", "part", "site", "layer", "positions", "quantity", "share", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def run_rounds(
    run: Path, out: Path, n: int = 300, layers: Sequence[int] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Patch round 1 at SFT and IMAD, in their own texts and in the base's explicit debates; finished pairs are kept.

    Args:
        run: folder of a run of `training.imad`.
        out: run folder.
        n: largest number of test questions.
        layers: see `patched_rounds`.

    Returns:
        The rows of `shares` by stage (SFT, IMAD) and text (`own text`: what the checkpoint wrote; `debate`: an explicit
        debate of the test questions, the same for both checkpoints); the numbers of texts and pairs; provenance.
    """
    config = read_json(run / "config.json")
    inputs = inputs_of_run(run, only=(SFT, IMAD))
    preset = replace(get_preset(config["name"], config["family"]), test=config["test"])
    of_run = Run(preset, config["seed"], run)
    problems = of_run.test_problems[:n]
    sampling = replace(of_run.sampling(), seed=config["seed"] + 1)  # the texts of `analysis transplant`
    traces = read_traces(run / "evaluation" / "sampled" / "debates" / "traces.jsonl")[:n]
    about = {
        "family": config["family"],
        "seed": config["seed"],
        "n": n,
        "layers": None if layers is None else list(layers),
        "sampling": asdict(sampling),
        "questions": sha256("".join(problem.question for problem in problems)),
        "debates": sha256("".join(trace.text for trace in traces)),
        "stages": {name: inputs.about(name) for name in (SFT, IMAD)},
    }
    found, numbers = [], []
    with run_folder(out, about) as folder:
        for stage in (SFT, IMAD):
            paths = {text: folder / f"{stage}-{text.replace(' ', '-')}.csv" for text in (OWN_TEXT, DEBATE)}
            missing = {text: path for text, path in paths.items() if not path.exists()}
            if missing:
                model, tokenizer = inputs.load(stage)
            for text, path in missing.items():
                some = [(trace.question, trace.body) for trace in traces]
                if text == OWN_TEXT:
                    questions = [problem.question for problem in problems]
                    some = _written(model, tokenizer, questions, sampling, folder / f"{stage}-written.jsonl")
                table, counts = patched_rounds(
                    model, tokenizer, some, problems[0].kind, layers=layers, seed=config["seed"],
                    max_new_tokens=sampling.max_new_tokens, log=path.with_suffix(".jsonl"),
                )  # fmt: skip
                write_table(path, table, {**about, "counts": counts})
            for text, path in paths.items():
                table, meta = read_table(path)
                table = table.astype(dict.fromkeys(ANSWERS, object)).where(table.notna() & (table != ""), None)
                one = shares(table)
                found.append(one.assign(stage=stage, text=text))
                pairs = int(one.groupby("then")["n"].max().sum()) if len(one) else 0
                numbers.append(
                    {"stage": stage, "text": text, **meta["counts"], "pairs with two different answers": pairs}
                )
    filled = [one for one in found if len(one)] or found
    return pd.concat(filled, ignore_index=True), pd.DataFrame(numbers), about


def _written(
    model: Any, tokenizer: Any, questions: Sequence[str], sampling: Sampling, log: Path
) -> list[tuple[str, str]]:
    """Question and text that the checkpoint writes, sampled as in `analysis transplant`; those in the log are kept."""
    requests = [
        Request(f"own/{index}", render(tokenizer, f"Problem: {question}\n\n"))
        for index, question in enumerate(questions)
    ]
    answered = logged(LocalModel(model, tokenizer), requests, sampling, log)
    replies: Mapping[str, str] = {reply.id: reply.text or "" for reply in answered}
    return [(question, replies[f"own/{index}"]) for index, question in enumerate(questions)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the analysis and write its tables."""
    parser = argparse.ArgumentParser(prog="python -m analysis patch-rounds", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of training.imad")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same call resumes it")
    parser.add_argument("--results", type=Path, help="folder that the tables are also written to")
    parser.add_argument("--n", type=int, default=300, help="largest number of test questions")
    parser.add_argument("--layers", help="layers that are patched, with commas; default: all")
    given = parser.parse_args(arguments)
    try:
        layers = None if given.layers is None else [int(one) for one in given.layers.split(",")]
    except ValueError:
        parser.error(f"expected --layers as integers with commas; got {given.layers!r}. Pass e.g. 0,8,16.")
    table, counts, about = run_rounds(given.run, given.out, given.n, layers)
    for folder in (given.out, *([] if given.results is None else [given.results])):
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "patched_rounds.csv", table, published(about))
        write_table(folder / "patched_rounds_counts.csv", counts, published(about))
    print(counts.to_string(index=False))
    follows = table[table["quantity"] == "follows"]
    print(
        follows.pivot_table(index=["stage", "text", "then", "part"], columns=["site", "layer"], values="share").round(3)
    )
