"""Training and evaluation of baselines: whose answer is the label, what a cut reply counts, what a step keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig

from training.debates.answerers import Rule, Sampling
from training.debates.debate import Call, Setting, Template, run_debates
from training.debates.personas import Cast, Persona
from training.evaluate.benchmark import call_row
from training.memory import training_step
from training.problems.answers import read_answer
from training.problems.problem import Problem
from training.train.evolve import majority_labels

COPIES = Cast("copies", (Persona("You are careful."),) * 3)


def check_no_right_answer_becomes_a_label(
    labels: Callable[[Sequence[Problem], Path], list[Problem]], folder: Path
) -> None:
    problem = Problem("sum/0", "1+1", "2", "number", "own")
    wrong = Rule(lambda request, rng: r"\boxed{3}")
    run_debates([problem], wrong, COPIES, Setting(rounds=1, sampling=Sampling(max_new_tokens=4)), folder)
    assert [one.gold for one in labels([problem], folder)] == ["3"]


def right_answers(problems: Sequence[Problem], folder: Path) -> list[Problem]:
    """The problems as they are: GRPO on them would use the right answers."""
    return [replace(problem) for problem in problems]


def check_a_cut_reply_is_wrong(rows: Callable[..., Any], _: Path) -> None:
    problem = Problem("sum/0", "1+1", "2", "number", "own")
    cut = Call(1, 1, r"Perhaps \boxed{2}, or", 5, 8, None, False)
    row = rows(problem, cut, Template(), 0, 8)
    assert row["answer"] is None and row["cut"] and not row["unread"]


def read_as_far_as_it_goes(problem: Problem, call: Call, *rest: Any) -> dict[str, Any]:
    """A row that reads a cut reply too."""
    return {**call_row(problem, call, *rest), "answer": read_answer(call.text or "", problem.kind)}


def check_activations_are_what_a_step_keeps(count: Callable[[LlamaConfig, int], int], _: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.ones(2, 20, dtype=torch.long)
    mask = ids.clone()
    mask[1, 15:] = 0
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
    assert real <= count(config, 40) <= 1.1 * real


def counted(config: LlamaConfig, tokens: int) -> int:
    return training_step(config, None, 2, tokens // 2).activations


def by_the_rule_of_thumb(config: LlamaConfig, tokens: int) -> int:
    """34 bytes per token, layer and unit of width in 16 bits, twice in 32 (Korthikanti et al., arXiv 2205.05198)."""
    return 2 * 34 * tokens * config.num_hidden_layers * config.hidden_size


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "a majority is the label, right or wrong": (check_no_right_answer_becomes_a_label, majority_labels, right_answers),
    "a cut reply is wrong": (check_a_cut_reply_is_wrong, call_row, read_as_far_as_it_goes),
    "an estimate counts what a step keeps": (check_activations_are_what_a_step_keeps, counted, by_the_rule_of_thumb),
}
