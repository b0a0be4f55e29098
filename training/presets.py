"""Presets: all settings of a run of IMAD as frozen data; `--set field=value` changes a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from training.debates.answerers import Sampling
from training.debates.debate import Setting
from training.debates.personas import CASTS
from training.problems.families import FAMILIES
from training.settings import check_fields, override
from training.toy.base_model import Base
from training.train.checkpoints import LoRA, check_batch
from training.train.grpo import GRPO
from training.train.schedules import Anneal
from training.train.sft import SFT

DEBATEGPT_GRPO = "DebateGPT + GRPO"
MATCHED = ("SFT on shuffled turns", "SFT on gold answers", "SFT on right answers", DEBATEGPT_GRPO)
"""Controls whose SFT has as many steps and target tokens as SFT on the traces, and a learning rate of its own."""
EVOLVED = "Debate, Train, Evolve"
"""Baseline without right answers and without SFT, see `training.train.evolve`."""
ON_ANSWERS = "DebateGPT (answer) + GRPO"
"""GRPO on DebateGPT as its authors train it: as many examples as traces. The matched one sees each trace many times."""
SELF_CHECKED = "IMAD of one self-check"
RATED = (*MATCHED, ON_ANSWERS, SELF_CHECKED)
"""Controls whose SFT may have a learning rate of its own."""


@dataclass(frozen=True)
class Preset:
    """All settings of one run.

    Args:
        name: name of the preset.
        checkpoint: hub id, folder or GGUF file; None trains `base` from scratch in the family's toy world.
        family: a family of `training.problems.families`; without a checkpoint, a world of `training.toy.worlds`.
        cast: cast of the debates, a name in `training.debates.personas`; a toy world has its own cast.
        debates: number of problems debated for training.
        test: number of test questions, the same for all methods.
        debate: settings of the debates.
        sft: settings of supervised fine-tuning.
        grpo: settings of GRPO.
        sampling: sampling of the evaluation.
        turn_tokens: largest number of tokens of a turn in the debates on test questions; None is that of `sampling`.
        fresh: number of further problems for GRPO that were not debated; 0 uses the debated problems. The policy
            remembers debated problems from SFT, so their rewards generalise less to other questions. Of a further
            problem, another order of the same numbers may have been debated.
        controls: also train and evaluate both DebateGPT baselines and GRPO without debate, and evaluate
            self-consistency. With a chat checkpoint, GRPO without debate starts from a model fine-tuned on its own
            first answers, right or wrong: a plain prompt would give few boxes, and so few rewards.
        what_helps: controls among `MATCHED` that are trained too, to show what the debate adds: SFT on traces with
            other questions' turns, on gold answers and on right single answers, and GRPO on DebateGPT, each with as
            many steps and target tokens as SFT on the traces. With the latter comes GRPO on DebateGPT with as many
            examples. `EVOLVED` may be among them.
        rates: method among `RATED` -> learning rate of its SFT, where it is not that of `sft`.
        self_check: also run the controls in which each agent checks its own answer and reads no other.
        untagged: also fine-tune on the traces without tags.
        turns: also fine-tune on one turn of each trace, the first turn of a random agent.
        decodings: number of decoding seeds of the evaluation, whose mean is reported; None is 1.
        dtype: data type of the weights during debates and evaluation; None uses the checkpoint's.
        base: settings of the toy base model.
    """

    name: str
    checkpoint: str | None
    family: str
    cast: str
    debates: int
    test: int
    debate: Setting
    sft: SFT
    grpo: GRPO
    sampling: Sampling
    turn_tokens: int | None = None
    fresh: int = 0
    controls: bool = True
    what_helps: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    self_check: bool = False
    untagged: bool = False
    turns: bool = False
    decodings: int | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    base: Base = field(default_factory=Base)

    def __post_init__(self) -> None:
        check_fields(self, debates=1, test=1, fresh=0, turn_tokens=1, decodings=1)
        if self.family not in FAMILIES or self.cast not in ("world", *CASTS):
            raise ValueError(
                f"expected a family among {sorted(FAMILIES)} and a cast among {sorted(CASTS)}; got {self.family!r} and "
                f"{self.cast!r}. Pass two of these."
            )
        if not all(rate >= 0 for rate in self.rates.values()):
            raise ValueError(f"expected rates of 0 or more; got {dict(self.rates)}. Pass positive learning rates.")
        if unknown := sorted((set(self.rates) - set(RATED)) | (set(self.what_helps) - {*MATCHED, EVOLVED})):
            raise ValueError(
                f"expected methods among {RATED} in rates and {(*MATCHED, EVOLVED)} in what_helps; got {unknown}. For "
                "the rate of others set sft.learning_rate."
            )

    @property
    def free(self) -> tuple[str, ...]:
        """Settings that do not determine results: a run may be resumed with others."""
        names = [f"{stage}.{name}" for stage in ("sft", "grpo") for name in getattr(self, stage).free]
        matched = any(method in MATCHED for method in self.what_helps)  # their batch is a multiple of a micro-batch
        return tuple(name for name in names if not (matched and name == "sft.micro_batch"))

    def decoding_seeds(self, seed: int) -> list[int]:
        """Return the seeds with which test questions are answered: the run's own, and `decodings - 1` further ones.

        Example:
            >>> get_preset("llama-3.1-8b").decoding_seeds(0)
            [0, 1000, 2000]
        """
        return [seed + 1000 * number for number in range(self.decodings or 1)]

    def test_debates(self, sampling: Sampling) -> Setting:
        """Return the settings of debates on test questions with this sampling; turns may be shorter than answers."""
        longest = self.turn_tokens or sampling.max_new_tokens
        return replace(self.debate, sampling=replace(sampling, max_new_tokens=longest))

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the trained methods; each has one checkpoint."""
        optional = {
            "SFT without tags": self.untagged,
            "SFT on single turns": self.turns,
            "DebateGPT (answer)": self.controls,
            "DebateGPT (response)": self.controls,
            "SFT on first answers": self.controls and self.checkpoint is not None,
            "GRPO without debate": self.controls,
            **{method: method in self.what_helps for method in (*MATCHED, EVOLVED)},
            ON_ANSWERS: self.controls and DEBATEGPT_GRPO in self.what_helps,
            "SFT of one self-check": self.self_check,
            SELF_CHECKED: self.self_check,
        }
        return ("SFT", "IMAD", *(method for method, enabled in optional.items() if enabled))


ARITHMETIC = Preset(
    name="tiny",
    checkpoint=None,
    family="arithmetic",
    cast="world",
    debates=2500,
    fresh=2500,
    test=500,
    debate=Setting(sampling=Sampling(0.8, 1.0, 80)),
    sft=SFT(
        steps=220, learning_rate=1e-3, batch=32, micro_batch=32, lora=None, structure_dropout=0.35, max_grad_norm=1.0
    ),
    grpo=GRPO(
        anneal=Anneal("gated", weight=(0.05, 0.01), clip=(112, 52), share=0.2, floor=0.3),
        must_end=True,
        steps=150,
        prompts=24,
        generations=8,
        micro_batch=192,
        inner=1,
        learning_rate=2e-4,
        decay=True,
        temperature=0.8,
        top_p=1.0,
        beta=0.0,
        epsilon=0.2,
        loss="bnpo",
        scale=False,
        max_grad_norm=1.0,
        lora=None,
        save_every=25,
    ),
    sampling=Sampling(0.8, 1.0, 240),
)
TWO_SUM = replace(
    ARITHMETIC,
    family="two_sum",
    debates=2000,
    fresh=3000,
    self_check=True,
    untagged=True,
    debate=Setting(sampling=Sampling(0.7, 0.9, 100)),
    sampling=Sampling(0.7, 0.9, 240),
    sft=replace(ARITHMETIC.sft, steps=1000, learning_rate=1.25e-4, structure_dropout=0.5, cut_to="revision"),
    rates={
        "SFT on shuffled turns": 1e-3,
        "SFT on gold answers": 1.6e-2,
        "SFT on right answers": 2.5e-4,
        "DebateGPT + GRPO": 2e-3,
        ON_ANSWERS: 5e-4,
        SELF_CHECKED: 2.5e-4,
    },
    grpo=replace(
        ARITHMETIC.grpo,
        anneal=Anneal("gated", weight=(0.1, 0.015), clip=(200, 96), share=0.4),
        prompts=12,
        micro_batch=96,
    ),
    base=Base(
        shares={"bare": 0.2, "persona": 0.15, "revision": 0.4, "several": 0.05, "facts": 0.2},
        stop_at=0.35,
        revised_at=0.9,
        steps=3000,
        width=128,
        heads=4,
        inner=384,
        temperature=0.7,
        top_p=0.9,
        check_every=50,
    ),
)
TINY: Mapping[str, Preset] = {
    "arithmetic": ARITHMETIC,
    "two_sum": TWO_SUM,
    "malice": replace(
        ARITHMETIC,
        family="malice",
        debates=1500,
        fresh=1500,
        controls=False,
        sft=replace(ARITHMETIC.sft, steps=150),
        grpo=replace(ARITHMETIC.grpo, steps=75, anneal=replace(ARITHMETIC.grpo.anneal, clip=(112, 56))),
    ),
    "clues": replace(
        TWO_SUM,
        family="clues",
        turns=True,
        base=replace(TWO_SUM.base, stop_at=0.2),
        sft=replace(TWO_SUM.sft, steps=500, learning_rate=5e-4),
        rates={
            "SFT on shuffled turns": 8e-3,
            "SFT on gold answers": 1e-3,
            "SFT on right answers": 1e-3,
            "DebateGPT + GRPO": 5e-4,
            ON_ANSWERS: 1e-3,
        },
        grpo=replace(TWO_SUM.grpo, anneal=replace(TWO_SUM.grpo.anneal, clip=(112, 70))),
    ),
}
"""The preset `tiny`: a base model trained from scratch on a CPU, with one recipe per toy world."""
PAPER_SAMPLING = Sampling(0.7, 0.9, 1024)


def _paper(name: str, checkpoint: str, epochs: float = 3.0, sft_rate: float = 5e-5, grpo_rate: float = 5e-6) -> Preset:
    return Preset(
        name=name,
        checkpoint=checkpoint,
        family="arithmetic",
        cast="diverse",
        debates=1000,
        test=1000,
        debate=Setting(sampling=PAPER_SAMPLING),
        sft=SFT(epochs=epochs, learning_rate=sft_rate, checkpointing=True),
        grpo=GRPO(
            anneal=Anneal("linear"),
            epochs=6.0,
            prompts=1,
            micro_batch=4,
            learning_rate=grpo_rate,
            decay="cosine",
            warmup=0.1,
            checkpointing=True,
            kept_checkpoints=2,
        ),
        sampling=PAPER_SAMPLING,
        untagged=True,
        decodings=3,
    )


SUMS = Preset(
    name="smollm2",
    checkpoint="smollm2",
    family="addition",
    cast="adding",
    debates=400,
    fresh=256,
    test=300,
    debate=Setting(sampling=Sampling(0.7, 0.9, 48)),
    sft=SFT(
        epochs=3,
        learning_rate=5e-4,
        batch=8,
        micro_batch=8,
        max_grad_norm=1.0,
        structure_dropout=0.35,
        save_every=15,
    ),
    grpo=GRPO(
        anneal=Anneal("gated", weight=(0.05, 0.01), clip=(224, 120), share=0.5),
        must_end=True,
        steps=32,
        prompts=4,
        generations=8,
        micro_batch=16,
        inner=1,
        learning_rate=1e-4,
        decay=True,
        scale=False,
        beta=0.0,
        epsilon=0.2,
        loss="bnpo",
        max_grad_norm=1.0,
        lora=LoRA(32, 64, 0.0),
        save_every=4,
    ),
    sampling=Sampling(0.7, 0.9, 256),
    turn_tokens=48,  # as in the debates that are learnt: a longer turn is one that did not end
)
SMOLLM2: Mapping[str, Preset] = {
    "addition": SUMS,
    "malice": replace(SUMS, family="malice", cast="scorning", debates=250, test=160, controls=False),
}
"""The preset `smollm2` (135M parameters): a cast for each of two families; other families use the first cast."""

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        SUMS,
        _paper("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct"),
        _paper("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        _paper("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"),
        _paper("mistral-nemo-12b", "mistralai/Mistral-Nemo-Instruct-2407", 6.0, 3e-5, 3e-6),
    )
}


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return ["tiny", *PRESETS]


def get_preset(name: str, family: str | None = None, settings: Sequence[str] = ()) -> Preset:
    """Return a preset by name, for a family of problems, with fields replaced.

    Args:
        name: one of `preset_names()`.
        family: family of problems; default: the preset's own. `tiny` has a recipe for each of its families.
        settings: `field=value` texts, see `override`.

    Raises:
        ValueError: an unknown preset, family or field, a value of the wrong type, or a seed or family in the settings.

    Example:
        >>> get_preset("tiny", "clues", ["grpo.steps=60"]).grpo.steps
        60
    """
    if seeds := [one for one in settings if one.partition("=")[0].rpartition(".")[2] == "seed"]:
        raise ValueError(f"expected no seed among the settings; got {seeds}. Pass --seed, which all stages take.")
    if families := [one for one in settings if one.partition("=")[0] == "family"]:
        raise ValueError(
            f"expected no family among the settings; got {families}. Pass --family to imad, which uses the recipe of "
            "that family; the other stages take the family of their problems."
        )
    if name == "tiny":
        if (family := family or "arithmetic") not in TINY:
            raise ValueError(
                f"expected a family among {sorted(TINY)} for the preset tiny; got {family!r}. Pass one of these."
            )
        return _divided(override(TINY[family], settings))
    if name not in PRESETS:
        raise ValueError(f"expected a preset among {preset_names()}; got {name!r}. Pass one of these.")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"expected a family among {sorted(FAMILIES)}; got {family!r}. Pass one of these.")
    preset = PRESETS[name]
    variants = SMOLLM2 if preset is SUMS else {}
    family = family or preset.family
    return _divided(override(variants.get(family, replace(preset, family=family)), settings))


def _divided(preset: Preset) -> Preset:
    """The preset; `ValueError` if micro-batches do not divide batches, or GRPO and the debates have other rounds."""
    sft, grpo = preset.sft, preset.grpo
    check_batch("sft.batch", sft.batch, sft.micro_batch)
    check_batch("grpo.prompts x generations", grpo.prompts * grpo.generations, grpo.micro_batch)
    if grpo.format and preset.debate.rounds != grpo.rounds:
        raise ValueError(
            f"expected as many rounds in GRPO as in the debates; got grpo.rounds={grpo.rounds} and "
            f"debate.rounds={preset.debate.rounds}. Pass --set for both."
        )
    return preset
