"""Steer the agents of your own debates: vectors, probes, the paper's protocol, controls, figures and a page.

With --traces and --checkpoint, sizes are checked before a model is loaded, and everything is written into one folder:
`report.html`, tables, figures, and the vectors of each agent. The same command resumes. With --run or --stage, only the
agents' own directions and their controls are analysed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from analysis.agents.choose import Grid
from analysis.agents.contexts import by_cast, by_tag, first_texts
from analysis.agents.continuations import length_of_texts
from analysis.agents.steer import add_options, analyse, run_options
from analysis.inputs import BASE, CHECKPOINT, Inputs, add_inputs, inputs_of_files
from analysis.paper.pooling import pool_protocol
from analysis.paper.protocol import Protocol, run_protocol
from analysis.probes.separability import probe_checkpoints
from steerkit.io.files import file_name
from steerkit.io.run_folder import ConfigurationChanged, RunFolderBusy
from steerkit.io.tables import write_table
from steerkit.models.context import context_length
from steerkit.show.report import write_report
from steerkit.stats.format import interval_text
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, write_traces
from training.debates.personas import CASTS, cast_of
from training.presets import override
from training.problems.answers import KINDS

LEAST = {"vectors": 12, "validation": 4, "test": 8}
"""Least number of questions of each split. With fewer, intervals and Holm's correction have no value."""


@dataclass(frozen=True)
class Analysis:
    """What is computed; the defaults suit models of 7 billion parameters on one GPU.

    Args:
        grid: the agents' own directions, see `analysis.agents.choose.Grid`.
        protocol: the paper's protocol, see `analysis.paper.protocol.Protocol`.
        layers: number of layers that are tried, evenly spaced.
        probed: largest number of debates for the probes.
    """

    grid: Grid = Grid(  # noqa: RUF009  frozen
        sources=("trace",),
        positions=("last", "mean"),
        extents=("all", "generated"),
        coefficients=(0.5, 1.0, 2.0),
        negative=(-1.0,),
        train=200,
        validation=12,
        test=24,
        bands=2,
        max_new_tokens=None,
    )
    protocol: Protocol = Protocol(  # noqa: RUF009  frozen
        control_coefficients=(2.0, 5.0), train=200, validation=12, test=24, plant=None
    )
    layers: int = 7
    probed: int = 100


@dataclass(frozen=True)
class Sizes:
    """Sizes that are known before the weights are loaded.

    Args:
        layers: decoder blocks of the checkpoint.
        context: its context in tokens; None if its configuration does not state it.
        continuation: new tokens of each text: one and a half times the longest first turn.
        longest: tokens of the longest debate with its question.
        agents: number of agents.
    """

    layers: int
    context: int | None
    continuation: int
    longest: int
    agents: int


def sampled_layers(n: int, count: int) -> tuple[int, ...]:
    """`count` layers of a model of `n`, evenly spaced between its first and last.

    Example:
        >>> sampled_layers(32, 7)
        (4, 8, 12, 16, 20, 24, 28)
    """
    return tuple(sorted({n * k // (count + 1) for k in range(1, count + 1)}))


def check_debates(inputs: Inputs) -> int:
    """Check the debates, and return the number of agents.

    Raises:
        ValueError: a question twice, too few questions in a split, or debates with different agents.
    """
    splits = dict(zip(LEAST, (inputs.train, inputs.validation, inputs.test), strict=True))
    traces = [trace for split in splits.values() for trace in split]
    questions = [trace.question for trace in traces]
    if repeated := len(questions) - len(set(questions)):
        raise ValueError(f"expected one debate per question; got {repeated} repeated questions. Keep one of each.")
    if any(len(splits[name]) < least for name, least in LEAST.items()):
        raise ValueError(
            f"expected at least {LEAST} questions, split by their text; got {len(traces)} debates, "
            f"{ {name: len(split) for name, split in splits.items()} }. About 60 debates are enough; 300 are better."
        )
    agents = {frozenset(first_texts(trace)) for trace in traces}
    if len(agents) != 1 or len(next(iter(agents))) < 2:
        shown = sorted("".join(sorted(one)) or "none" for one in agents)
        raise ValueError(
            "expected the same two or more agents in every debate, each with a text in round 1; got the agents "
            f"{', '.join(shown)}. Leave the other debates out."
        )
    return len(next(iter(agents)))


def sizes_of(inputs: Inputs, agents: int) -> Sizes:
    """The sizes of the checkpoint that gives the vectors, and of the debates in its tokens.

    Raises:
        OSError: no such checkpoint.
        ValueError: a debate or a continuation is longer than the checkpoint's context.
    """
    model_config, tokenizer = _config_and_tokenizer(inputs)
    traces = (*inputs.train, *inputs.validation, *inputs.test)
    texts = [text for trace in traces for text in first_texts(trace).values()]
    longest = max(len(encode_prompt(tokenizer, trace.prompt)) + len(encode(tokenizer, trace.body)) for trace in traces)
    sizes = Sizes(*model_config, length_of_texts(tokenizer, texts), longest, agents)
    needed = sizes.longest + sizes.continuation
    if sizes.context is not None and needed > sizes.context:
        raise ValueError(
            f"expected debates whose tokens and a continuation fit the checkpoint's context of {sizes.context}; got "
            f"{sizes.longest} + {sizes.continuation}. Leave long debates out, or use a model with a longer context."
        )
    return sizes


def _config_and_tokenizer(inputs: Inputs) -> tuple[tuple[int, int | None], Any]:
    """`((layers, context), tokenizer)` without weights; a GGUF file is loaded whole."""
    import steerkit
    from steerkit.models.blocks import find_blocks

    stage = inputs.vectors_at
    checkpoint = str(inputs.stages[stage])
    if checkpoint.endswith(".gguf"):
        model, tokenizer = steerkit.load(checkpoint)
        return (len(find_blocks(model)), context_length(model)), tokenizer
    from transformers import AutoConfig, AutoTokenizer

    from steerkit.models.checkpoint import check_folder
    from steerkit.models.hub import offline_options

    check_folder(checkpoint, trust_pickle=False)
    adapter = inputs.adapters.get(stage)
    if adapter is not None and Path(adapter).is_absolute() and not Path(adapter, "adapter_config.json").is_file():
        raise FileNotFoundError(f"expected a PEFT adapter at {adapter}; there is none. Check the path.")
    options = offline_options(checkpoint)
    config: Any = AutoConfig.from_pretrained(checkpoint, **options).get_text_config(decoder=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
    context = getattr(config, "max_position_embeddings", None)
    return (config.num_hidden_layers, context), tokenizer


def planned(setting: Analysis, sizes: Sizes) -> Analysis:
    """The setting with its layers and continuation length where they are not given."""
    layers = sampled_layers(sizes.layers, setting.layers)
    grid, protocol = setting.grid, setting.protocol
    if grid.max_new_tokens is None:
        grid = replace(grid, max_new_tokens=sizes.continuation)
    return replace(
        setting,
        grid=replace(grid, layers=grid.layers or layers),
        protocol=replace(
            protocol,
            layers=protocol.layers or tuple(layer for layer in layers if layer < sizes.layers - 1),
            max_new_tokens=protocol.max_new_tokens or sizes.continuation,
        ),
    )


def texts_written(setting: Analysis, inputs: Inputs, agents: int) -> dict[str, int]:
    """The number of texts that each part writes, all checkpoints together."""
    grid, protocol = setting.grid, setting.protocol
    validation, test = min(grid.validation, len(inputs.validation)), min(grid.test, len(inputs.test))
    places = len(grid.layers or ()) * len(grid.positions) * len(grid.sources) * len(grid.extents)
    screened = places * max(4, validation // 4) + max(1, places // 4) * validation
    curves = 1 + agents * (len(grid.coefficients) + len(grid.negative)) * 1
    curves += 3 * grid.bands * (len(grid.coefficients) + len(grid.negative))
    frozen = 1 + agents + 3 * grid.controls
    few = protocol.control_strengths
    strengths = len(protocol.coefficients) + len(protocol.doses)
    controls = 2 * protocol.controls * (strengths if few is None else len(few))
    per_context = agents * min(protocol.test, len(inputs.test)) * (1 + strengths + controls)
    contexts = len(inputs.stages) + (inputs.base_context is not by_tag)
    of_layers = agents * min(protocol.validation, len(inputs.validation)) * (1 + strengths)
    return {
        "choice of the setting": len(inputs.stages) * agents * len(grid.coefficients) * screened,
        "curves and gains": len(inputs.stages) * (1 + agents) * test * (curves + frozen),
        "the paper's protocol": of_layers * len(protocol.layers or ()) + contexts * per_context,
    }


def plan_text(setting: Analysis, inputs: Inputs, sizes: Sizes) -> str:
    """What will be computed, in lines."""
    written = texts_written(setting, inputs, sizes.agents)
    total = sum(written.values())
    lines = [
        f"Debates: {len(inputs.train)} for vectors, {len(inputs.validation)} to choose settings, {len(inputs.test)} "
        f"to report; {sizes.agents} agents; the longest debate has {sizes.longest} tokens.",
        f"Checkpoints: {', '.join(f'{name} ({path})' for name, path in inputs.stages.items())}; {sizes.layers} layers, "
        f"tried: {', '.join(map(str, setting.grid.layers or ()))}.",
        f"Continuations: at most {setting.grid.max_new_tokens} new tokens (one and a half times the longest first turn "
        "unless set).",
        *(f"Texts, {name}: {count:,}" for name, count in written.items()),
        f"Texts in all: {total:,}, at most {total * (setting.grid.max_new_tokens or sizes.continuation):,} new tokens.",
    ]
    return "\n".join(lines)


def analyse_debates(inputs: Inputs, setting: Analysis, out: str | Path) -> Path:
    """Run everything, and write the tables, the figures and the page; finished parts are not computed again.

    Args:
        inputs: checkpoints and debates.
        setting: see `planned`.
        out: folder of the results.

    Returns:
        The page, `out/report.html`.

    Raises:
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    out = Path(out)
    tables = analyse(inputs, setting.grid, out)
    probed = {"debates": inputs.train[: setting.probed]}
    tables["separability"] = probe_checkpoints(inputs, probed, out, setting.grid.layers)
    run_protocol(inputs, setting.protocol, out / "protocol")
    tables["protocol"] = pool_protocol({0: out})
    write_table(out / "protocol.csv", tables["protocol"], {})
    subprocess.run([sys.executable, "-m", "figures", str(out)], check=True, stdout=subprocess.DEVNULL)
    page = out / "report.html"
    sweep = SweepResult.load(out / "stages" / file_name(inputs.vectors_at) / "rouge_l-none.parquet")
    write_report(
        page,
        title="The agents of your debates",
        sweep=sweep,
        summary=sentences(tables, inputs.vectors_at),
        tables=shown_tables(tables),
        figures={caption_of(path.stem): path for path in sorted((out / "figures").glob("*.png"))},
        notes=NOTES,
    )
    return page


NOTES = (
    "Settings are chosen on validation questions and reported on test questions. One checkpoint is one training run: "
    "intervals are over questions or over control directions, and do not cover other training seeds.",
    "Controls have the mean norm of the agents' vectors: random directions, directions with the covariance of the "
    "stream, and vectors of shuffled agent labels.",
    "A text is scored up to the next agent's tag. ROUGE-L compares it with the agent's own first text of that "
    "question; 'speaks' is 1 where the first turn carries the agent's tag; fidelity is its mean log-probability "
    "per token minus that of the other agents' texts.",
    "The paper's protocol (arXiv 2604.24881, section 4): unit vectors of the last token of each turn, added to "
    "generated positions, with the trace up to the agent's tag as context. Its area is the mean score over the "
    "coefficients.",
    "Where a probe at the embedding or of length and position alone names the agents, higher layers may read nothing "
    "else.",
)


def sentences(tables: dict[str, pd.DataFrame], stage: str) -> list[str]:
    """What was found at a checkpoint, one sentence per question."""
    probes = tables["separability"]
    best = probes[(probes["layer"].astype(str) == "nested") & (probes["labels"] == "true") & (probes["stage"] == stage)]
    best = best[best["position"] == "last"].set_index("source")
    found = [
        f"A linear probe of the last token of a first turn names its agent with held-out accuracy "
        f"{_of(best.loc[source], 'accuracy', 'accuracy_low', 'accuracy_high')} ({source})."
        for source in best.index
    ]
    gains = tables["gains"]
    some = gains[(gains["stage"] == stage) & (gains["score"] == "rouge_l") & ~gains["identity"].astype(bool)]
    for agent, rows in some.groupby("agent", sort=True):
        over = rows.set_index("over")
        found.append(
            f"Agent {agent}, not named in the prompt: its direction changes ROUGE-L to its own text by "
            f"{_of(over.loc['coefficient 0'], 'gain', 'low', 'high')} over coefficient 0, and by "
            f"{_of(over.loc['random'], 'gain', 'low', 'high')} over random directions."
        )
    table = tables["protocol"]
    grid = "controls" if (table["grid"] == "controls").any() else "coefficient"
    lines = table[(table["stage"] == stage) & (table["score"] == "rouge_l") & (table["grid"] == grid)]
    lines = lines.set_index("measure")
    found.append(
        f"The paper's protocol: the area under ROUGE-L is {_of(lines.loc['area, own'], 'value', 'low', 'high')}; minus "
        f"that of random directions {_of(lines.loc['area over random'], 'value', 'low', 'high')}."
    )
    return found


def _of(row: pd.Series, mean: str, low: str, high: str) -> str:
    return interval_text(row[mean], row[low], row[high], 2)


def shown_tables(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables of the page by caption."""
    names = {
        "choice": "Chosen on validation",
        "gains": "Gains on test at the chosen coefficient",
        "protocol": "The paper's protocol",
        "separability": "Probes of the agents' names",
        "reliability": "Reliability of the vectors",
    }
    return {caption: tables[name].round(3) for name, caption in names.items()}


CAPTIONS = (
    ("steering", "Scores over the coefficient: each agent's own direction and its controls, test questions."),
    ("cosines", "Cosines between the agents' vectors."),
    ("plane", "Turns of test questions in the plane of the agents' vectors."),
    ("protocol", "The paper's protocol: area under ROUGE-L by kind of direction."),
    ("probes", "Held-out accuracy of probes of the agents' names by layer, with their controls."),
    ("separability", "Held-out accuracy of probes of the agents' names, layer chosen in training folds."),
)


def caption_of(name: str) -> str:
    """The caption of a figure by its file name."""
    return next((f"{text} ({name})" for start, text in CAPTIONS if name.startswith(start)), name)


def read_inputs(given: argparse.Namespace) -> Inputs:
    """The checkpoints and debates of the command line.

    Raises:
        OSError: no such file.
        ValueError: a record that is no debate.
    """
    stages = ({BASE: given.base} if given.base else {}) | {CHECKPOINT: given.checkpoint}
    others: dict[str, Any] = {"adapters": {CHECKPOINT: given.adapter}} if given.adapter else {}
    if given.cast:
        cast = cast_of(given.cast)
        others |= {"base_context": by_cast(cast, given.kind), "openings": cast.openings}
    return inputs_of_files(stages, given.traces, **others)


def copy_of_debates(inputs: Inputs, out: Path) -> None:
    """Write the debates with their tags to `out/traces.jsonl`, so that untagged records can be inspected."""
    traces: Sequence[DebateTrace] = (*inputs.train, *inputs.validation, *inputs.test)
    out.mkdir(parents=True, exist_ok=True)
    write_traces(out / "traces.jsonl", traces)


def _refuse(error: Exception) -> NoReturn:
    """End with exit code 2 and the error in one line."""
    print(f"python -m analysis agents: {error}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis agents", description=__doc__)
    add_inputs(parser)
    parser.add_argument("--checkpoint", help="hub id, folder or GGUF file, with --traces: analyse everything")
    parser.add_argument("--adapter", help="PEFT adapter of the checkpoint, hub id or folder")
    parser.add_argument("--base", help="checkpoint before training, compared in every table")
    parser.add_argument("--cast", choices=sorted(CASTS), help="cast whose prompts name an agent for --base")
    parser.add_argument("--kind", choices=(*KINDS, "open"), default="number", help="kind of the answers, with --cast")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the sizes, print what would be computed, and exit"
    )
    add_options(parser)
    given = parser.parse_args(arguments)
    if given.checkpoint is None:
        run_options(given, parser)
        return
    if given.traces is None or given.run or given.stage:
        parser.error("expected --traces FILE with --checkpoint, without --run and --stage; got others. Pass these two.")
    try:
        inputs = read_inputs(given)
        sizes = sizes_of(inputs, check_debates(inputs))
        setting = planned(override(Analysis(), given.set), sizes)
    except (ValueError, OSError) as error:
        _refuse(error)
    print(plan_text(setting, inputs, sizes), file=sys.stderr)
    if given.dry_run:
        return
    try:
        copy_of_debates(inputs, given.out)
        page = analyse_debates(inputs, setting, given.out)
    except (OSError, RunFolderBusy, ConfigurationChanged) as error:
        _refuse(error)
    print(f"Page: {page}. Vectors: {given.out}/stages/*/agent-*.safetensors. Tables: {given.out}/*.csv.")
