"""Answer questions of GSM8K, MMLU-Pro and BBH by single answers, self-consistency and debates of one model.

The questions are drawn with a fixed seed from local files in the released formats. The model is --checkpoint or a
server (--answerer URL MODEL); a trained model (--trained NAME=CHECKPOINT) answers the same questions, five times each,
by the prompt that it was trained with. Replies are on disk as soon as their chunk of --rows ends. The same command
resumes, and --minutes ends a part in time (exit code 3). The token limit is doubled from 512 until at most 5 % of the
replies are cut, or to 2,048.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

import steerkit as sk
from steerkit.io.files import file_name
from steerkit.io.run_folder import RunFolderBusy
from steerkit.io.signals import restore_interrupt
from steerkit.io.tables import read_table, write_table
from training.commands.options import add_server, check_alone, positive, server_of
from training.debates.answerers import Answerer, LocalModel, check_unique_ids
from training.evaluate.benchmark import BASE, METHODS, evaluate
from training.evaluate.benchmark_tables import EXPORTED, write_tables
from training.evaluate.chunks import Chunks, TimeUp
from training.evaluate.methods import DEBATES, PLURALITIES
from training.evaluate.questions import BENCHMARKS, SEED, drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0 when all is answered, 3 when the minutes were over before."""
    restore_interrupt()
    parser = argparse.ArgumentParser(
        prog="python -m training benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", help="untrained model: hub id, folder or GGUF file")
    add_server(parser, "answerer", "answers instead of a checkpoint")
    parser.add_argument(
        "--trained", action="append", default=[], metavar="NAME=CHECKPOINT", help="also a trained model of this name"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/, mmlu_pro/ and bbh/")
    parser.add_argument("--out", type=Path, required=True, help="folder of replies and tables")
    parser.add_argument("--results", type=Path, help="also write the tables here, without the texts")
    parser.add_argument("--benchmark", choices=BENCHMARKS, action="append", default=[], help="this one only")
    parser.add_argument("--method", choices=METHODS, action="append", default=[], help="this one only")
    parser.add_argument("--draw", type=int, default=SEED, help=f"seed of the questions (default: {SEED}); for a pilot")
    parser.add_argument(
        "--per", type=positive, help="questions of each category or task, and of GSM8K (default: 7, 20, 100)"
    )
    parser.add_argument("--rows", type=positive, default=16, help="replies generated and stored at once (default: 16)")
    parser.add_argument("--minutes", type=float, help="end this part within so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    check_alone("benchmark")
    if given.answerer is not None and given.checkpoint is not None:
        parser.error("expected either --checkpoint MODEL or --answerer URL MODEL; got both. Pass one of them.")
    if given.answerer is None and given.checkpoint is None and not given.trained:
        parser.error(
            "expected either --checkpoint MODEL or --answerer URL MODEL, or --trained NAME=CHECKPOINT; got none. "
            "Pass one of them."
        )
    deadline = None if given.minutes is None else start + 60 * given.minutes
    over = False
    try:
        trained = [_trained(text) for text in given.trained]
        check_unique_ids("trained models", (file_name(name) for name, _ in trained))
        problems = {name: drawn(given.data, name, given.draw, given.per) for name in given.benchmark or BENCHMARKS}
        try:
            for name, load in _models(given, trained):
                evaluate(
                    problems, Chunks(load(), given.rows, deadline), given.out, given.method or METHODS, given.seed, name
                )
        except TimeUp:
            over = True
        table = write_tables(given.out)
    except (ValueError, OSError, RunFolderBusy) as error:
        parser.error(str(error))
    if given.results is not None:
        for file in EXPORTED:
            if (given.out / file).exists():
                write_table(given.results / file, *read_table(given.out / file))
    _report(table, given, over)
    return 3 if over else 0


def _trained(text: str) -> tuple[str, str]:
    """The name and the checkpoint of a trained model."""
    name, equals, checkpoint = text.partition("=")
    if not equals or not checkpoint or file_name(name) == BASE or name in (*METHODS, *DEBATES, *PLURALITIES):
        raise ValueError(
            f"expected NAME=CHECKPOINT with a name that no method has; got {text!r}. Example: IMAD=runs/grpo."
        )
    return name, checkpoint


def _models(
    given: argparse.Namespace, trained: Sequence[tuple[str, str]]
) -> Iterator[tuple[str | None, Callable[[], Answerer]]]:
    """The models to evaluate: the name of a trained one, and what loads it; only one is in memory at a time."""

    def loader(checkpoint: str) -> Callable[[], Answerer]:
        return lambda: LocalModel(*sk.load(checkpoint), batch_rows=given.rows)

    server = server_of(given, "answerer")
    if server is not None:
        yield None, lambda: server
    elif given.checkpoint is not None:
        yield None, loader(given.checkpoint)
    for name, checkpoint in trained:
        yield name, loader(checkpoint)


def _report(table: pd.DataFrame, given: argparse.Namespace, over: bool) -> None:
    if len(table):
        print(table.round(3).to_string(index=False))
    print(f"Tables in {given.out}: {', '.join(EXPORTED)}, results.md, unread.jsonl.")
    if over:
        print(f"{given.minutes:g} minutes are over; the replies are in {given.out}. Run the same command to resume.")
