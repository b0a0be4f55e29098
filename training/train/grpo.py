"""GRPO on the SFT checkpoint: the format reward fades, and the length clip and the generation length shrink."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.ranks import in_first_process, is_first
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import run_folder
from steerkit.models.identity import describe, identity, provenance
from steerkit.models.kernels import resume_kernels
from steerkit.models.products import fast_products
from steerkit.text.prompt import encode_prompt
from steerkit.text.tags import agents_in, tags
from training.debates.judge import Judge
from training.problems.problem import Problem
from training.settings import check_fields, check_shares, check_top_p, shell
from training.train.checkpoints import (
    LoRA,
    NoFinalSave,
    check_batch,
    checkpointing_options,
    declare_ends,
    device_options,
    in_rounds,
    last_checkpoint,
    save,
    started_with,
    with_adapter,
)
from training.train.distributed import mean_over_processes, process_count, whole_weights
from training.train.log_probs import fast_log_probs
from training.train.rewards import Box, Completion, clip_reward, format_reward, tag_weights, weighted_format
from training.train.rollouts import rollouts, sharded
from training.train.schedules import Anneal, pass_gate

GATE, LOG = "gate.json", "log.jsonl"
DECIDED = ("clip", "clip_next", "correct")
"""Terms of the log that a judge decides for open questions."""
SILENT = 3
"""Steps in a row without any verdict of the judge after which a training ends."""
SCHEDULERS = {False: "constant_with_warmup", True: "linear", "cosine": "cosine"}
"""`GRPO.decay` -> TRL's name of the schedule of the learning rate."""


@dataclass(frozen=True)
class GRPO:
    """Settings of GRPO (Shao et al. 2024, arXiv 2402.03300).

    For a group of G completions y_1 ... y_G of one problem with rewards r_i, the advantage is

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)        (without the division if `scale` is False)

    A step minimises the mean over the tokens t of all completions of

        -min(rho_t A_i, clip(rho_t, 1 - epsilon, 1 + epsilon) A_i) + beta KL(policy || reference)

    with rho_t the probability ratio of token t between the policy and the policy that generated it. The reward is that
    of `training.train.rewards`.

    docs/training-settings.md compares the settings with the paper's (arXiv 2604.24881, section 3) and its released
    script's; the presets of its checkpoints have them.

    Args:
        anneal: schedule of `w_fmt` and `l`.
        clip_weight: `w_clip`.
        format: reward the tags; False in the control without a debate.
        box: which box counts, see `training.train.rewards.clip_reward`.
        must_end: require the end of the completion within `l`, see `training.train.rewards.clip_reward`.
        kept: tags whose reward never fades, of the `agents` and `rounds` below.
        agents: agents of the debate whose tags are rewarded.
        rounds: rounds of that debate.
        epochs: passes over the problems, each with `generations` completions per problem; None trains for `steps`.
        steps: optimisation steps if `epochs` is None; the schedule ends with them.
        prompts: problems per generation step of all processes together; a multiple of their number.
        generations: completions per problem, G.
        micro_batch: completions per backward pass of one process; divides that process's share of prompts x
            generations.
        inner: optimisation steps on the same completions.
        learning_rate: learning rate after a warm-up.
        decay: decrease the learning rate to 0, linearly (True) or as a half cosine (`"cosine"`), instead of keeping it
            constant. With small batches a constant rate leaves noise in the final weights.
        warmup: share of the steps with increasing learning rate; None is 0.05.
        temperature: sampling temperature of the completions.
        top_p: nucleus of the completions, above 0.
        beta: weight of the KL term.
        epsilon: clip of the probability ratio.
        loss: TRL's name of the loss. `"dapo"` averages over all tokens of the generation step, however it is divided;
            `"bnpo"` over those of each micro-batch and then over the micro-batches; several processes refuse it.
            `"grpo"` is a mean over completions, `"dr_grpo"` a sum over tokens divided by the longest length.
        scale: divide the advantages of a group by their standard deviation.
        mask_truncated: leave completions without an end out of the loss.
        max_grad_norm: gradient norm limit.
        lora: the adapter; None trains all weights.
        save_every: steps between checkpoints, a multiple of `inner`.
        kept_checkpoints: number of the trainer's newest checkpoints that are kept; None keeps all, which analyses of
            the training need.
        bf16: compute in bfloat16 on a CPU too, see `training.train.sft.SFT`; a GPU always does.
        checkpointing: see `training.train.sft.SFT`.
        vllm: generate completions by vLLM in the same process; this requires vLLM and a GPU.
        seed: seed of the trainer and of the completions.
    """

    anneal: Anneal = Anneal()  # noqa: RUF009  frozen
    clip_weight: float = 1.0
    format: bool = True
    box: Box = "last"
    must_end: bool = False
    kept: tuple[str, ...] = ()
    agents: int = 3
    rounds: int = 2
    epochs: float | None = None
    steps: int = 300
    prompts: int = 8
    generations: int = 4
    micro_batch: int = 8
    inner: int = 3
    learning_rate: float = 5e-6
    decay: bool | Literal["cosine"] = False
    warmup: float | None = None
    temperature: float = 0.7
    top_p: float = 0.9
    beta: float = 0.02
    epsilon: float = 0.1
    loss: Literal["dapo", "bnpo", "grpo", "dr_grpo"] = "dapo"
    scale: bool = True
    mask_truncated: bool = False
    max_grad_norm: float = 0.3
    lora: LoRA | None = LoRA(32, 64, 0.1)  # noqa: RUF009  frozen
    save_every: int = 60
    kept_checkpoints: int | None = None
    bf16: bool = False
    checkpointing: bool | None = None
    vllm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, epochs=0.01, steps=1, prompts=1, generations=2, micro_batch=1, inner=1, save_every=1)
        check_fields(self, kept_checkpoints=2)  # a run may be killed while it writes the newest one
        check_fields(self, agents=1, rounds=1, learning_rate=0, beta=0, clip_weight=0, epsilon=0, max_grad_norm=0)
        check_shares(self, "warmup")
        check_top_p(self.top_p)
        if not self.temperature > 0:
            raise ValueError(
                f"expected a temperature above 0, since equal completions of a problem have no advantage; got "
                f"{self.temperature}. Pass e.g. --set grpo.temperature=0.7."
            )
        known = tags(self.agents, self.rounds)
        if unknown := [tag for tag in self.kept if tag not in known]:
            raise ValueError(
                f"expected tags of {self.agents} agents and {self.rounds} rounds in kept; got {unknown}. Pass some of "
                f"{list(known)}, or grpo.agents and grpo.rounds before grpo.kept."
            )
        if self.save_every % self.inner:
            raise ValueError(
                f"expected save_every as a multiple of inner={self.inner}, so that a run resumes between generations; "
                f"got {self.save_every}. Pass {self.inner * max(1, round(self.save_every / self.inner))}."
            )

    @property
    def free(self) -> tuple[str, ...]:
        """Settings that do not determine the model: a run may be resumed with others."""
        divided = () if self.loss == "bnpo" else ("micro_batch",)  # bnpo is a mean of the micro-batches' means
        return (*divided, "checkpointing", "save_every", "kept_checkpoints")

    def steps_for(self, problems: int) -> int:
        """Return the optimisation steps: with `epochs`, `inner * ceil(epochs * problems / prompts)`, else `steps`.

        Example:
            >>> GRPO(epochs=6, prompts=1, inner=3).steps_for(944)
            16992
        """
        if self.epochs is None:
            return self.steps
        return self.inner * math.ceil(self.epochs * problems / self.prompts)


class AnnealedReward(TrainerCallback):
    """Reward function that TRL calls, and callback that advances its schedule; both share one state.

    The state is the progress of a gated schedule. It is written into each of the trainer's checkpoints and read when a
    run resumes. `log.jsonl` has one row per step: the step, `l`, `w_fmt`, the terms of the reward, accuracy, length,
    and the shares of completions with 1, 2, ... agents.

    Args:
        setting: see `GRPO`.
        tokenizer: tokenizer of the policy.
        folder: folder of `log.jsonl`.
        ends: tokens that end a completion, see `steerkit.models.ends.ends_of`.
        on_clip: called with `l` at the beginning of each step.
        judge: judge of open questions.
    """

    def __init__(
        self,
        setting: GRPO,
        tokenizer: Any,
        folder: Path,
        ends: frozenset[int],
        on_clip: Any = None,
        judge: Judge | None = None,
    ) -> None:
        self.setting = setting
        self.tokenizer = tokenizer
        self.folder = folder
        self.ends = ends
        self.on_clip = on_clip
        self.judge = judge
        self.progress = 0.0
        self.silent = 0
        self.weights = tag_weights(setting.agents, setting.rounds)
        self.__name__ = "imad"

    @property
    def pace(self) -> float:
        """The schedule's progress per generation step."""
        return self.setting.anneal.pace(self.setting.steps, self.setting.inner)

    def at_step(self, step: int, ahead: int = 0) -> tuple[float, int]:
        """Return `(w_fmt, l)` of an optimisation step, or those that come `ahead` generation steps later."""
        gated = self.setting.anneal.kind == "gated"
        progress = self.progress if gated else (step // self.setting.inner) * self.pace
        return self.setting.anneal.at(min(1.0, progress + ahead * self.pace))

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        question: Sequence[str],
        gold: Sequence[str],
        kind: Sequence[str],
        trainer_state: Any,
        **_: Any,
    ) -> list[float]:
        """Return the reward of each completion and append a row to the log.

        A completion on which the judge gives no verdict gets the mean reward of its group, so that its advantage is 0.

        Args:
            completion_ids: token ids of the completions.
            question: question of each completion.
            gold: correct answer of each; empty for an open question.
            kind: kind of answer of each.
            trainer_state: TRL's state, for the step.

        Raises:
            ValueError: no verdict of the judge in `SILENT` steps in a row.
        """
        step = trainer_state.global_step
        w_fmt, clip = self.at_step(step)
        verdicts = self._judge_open(completion_ids, question, kind, clip)
        rows = [
            self._score(ids, gold[i], kind[i], w_fmt, (clip, self.at_step(step, 1)[1]), verdicts.get(i))
            for i, ids in enumerate(completion_ids)
        ]
        for index, reward in self._unjudged(rows, verdicts).items():
            rows[index]["reward"] = reward
        judged = self._judged(verdicts)
        self._log(step, w_fmt, clip, rows, judged, {index for index, one in verdicts.items() if one is None})
        return [row["reward"] for row in rows]

    def _unjudged(self, rows: Sequence[Mapping[str, float]], verdicts: Mapping[int, bool | None]) -> dict[int, float]:
        """Return the rewards of the completions without a verdict: the mean of their group's others.

        Where a group has no verdict, it is the mean of all its completions, so that none of them has an advantage.
        """
        missing = {index for index, verdict in verdicts.items() if verdict is None}
        found = {}
        for index in missing:
            first = index - index % self.setting.generations
            group = range(first, first + self.setting.generations)
            others = [rows[one]["reward"] for one in group if one not in missing]
            others = others or [rows[one]["reward"] for one in group]
            found[index] = sum(others) / len(others)
        return found

    def _judged(self, verdicts: Mapping[int, bool | None]) -> dict[str, float]:
        """Return the share of the open questions' completions with a verdict, for the log; nothing without a judge."""
        if self.judge is None:
            return {}
        asked = mean_over_processes(len(verdicts))
        given = mean_over_processes(sum(verdict is not None for verdict in verdicts.values()))
        self.silent = self.silent + 1 if asked and not given else 0
        if self.silent == SILENT:
            raise ValueError(
                f"expected verdicts of the judge; got none in {SILENT} steps in a row. Check its server, use another "
                "judge, or pass --judge-tokens 2048 for one that thinks first; the same command resumes."
            )
        return {"judged": given / asked if asked else 1.0}

    def _score(
        self, ids: Sequence[int], gold: str, kind: str, w_fmt: float, clips: tuple[int, int], verdict: bool | None
    ) -> dict[str, float]:
        """Return one completion's reward and its terms, and what it would earn under the next limit.

        With a gated schedule the clip reward is the mean of both: otherwise nothing would reward a text for being short
        enough for the next limit while the schedule waits for such texts. `clips` are `l` and the next `l`; `verdict`
        is the judge's for an open question, on the first `l` tokens.
        """
        setting = self.setting
        finished = bool(ids) and ids[-1] in self.ends
        text = self._decode(ids)
        if kind == "open":
            correct = float(bool(verdict))
            earned = [correct if not setting.must_end or (finished and len(ids) <= clip) else 0.0 for clip in clips]
        else:
            completion = Completion(tuple(ids), finished)
            earned = [
                clip_reward(completion, clip, self._decode, gold, kind, setting.box, setting.must_end) for clip in clips
            ]
            correct = clip_reward(completion, len(ids), self._decode, gold, kind, "last", False)
        formatted = weighted_format(text, self.weights, w_fmt, setting.kept) if setting.format else 0.0
        gated = setting.anneal.kind == "gated"
        return {
            "format": formatted,
            "tags": format_reward(text, self.weights),
            "clip": earned[0],
            "clip_next": earned[1],
            "correct": correct,
            "length": len(ids),
            "truncated": not finished,
            "agents": len(agents_in(text)),
            "reward": formatted + setting.clip_weight * (sum(earned) / 2 if gated else earned[0]),
        }

    def _judge_open(
        self, completion_ids: Sequence[Sequence[int]], question: Sequence[str], kind: Sequence[str], clip: int
    ) -> dict[int, bool | None]:
        """Return the judge's verdict on the first `clip` tokens of each open question's completion, by its index."""
        indices = [index for index, one in enumerate(kind) if one == "open"]
        if not indices:
            return {}
        assert self.judge is not None
        pairs = [(question[index], self._decode(completion_ids[index][:clip])) for index in indices]
        return dict(zip(indices, self.judge(pairs), strict=True))

    def _log(
        self,
        step: int,
        w_fmt: float,
        clip: int,
        rows: Sequence[Mapping[str, float]],
        judged: Mapping[str, float],
        missing: Collection[int] = (),
    ) -> None:
        """Append the means of a step to the log, and update the progress of a gated schedule.

        Args:
            missing: rows without a verdict. They do not count in the means of what a verdict decides; in a step without
                any verdict these are missing, and the schedule stays where it is.
        """
        rewards = np.array([row["reward"] for row in rows]).reshape(-1, self.setting.generations)
        own = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        for count in range(1, self.setting.agents + 1):
            own[f"agents_{count}"] = float(np.mean([row["agents"] == count for row in rows]))
        own["groups_without_spread"] = float((rewards.std(1) == 0).mean())
        means: dict[str, float | None] = {name: mean_over_processes(value) for name, value in own.items()}
        if judged:
            known = [row for index, row in enumerate(rows) if index not in missing]
            share = mean_over_processes(float(len(known)))
            for name in DECIDED:
                total = mean_over_processes(float(sum(row[name] for row in known)))
                means[name] = total / share if share else None
        means["success"] = now = means["clip"]
        under_next = means["clip_next"]
        if is_first():
            row = {"step": step, "w_fmt": w_fmt, "clip_tokens": clip, **means, **judged, "progress": self.progress}
            append_rows(self.folder / LOG, [row])
        if self.setting.anneal.kind == "gated" and now is not None and under_next is not None:
            self.progress = pass_gate(self.progress, now, under_next, self.pace, self.setting.anneal.floor)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Pass the current `l` to `on_clip`."""
        if self.on_clip is not None:
            self.on_clip(self.at_step(state.global_step)[1])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the progress into the trainer's checkpoint."""
        if is_first():
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / GATE, {"progress": self.progress})

    def resume(self, checkpoint: str | None) -> None:
        """Restore the progress of a checkpoint, and remove the log's rows of later steps."""
        log = self.folder / LOG
        step = 0
        if checkpoint is not None:
            self.progress = float(read_json(Path(checkpoint) / GATE)["progress"])
            step = int(checkpoint.rpartition("-")[2])
        if log.exists() and is_first():
            rows = [row for row in read_rows(log) if row["step"] < step]
            write_text(log, "")
            append_rows(log, rows)


def check_clip(short: Mapping[int, int], setting: GRPO) -> None:
    """Check that each agent can still finish a text under the last length limit.

    With a limit that hardly any text of an agent fits, the limit decides which agents survive.

    Args:
        short: tokens of each agent's short finished texts, see `training.train.sft.short_finished`.
        setting: the schedule, and whether a text must end within the limit.

    Raises:
        ValueError: the short texts of some agent do not fit.
    """
    last = setting.anneal.at(1.0)[1]
    too_long = {agent: length for agent, length in short.items() if length > last}
    if setting.must_end and too_long:
        limits = f"grpo.anneal.clip=[{setting.anneal.at(0.0)[1]},{max(short.values())}]"
        raise ValueError(
            f"expected a length limit that ends where every agent can finish a text; grpo.anneal.clip ends at {last} "
            f"tokens, and short texts of the agents {sorted(too_long)} have {sorted(too_long.values())}. Pass "
            f"{shell('--set', limits)} or more."
        )


def check_division(setting: GRPO, processes: int) -> None:
    """`ValueError` unless this many processes compute what one process computes with these settings."""
    check_batch("prompts", setting.prompts, 1, processes)
    check_batch("prompts x generations", setting.prompts * setting.generations, setting.micro_batch, processes)
    if processes > 1 and setting.loss == "bnpo":
        raise ValueError(
            f"expected a loss that does not depend on the {processes} processes; got 'bnpo', a mean of the "
            "micro-batches' means. Pass --set grpo.loss=dapo, the mean over all tokens."
        )


def check_rollouts(setting: GRPO) -> None:
    """`ValueError` for completions by vLLM on a machine without a GPU."""
    if setting.vllm and not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU for completions by vLLM; this machine has none, and on a CPU vLLM packs its weights, which "
            "then cannot follow the training. Pass --set grpo.vllm=false."
        )


def train_grpo(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    setting: GRPO,
    out: str | Path,
    judge: Judge | None = None,
    judged_by: Mapping[str, Any] | None = None,
) -> Path:
    """Train a model by GRPO and write a standalone checkpoint; an interrupted run resumes.

    Args:
        model: the policy, trained in place; load it again to use the old weights.
        tokenizer: its tokenizer.
        problems: problems to answer; the policy reads `Problem: {question}` and a blank line.
        setting: see `GRPO`.
        out: run folder. `log.jsonl` has one row per step, `trainer/` the checkpoints to resume from.
        judge: judge of open questions, see `training.debates.judge`. The clip reward of an open question is 1 if the
            judge passes the first `l` tokens.
        judged_by: what determines the judge's verdicts, as plain data; another judge is another run.

    Returns:
        The folder `out/checkpoint`, which `steerkit.load` opens.

    Raises:
        ValueError: no problems, an open question without a judge, a batch that the processes' micro-batches do not
            divide, a loss that depends on the number of processes, or completions by vLLM without a GPU.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.

    Source: stage 2 of Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3.

    Example:
        >>> checkpoint = train_grpo(*sk.load("runs/sft/checkpoint"), addition(256, 0, "train"), GRPO(), "runs/grpo")
    """
    from datasets import Dataset
    from trl import GRPOTrainer

    rows = _rows(problems)
    if not rows or (judge is None and any(p.kind == "open" for p in problems)):
        raise ValueError(
            f"expected problems, and a judge where one is open; got {len(rows)} problems and judge={judge}. "
            "Pass judge=, see training/debates/judge.py."
        )
    check_rollouts(setting)
    check_division(setting, process_count())
    setting = replace(setting, steps=setting.steps_for(len(rows)))
    resume_kernels(model, out)
    about, dtype = describe(model, tokenizer), model.dtype
    config = {
        **_config(setting, rows),
        "model": identity(about),
        "judge": None if judged_by is None else dict(judged_by),
    }
    if dtype is not torch.float32 and setting.lora is None:
        config["trained"] = "float32 weights"  # earlier versions trained the weights in their own data type
    with run_folder(out, config, provenance(about), setting.free) as folder:
        done = folder / "checkpoint"
        if done.exists():
            return done
        longest = max(len(encode_prompt(tokenizer, row["prompt"])) for row in rows)
        arguments = _trl_config(setting, folder, longest)
        asked = math.ceil(setting.steps / setting.inner) * setting.prompts
        ends = declare_ends(model, tokenizer)
        reward: Any = AnnealedReward(setting, tokenizer, folder, ends, judge=judge)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*experimental")
            trainer = GRPOTrainer(
                with_adapter(model, setting.lora, train_embeddings=False, seed=setting.seed),
                reward_funcs=reward,
                args=arguments,
                train_dataset=Dataset.from_list(in_rounds(rows, asked, setting.seed)),
                processing_class=tokenizer,
                callbacks=[reward, NoFinalSave()],
                rollout_func=None if setting.vllm or sharded(arguments) else rollouts,
            )
        reward.on_clip = lambda length: set_generation_length(trainer, length)
        checkpoint = last_checkpoint(folder / "trainer", (TRAINER_STATE_NAME, GATE))
        reward.resume(checkpoint)
        with fast_products(model), fast_log_probs():
            trainer.train(resume_from_checkpoint=checkpoint)
        if setting.anneal.kind == "gated" and reward.progress < 1:
            warnings.warn(
                f"the length limit ended at {setting.anneal.at(reward.progress)[1]} tokens, before the schedule's "
                f"{setting.anneal.at(1.0)[1]}: too few texts were right under the next limit. Train for more steps.",
                stacklevel=2,
            )
        with whole_weights(trainer):
            in_first_process(lambda: save(trainer.model, tokenizer, done, dtype))
        return done


def finished_grpo(start: str | Path, problems: Sequence[Problem], setting: GRPO, out: str | Path) -> Path | None:
    """Return the checkpoint that `train_grpo` has written for these arguments, without loading a model; None if none.

    Args:
        start: checkpoint of the policy. None is returned too where its weights cannot be compared without loading them,
            see `training.train.checkpoints.started_with`.

    The other arguments are those of `train_grpo`, without a judge.

    Example:
        >>> done = finished_grpo(sft, problems, GRPO(), out) or train_grpo(*sk.load(sft), problems, GRPO(), out)
    """
    rows = _rows(problems)
    done = Path(out) / "checkpoint"
    if not done.exists():
        return None
    config = {**_config(replace(setting, steps=setting.steps_for(len(rows))), rows), "judge": None}
    return done if started_with(out, config, "model", start, setting.free) else None


def _rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
    """What the trainer reads of each problem."""
    return [
        {"prompt": f"Problem: {p.question}\n\n", "question": p.question, "gold": p.gold or "", "kind": p.kind}
        for p in problems
    ]


def _config(setting: GRPO, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What determines a training, without its model and its judge."""
    return {**asdict(setting), "problems": sha256(canonical_json(rows))}


def _trl_config(setting: GRPO, folder: Path, longest: int) -> Any:
    """Return TRL's configuration; `longest` is the number of tokens of the longest prompt."""
    from trl import GRPOConfig

    completions = setting.prompts * setting.generations
    new = setting.anneal.at(0.0)[1]
    return GRPOConfig(
        output_dir=str(folder / "trainer"),
        max_steps=setting.steps,
        shuffle_dataset=False,  # the problems are already in their order, see `in_rounds`
        learning_rate=setting.learning_rate,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=completions // (setting.micro_batch * process_count()),
        num_generations=setting.generations,
        num_iterations=setting.inner,
        temperature=setting.temperature,
        top_p=setting.top_p,
        beta=setting.beta,
        epsilon=setting.epsilon,
        loss_type=setting.loss,
        scale_rewards="group" if setting.scale else "none",
        mask_truncated_completions=setting.mask_truncated,
        max_completion_length=new,
        max_grad_norm=setting.max_grad_norm,
        lr_scheduler_type=SCHEDULERS[setting.decay],
        warmup_steps=0.05 if setting.warmup is None else setting.warmup,
        save_strategy="steps",
        save_steps=setting.save_every,
        save_total_limit=setting.kept_checkpoints,
        logging_steps=10,
        seed=setting.seed,
        **checkpointing_options(setting.checkpointing),
        disable_tqdm=True,
        use_vllm=setting.vllm,
        vllm_mode="colocate",
        vllm_max_model_length=longest + new,  # otherwise vLLM reserves cache for the model's whole context
        **device_options(setting.bf16),
    )


def set_generation_length(trainer: Any, length: int) -> None:
    """Set the maximum completion length everywhere the trainer copied it to when it was built.

    Args:
        trainer: TRL's GRPO trainer.
        length: maximum number of new tokens.
    """
    trainer.max_completion_length = length
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.max_new_tokens = length
        trainer.generation_kwargs["max_new_tokens"] = length
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.max_completion_length = length
