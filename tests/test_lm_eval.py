"""Tasks of lm-evaluation-harness on a steered model, against the harness's own model and against our own scores."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit as sk
from steerkit.models.hooks import counted_forwards
from steerkit.scores.fluency import log_probabilities
from tests.capture.test_capture import hooks
from tests.models.test_backends import readable
from tests.steering.test_steering import vector
from tests.tiny import tiny_model

harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `lm-eval`)")

ROOT = Path(__file__).parent.parent
QUESTIONS = [
    {
        "question": f"Question {i}: what {'is' * (1 + i % 3)} {i}?",
        "choices": ["A", "no it is not", "two words"],
        "answer": i % 3,
    }
    for i in range(6)
]
POSITIONS = ["generated", "from_last_prompt_token", "prompt", "all"]
EACH = {
    "multiple_choice": "steerkit_choice",
    "generate_until": "steerkit_text",
    "loglikelihood_rolling": "steerkit_roll",
}
TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
metadata:
  version: 1
"""
REST = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc',
    "generate_until": 'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs:\n  max_gen_toks: 8\n  until: ["\\0"]\n'
    "metric_list:\n  - metric: exact_match",
    "loglikelihood_rolling": 'doc_to_target: "{{question}}"\nmetric_list:\n  - metric: byte_perplexity',
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for kind, task in EACH.items():
        text = TASK.format(task=task, file=folder / "questions.jsonl", kind=kind, rest=REST[kind])
        (folder / f"{task}.yaml").write_text(text)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: Any, tasks: Any, task: str) -> list[Any]:
    """What the harness got back for each request of the task."""
    out = harness.simple_evaluate(model=model, tasks=[task], task_manager=tasks, bootstrap_iters=0, verbosity="ERROR")
    samples = sorted(out["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def numbers(answers: Any) -> list[float]:
    """All numbers in a nest of answers, in order."""
    if isinstance(answers, bool | str):
        return []
    return [float(answers)] if isinstance(answers, int | float) else [n for one in answers for n in numbers(one)]


@pytest.mark.parametrize("task", EACH.values())
def test_coefficient_zero_is_the_harness_own_model_and_another_is_not(tasks, task: str) -> None:
    from lm_eval.models.huggingface import HFLM

    from steerkit.lm_eval import SteeredLM

    model, tokenizer = tiny_model(), readable()
    plain = evaluate(HFLM(pretrained=model, tokenizer=readable(), batch_size=4), tasks, task)
    for positions in ("from_last_prompt_token", "all"):
        zero, strong = (
            evaluate(
                SteeredLM(model, tokenizer, sk.Steering(vector(model, 1), c, positions), batch_size=4), tasks, task
            )
            for c in (0.0, 1.5)
        )
        if numbers(plain):
            assert numbers(zero) == pytest.approx(numbers(plain), rel=1e-5)
            assert numbers(strong) != pytest.approx(numbers(plain), rel=1e-2)
        else:
            assert zero == plain != strong
    assert hooks(model) == 0


@pytest.mark.parametrize("positions", [*POSITIONS, "generated:2"])
def test_log_likelihoods_are_our_own_teacher_forced_ones(tasks, positions: str) -> None:
    from steerkit.lm_eval import SteeredLM

    model, tokenizer = tiny_model(), readable()
    steering = sk.Steering(vector(model, 1, 2), 1.5, positions, layer="all")
    found = evaluate(SteeredLM(model, tokenizer, steering, batch_size=5), tasks, EACH["multiple_choice"])
    prompts = [row["question"] for row in QUESTIONS for _ in row["choices"]]
    texts = [" " + choice for row in QUESTIONS for choice in row["choices"]]
    for steerings in ([steering] * len(texts), None):
        ours = [float(s.sum()) for s in log_probabilities(model, tokenizer, prompts, texts, steerings)]
        same = numbers(found) == pytest.approx(ours, rel=1e-5)
        assert same == (steerings is not None)


def test_scores_of_choices_are_the_harness_log_likelihoods(tasks) -> None:
    from lm_eval.models.huggingface import HFLM

    from steerkit.lm_eval import SteeredLM

    model, tokenizer = tiny_model(), readable()
    steering = sk.Steering(vector(model, 1), 1.5)
    prompts, choices = [[row[key] for row in QUESTIONS] for key in ("question", "choices")]
    choices = [[" " + choice for choice in several] for several in choices]
    plain = HFLM(pretrained=model, tokenizer=readable(), batch_size=4)
    for evaluated, steered in ((plain, None), (SteeredLM(model, tokenizer, steering, batch_size=4), steering)):
        found = numbers(evaluate(evaluated, tasks, EACH["multiple_choice"]))
        ours = sk.score_choices(model, tokenizer, prompts, choices, steering=steered)
        assert ours["log_prob"].tolist() == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("size", ["auto", "auto:4"])
def test_the_largest_batch_is_searched_once_for_all_lengths_of_context(size: str) -> None:
    from lm_eval.api.instance import Instance

    from steerkit.lm_eval import SteeredLM

    model, tokenizer = tiny_model(), readable()
    steering = sk.Steering(vector(model, 1), 1.5)
    pairs = [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found, counts = [], []
    for batch_size in (8, size):
        lm = SteeredLM(model, tokenizer, steering, batch_size=batch_size, max_batch_size=8)
        with counted_forwards(model) as count:
            found.append(numbers(lm.loglikelihood(requests, disable_tqdm=True)))
        counts += count
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert counts[1] == counts[0] + 5  # the harness tries a size five times


@pytest.mark.parametrize("positions", ["from_last_prompt_token", "generated", "generated:70", "prompt", "all"])
def test_each_window_of_a_long_text_is_steered_from_its_first_token_on(positions: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows

    from steerkit.lm_eval import SteeredLM

    model, tokenizer = tiny_model(context=64), readable()
    steering = sk.Steering(vector(model, 1), 1.5, positions)
    lm = SteeredLM(model, tokenizer, steering, batch_size=4)
    text = "The sea is calm. " * 9
    ids, total, widths = tokenizer(text)["input_ids"], 0.0, []
    for entered, predicted in get_rolling_token_windows(ids, lm.prefix_token_id, 64, 1):
        with torch.no_grad(), steering.on(model, prompt_length=1):
            scores = model(torch.tensor([entered])).logits[0].log_softmax(-1)[-len(predicted) :]
        total += float(scores.gather(1, torch.tensor(predicted)[:, None]).sum())
        widths.append((len(entered), len(predicted)))
    assert widths[-1][1] < widths[-1][0] == 64  # the last window has a long context
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert found == pytest.approx(total, rel=1e-5)


def test_generated_texts_are_our_own(tasks) -> None:
    from steerkit.lm_eval import SteeredLM

    model, tokenizer = tiny_model("gpt2"), readable()
    steering = sk.Steering(vector(model, 1), 0.2, "from_last_prompt_token")
    found = evaluate(SteeredLM(model, tokenizer, steering, batch_size=4), tasks, EACH["generate_until"])
    ours = sk.generate(model, tokenizer, [row["question"] for row in QUESTIONS], max_new_tokens=8, steering=steering)
    assert [answers[0][0] for answers in found] == ours
    assert ours != sk.generate(model, tokenizer, [row["question"] for row in QUESTIONS], max_new_tokens=8)


def test_the_command_lines_arguments_load_a_checkpoint_and_a_vector(tasks, tmp_path) -> None:
    from steerkit.lm_eval import SteeredLM

    tiny_model().save_pretrained(tmp_path)
    readable().save_pretrained(tmp_path)
    model, tokenizer = sk.load(tmp_path)
    vector(model, 1, 2).save(tmp_path / "v.safetensors")
    text = f"pretrained={tmp_path},vector={tmp_path}/v.safetensors,layer=1,coefficient=1.5,positions=all"
    named = harness.api.registry.get_model("steerkit").create_from_arg_string(text, {"batch_size": 3, "device": "cpu"})
    assert isinstance(named, SteeredLM) and list(named.steering.vector.layers) == [1] and named.batch_size == 3
    made = SteeredLM(model, tokenizer, sk.Steering(vector(model, 1), 1.5, "all"), batch_size=3)
    found = [numbers(evaluate(one, tasks, EACH["multiple_choice"])) for one in (named, made)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_its_command_line_has_one_more_model(tasks, tmp_path) -> None:
    from steerkit.lm_eval import SteeredLM

    model, tokenizer, task = tiny_model(), readable(), EACH["loglikelihood_rolling"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vector(model, 1, 2).save(tmp_path / "v.safetensors")
    arguments = f"pretrained={tmp_path},vector={tmp_path}/v.safetensors,layer=1,coefficient=1.5"
    command = f"-m steerkit.lm_eval --model steerkit --model_args {arguments} --device cpu --tasks {task}"
    command += f" --include_path {tasks.include_path}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=False)
    printed = re.findall(r"byte_perplexity\|[^\d]*([\d.]+)", done.stdout)
    assert printed, done.stderr
    for coefficient in (1.5, 0.0):
        lm = SteeredLM(model, tokenizer, sk.Steering(vector(model, 1), coefficient))
        out = harness.simple_evaluate(lm, tasks=[task], task_manager=tasks, bootstrap_iters=0)
        same = float(printed[0]) == pytest.approx(out["results"][task]["byte_perplexity,none"], rel=1e-3)
        assert same == (coefficient == 1.5)


def test_the_callers_tokenizer_is_not_changed(llama) -> None:
    from steerkit.lm_eval import SteeredLM

    tokenizer = readable()
    settings = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    SteeredLM(llama[0], tokenizer, sk.Steering(vector(llama[0], 1)))
    assert settings == (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))


def test_what_cannot_be_said_is_refused(llama) -> None:
    from steerkit.lm_eval import SteeredLM

    model, tokenizer = llama
    with pytest.raises(ValueError, match="one coefficient for all requests"):
        SteeredLM(model, tokenizer, sk.Steering(vector(model, 1), torch.tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match="layer from 0 to 3"):
        SteeredLM(model, tokenizer, sk.Steering(vector(model, 9)))
    short = SteeredLM(model, tokenizer, sk.Steering(vector(model, 1)), max_length=4)
    with pytest.raises(ValueError, match="room for a token of context before a continuation of 5"):
        short._loglikelihood_tokens([(("a", "b"), [1, 2], [3, 4, 5, 6, 7])])
