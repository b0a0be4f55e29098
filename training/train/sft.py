"""Supervised fine-tuning on debate traces, and its baselines, which train on shorter targets of the same traces."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from steerkit.io.files import sha256
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.ranks import in_first_process
from steerkit.io.run_folder import run_folder
from steerkit.models.context import context_length
from steerkit.models.ends import ends_of
from steerkit.models.identity import describe, identity, provenance
from steerkit.models.kernels import resume_kernels
from steerkit.models.products import fast_products
from steerkit.text.prompt import encode_prompt
from steerkit.text.tags import CONSENSUS, END, TAG, agents_in, tags, without_tags
from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, Turn
from training.problems.answers import read_answer, same
from training.problems.problem import Kinds, kind_for
from training.settings import check_fields, check_shares
from training.train.checkpoints import (
    KeepAt,
    LoRA,
    NoFinalSave,
    add_tags,
    check_batch,
    checkpointing_options,
    declare_ends,
    device_options,
    in_epochs,
    in_rounds,
    last_checkpoint,
    save,
    started_with,
    with_adapter,
    with_tags,
)
from training.train.distributed import process_count, whole_weights
from training.train.log_probs import fast_log_probs

STEPS = "steps"
"""Folder of a run with the models of `SFT.keep_at`."""
Target = Literal["trace", "untagged", "answer", "response", "first", "gold"]
Cut = Literal["answers", "revision", "turn"]


@dataclass(frozen=True)
class SFT:
    """Settings of supervised fine-tuning; docs/training-settings.md compares them with the paper's (arXiv 2604.24881).

    Args:
        target: text to learn after the prompt `Problem: ...`:
            `"trace"`, the whole trace;
            `"untagged"`, the trace without its tags (control: no text names an agent);
            `"answer"`, the box with the consensus (DebateGPT);
            `"response"`, a last turn that gave the consensus (DebateGPT);
            `"first"`, the first turn of a random agent, right or wrong, among those with a text (no debate);
            `"gold"`, the box with the correct answer (no debate).
        epochs: passes over the examples, if `steps` is None.
        steps: optimisation steps, each on `batch` examples; None trains for `epochs`.
        learning_rate: peak of a cosine schedule.
        batch: examples per optimisation step of all processes together.
        micro_batch: examples per backward pass of one process; divides that process's share of `batch`.
        warmup: share of the steps with increasing learning rate.
        max_length: maximum length of an example in tokens, longer ones are refused; None is the model's context.
        max_grad_norm: gradient norm limit.
        lora: the adapter; the embeddings are trained beside it, whatever the target, so that the targets differ in
            their texts alone. None trains all weights.
        structure_dropout: share of traces that are shortened to the turns of `cut_to` and the consensus. Without
            shortened traces, the length reward of GRPO finds no short output to reinforce.
        cut_to: turns of a shortened trace:
            `"answers"`, one or two agents' first turns that gave the consensus;
            `"revision"`, all earlier rounds and one turn of the last round that gave the consensus, for problems
            in which the first round is seldom right;
            `"turn"`, one agent's first turn with a text, right or wrong, so that the first choice is who speaks.
        bf16: compute in bfloat16 on a CPU too; a GPU always does. Without AMX instructions a step takes about as long
            as in float32 (`python -m benchmarks sft-bfloat16`).
        checkpointing: keep only the input of each block for the backward pass and compute the rest again: less memory,
            about a third more time, the same gradients. None is False.
        save_every: steps between two checkpoints to resume from, of which the last is kept; None is 100.
        keep_at: steps after which the model is kept in `steps/STEP`, for a learning curve; None keeps none. A step that
            a run has passed cannot be kept later, and one after the last step is refused.
        seed: seed of the examples and of the trainer.

    With prompt x and target y, the loss is the mean of `-log p(y_t | x, y_1 ... y_(t-1))` over all target tokens of a
    batch.
    """

    target: Target = "trace"
    epochs: float = 3.0
    steps: int | None = None
    learning_rate: float = 5e-5
    batch: int = 16
    micro_batch: int = 4
    warmup: float = 0.1
    max_length: int | None = None
    max_grad_norm: float = 0.3
    lora: LoRA | None = LoRA()  # noqa: RUF009  frozen
    structure_dropout: float = 0.0
    cut_to: Cut = "answers"
    bf16: bool = False
    checkpointing: bool | None = None
    save_every: int | None = None
    keep_at: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, epochs=0.01, steps=1, batch=1, micro_batch=1, max_length=1, save_every=1, learning_rate=0)
        check_shares(self, "warmup", "structure_dropout")
        if any(step < 1 for step in self.keep_at or ()):
            raise ValueError(f"expected steps from 1 in keep_at; got {self.keep_at}. Pass e.g. [25,50].")

    @property
    def free(self) -> tuple[str, ...]:
        """Settings that do not determine the model: a run may be resumed with others."""
        return ("micro_batch", "checkpointing", "save_every", "keep_at")

    def steps_for(self, examples: int) -> int:
        """Return the optimisation steps: `steps`, or of `epochs` passes, each in whole batches.

        Example:
            >>> SFT(epochs=3, batch=16).steps_for(944)
            177
        """
        return self.steps or math.ceil(self.epochs * math.ceil(examples / self.batch))


def examples(
    traces: Sequence[DebateTrace],
    setting: SFT,
    kind: Kinds = "number",
    cut_like: Sequence[DebateTrace] | None = None,
) -> list[dict[str, str]]:
    """Return `{"prompt", "completion"}` for each trace; the loss is computed on the completion only.

    The problem is in the prompt only, even if the trace begins with it. Traces without the target are left out.

    Args:
        traces: debates with a consensus.
        setting: target, structure dropout and seed.
        kind: kind of the answers, one of `training.problems.answers.KINDS`, or a mapping from each question to it.
        cut_like: traces of the same agents and rounds, one for each, whose answers decide which turns a shortened trace
            keeps; default: the traces themselves.

    Raises:
        ValueError: no trace gives an example, or another number of `cut_like`.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3.

    Example:
        >>> rows = examples(read_traces("runs/debates/traces.jsonl"), SFT(structure_dropout=0.35))
    """
    rng = random.Random(setting.seed)
    rows = []
    for trace, like in zip(traces, traces if cut_like is None else cut_like, strict=True):
        completion = _completion(trace, like, setting, kind_for(kind, trace.question), rng)
        if completion is not None:
            rows.append({"prompt": trace.prompt_text, "completion": completion})
    if not rows:
        raise ValueError(
            f"expected traces that give examples for the target {setting.target!r}; got {len(traces)} that give none. "
            "Pass traces with a consensus."
        )
    return rows


def _completion(trace: DebateTrace, like: DebateTrace, setting: SFT, kind: str, rng: random.Random) -> str | None:
    """Return the target text of a trace, shortened as `like` would be; None if the trace does not contain it."""
    if setting.target in ("trace", "untagged"):
        cut = rng.random() < setting.structure_dropout
        tagged = cut_trace(trace, kind, rng, setting.cut_to, like) if cut else trace.body
        return without_tags(tagged) if setting.target == "untagged" else tagged
    if setting.target == "gold":
        return None if trace.gold is None else rf"\boxed{{{trace.gold}}}"
    if setting.target == "first":
        texts = [turn.text for turn in trace.turns if turn.round == 1 and turn.text]
        return rng.choice(texts) if texts else None
    return debategpt_target(trace, setting.target, kind)


def cut_trace(
    trace: DebateTrace, kind: str, rng: random.Random, cut_to: Cut = "answers", like: DebateTrace | None = None
) -> str:
    """Return a trace's tagged text shortened as `SFT.cut_to` defines.

    The text is unchanged if no turn of the round in question gave the consensus (for `"turn"`, has a text).

    Args:
        trace: a debate with a consensus.
        kind: kind of the answer.
        rng: source of the random choice among turns.
        cut_to: see `SFT`.
        like: a debate of the same agents and rounds whose answers decide which turns stay; default: the trace itself.
    """
    kept: set[tuple[int | None, int]] = set()
    for turn in _kept_turns(like or trace, kind, rng, cut_to):
        kept |= {(turn.agent, turn.round), (None, turn.round)}  # the turn, and the tag of its round
    found = list(TAG.finditer(trace.body))
    stops = [*(tag.start() for tag in found[1:]), len(trace.body)]
    text, number = "", 0
    for tag, stop in zip(found, stops, strict=True):
        number = int(tag["round"] or number)  # an agent has the same tag in all rounds after the first
        agent = int(tag["agent"]) if tag["agent"] else None
        if (agent, number) in kept or tag.group() in (CONSENSUS, END):
            text += trace.body[tag.start() : stop]
    return text


def _kept_turns(trace: DebateTrace, kind: str, rng: random.Random, cut_to: Cut) -> list[Turn]:
    """Return the turns that `cut_trace` keeps: all of them if no turn of the round in question can stay alone."""
    answer = read_answer(trace.consensus or "", kind)
    number = max(turn.round for turn in trace.turns) if cut_to == "revision" else 1
    in_round = [turn for turn in trace.turns if turn.round == number]
    if cut_to == "turn":
        candidates = [turn for turn in in_round if turn.text]
    else:
        candidates = [turn for turn in in_round if same(read_answer(turn.text, kind), answer)]
    if not candidates:
        return list(trace.turns)
    if cut_to == "answers":
        return rng.sample(candidates, min(len(candidates), rng.choice((1, 2))))
    return [*(turn for turn in trace.turns if turn.round < number), rng.choice(candidates)]


def short_finished(
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    setting: SFT,
    kind: Kinds = "number",
    draws: int = 4,
    share: float = 0.05,
) -> dict[int, int]:
    """Return, for each agent, how many tokens a short text with a turn of it has, end token included.

    Of each trace the shortest text that SFT trains counts; the result is the length that a small share of them does not
    exceed. The very shortest may be malformed.

    Args:
        tokenizer: the tokenizer with its tags.
        traces: debates with a consensus.
        setting: the settings of SFT; with `structure_dropout`, the shortened traces are among the texts.
        kind: kind of the answers, or a mapping from each question to it.
        draws: random shortenings of each trace that are looked at.
        share: of an agent's traces.

    Example:
        >>> short_finished(tokenizer, traces, SFT(structure_dropout=0.35))
        {1: 54, 2: 46, 3: 49}
    """
    rng = random.Random(0)
    lengths: dict[int, list[int]] = {}
    for trace in traces:
        texts = {trace.body}
        if setting.structure_dropout:
            texts |= {cut_trace(trace, kind_for(kind, trace.question), rng, setting.cut_to) for _ in range(draws)}
        shortest: dict[int, int] = {}
        for text in sorted(texts):
            length = len(encode(tokenizer, text)) + 1
            for agent in agents_in(text):
                shortest[agent] = min(length, shortest.get(agent, length))
        for agent, length in shortest.items():
            lengths.setdefault(agent, []).append(length)
    return {agent: sorted(found)[int(share * len(found))] for agent, found in sorted(lengths.items())}


def debategpt_target(trace: DebateTrace, target: Target, kind: str) -> str | None:
    r"""Return DebateGPT's target: `\boxed{answer}`, or the last turn of the first agent that gave the consensus.

    Args:
        trace: a debate.
        target: `"answer"` or `"response"`.
        kind: kind of the answer.

    Returns:
        The target; None if the consensus cannot be parsed, or no last turn gave it.

    Source: the baseline of Yi, Mueller and Lee 2026, arXiv 2604.24881, which trains on the consensus answer only.
    """
    answer = read_answer(trace.consensus or "", kind)
    if answer is None:
        return None
    if target == "answer":
        return rf"\boxed{{{answer}}}"
    last = max(turn.round for turn in trace.turns)
    texts = [turn.text for turn in trace.turns if turn.round == last and same(read_answer(turn.text, kind), answer)]
    return texts[0] if texts else None


def train_sft(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    setting: SFT,
    out: str | Path,
    kind: Kinds = "number",
    cut_like: Sequence[DebateTrace] | None = None,
) -> Path:
    """Fine-tune a model and write a standalone checkpoint; an interrupted run resumes.

    Args:
        model: a causal language model, trained in place; load it again to use the old weights.
        tokenizer: its tokenizer.
        traces: debates with a consensus.
        setting: see `SFT`.
        out: run folder. `log.json` has the mean loss of each ten steps (with `keep_at`, of each step), `trainer/` the
            checkpoints to resume from, `steps/` the models of `keep_at`.
        kind: kind of the answers, one of `training.problems.answers.KINDS`, or a mapping from each question to it.
        cut_like: see `examples`.

    Returns:
        The folder `out/checkpoint`, which `steerkit.load` opens.

    Raises:
        ValueError: no trace gives an example, examples that are too long, a `batch` that the processes' micro-batches
            do not divide, or steps of `keep_at` that the training has passed or does not reach; the model is then
            unchanged.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.

    Source: stage 1 of Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3.

    Example:
        >>> checkpoint = train_sft(*sk.load("runs/base"), traces, SFT(epochs=3), "runs/sft")
    """
    from datasets import Dataset
    from trl import SFTTrainer

    rows = examples(traces, setting, kind, cut_like)
    check_batch("batch", setting.batch, setting.micro_batch, process_count())
    check_kept_steps(setting, len(rows))
    resume_kernels(model, out)
    about, dtype = describe(model, tokenizer), model.dtype
    config = {**_config(setting, rows), "model": identity(about)}
    if dtype is not torch.float32 or (setting.lora is not None and setting.target != "trace"):
        config["trained"] = "float32 weights, embeddings"  # earlier versions trained others in these cases
    with run_folder(out, config, provenance(about), setting.free) as folder:
        checkpoint = folder / "checkpoint"
        if checkpoint.exists():
            _check_kept(setting, folder, read_json(folder / "log.json")[-1]["step"] if setting.keep_at else 0)
            return checkpoint
        last = last_checkpoint(folder / "trainer")
        _check_kept(setting, folder, 0 if last is None else int(last.rpartition("-")[2]))
        needs_tags = setting.target == "trace"
        names = tags_of(traces) if needs_tags else ()
        tagged = with_tags(tokenizer, names) if needs_tags else tokenizer
        encoded = encode_examples(tagged, rows, ends_of(model, tagged))
        _check_lengths(encoded, setting.max_length, context_length(model))
        ordered = in_order(encoded, setting)
        if needs_tags:
            tagged = add_tags(model, tokenizer, names)
        declare_ends(model, tagged)
        if tagged.pad_token is None:
            tagged = _with_pad_token(tagged)
        kept = KeepAt(setting.keep_at or (), folder / STEPS)
        trainer = SFTTrainer(
            with_adapter(model, setting.lora, train_embeddings=True, seed=setting.seed),
            args=_trl_config(setting, folder, len(ordered) // setting.batch),
            train_dataset=Dataset.from_list(ordered),
            processing_class=tagged,
            callbacks=[NoFinalSave(), kept],
        )
        kept.trainer = trainer
        with fast_products(model), fast_log_probs():
            trainer.train(resume_from_checkpoint=last)
        with whole_weights(trainer):
            in_first_process(lambda: _write_checkpoint(folder, trainer, tagged, dtype))
        return checkpoint


def finished_sft(
    start: str | Path,
    traces: Sequence[DebateTrace],
    setting: SFT,
    out: str | Path,
    kind: Kinds = "number",
    cut_like: Sequence[DebateTrace] | None = None,
) -> Path | None:
    """Return the checkpoint that `train_sft` has written for these arguments, without loading a model; None if none.

    Args:
        start: checkpoint of the model. None is returned too where its weights cannot be compared without loading them,
            see `training.train.checkpoints.started_with`.

    The other arguments are those of `train_sft`.

    Example:
        >>> done = finished_sft(base, traces, SFT(), out) or train_sft(*sk.load(base), traces, SFT(), out)
    """
    done = Path(out) / "checkpoint"
    if setting.keep_at or not done.exists():
        return None
    config = _config(setting, examples(traces, setting, kind, cut_like))
    return done if started_with(out, config, "model", start, setting.free) else None


def _config(setting: SFT, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What determines a training, without its model."""
    return {**asdict(setting), "examples": sha256(canonical_json(rows))}


def in_order(encoded: Sequence[dict[str, list[int]]], setting: SFT) -> list[dict[str, list[int]]]:
    """Return the examples of all optimisation steps, one step after the other, whatever the number of processes.

    Args:
        encoded: see `encode_examples`.
        setting: `steps` or `epochs`, `batch`, and the seed of the orders.
    """
    if setting.steps is not None:
        return in_rounds(encoded, setting.steps * setting.batch, setting.seed)
    start = encoded[0]["input_ids"][:2]
    blank = {"input_ids": start, "labels": [-100] * len(start)}
    return in_epochs(encoded, setting.epochs, setting.batch, setting.seed, blank)


def encode_examples(
    tokenizer: Any, rows: Sequence[Mapping[str, str]], ends: frozenset[int]
) -> list[dict[str, list[int]]]:
    """Return `{"input_ids", "labels"}` for each example, as generation reads and writes it.

    The ids are those of the prompt as `steerkit.generate` and rollouts read it, those of the completion
    (`steerkit.text.tokens.encode`), and an end token. Labels are -100 on the prompt.

    Args:
        tokenizer: the tokenizer with its tags.
        rows: `{"prompt", "completion"}`, see `examples`.
        ends: tokens that end a text, see `steerkit.models.ends.ends_of`; the tokenizer's own is used if it has one.

    Raises:
        ValueError: there is no end token.

    Example:
        >>> encode_examples(tokenizer, [{"prompt": "1+1=", "completion": "2"}], ends_of(model, tokenizer))
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends, default=None)
    if end is None:
        raise ValueError(
            "expected a token that ends a text; the tokenizer has no eos_token, and the model's generation "
            "configuration names none. Set tokenizer.eos_token."
        )
    encoded = []
    for row in rows:
        prompt = list(encode_prompt(tokenizer, row["prompt"]))
        completion = [*encode(tokenizer, row["completion"]), end]
        encoded.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return encoded


def _check_lengths(encoded: Sequence[Mapping[str, Sequence[int]]], limit: int | None, context: int | None) -> None:
    """`ValueError` for examples longer than the limit: cutting them would drop their consensus and end."""
    most = min((one for one in (limit, context) if one is not None), default=None)
    lengths = [len(row["input_ids"]) for row in encoded]
    if most is not None and (longer := [length for length in lengths if length > most]):
        raise ValueError(
            f"expected examples of at most {most} tokens; {len(longer)} of {len(lengths)} traces are longer, the "
            f"longest with {max(lengths)}. Raise max_length up to the model's context of {context}, or leave those "
            "traces out."
        )


def _trl_config(setting: SFT, folder: Path, steps: int) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder / "trainer"),
        learning_rate=setting.learning_rate,
        max_steps=steps,
        train_sampling_strategy="sequential",  # the examples are already in their order, see `in_order`
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=setting.batch // (setting.micro_batch * process_count()),
        lr_scheduler_type="cosine",
        warmup_steps=setting.warmup,
        max_length=None,  # examples are complete; see _check_lengths
        max_grad_norm=setting.max_grad_norm,
        save_strategy="steps",
        save_steps=setting.save_every or 100,
        save_total_limit=1,
        logging_steps=1 if setting.keep_at else 10,
        seed=setting.seed,
        **checkpointing_options(setting.checkpointing),
        disable_tqdm=True,
        **device_options(setting.bf16),
    )


def check_kept_steps(setting: SFT, examples: int) -> None:
    """`ValueError` for steps of `keep_at` after the last one of a training on this number of examples."""
    last = setting.steps_for(examples)
    if beyond := [step for step in setting.keep_at or () if step > last]:
        raise ValueError(
            f"expected steps up to {last}, the last one with {examples} examples, in keep_at; got {beyond}. Pass "
            "smaller ones, or train for more steps."
        )


def _check_kept(setting: SFT, folder: Path, last: int) -> None:
    """`ValueError` where a training has passed steps without keeping the models that are asked for.

    Args:
        last: the last step of the training so far.
    """
    wanted = [step for step in setting.keep_at or () if step <= last]
    if lacking := [step for step in wanted if not (folder / STEPS / str(step)).exists()]:
        raise ValueError(
            f"expected models of the steps {lacking} in {folder / STEPS}; this training has passed step "
            f"{last} without them. Train again in another folder (`--name`), with keep_at from the start."
        )


def _write_checkpoint(folder: Path, trainer: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    write_json(folder / "log.json", trainer.state.log_history)
    save(trainer.model, tokenizer, folder / "checkpoint", dtype)


def tags_of(traces: Sequence[DebateTrace]) -> tuple[str, ...]:
    """Return all tags of debates with as many agents and rounds as the largest of these traces.

    Raises:
        ValueError: no traces.
    """
    if not traces:
        raise ValueError("expected at least one trace with a consensus; got none. Pass debates that reached one.")
    agents = max(turn.agent for trace in traces for turn in trace.turns)
    rounds = max(turn.round for trace in traces for turn in trace.turns)
    return tags(agents, rounds)


def _with_pad_token(tokenizer: Any) -> Any:
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = tokenizer.eos_token
    return padded
