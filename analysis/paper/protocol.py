"""The paper's own steering protocol, with the controls that it lacks.

One vector per agent, made once at SFT (last token of the response, unit length, layer chosen on SFT's validation
debates). The same vectors are added to the generated positions of the base, SFT and IMAD, after the same context: the
trace up to and including the agent's tag. No push acts on the first new token, which the last one of the context
decides. Texts are sampled (T 0.7, top-p 0.9); the score is ROUGE-L of the agent's turn. Beside each curve: random and
shuffled-label vectors of the same norm, a triple of them for the three agents. A base into which directions were
planted that do select the agent shows what the protocol can find.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import steerkit as sk
from analysis.agents.activations import turn_activations
from analysis.agents.contexts import Context, by_tag, first_texts
from analysis.agents.continuations import TEMPERATURE, TOP_P, length_of_texts, texts_with_tags
from analysis.agents.speaker import first_turn
from analysis.agents.vectors import agent_vectors
from analysis.inputs import BASE, CHECKPOINT, IMAD, SFT, Inputs, inputs_of_run
from analysis.paper.plant import PLANTED, Plant, plant, planted_directions
from analysis.stored import stored_vectors
from steerkit.capture.norms import stream_norms
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.scores.text import rouge_l, tokenize
from steerkit.stats.areas import curve_auc
from steerkit.stats.controls import against_controls
from steerkit.text.traces import DebateTrace
from steerkit.vectors.controls import shuffle_labels
from steerkit.vectors.vector import SteeringVector
from training.settings import override

Vectors = Mapping[str, SteeringVector]
"""A unit vector per agent."""
OWN, RANDOM, SHUFFLED = "own", "random", "shuffled"
CONTROLS = (RANDOM, SHUFFLED)
COEFFICIENT, DOSE, AT_CONTROLS = "coefficient", "dose", "controls"
TAGGED, CAST = "tagged", "cast"
PLANTED_BASE = "base with planted directions"
PLANTING = "planting.pt"
"""State of the planting, which a killed run resumes from."""


@dataclass(frozen=True)
class Protocol:
    """What is steered.

    Args:
        coefficients: of the unit vector, as in the paper.
        doses: shares of the stream's mean norm at the layer.
        controls: number of random and of shuffled triples; a rank of 5 % needs 19.
        control_coefficients: coefficients at which the controls are added, which are among `coefficients`; None for
            all of them and all doses. With fewer, own directions and controls are compared at these (grid `controls`).
        control_doses: doses at which the controls are added instead, which are among `doses`: for a stream of large
            norm, of which coefficients from 1 to 5 are a small share.
        layers: to choose from; None for all but the last.
        train: largest number of debates for the vectors.
        validation: largest number of debates for the choice of the layer.
        test: largest number of debates for the results.
        max_new_tokens: of each text; None is one and a half times the longest reference.
        plant: training of the base with planted directions, all weights of it; None leaves that check out.
        seed: of the sampling, of the controls and of the planting.
        rouge_tokenizer: tokenizer of ROUGE-L, see `steerkit.scores.text.tokenize`; None is `rouge_score`.
    """

    coefficients: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    doses: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    controls: int = 19
    control_coefficients: tuple[float, ...] | None = None
    control_doses: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None
    train: int = 300
    validation: int = 24
    test: int = 48
    max_new_tokens: int | None = None
    plant: Plant | None = Plant()  # noqa: RUF009  frozen
    seed: int = 0
    rouge_tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("coefficients", "doses"):
            every, few = getattr(self, name), getattr(self, f"control_{name}")
            if unknown := sorted(set(few or ()) - set(every)):
                raise ValueError(f"expected control_{name} among {every}; got {unknown}. Pass some of these.")
        if self.control_coefficients is not None and self.control_doses is not None:
            raise ValueError("expected control_coefficients or control_doses; got both. Pass one of the two.")

    @property
    def control_strengths(self) -> tuple[float, ...] | None:
        """The coefficients or doses of the controls, where these have fewer."""
        return self.control_coefficients if self.control_doses is None else self.control_doses


def sft_vectors(inputs: Inputs, setting: Protocol) -> tuple[Vectors, list[Vectors]]:
    """The agents' unit vectors at SFT (`Inputs.vectors_at`), and `setting.controls` triples with shuffled names.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 4.
    """
    train = inputs.train[: setting.train]
    acts = turn_activations(*inputs.load(inputs.vectors_at), train, layers=inputs.read)["last"]
    own = {agent: vector.unit() for agent, vector in agent_vectors(acts).items()}
    shuffled: list[Vectors] = [
        {a: v.unit() for a, v in agent_vectors(shuffle_labels(acts, setting.seed + k, balanced=True)).items()}
        for k in range(setting.controls)
    ]
    return own, shuffled


def random_triples(own: Vectors, n: int, seed: int) -> list[Vectors]:
    """`n` triples of isotropic random directions of unit length."""
    agents = sorted(own)
    return [
        {agent: sk.random_like(own[agent], seed + len(agents) * k + i) for i, agent in enumerate(agents)}
        for k in range(n)
    ]


def steered(
    model: Any,
    tokenizer: Any,
    debates: Sequence[DebateTrace],
    context: Context,
    sets: Mapping[str, Sequence[Vectors]],
    layer: int,
    setting: Protocol,
    openings: Sequence[str] = (),
    out: Path | None = None,
) -> pd.DataFrame:
    """ROUGE-L of every agent's turn under its direction of each triple, at every strength.

    All texts of a context share their random numbers.

    Args:
        model: the checkpoint.
        tokenizer: its tokenizer.
        debates: whose turns of round 1 are written.
        context: what precedes a turn.
        sets: triples of unit vectors by kind.
        layer: where they are added.
        setting: strengths and sampling.
        openings: for each agent what its texts begin with.
        out: folder of the sweeps.

    Returns:
        Columns kind, number (of the triple), grid (`coefficient`, `dose`; `controls`: the coefficients or doses of the
        controls where these have fewer), strength, question, agent, rouge_l, speaks (1 where the turn has the agent's
        own format; NaN without `openings`), relative_dose (share of the stream's mean norm). Strength 0 is in each
        grid.
    """
    some = debates[:50]
    norm = stream_norms(model, tokenizer, [t.prompt for t in some], [t.body for t in some], [layer])[layer]
    strengths = {(COEFFICIENT, c): c for c in setting.coefficients} | {(DOSE, d): d * norm for d in setting.doses}
    few = None
    if setting.control_strengths is not None:
        unit = 1.0 if setting.control_doses is None else norm
        few = {(AT_CONTROLS, strength): strength * unit for strength in setting.control_strengths}
    references = {(trace.question, agent): text for trace in debates for agent, text in first_texts(trace).items()}
    longest = setting.max_new_tokens or length_of_texts(tokenizer, references.values())
    parts = []
    for agent in sorted({agent for _, agent in references}):
        named = {
            kind: {f"{kind} {k}": triple[agent] for k, triple in enumerate(triples)} for kind, triples in sets.items()
        }
        prompts = [
            {"prompt": context(tokenizer, trace, agent), "id": trace.question}
            for trace in debates
            if (trace.question, agent) in references
        ]
        for part, vectors in _parts(named, few is not None).items():
            chosen = (few if part == AT_CONTROLS and few is not None else strengths).values()
            swept = sk.sweep(
                model,
                tokenizer,
                vectors,
                prompts,
                coefficients=[0.0, *chosen],
                layers=[layer],
                positions="generated",
                temperature=TEMPERATURE,
                top_p=TOP_P,
                max_new_tokens=longest,
                seed=setting.seed,
                foreign=True,
                stream_norms={layer: norm},
                out=out and out / f"agent-{agent}-{part}",
            )
            grids = (few or {}) | (strengths if part != AT_CONTROLS else {})
            table = swept.table.assign(text=texts_with_tags(tokenizer, swept.table))
            parts.append(_scored(table, agent, references, grids, openings, setting.rouge_tokenizer))
    return pd.concat(parts, ignore_index=True)


def _parts(named: Mapping[str, Mapping[str, Any]], apart: bool) -> dict[str, dict[str, Any]]:
    """The vectors of each sweep: all in one, or the controls apart where they have coefficients of their own."""
    merged: dict[str, dict[str, Any]] = {}
    for kind, vectors in named.items():
        merged.setdefault(AT_CONTROLS if apart and kind in CONTROLS else "all", {}).update(vectors)
    return merged


def _scored(
    table: pd.DataFrame,
    agent: str,
    references: Mapping[tuple[str, str], str],
    strengths: Mapping[tuple[str, float], float],
    openings: Sequence[str],
    rouge_tokenizer: str | None = None,
) -> pd.DataFrame:
    """One agent's texts with their scores, by grid and strength."""
    turns = [first_turn(text if isinstance(text, str) else "", openings) for text in table["text"]]
    own = [references[question, agent] for question in table["prompt_id"]]
    words: Any = rouge_tokenizer or "rouge_score"
    scores = rouge_l([turn.text for turn in turns], own, words)
    unseen = {text for text in set(own) if not tokenize(text, words) and any(map(str.isalnum, text))}
    # A text without a word is like none; of a reference whose letters the tokenizer does not see nothing is known.
    scores = np.where(np.isnan(scores) & [text not in unseen for text in own], 0.0, scores)
    kind = table["vector"].str.partition(" ")
    about = pd.DataFrame(
        {
            "kind": kind[0],
            "number": kind[2].astype(int),
            "coefficient": table["coefficient"],
            "question": table["prompt_id"],
            "agent": agent,
            "rouge_l": scores,
            "speaks": [float(str(turn.agent) == agent) if openings else np.nan for turn in turns],
            "relative_dose": table["relative_dose"],
        }
    )
    parts = []
    zeros = {(grid, 0.0): 0.0 for grid, _ in strengths}
    for (grid, strength), coefficient in (*strengths.items(), *zeros.items()):
        rows = about[np.isclose(about["coefficient"], coefficient, rtol=1e-9, atol=0)]
        parts.append(rows.drop(columns="coefficient").assign(grid=grid, strength=strength))
    return pd.concat(parts, ignore_index=True)


def areas(table: pd.DataFrame, score: str = "rouge_l") -> pd.DataFrame:
    """The area under the curve of a score, and the area above its value at strength 0, per triple and question.

    Areas are divided by the width of the grid. A question's value is the mean over its agents.

    Args:
        table: see `steered`.
        score: a column of it.

    Returns:
        Columns kind, number, grid, question, area, above.
    """
    wide = table.pivot_table(
        index=["kind", "number", "grid", "question", "agent"], columns="strength", values=score, aggfunc="mean"
    )
    rows = []
    for grid, part in wide.groupby(level="grid", sort=False):
        values = part.dropna(axis=1, how="all")
        curves = values.to_numpy()
        area = np.full(len(curves), np.nan)
        for index in np.flatnonzero(np.isfinite(curves).all(axis=1)):
            area[index] = curve_auc(values.columns, curves[index], normalize=True)
        rows.append(pd.DataFrame({"area": area, "above": area - values[0.0].to_numpy()}, index=values.index))
        assert grid
    keys = ["kind", "number", "grid", "question"]
    return pd.concat(rows).groupby(level=keys, sort=False).mean().reset_index()


def compared(area: pd.DataFrame) -> pd.DataFrame:
    """The agents' own triple against each kind of control triples.

    Args:
        area: see `areas`.

    Returns:
        A row per grid, kind and over: area and above (means of the kind over questions; of the controls over triples
        too), and for the kinds that are no controls gain, low, high, p, p_rank, n (questions), k (triples): the area
        minus that of the controls, see `steerkit.stats.controls.against_controls`.
    """
    rows = []
    for grid, part in area.groupby("grid", sort=False):
        by_kind = {
            kind: some.pivot_table(index="question", columns="number", values="area")
            for kind, some in part.groupby("kind")
        }
        for kind, some in part.groupby("kind", sort=False):
            means = {"grid": grid, "kind": kind, "area": some["area"].mean(), "above": some["above"].mean()}
            controls = [name for name in CONTROLS if name in by_kind] if kind not in CONTROLS else []
            rows += [{**means, "over": None}] if not controls else []
            for over in controls:
                found = against_controls(by_kind[kind][0].to_numpy(), by_kind[over].to_numpy())
                rows.append({**means, "over": over, **asdict(found)})
    return pd.DataFrame(rows)


def choose_layer(inputs: Inputs, own: Vectors, setting: Protocol, out: Path) -> int:
    """The layer where the agents' own vectors have the largest area on validation debates, at SFT."""
    model, tokenizer = inputs.load(inputs.vectors_at)
    layers = setting.layers or tuple(int(layer) for layer in next(iter(own.values())).layers)[:-1]
    debates = inputs.validation[: setting.validation]
    found = {}
    for layer in layers:
        table = steered(model, tokenizer, debates, by_tag, {OWN: [own]}, layer, setting, (), out / f"layer-{layer}")
        area = areas(table)
        found[layer] = float(area["area"].mean())
    write_table(out / "layers.csv", pd.DataFrame({"layer": found.keys(), "area": found.values()}), {})
    return max(found, key=lambda layer: found[layer])


def run_protocol(inputs: Inputs, setting: Protocol, out: str | Path) -> pd.DataFrame:
    """The protocol on base, SFT and IMAD, or on other checkpoints; a finished part is not run again.

    Args:
        inputs: a run's checkpoints and debates.
        setting: what is steered.
        out: run folder.

    Returns:
        The rows of `compared` per stage and context (`tagged`: the trace up to the agent's tag; `cast`, for the base
        only: its own prompt for that agent).
    """
    stages = [stage for stage in (BASE, SFT, IMAD, CHECKPOINT) if stage in inputs.stages]
    debates = (*inputs.train, *inputs.validation, *inputs.test)
    config = {
        "setting": asdict(setting),
        "stages": {name: inputs.about(name) for name in stages},
        "traces": sha256("".join(trace.text for trace in debates)),
        **inputs.reading(),
    }
    with run_folder(out, config) as folder:

        @cache
        def sets() -> dict[str, list[Vectors]]:
            def made() -> dict[str, SteeringVector]:
                own, shuffled = sft_vectors(inputs, setting)
                every = {OWN: [own], RANDOM: random_triples(own, setting.controls, setting.seed), SHUFFLED: shuffled}
                return {
                    f"{kind} {k} {agent}": vector
                    for kind, triples in every.items()
                    for k, triple in enumerate(triples)
                    for agent, vector in triple.items()
                }

            found: dict[str, list[dict[str, SteeringVector]]] = {OWN: [], RANDOM: [], SHUFFLED: []}
            for name, vector in stored_vectors(folder / "vectors", made).items():
                kind, k, agent = name.split(" ")
                if int(k) == len(found[kind]):
                    found[kind].append({})
                found[kind][int(k)][agent] = vector
            return {kind: [*triples] for kind, triples in found.items()}

        path = folder / "layers.csv"
        if not path.exists():
            choose_layer(inputs, sets()[OWN][0], setting, folder)
        layers = read_table(path)[0].set_index("layer")["area"]
        layer = int(layers.idxmax())
        each = []
        for stage in stages:
            asked = stage == BASE and inputs.base_context is not by_tag
            contexts = {TAGGED: by_tag} | ({CAST: inputs.base_context} if asked else {})
            for name, context in contexts.items():
                path = folder / f"{file_name(stage)}-{name}.parquet"
                if not path.exists():
                    test = inputs.test[: setting.test]
                    written = folder / "texts" / f"{file_name(stage)}-{name}"
                    vectors = sets()  # before the model is loaded: one model at a time
                    table = steered(
                        *inputs.load(stage), test, context, vectors, layer, setting, inputs.openings, written
                    )
                    write_table(path, table, config)
                table = read_table(path)[0]
                each.append(_all_areas(table, inputs).assign(stage=stage, context=name))
        if BASE in stages and setting.plant is not None:
            path = folder / "planted.parquet"
            if not path.exists():
                write_table(path, _on_planted(inputs, sets(), layer, setting, folder), config)
            (folder / PLANTING).unlink(missing_ok=True)
            each.append(_all_areas(read_table(path)[0], inputs).assign(stage=PLANTED_BASE, context=TAGGED))
        write_table(folder / "areas.parquet", pd.concat(each, ignore_index=True), config)
        parts = [
            compared(part).assign(score=str(score), stage=part["stage"].iloc[0], context=part["context"].iloc[0])
            for one in each
            for score, part in one.groupby("score", sort=False)
        ]
        table = pd.concat(parts, ignore_index=True).assign(layer=layer)
        write_table(folder / "protocol.csv", table, config)
    return table


def _all_areas(table: pd.DataFrame, inputs: Inputs) -> pd.DataFrame:
    """The areas of every score."""
    scores = ("rouge_l", "speaks") if inputs.openings else ("rouge_l",)
    return pd.concat([areas(table, score).assign(score=score) for score in scores], ignore_index=True)


def _on_planted(
    inputs: Inputs, sets: Mapping[str, Sequence[Vectors]], layer: int, setting: Protocol, out: Path
) -> pd.DataFrame:
    """The texts of a base with planted directions, under these and under the controls."""
    model, tokenizer = inputs.load(BASE)
    assert setting.plant is not None
    own = sets[OWN][0]
    directions = planted_directions(next(iter(own.values())), sorted(own), setting.seed)
    planting = replace(setting.plant, seed=setting.seed)
    losses = plant(model, tokenizer, inputs.train, directions, layer, planting, out / PLANTING)
    write_table(out / "planting.csv", pd.DataFrame({"step": range(len(losses)), "loss": losses}), {})
    steered_by = {PLANTED: [directions], RANDOM: sets[RANDOM], SHUFFLED: sets[SHUFFLED]}
    test = inputs.test[: setting.test]
    return steered(
        model, tokenizer, test, by_tag, steered_by, layer, setting, inputs.openings, out / "texts" / "planted"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis protocol", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of training.imad")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of Protocol, e.g. test=24"
    )
    given = parser.parse_args(arguments)
    try:
        setting = override(Protocol(), given.set)
    except ValueError as error:
        parser.error(str(error))
    table = run_protocol(inputs_of_run(given.run, only=(BASE, SFT, IMAD)), setting, given.out)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
