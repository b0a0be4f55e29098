"""Toy base model: a word tokenizer and a Llama of about 0.3 million parameters, trained from scratch on a toy world."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import steerkit as sk
from steerkit.io.json import write_json
from steerkit.io.progress import progress
from steerkit.io.run_folder import run_folder
from steerkit.text.tags import tags
from training.problems.answers import read_answer, same
from training.problems.families import TooFewProblems
from training.problems.problem import Problem
from training.toy.muon import muon
from training.toy.worlds import World, bare, document
from training.train.checkpoints import save

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
WORD = r"\\boxed\{|//|[A-Za-z]+(?:-[A-Za-z]+)*|NUMBER|[^\sA-Za-z0-9]"


@dataclass(frozen=True)
class Base:
    """Shape and training settings of the toy base model.

    Args:
        width: d_model.
        layers: number of decoder blocks.
        heads: attention heads.
        inner: width of the MLP.
        spread: standard deviation of the initial weights.
        shares: share of each kind of document, see `training.toy.worlds.document`.
        learning_rate: peak learning rate.
        batch: documents per step.
        stop_at: training ends once the accuracy of sampled answers on validation problems is at least this. Accuracy
            jumps within a few hundred steps, so a fixed number of steps would end at a random level.
        revised_at: required accuracy of revised answers, see `revisions`; 0 does not measure it.
        steps: maximum number of steps; the learning rate falls linearly to a tenth by then.
        check_every: steps between validations.
        check_from: step of the first validation.
        held: number of validation problems.
        temperature: sampling temperature of the validation answers.
        top_p: nucleus of the validation answers.
        seed: seed of the weights, the documents and the problems.
    """

    width: int = 96
    layers: int = 3
    heads: int = 3
    inner: int = 288
    spread: float = 0.1
    shares: dict[str, float] = field(
        default_factory=lambda: {"bare": 0.35, "persona": 0.33, "revision": 0.14, "several": 0.06, "facts": 0.12}
    )
    learning_rate: float = 4e-3
    batch: int = 64
    stop_at: float = 0.62
    revised_at: float = 0.0
    steps: int = 1000
    check_every: int = 25
    check_from: int = 150
    held: int = 150
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0


def tokenizer_of(world: World) -> Any:
    """Return a tokenizer with one token per word, digit or number, sign and tag.

    Decoding puts a space between any two tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, UNKNOWN, *world.vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    number = "[0-9]+" if max(map(len, world.numbers)) > 1 else "[0-9]"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD.replace("NUMBER", number)), behavior="removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags()])
    return tokenizer


def fresh_model(tokenizer: Any, base: Base) -> Any:
    """Return a Llama with random weights and tied embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=base.width,
        intermediate_size=base.inner,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.heads,
        max_position_embeddings=1024,
        initializer_range=base.spread,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(base.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train_base(world: World, base: Base, out: str | Path) -> Path:
    """Train the base model of a toy world; a finished one is not trained again.

    Args:
        world: the toy world.
        base: shape and training settings.
        out: run folder. `log.json` has the validations.

    Returns:
        The folder `out/checkpoint`, which `steerkit.load` opens.

    Raises:
        RuntimeError: validation accuracy did not reach `stop_at`, or `revised_at`, within `steps`.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.

    Example:
        >>> checkpoint = train_base(WORLDS["clues"], get_preset("tiny", "clues").base, "runs/base")
    """
    with run_folder(out, {**asdict(base), "family": world.family}) as folder:
        checkpoint = folder / "checkpoint"
        if checkpoint.exists():
            return checkpoint
        tokenizer = tokenizer_of(world)
        model = fresh_model(tokenizer, base)
        validation = world.problems(base.held, base.seed, "validation")
        optimizers = _optimizers(model, base)
        log: list[dict[str, Any]] = []
        with progress("base model", base.steps) as advance:
            for step, batch in enumerate(_batches(world, tokenizer, base), 1):
                loss = _train_step(model, optimizers, batch, _learning_rate(base, step))
                advance(1)
                if step >= base.check_from and step % base.check_every == 0:
                    log.append({"step": step, "loss": loss, **_validate(model, tokenizer, world, validation, base)})
                    write_json(folder / "log.json", log)
                    if _good_enough(log[-1], base):
                        return save(model.eval(), tokenizer, checkpoint)
                if step == base.steps:
                    break
        raise RuntimeError(
            f"expected a validation accuracy of {base.stop_at}, and of {base.revised_at} for revised answers, within "
            f"{base.steps} steps; got {log[-1:]}. Use more steps or another seed."
        )


def _learning_rate(base: Base, step: int) -> float:
    """Learning rate of a step: 50 steps of warm-up, then a linear decrease to a tenth."""
    return base.learning_rate * min(1.0, step / 50) * (1 - 0.9 * step / base.steps)


def _train_step(
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    learning_rate: float,
) -> float:
    """Make one optimisation step and return the loss."""
    ids, labels, mask = batch
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())


def _validate(
    model: Any, tokenizer: Any, world: World, validation: Sequence[Problem], base: Base
) -> dict[str, float | None]:
    """Return the accuracy on bare problems, and on revisions where `revised_at` requires it."""
    bare_prompts = [(bare(problem), problem) for problem in validation]
    return {
        "accuracy": accuracy(model, tokenizer, bare_prompts, base),
        "revised": accuracy(model, tokenizer, revisions(world, validation), base) if base.revised_at else None,
    }


def _good_enough(entry: dict[str, Any], base: Base) -> bool:
    revised = entry["revised"]
    return bool(entry["accuracy"] >= base.stop_at and (revised is None or revised >= base.revised_at))


def _optimizers(model: Any, base: Base) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for the rest; Muon's updates are scaled to the size of AdamW's."""
    inner = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    matrices = [p for p in model.parameters() if id(p) in inner]
    rest = [p for p in model.parameters() if id(p) not in inner]
    return [
        muon(matrices, base.learning_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=base.learning_rate, weight_decay=0.01),
    ]


def accuracy(model: Any, tokenizer: Any, prompts: Sequence[tuple[str, Problem]], base: Base) -> float:
    """Return the share of prompts answered correctly by one sample each.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: (prompt, problem) pairs.
        base: sampling temperature and nucleus.
    """
    texts = sk.generate(
        model,
        tokenizer,
        [prompt for prompt, _ in prompts],
        max_new_tokens=80,
        temperature=base.temperature,
        top_p=base.top_p,
        batch_rows=256,
    )
    correct = [
        same(read_answer(text, problem.kind), problem.gold) for text, (_, problem) in zip(texts, prompts, strict=True)
    ]
    return sum(correct) / len(correct)


def revisions(world: World, problems: Sequence[Problem]) -> list[tuple[str, Problem]]:
    """Return (prompt, problem) pairs of second-round turns.

    The prompt shows one text per persona, the agent's own among them. One text, of a random persona, is correct and the
    others are spoilt. In a world where each agent sees a part of the problem, all texts are correct, and the answer
    requires all parts.
    """
    rng = random.Random("revisions")
    prompts = []
    for problem in problems:
        personas = rng.sample(world.personas, len(world.personas))
        correct = {rng.choice(personas)} if world.part is None else set(personas)
        seen = [(world.write if one in correct else world.spoil)(problem, one, rng) for one in personas]
        prompts.append((world.turn_prompt(problem, personas[0], seen[0], seen[1:]), problem))
    return prompts


def _batches(world: World, tokenizer: Any, base: Base) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield endless batches `(ids, labels, mask)`, each `[batch, tokens]`, of training documents of similar length.

    Labels are -100 where no loss is computed: in prompts, in spoilt texts and in padding.
    """
    rng = random.Random(f"base {base.seed}")
    problems = _training_problems(world, base.seed)
    while True:
        rows = []
        for _ in range(8 * base.batch):
            ids: list[int] = []
            labels: list[int] = []
            for text, has_loss in document(world, rng.choice(problems), rng, base.shares):
                piece = tokenizer(text)["input_ids"]
                ids += piece
                labels += piece if has_loss else [-100] * len(piece)
            rows.append(([*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]))
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[i : i + base.batch] for i in range(0, len(rows), base.batch)]
        rng.shuffle(batches)
        for batch in batches:
            width = max(len(ids) for ids, _ in batch)
            yield (
                torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch]),
                torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch]),
                torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]),
            )


def _training_problems(world: World, seed: int, most: int = 20_000) -> list[Problem]:
    """Return up to `most` training problems, or all if there are fewer."""
    try:
        return world.problems(most, seed, "train")
    except TooFewProblems as error:
        return world.problems(error.available, seed, "train")
