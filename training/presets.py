"""Presets: everything that a run of IMAD does, as frozen data; `--set field=value` changes a copy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from training.debates.answerers import Sampling
from training.debates.debate import Setting
from training.problems.families import FAMILIES
from training.toy.model import Base
from training.train.checkpoints import LoRA
from training.train.grpo import GRPO
from training.train.schedules import Anneal
from training.train.sft import SFT

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """One run: where it begins, what it debates, how it is trained and judged.

    Args:
        checkpoint: hub id, folder or GGUF file; None trains `base` from scratch in the family's small world.
        family: a family of `training.families`, or a small world of `training.worlds` where there is no checkpoint.
        cast: of the debates, by name in `training.personas`; a small world has its own.
        debates, test: how many problems are debated for training, and how many questions judge all methods.
        fresh: how many further problems GRPO is trained on, none of which was debated; 0 takes the debated ones. What
            was debated is half remembered from SFT, so that its rewards say little of other questions.
        debate, sft, grpo: the stages.
        sampling: of the evaluation.
        controls: train and judge both DebateGPTs and GRPO without debate, and judge self-consistency, too. A checkpoint
            that is asked in a chat is first fine-tuned on its own first answers, right or wrong, for GRPO without
            debate: asked plainly it need not put any into a box, and GRPO would have nothing to reward.
        self_check: run the controls in which agents check themselves and never read each other, too.
        untagged: fine-tune on the traces without their tags, too.
        turns: fine-tune on one turn of each trace, too, the first of an agent drawn at random.
        dtype: of the weights of a model that debates or is judged; None leaves it to the checkpoint.
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
    fresh: int = 0
    controls: bool = True
    self_check: bool = False
    untagged: bool = False
    turns: bool = False
    dtype: str | None = None
    base: Base = field(default_factory=Base)

    @property
    def trained(self) -> tuple[str, ...]:
        """The methods that are trained, each a checkpoint."""
        others = {
            "SFT without tags": self.untagged, "SFT on single turns": self.turns, "DebateGPT (answer)": self.controls,
            "DebateGPT (response)": self.controls,
            "SFT on first answers": self.controls and self.checkpoint is not None,
            "GRPO without debate": self.controls,
            "SFT of one self-check": self.self_check, "IMAD of one self-check": self.self_check,
        }  # fmt: skip
        return ("SFT", "IMAD", *(method for method, wanted in others.items() if wanted))


ARITHMETIC = Preset(
    name="tiny",
    checkpoint=None,
    family="arithmetic",
    cast="world",
    debates=2500,
    fresh=2500,
    test=1500,
    debate=Setting(sampling=Sampling(0.8, 1.0, 80)),
    sft=SFT(
        steps=220, learning_rate=1e-3, batch=32, micro_batch=32, lora=None, structure_dropout=0.35, max_grad_norm=1.0
    ),
    grpo=GRPO(
        anneal=Anneal("gated", weight=(0.05, 0.01), clip=(112, 41), share=0.2, floor=0.3), steps=150, prompts=24,
        generations=8, micro_batch=192, inner=1, learning_rate=2e-4, decay=True, temperature=0.8, top_p=1.0, beta=0.0,
        epsilon=0.2, scale=False, max_grad_norm=1.0, lora=None, save_every=25,
    ),
    sampling=Sampling(0.8, 1.0, 240),
)  # fmt: skip
CHECKED = replace(
    ARITHMETIC, family="two_sum", debates=2000, fresh=3000, self_check=True, untagged=True,
    debate=Setting(early_stop=False, sampling=Sampling(0.7, 0.9, 100)), sampling=Sampling(0.7, 0.9, 240),
    sft=replace(ARITHMETIC.sft, steps=1000, structure_dropout=0.5, cut_to="revision"),
    grpo=replace(
        ARITHMETIC.grpo, anneal=Anneal("gated", weight=(0.1, 0.015), clip=(200, 80), share=0.4), prompts=12,
        micro_batch=96,
    ),
    base=Base(
        shares={"bare": 0.2, "persona": 0.15, "revision": 0.4, "several": 0.05, "facts": 0.2}, stop_at=0.35,
        revised_at=0.9, steps=3000, width=128, heads=4, inner=384, temperature=0.7, top_p=0.9, check_every=50,
    ),
)  # fmt: skip
TINY: Mapping[str, Preset] = {
    "arithmetic": ARITHMETIC,
    "two_sum": CHECKED,
    "malice": replace(
        ARITHMETIC,
        family="malice",
        debates=1500,
        fresh=1500,
        test=500,
        controls=False,
        sft=replace(ARITHMETIC.sft, steps=150),
        grpo=replace(ARITHMETIC.grpo, steps=75),
    ),
    "clues": replace(
        CHECKED,
        family="clues",
        turns=True,
        base=replace(CHECKED.base, stop_at=0.2),
        sft=replace(CHECKED.sft, steps=500),
        grpo=replace(CHECKED.grpo, anneal=replace(CHECKED.grpo.anneal, clip=(112, 66))),
    ),
}
"""The miniature, trained from scratch on a CPU, a recipe for each small world."""
PAPER_SAMPLING = Sampling(0.7, 0.9, 1024)


def _paper(name: str, checkpoint: str, epochs: float = 3.0, sft_rate: float = 5e-5, grpo_rate: float = 5e-6) -> Preset:
    return Preset(
        name=name, checkpoint=checkpoint, family="arithmetic", cast="diverse", debates=1000, test=1000,
        debate=Setting(sampling=PAPER_SAMPLING), sft=SFT(epochs=epochs, learning_rate=sft_rate),
        grpo=GRPO(anneal=Anneal("linear"), learning_rate=grpo_rate, steps=700), sampling=PAPER_SAMPLING,
    )  # fmt: skip


SUMS = Preset(
    name="smollm2", checkpoint="smollm2", family="addition", cast="adding", debates=400, fresh=256, test=300,
    debate=Setting(sampling=Sampling(0.7, 0.9, 48)),
    sft=SFT(
        epochs=3, learning_rate=5e-4, batch=8, micro_batch=8, max_length=512, max_grad_norm=1.0,
        structure_dropout=0.35,
    ),
    grpo=GRPO(
        anneal=Anneal("gated", weight=(0.05, 0.01), clip=(224, 120), share=0.5), steps=32, prompts=4,
        generations=8, micro_batch=16, inner=1, learning_rate=1e-4, decay=True, scale=False, beta=0.0,
        epsilon=0.2, max_grad_norm=1.0, lora=LoRA(32, 64, 0.0), save_every=8,
    ),
    sampling=Sampling(0.7, 0.9, 256),
)  # fmt: skip
SMOLLM2: Mapping[str, Preset] = {
    "addition": SUMS,
    "malice": replace(SUMS, family="malice", cast="scorning", debates=250, test=160, controls=False),
}
"""The 135M model, with a cast for each of two families; other families are debated by that of the first."""

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        SUMS,
        _paper("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        _paper("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"),
        _paper("mistral-nemo-12b", "mistralai/Mistral-Nemo-Instruct-2407", 6.0, 3e-5, 3e-6),
    )
}  # fmt: skip


def names() -> list[str]:
    """Of all presets."""
    return ["tiny", *PRESETS]


def chosen(name: str, family: str | None = None, settings: Sequence[str] = ()) -> Preset:
    """A preset by name, for a family of problems, with fields replaced.

    Raises:
        ValueError: a preset, family or field that does not exist, or a value of another type than the field's.
    """
    if name == "tiny":
        if (family := family or "arithmetic") not in TINY:
            raise ValueError(f"expected a family among {sorted(TINY)} for the preset tiny; got {family!r}.")
        return changed(TINY[family], settings)
    if name not in PRESETS:
        raise ValueError(f"expected a preset among {names()}; got {name!r}.")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"expected a family among {sorted(FAMILIES)}; got {family!r}.")
    preset = PRESETS[name]
    own = SMOLLM2 if preset is SUMS else {}
    family = family or preset.family
    return changed(own.get(family, replace(preset, family=family)), settings)


def changed(preset: T, settings: Sequence[str]) -> T:
    """A preset, or any frozen data, with fields replaced: `grpo.steps=60`, `sft.lora=null`, `family=two_sum`.

    Values are JSON, or plain text.

    Raises:
        ValueError: a field that does not exist, or a value of another type than the field's.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"expected field=value; got {setting!r}.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        preset = _replaced(preset, path.split("."), value, path)
    return preset


def _replaced(data: Any, path: Sequence[str], value: Any, whole: str) -> Any:
    names = [one.name for one in dataclasses.fields(data)] if dataclasses.is_dataclass(data) else []
    if path[0] not in names:
        raise ValueError(f"expected a field among {names} for {whole!r}; got {path[0]!r}.")
    old = getattr(data, path[0])
    if len(path) > 1:
        return dataclasses.replace(data, **{path[0]: _replaced(old, path[1:], value, whole)})
    if isinstance(old, tuple | None) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if old is not None and value is not None and type(value) is not type(old):
        raise ValueError(f"expected a value of type {type(old).__name__} for {whole!r}; got {value!r}.")
    return dataclasses.replace(data, **{path[0]: value})
