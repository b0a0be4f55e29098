"""Supervised fine-tuning on debate traces, and the DebateGPT baselines, which are the same on shorter targets."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from steerkit.io.files import sha256
from steerkit.io.json import canonical_json, write_json
from steerkit.io.ranks import in_first_process
from steerkit.io.run_folder import run_folder
from steerkit.text.tags import CONSENSUS, END, agent_tag, round_tag, tags, without_tags
from steerkit.text.traces import DebateTrace
from training.problems.answers import read_answer, same
from training.train.checkpoints import LoRA, adapted, add_tags, device_options, last_checkpoint, save
from training.train.ranks import whole_weights

Target = Literal["trace", "untagged", "answer", "response", "first"]
Cut = Literal["answers", "revision", "turn"]


@dataclass(frozen=True)
class SFT:
    """How to fine-tune; the defaults are the paper's (arXiv 2604.24881, section 3).

    Args:
        target: what is learnt after `Problem: ...`: the whole `"trace"`; the same `"untagged"`, a control in which
            nothing names the agents; DebateGPT's `"answer"`, the box alone; or its `"response"`, a last turn that gave
            the consensus; or the `"first"` turn of an agent drawn at random, right or wrong: no debate at all.
        structure_dropout: share of traces that are cut short, to what `cut_to` says and the consensus; without it a
            later length reward finds no short output to reinforce.
        cut_to: one or two agents' first turns that gave the consensus (`"answers"`), or all but the last round and one
            turn of that which gave it (`"revision"`), for problems in which the first round is seldom right, or one
            agent's first turn, right or wrong (`"turn"`), so that who speaks is the first thing to choose.
        batch: examples per optimisation step, `micro_batch` of them at a time on each device.
        lora: None trains all weights.
        steps: optimisation steps; None for `epochs`.
        bf16: compute in bfloat16 on a CPU too, which pays only where it has instructions for it (AMX) and is several
            times slower elsewhere; a GPU always does.
    """

    target: Target = "trace"
    epochs: float = 3.0
    steps: int | None = None
    learning_rate: float = 5e-5
    batch: int = 16
    micro_batch: int = 4
    warmup: float = 0.1
    max_length: int = 2048
    max_grad_norm: float = 0.3
    lora: LoRA | None = LoRA()  # noqa: RUF009  frozen
    structure_dropout: float = 0.0
    cut_to: Cut = "answers"
    bf16: bool = False
    seed: int = 0


def examples(traces: Sequence[DebateTrace], setting: SFT, kind: str = "number") -> list[dict[str, str]]:
    """`{"prompt", "completion"}` of each trace; loss falls on the completion alone.

    A trace that begins with its problem does not get it twice. `ValueError` where no trace gives an example.
    """
    rng = random.Random(setting.seed)
    rows = []
    for trace in traces:
        if setting.target in ("trace", "untagged"):
            cut = rng.random() < setting.structure_dropout
            tagged = shortened(trace, kind, rng, setting.cut_to) if cut else trace.body
            completion: str | None = without_tags(tagged) if setting.target == "untagged" else tagged
        elif setting.target == "first":
            completion = rng.choice([turn.text for turn in trace.turns if turn.round == 1])
        else:
            completion = debategpt(trace, setting.target, kind)
        if completion is not None:
            rows.append({"prompt": trace.prompt, "completion": completion})
    if not rows:
        raise ValueError(f"expected traces that give examples for {setting.target!r}; {len(traces)} gave none.")
    return rows


def shortened(trace: DebateTrace, kind: str, rng: random.Random, cut_to: Cut = "answers") -> str:
    """A trace's tagged text cut as `SFT.cut_to` says; all of it where no turn of that round gave the consensus."""
    answer = read_answer(trace.consensus or "", kind)
    number = max(turn.round for turn in trace.turns) if cut_to == "revision" else 1
    there = [turn for turn in trace.turns if turn.round == number]
    gave = there if cut_to == "turn" else [t for t in there if same(read_answer(t.text, kind), answer)]
    if not gave:
        return trace.body
    if cut_to == "answers":
        turns = rng.sample(gave, min(len(gave), rng.choice((1, 2))))
    else:
        turns = [*(turn for turn in trace.turns if turn.round < number), rng.choice(gave)]
    kept = {agent_tag(turn.agent, turn.round) for turn in turns} | {round_tag(turn.round) for turn in turns}
    parts = re.split(f"(?={'|'.join(map(re.escape, found_tags([trace])))})", trace.body)
    return "".join(part for part in parts if part.startswith((*kept, CONSENSUS, END)))


def debategpt(trace: DebateTrace, target: Target, kind: str) -> str | None:
    r"""DebateGPT's target: `\boxed{answer}`, or the last turn of the first agent that gave the consensus."""
    answer = read_answer(trace.consensus or "", kind)
    if answer is None:
        return None
    if target == "answer":
        return rf"\boxed{{{answer}}}"
    last = max(turn.round for turn in trace.turns)
    mine = [turn.text for turn in trace.turns if turn.round == last and same(read_answer(turn.text, kind), answer)]
    return mine[0] if mine else None


def train_sft(
    model: Any, tokenizer: Any, traces: Sequence[DebateTrace], setting: SFT, out: str | Path, kind: str = "number"
) -> Path:
    """Fine-tune and write a standalone checkpoint, `out/checkpoint`; goes on from the trainer's last if interrupted.

    The model is trained in place: load it anew to use the old one.

    Raises:
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = examples(traces, setting, kind)
    config = {**asdict(setting), "examples": sha256(canonical_json(rows))}
    with run_folder(out, config) as folder:
        done = folder / "checkpoint"
        if done.exists():
            return done
        needs_tags = setting.target == "trace"
        tagged = add_tags(model, tokenizer, found_tags(traces)) if needs_tags else tokenizer
        if tagged.pad_token is None:
            tagged = _with_pad(tagged)
        trained = adapted(model, setting.lora, needs_tags)
        length = {"max_steps": setting.steps} if setting.steps is not None else {"num_train_epochs": setting.epochs}
        arguments = SFTConfig(
            output_dir=str(folder / "trainer"), learning_rate=setting.learning_rate, **length,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=max(1, setting.batch // setting.micro_batch), lr_scheduler_type="cosine",
            warmup_steps=setting.warmup, max_length=setting.max_length, max_grad_norm=setting.max_grad_norm,
            save_strategy="steps", save_steps=100, save_total_limit=2, logging_steps=10, seed=setting.seed,
            gradient_checkpointing=False, disable_tqdm=True, **device_options(setting.bf16),
        )  # fmt: skip
        trainer = SFTTrainer(trained, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tagged)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "trainer"))
        with whole_weights(trainer):
            in_first_process(lambda: _leave(folder, trainer, tagged))
        return done


def _leave(folder: Path, trainer: Any, tokenizer: Any) -> None:
    write_json(folder / "log.json", trainer.state.log_history)
    save(trainer.model, tokenizer, folder / "checkpoint")


def found_tags(traces: Sequence[DebateTrace]) -> tuple[str, ...]:
    """All tags that debates of as many agents and rounds as these have."""
    agents = max(turn.agent for trace in traces for turn in trace.turns)
    rounds = max(turn.round for trace in traces for turn in trace.turns)
    return tags(agents, rounds)


def _with_pad(tokenizer: Any) -> Any:
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = tokenizer.eos_token
    return padded
