"""GRPO on the SFT checkpoint: the format reward fades, the length clip shrinks, the generation budget with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from steerkit import artifacts
from steerkit.traces import agents_in
from training.checkpoints import LoRA, adapted, device_options, last_checkpoint, save
from training.problems import Problem
from training.rewards import Box, Completion, clip_reward, format_reward, tag_weights, weighted_format
from training.schedules import Anneal, Gate, pass_gate

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
        beta: weight of the KL term; epsilon: clip of the probability ratio.
        scale: divide a group's advantages by their standard deviation.
        mask_truncated: leave completions that never ended out of the loss.
        lora: None trains all weights.
        save_every: steps between checkpoints.
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
    seed: int = 0


class Annealed(TrainerCallback):
    """The reward function that TRL calls, and the callback that moves its schedule: one state for both.

    The state is the gate; it is written into each of the trainer's checkpoints and read back on resuming. A line of
    `log.jsonl` per step has the step, `l`, `w_fmt`, the reward's parts, accuracy, length and shares.
    """

    def __init__(self, setting: GRPO, tokenizer: Any, folder: Path, on_clip: Any = None) -> None:
        self.setting, self.tokenizer, self.folder, self.on_clip = setting, tokenizer, folder, on_clip
        self.gate = Gate()
        self.weights = tag_weights(setting.agents, setting.rounds)
        self.__name__ = "imad"

    def now(self, step: int) -> tuple[float, int]:
        """`(w_fmt, l)` in a step."""
        gated = self.setting.anneal.kind == "gated"
        return self.setting.anneal.at(self.gate.progress if gated else step / max(1, self.setting.steps - 1))

    def __call__(
        self, completion_ids: Sequence[Sequence[int]], gold: Sequence[str], kind: Sequence[str], trainer_state: Any,
        **_: Any,
    ) -> list[float]:  # fmt: skip
        w_fmt, clip = self.now(trainer_state.global_step)
        ends = {self.tokenizer.eos_token_id}
        rows = []
        for ids, right, how in zip(completion_ids, gold, kind, strict=True):
            finished = bool(ids) and ids[-1] in ends
            text = self._decode(ids)
            completion = Completion(tuple(ids), finished)
            parts = {
                "format": weighted_format(text, self.weights, w_fmt, self.setting.kept) if self.setting.format else 0.0,
                "tags": format_reward(text, self.weights),
                "clip": clip_reward(
                    completion, clip, self._decode, right, how, self.setting.box, self.setting.must_end
                ),
                "correct": clip_reward(completion, len(ids), self._decode, right, how, "last", False),
                "length": len(ids), "truncated": not finished, "agents": len(agents_in(text)),
            }  # fmt: skip
            rows.append({**parts, "reward": parts["format"] + self.setting.clip_weight * parts["clip"]})
        self._note(trainer_state.global_step, w_fmt, clip, rows)
        return [row["reward"] for row in rows]

    def _note(self, step: int, w_fmt: float, clip: int, rows: Sequence[Mapping[str, float]]) -> None:
        rewards = np.array([row["reward"] for row in rows]).reshape(-1, self.setting.generations)
        line = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        line["success"] = _mean_over_processes(line["clip"])
        flat = float((rewards.std(1) == 0).mean())
        if _is_first():
            row = {"step": step, "w_fmt": w_fmt, "clip_tokens": clip, **line, "groups_without_spread": flat}
            artifacts.append_rows(self.folder / LOG, [{**row, "progress": self.gate.progress}])
        if self.setting.anneal.kind == "gated":
            taken = 1 / max(1, self.setting.steps - 1)
            self.gate = pass_gate(self.gate, line["success"], taken, self.setting.anneal.floor)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.on_clip is not None:
            self.on_clip(self.now(state.global_step)[1])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _is_first():
            artifacts.write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / GATE, asdict(self.gate))

    def resume(self, checkpoint: str | None) -> None:
        """Take up the gate of a checkpoint, and drop what the log says of later steps."""
        log = self.folder / LOG
        step = 0
        if checkpoint is not None:
            self.gate = Gate(**artifacts.read_json(Path(checkpoint) / GATE))
            step = int(checkpoint.rpartition("-")[2])
        if log.exists() and _is_first():
            rows = [row for row in artifacts.read_rows(log) if row["step"] < step]
            artifacts.write_text(log, "")
            artifacts.append_rows(log, rows)


def train_grpo(model: Any, tokenizer: Any, problems: Sequence[Problem], setting: GRPO, out: str | Path) -> Path:
    """Train and write a standalone checkpoint, `out/checkpoint`; goes on from the trainer's last if interrupted.

    The model is trained in place: load it anew to use the old one.

    Raises:
        ValueError: a problem without a gold answer.
        ConfigurationChanged, RunFolderBusy: see `steerkit.artifacts.run_folder`.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": f"Problem: {p.question}\n\n", "gold": p.gold, "kind": p.kind} for p in problems]
    if not rows or any(row["gold"] is None for row in rows):
        raise ValueError(f"expected problems with gold answers, one at least; got {len(rows)}.")
    config = {**asdict(setting), "problems": artifacts.sha256(artifacts.canonical_json(rows))}
    with artifacts.run_folder(out, config) as folder:
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
            lr_scheduler_type="constant_with_warmup", warmup_steps=0.05, save_strategy="steps",
            save_steps=setting.save_every, logging_steps=10, seed=setting.seed, gradient_checkpointing=False,
            disable_tqdm=True, **device_options(),
        )  # fmt: skip
        annealed: Any = Annealed(setting, tokenizer, folder)
        trainer = GRPOTrainer(
            adapted(model, setting.lora, tokens=False), reward_funcs=annealed, args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[annealed],
        )  # fmt: skip
        annealed.on_clip = lambda length: shorten_generation(trainer, length)
        checkpoint = last_checkpoint(folder / "trainer")
        annealed.resume(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        return save(trainer.model, tokenizer, done)


def shorten_generation(trainer: Any, length: int) -> None:
    """Set the completion length in every place that the trainer fixed it in when it was built."""
    trainer.max_completion_length = length
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.max_new_tokens = length
        trainer.generation_kwargs["max_new_tokens"] = length
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.max_completion_length = length


def _is_first() -> bool:
    import torch.distributed as ranks

    return not (ranks.is_available() and ranks.is_initialized()) or ranks.get_rank() == 0


def _mean_over_processes(value: float) -> float:
    """The mean of a number over all processes, so that every rank's gate moves alike."""
    import torch
    import torch.distributed as ranks

    if not (ranks.is_available() and ranks.is_initialized()):
        return value
    total = torch.tensor(value, dtype=torch.float64)
    ranks.all_reduce(total)
    return float(total) / ranks.get_world_size()
