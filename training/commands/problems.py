"""Write the problems of a run: `problems/train.jsonl` for training and `problems/test.jsonl` for evaluation.

SOURCE is a generated family (arithmetic, addition, ...), a benchmark with its place (gsm8k=openai/gsm8k,
mmlu_pro=TIGER-Lab/MMLU-Pro, bbh=lukaemon/bbh, open=questions.json; the place may be a local path), or a file of your
own: JSON lines with `question` and `gold` (without `gold` the question is open), optionally `kind` (number, option,
word, pair, open), `id` and `family`. A source that is used for both parts is split by the hash of each question.
"""

from __future__ import annotations

from steerkit.io.json import write_json
from training.commands.options import Stages, check_alone, one_line_errors, positive, refuse, stage_parser
from training.problems.problem import write_problems
from training.problems.sources import PARTS, split_problems


def main(arguments: list[str] | None = None) -> None:
    parser = stage_parser("problems", __doc__)
    parser.add_argument("--problems", required=True, metavar="SOURCE", help="source of the training problems")
    parser.add_argument(
        "--test", action="append", default=[], metavar="SOURCE", help="source of test problems (default: the same)"
    )
    parser.add_argument("--n", type=positive, help="largest number of training problems (default: all)")
    parser.add_argument("--n-test", type=positive, help="largest number of test problems of each source (default: all)")
    given = parser.parse_args(arguments)
    check_alone("problems")
    stages = Stages(given.run)
    with one_line_errors("problems"):
        train, test = split_problems(given.problems, given.test, given.n, given.n_test, given.seed)
        sources = {"train": given.problems, "test": given.test or [given.problems], "seed": given.seed}
        for part in PARTS:
            path = stages.problems(part)
            if path.is_file():
                refuse("problems", f"expected no file at {path}; there is one. Remove it, or pass another --run.")
        for part, problems in (("train", train), ("test", test)):
            stages.problems(part).parent.mkdir(parents=True, exist_ok=True)
            write_problems(stages.problems(part), problems)
        write_json(stages.problems("train").with_name("sources.json"), sources)
    print(f"{len(train)} training problems and {len(test)} test problems in {stages.problems('train').parent}.")
