"""The base model of a small world: a word tokenizer, a Llama of a third of a million weights, trained from scratch."""

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
from training.problems.families import TooFew
from training.problems.problem import Problem
from training.toy.worlds import World, bare, document
from training.train.checkpoints import save

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
WORD = r"\\boxed\{|//|[A-Za-z]+(?:-[A-Za-z]+)*|NUMBER|[^\sA-Za-z0-9]"


@dataclass(frozen=True)
class Base:
    """How the base model is built and trained.

    Args:
        width, layers, heads, inner: its shape.
        spread: standard deviation of the first weights.
        shares: of the kinds of documents, see `training.worlds.document`.
        stop_at: training ends once the accuracy of samples on validation problems is at least this:
            accuracy jumps within a few hundred steps, so that a fixed number of steps would be a lottery.
        revised_at: and that of an answer after reading a right one among two wrong ones is at least this.
        steps: at most; the learning rate falls linearly to a tenth by then.
        check_every, check_from: steps between looks at validation, and before the first.
        held: validation problems looked at.
        temperature, top_p: how their answers are sampled.
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
    """A tokenizer with one token per word, digit (or number), sign and tag; decoding puts a space between any two."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, UNKNOWN, *world.vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    number = "[0-9]+" if max(map(len, world.numbers)) > 1 else "[0-9]"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD.replace("NUMBER", number)), behavior="removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags()])
    return tokenizer


def fresh_model(tokenizer: Any, base: Base) -> Any:
    """A random Llama with tied embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=base.width, intermediate_size=base.inner,
        num_hidden_layers=base.layers, num_attention_heads=base.heads, num_key_value_heads=base.heads,
        max_position_embeddings=1024, initializer_range=base.spread, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(base.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train_base(world: World, base: Base, out: str | Path) -> Path:
    """Train the base model of a world and write `out/checkpoint`; a finished one is not trained again.

    Raises:
        RuntimeError: validation accuracy never reached `stop_at`, or `revised_at`.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    with run_folder(out, {**asdict(base), "family": world.family}) as folder:
        done = folder / "checkpoint"
        if done.exists():
            return done
        tokenizer = tokenizer_of(world)
        model = fresh_model(tokenizer, base)
        held = world.problems(base.held, base.seed, "validation")
        optimisers = _optimisers(model, base)
        log = []
        with progress("base model", base.steps) as advance:
            for step, (ids, labels, mask) in enumerate(_batches(world, tokenizer, base), 1):
                rate = base.learning_rate * min(1.0, step / 50) * (1 - 0.9 * step / base.steps)
                for group in (group for one in optimisers for group in one.param_groups):
                    group["lr"] = rate
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
                model.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for one in optimisers:
                    one.step()
                advance(1)
                if step >= base.check_from and step % base.check_every == 0:
                    found = accuracy(model, tokenizer, [(bare(p), p) for p in held], base)
                    revised = accuracy(model, tokenizer, revisions(world, held), base) if base.revised_at else None
                    log.append({"step": step, "loss": float(loss.detach()), "accuracy": found, "revised": revised})
                    write_json(folder / "log.json", log)
                    if found >= base.stop_at and (revised is None or revised >= base.revised_at):
                        return save(model.eval(), tokenizer, done)
                if step == base.steps:
                    break
        raise RuntimeError(
            f"expected an accuracy of {base.stop_at}, and of {base.revised_at} after reading others, on validation "
            f"within {base.steps} steps; got {log[-1:]}. "
            "Give it more steps or another seed."
        )


def _optimisers(model: Any, base: Base) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest, at one rate: Muon's steps are scaled to AdamW's size."""
    inner = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    matrices = [p for p in model.parameters() if id(p) in inner]
    rest = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(matrices, lr=base.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=base.learning_rate, weight_decay=0.01),
    ]


def accuracy(model: Any, tokenizer: Any, asked: Sequence[tuple[str, Problem]], base: Base) -> float:
    """Share of prompts that are answered rightly in one sample each."""
    texts = sk.generate(
        model, tokenizer, [prompt for prompt, _ in asked], max_new_tokens=80, temperature=base.temperature,
        top_p=base.top_p, batch_rows=256,
    )  # fmt: skip
    right = [same(read_answer(text, p.kind), p.gold) for text, (_, p) in zip(texts, asked, strict=True)]
    return sum(right) / len(right)


def revisions(world: World, problems: Sequence[Problem]) -> list[tuple[str, Problem]]:
    """Second turns to take: of what is read, one's own included, one text is right where an agent can be right alone.

    In a world where each agent knows a part, all are, and their parts have to be put together.
    """
    rng = random.Random("revisions")
    found = []
    for problem in problems:
        manners = rng.sample(world.personas, len(world.personas))
        right = {rng.choice(manners)} if world.part is None else set(manners)
        seen = [(world.write if m in right else world.spoil)(problem, m, rng) for m in manners]
        found.append((world.asked(problem, manners[0], seen[0], seen[1:]), problem))
    return found


def _batches(world: World, tokenizer: Any, base: Base) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches of documents over the training problems, similar lengths together; loss on what is learnt."""
    rng = random.Random(f"base {base.seed}")
    problems = _most(world, base.seed)
    while True:
        rows = []
        for _ in range(8 * base.batch):
            ids: list[int] = []
            labels: list[int] = []
            for text, learnt in document(world, rng.choice(problems), rng, base.shares):
                piece = tokenizer(text)["input_ids"]
                ids += piece
                labels += piece if learnt else [-100] * len(piece)
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


def _most(world: World, seed: int, most: int = 20_000) -> list[Problem]:
    """As many training problems as there are, up to `most`."""
    try:
        return world.problems(most, seed, "train")
    except TooFew as short:
        return world.problems(short.found, seed, "train")
