"""GRPO on the SFT checkpoint: the format reward fades, the length clip shrinks, the generation budget with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.ranks import in_first_process, is_first
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import run_folder
from steerkit.text.tags import agents_in
from training.debates.judge import Judge
from training.problems.problem import Problem
from training.train.checkpoints import LoRA, adapted, device_options, last_checkpoint, save
from training.train.ranks import mean as mean_over_ranks
from training.train.ranks import whole_weights
from training.train.rewards import Box, Completion, clip_reward, format_reward, tag_weights, weighted_format
from training.train.rollouts import rollouts, sharded
from training.train.schedules import Anneal, Gate, pass_gate

GATE, LOG = "gate.json", "log.jsonl"


@dataclass(frozen=True)
class GRPO:
    """How to train; the defaults are the paper's (arXiv 2604.24881, section 3).

    Args:
        anneal: how `w_fmt` and `l` go down.
        clip_weight: `w_clip`.
        format: whether tags are rewarded at all (not in the control without a debate).
        box, must_end: which box counts, and whether the end has to come within `l`; see `training.rewards.clip_reward`.
        kept: tags whose reward never fades.
        agents, rounds: of the debate whose tags are rewarded.
        steps: optimisation steps; the schedule ends with them.
        prompts, generations: how many problems a step, and completions of each.
        micro_batch: completions per backward pass on each device.
        inner: optimisation steps on the same completions.
        decay: let the learning rate fall linearly to 0, where it is constant else: small batches say little of a step's
            direction, and what a constant rate adds of noise is never taken back.
        beta: weight of the KL term; epsilon: clip of the probability ratio.
        scale: divide a group's advantages by their standard deviation.
        mask_truncated: leave completions that never ended out of the loss.
        lora: None trains all weights.
        save_every: steps between checkpoints.
        bf16: compute in bfloat16 on a CPU too; see `training.sft.SFT`. A GPU always does.
        vllm: let vLLM, in the same process, write the completions; it has to be installed, and a GPU to be there.
    """

    anneal: Anneal = Anneal()  # noqa: RUF009  frozen
    clip_weight: float = 1.0
    format: bool = True
    box: Box = "last"
    must_end: bool = True
    kept: tuple[str, ...] = ()
    agents: int = 3
    rounds: int = 2
    steps: int = 300
    prompts: int = 8
    generations: int = 4
    micro_batch: int = 8
    inner: int = 3
    learning_rate: float = 5e-6
    decay: bool = False
    temperature: float = 0.7
    top_p: float = 0.9
    beta: float = 0.02
    epsilon: float = 0.1
    loss: str = "bnpo"
    scale: bool = True
    mask_truncated: bool = False
    max_grad_norm: float = 0.3
    lora: LoRA | None = LoRA(32, 64, 0.1)  # noqa: RUF009  frozen
    save_every: int = 50
    bf16: bool = False
    vllm: bool = False
    seed: int = 0


class Annealed(TrainerCallback):
    """The reward function that TRL calls, and the callback that moves its schedule: one state for both.

    The state is the gate; it is written into each of the trainer's checkpoints and read back on resuming. A line of
    `log.jsonl` per step has the step, `l`, `w_fmt`, the reward's parts, accuracy, length, and the shares of
    completions that hold 1, 2, ... agents.
    """

    def __init__(
        self, setting: GRPO, tokenizer: Any, folder: Path, on_clip: Any = None, judge: Judge | None = None
    ) -> None:
        self.setting, self.tokenizer, self.folder, self.on_clip = setting, tokenizer, folder, on_clip
        self.judge = judge
        self.gate = Gate()
        self.weights = tag_weights(setting.agents, setting.rounds)
        self.__name__ = "imad"

    def now(self, step: int) -> tuple[float, int]:
        """`(w_fmt, l)` in a step."""
        gated = self.setting.anneal.kind == "gated"
        progress = self.gate.progress if gated else step * self.setting.anneal.pace(self.setting.steps)
        return self.setting.anneal.at(min(1.0, progress))

    def __call__(
        self, completion_ids: Sequence[Sequence[int]], question: Sequence[str], gold: Sequence[str],
        kind: Sequence[str], trainer_state: Any, **_: Any,
    ) -> list[float]:  # fmt: skip
        w_fmt, clip = self.now(trainer_state.global_step)
        ends = {self.tokenizer.eos_token_id}
        rows = []
        passed = self._judged(completion_ids, question, kind, clip)
        for number, (ids, right, how) in enumerate(zip(completion_ids, gold, kind, strict=True)):
            finished = bool(ids) and ids[-1] in ends
            text = self._decode(ids)
            completion = Completion(tuple(ids), finished)
            in_time = finished and len(ids) <= clip
            if how == "open":
                right_at_all = float(passed[number])
                right_now = right_at_all if in_time or not self.setting.must_end else 0.0
            else:
                right_now = clip_reward(
                    completion, clip, self._decode, right, how, self.setting.box, self.setting.must_end
                )
                right_at_all = clip_reward(completion, len(ids), self._decode, right, how, "last", False)
            parts = {
                "format": weighted_format(text, self.weights, w_fmt, self.setting.kept) if self.setting.format else 0.0,
                "tags": format_reward(text, self.weights),
                "clip": right_now, "correct": right_at_all,
                "length": len(ids), "truncated": not finished, "agents": len(agents_in(text)),
            }  # fmt: skip
            rows.append({**parts, "reward": parts["format"] + self.setting.clip_weight * parts["clip"]})
        self._note(trainer_state.global_step, w_fmt, clip, rows)
        return [row["reward"] for row in rows]

    def _judged(
        self, completion_ids: Sequence[Sequence[int]], question: Sequence[str], kind: Sequence[str], clip: int
    ) -> dict[int, bool]:
        """The judge's verdict on the first `clip` tokens of each completion of an open question, by place."""
        places = [number for number, how in enumerate(kind) if how == "open"]
        if not places:
            return {}
        assert self.judge is not None
        verdicts = self.judge([(question[number], self._decode(completion_ids[number][:clip])) for number in places])
        return dict(zip(places, verdicts, strict=True))

    def _note(self, step: int, w_fmt: float, clip: int, rows: Sequence[Mapping[str, float]]) -> None:
        rewards = np.array([row["reward"] for row in rows]).reshape(-1, self.setting.generations)
        line = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        line["success"] = mean_over_ranks(line["clip"])
        several = range(1, self.setting.agents + 1)
        line |= {f"agents_{k}": float(np.mean([row["agents"] == k for row in rows])) for k in several}
        flat = float((rewards.std(1) == 0).mean())
        if is_first():
            row = {"step": step, "w_fmt": w_fmt, "clip_tokens": clip, **line, "groups_without_spread": flat}
            append_rows(self.folder / LOG, [{**row, "progress": self.gate.progress}])
        if self.setting.anneal.kind == "gated":
            pace = self.setting.anneal.pace(self.setting.steps)
            self.gate = pass_gate(self.gate, line["success"], pace, self.setting.anneal.floor)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.on_clip is not None:
            self.on_clip(self.now(state.global_step)[1])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if is_first():
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / GATE, asdict(self.gate))

    def resume(self, checkpoint: str | None) -> None:
        """Take up the gate of a checkpoint, and drop what the log says of later steps."""
        log = self.folder / LOG
        step = 0
        if checkpoint is not None:
            self.gate = Gate(**read_json(Path(checkpoint) / GATE))
            step = int(checkpoint.rpartition("-")[2])
        if log.exists() and is_first():
            rows = [row for row in read_rows(log) if row["step"] < step]
            write_text(log, "")
            append_rows(log, rows)


def train_grpo(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    setting: GRPO,
    out: str | Path,
    judge: Judge | None = None,
) -> Path:
    """Train and write a standalone checkpoint, `out/checkpoint`; goes on from the trainer's last if interrupted.

    The model is trained in place: load it anew to use the old one. `judge` takes the place of the right answer where a
    question is open: the clip reward is then 1 if it passes the first `l` tokens.

    Raises:
        ValueError: no problems, or an open one without a judge.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [
        {"prompt": f"Problem: {p.question}\n\n", "question": p.question, "gold": p.gold or "", "kind": p.kind}
        for p in problems
    ]
    if not rows or (judge is None and any(p.kind == "open" for p in problems)):
        raise ValueError(
            f"expected problems, and a judge where one is open; got {len(rows)} problems and {judge}. See judge.py."
        )
    config = {**asdict(setting), "problems": sha256(canonical_json(rows))}
    with run_folder(out, config) as folder:
        done = folder / "checkpoint"
        if done.exists():
            return done
        completions = setting.prompts * setting.generations
        arguments = GRPOConfig(
            output_dir=str(folder / "trainer"), max_steps=setting.steps, learning_rate=setting.learning_rate,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=max(1, completions // setting.micro_batch),
            num_generations=setting.generations, num_iterations=setting.inner, temperature=setting.temperature,
            top_p=setting.top_p, beta=setting.beta, epsilon=setting.epsilon, loss_type=setting.loss,
            scale_rewards="group" if setting.scale else "none", mask_truncated_completions=setting.mask_truncated,
            max_completion_length=setting.anneal.at(0.0)[1], max_grad_norm=setting.max_grad_norm,
            lr_scheduler_type="linear" if setting.decay else "constant_with_warmup", warmup_steps=0.05,
            save_strategy="steps", save_steps=setting.save_every, logging_steps=10, seed=setting.seed,
            gradient_checkpointing=False, disable_tqdm=True, use_vllm=setting.vllm, vllm_mode="colocate",
            **device_options(setting.bf16),
        )  # fmt: skip
        annealed: Any = Annealed(setting, tokenizer, folder, judge=judge)
        engine = None if setting.vllm or sharded(arguments) else rollouts
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*experimental")
            trainer = GRPOTrainer(
                adapted(model, setting.lora, tokens=False), reward_funcs=annealed, args=arguments,
                train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[annealed],
                rollout_func=engine,
            )  # fmt: skip
        annealed.on_clip = lambda length: shorten_generation(trainer, length)
        checkpoint = last_checkpoint(folder / "trainer")
        annealed.resume(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        with whole_weights(trainer):
            in_first_process(lambda: save(trainer.model, tokenizer, done))
        return done


def shorten_generation(trainer: Any, length: int) -> None:
    """Set the completion length in every place that the trainer fixed it in when it was built."""
    trainer.max_completion_length = length
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.max_new_tokens = length
        trainer.generation_kwargs["max_new_tokens"] = length
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.max_completion_length = length
