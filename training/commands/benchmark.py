"""Answer questions of GSM8K, MMLU-Pro and BBH by single answers, self-consistency and debates of one model.

The questions are drawn with a fixed seed from local files in the released formats. The model is --checkpoint or a
server (--answerer URL MODEL). Each reply is on disk as soon as it is there: the same command resumes, and --minutes
ends a part in time (exit code 3). The token limit is doubled from 512 until at most 5 % of the replies are cut, or to
2,048.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import steerkit as sk
from steerkit.io.signals import restore_interrupt
from steerkit.io.tables import read_table, write_table
from training.commands.options import add_server, server_of
from training.debates.answerers import Answerer, LocalModel
from training.evaluate.benchmark import BENCHMARKS, METHODS, TimeUp, Until, drawn, evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0 when all is answered, 3 when the minutes were over before."""
    restore_interrupt()
    parser = argparse.ArgumentParser(
        prog="python -m training benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", help="hub id, folder or GGUF file")
    add_server(parser, "answerer", "answers instead of a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/, mmlu_pro/ and bbh/")
    parser.add_argument("--out", type=Path, required=True, help="folder of replies and tables")
    parser.add_argument("--results", type=Path, help="also write the two tables here, without the texts")
    parser.add_argument("--benchmark", choices=BENCHMARKS, action="append", default=[], help="this one only")
    parser.add_argument("--method", choices=METHODS, action="append", default=[], help="this one only")
    parser.add_argument("--first", type=int, help="the first N of the drawn questions of each benchmark only")
    parser.add_argument("--rows", type=int, default=16, help="replies generated at once (default: 16)")
    parser.add_argument("--minutes", type=float, help="end this part after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    if (given.answerer is None) == (given.checkpoint is None):
        parser.error("expected either --checkpoint MODEL or --answerer URL MODEL. Pass one of them.")
    try:
        problems = {name: drawn(given.data, name)[: given.first] for name in given.benchmark or BENCHMARKS}
        model: Answerer = server_of(given, "answerer") or LocalModel(*sk.load(given.checkpoint), batch_rows=given.rows)
        if given.minutes is not None:
            model = Until(model, start + 60 * given.minutes)
        table = evaluate(problems, model, given.out, given.method or METHODS, seed=given.seed)
    except TimeUp:
        print(f"{given.minutes:g} minutes are over; the replies are in {given.out}. Run the same command to resume.")
        return 3
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if given.results is not None:
        for name in ("results.csv", "questions.parquet"):
            write_table((given.results / name).with_suffix(".csv"), *read_table(given.out / name))
    print(table.round(3).to_string(index=False))
    print(f"Tables in {given.out}: results.csv, results.md, questions.parquet, unread.jsonl.")
    return 0
