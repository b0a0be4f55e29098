"""Every causal language model of the installed transformers, small and random, put before the doctor.

`make architectures` (`python -m tests.architectures`) writes docs/architectures.md.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.utils import logging

from steerkit.doctor.report import Finding, examine
from steerkit.io.files import write_text
from steerkit.io.signals import restore_interrupt
from steerkit.io.versions import versions
from steerkit.models.blocks import NoResidualStream, find_blocks
from steerkit.models.site_names import DEFAULT, SITES
from steerkit.models.sites import find_sites
from tests.small_models import build
from tests.tiny import tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
FORK = multiprocessing.get_context("fork")
SECONDS = 180
NEED_GENERATION = {"cache", "operations", "conditions", "steered sites", "first new token"}
"""Checks that fail where `generate` refuses a model."""
REFUSALS = ("expected a model whose logits with a cache", "expected a model that takes a KV cache")
ADVICE = " Steer its plain forwards with `steering.on(model)`."
NEEDS = " Use a model whose only input is text."
EXPLANATIONS = {
    "blt": "bytes and patches of bytes are streams of different lengths",
    "cpmant": "32 positions of its own stand before the text",
    "deepseek_v4": "four streams",
    "gemma3n": "four streams",
    "gemma3n_text": "four streams",
    "gemma4_assistant": "drafts from another model's keys; two checks of its configuration exclude each other",
    "gemma4_unified_assistant": "drafts from another model's keys",
    "hrm_text": "two stacks of blocks run several times each",
    "hy_v4": "four streams",
    "minimax": "its cache is of its own class",
    "mllama": "some blocks run for pictures alone",
    "musicgen": "reads several codes of a sound per position",
    "musicgen_melody": "reads several codes of a sound per position",
    "openai-gpt": "keeps no cache",
    "prophetnet": "three streams, one after the other",
    "reformer": "two streams",
    "rwkv": "its state is no cache that can be passed in",
    "xlm": "no module is a block: there are lists of their parts",
    "xlnet": "positions come before the batch",
    "xlstm": "its state is no cache that can be passed in",
}
"""Explanations of the errors, by model type."""
ABOUT = (
    "Written by `make architectures` with transformers {transformers} and torch {torch}: a small random model of "
    "each of the {count} entries of its causal language model mapping, put before `steerkit doctor`. **Works** "
    "means that its blocks were found by the rule and verified, that a text alone and in a padded batch read "
    "alike, that coefficient 0 changes nothing bit for bit, and that steered texts, others than the unsteered "
    "ones, are the same in a cached batch and one prompt at a time without a cache. **Refused** models raise an "
    "error that names the reason; none is read silently wrong."
)
COLUMNS = [site for site in SITES if site != DEFAULT]
PARTS = ("attn_out", "mlp_out")
ABSENT = (
    "the block has no attention",
    "the block adds one output to the stream, not two",
    "the configuration names no attention heads",
)
"""Reasons of a site that a block does not have."""
ABOUT_SITES = (
    "**Sites** are those besides `resid_post`. A site was verified in all four blocks, or in those that are named; a "
    "site that is not listed was refused by name. **All**: {columns}. Blocks with attention and MLP in parallel have "
    "no `resid_mid`; recurrent blocks have no heads `z`; blocks that normalise the sum of stream and sublayer (BERT, "
    "BART), or add more than two outputs, have no part that is added as it is. **Complete** are types whose every "
    "block has each part that it adds verified, and its heads `z` unless it has no attention: {complete} of {works}. "
    "{added} more have each part verified, and blocks without `z`, such as recurrent ones."
)
NOTES = (
    "Models that cannot be padded on the left (positions counted by the column, recurrent layers that read pads) "
    "are batched by prompt length. Those whose layers forget between chunks of several tokens are scored token by "
    "token. A composite model that cannot be built small, or needs other packages, stands for its text part. The "
    "weights are random and the embeddings untied, so that texts differ; windows are eight tokens, so that texts "
    "outgrow them."
)
ORDINARY = ("ours before it", "all layers equal output_hidden_states")


@dataclass(frozen=True)
class Verdict:
    """The result for one architecture.

    Args:
        name: the model type.
        made: the class that was built, or the one in the mapping.
        state: `works`; `refused`, by name and with the reason; `wrong`, a check failed; `not built`.
        note: the path of its blocks and what differs from other models, or the reason why it does not work.
        sites: site -> the layers at which it was verified.
        reasons: (site, layer) -> why it was not.
        layers: number of its blocks.
    """

    name: str
    made: str
    state: str
    note: str
    sites: Mapping[str, Sequence[int]] = field(default_factory=dict)
    reasons: Mapping[tuple[str, int], str] = field(default_factory=dict)
    layers: int = 0

    def _has(self, *names: str) -> bool:
        """Whether each of these sites was verified in every block, or the block does not have it."""
        return self.layers > 0 and all(
            layer in self.sites.get(name, ()) or self.reasons.get((name, layer)) in ABSENT
            for name in names
            for layer in range(self.layers)
        )

    @property
    def added(self) -> bool:
        """Whether in every block each part that it adds was verified."""
        return self._has(*PARTS)

    @property
    def complete(self) -> bool:
        """Whether also the heads of every block with attention were."""
        return self._has(*PARTS, "z")

    def verified(self) -> str:
        """The verified sites, as the page shows them; one that not every block has is followed by its blocks."""
        found = {site: self.sites.get(site, ()) for site in COLUMNS}
        if all(len(layers) == self.layers for layers in found.values()):
            return "all"
        some = [(site, "" if len(layers) == self.layers else f" in {', '.join(map(str, layers))}")
                for site, layers in found.items() if layers]  # fmt: skip
        return "; ".join(f"{site}{where}" for site, where in some) or "none"


def judge(name: str) -> Verdict:
    """Build a small model of an architecture and run the doctor's checks on it."""
    try:
        model = build(name)
    except Exception as error:  # a third party's class may raise anything; the message is the reason on the page
        return Verdict(name, str(CLASSES[name]), "not built", _line(error))
    made = type(model).__name__
    try:
        path = find_blocks(model).path
    except NoResidualStream as error:
        return Verdict(name, made, "refused", _reason(error))
    verdict = _verdict(name, made, path, examine(model, tiny_tokenizer()))
    sites = find_sites(model)
    found = {site: sites.layers(site) for site in COLUMNS}
    return dataclasses.replace(verdict, sites=found, reasons=dict(sites.reasons), layers=len(find_blocks(model)))


def _verdict(name: str, made: str, path: str, findings: Sequence[Finding]) -> Verdict:
    failed = {finding.check: finding.detail for finding in findings if finding.state == "failed"}
    said = {finding.check: finding.detail for finding in findings}
    if "nothing is shown" in said.get("cache", ""):
        failed["cache"] = said["cache"]
    if not failed:
        notes = [f"blocks at `{path}`", *said["cache"].split("; ")[1:]]
        if not said["hidden states"].endswith(ORDINARY):
            notes.append(said["hidden states"])
        return Verdict(name, made, "works", _line("; ".join(notes)))
    if set(failed) == NEED_GENERATION and all(one.startswith(REFUSALS) for one in failed.values()):
        reason = failed["cache"].removesuffix(ADVICE)
        return Verdict(name, made, "refused", _line(f"read, and steered in plain forwards; not generated: {reason}"))
    return Verdict(name, made, "wrong", _line("; ".join(f"{check}: {why}" for check, why in failed.items())))


def _reason(error: Exception) -> str:
    """The reasons of the candidates, without the advice of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    return _line("; ".join(lines) or str(error).removesuffix(NEEDS))


def _line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) < 240 else text[:237] + "...").replace("|", "\\|")


def apart(name: str) -> Verdict:
    """`judge` in a process of its own, so that a class that hangs or crashes does not stop the others."""
    mapped = str(CLASSES[name])
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: theirs.send(judge(name)))
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else Verdict(name, mapped, "wrong", f"not done in {SECONDS} s")
    except EOFError:
        child.join()
        return Verdict(name, mapped, "wrong", f"its process ended with {child.exitcode}")
    finally:
        child.kill()
        child.join()


def page(verdicts: Sequence[Verdict]) -> str:
    """The text of docs/architectures.md."""
    count = Counter(verdict.state for verdict in verdicts)
    works = [verdict for verdict in verdicts if verdict.state == "works"]
    complete = sum(one.complete for one in works)
    about = versions()
    lines = [
        "# Architectures",
        "",
        *wrap(ABOUT.format(count=len(verdicts), **about), 120),
        "",
        *wrap(NOTES, 120),
        "",
        *wrap(
            ABOUT_SITES.format(
                columns=", ".join(f"`{site}`" for site in COLUMNS),
                complete=complete,
                works=len(works),
                added=sum(one.added for one in works) - complete,
            ),
            120,
        ),
        "",
        ", ".join(f"{count[state]} {state}" for state in ("works", "refused", "wrong", "not built")) + ".",
    ]
    for state in ("wrong", "not built", "refused", "works"):
        rows = [verdict for verdict in verdicts if verdict.state == state]
        if rows:
            heads = ["model type", "class", *(["sites"] if state == "works" else []), ""]
            lines += ["", f"## {state.capitalize()} ({len(rows)})", "", f"| {' | '.join(heads)} |"]
            lines.append("|---" * len(heads) + "|")
            sites = [[row.verified()] if state == "works" else [] for row in rows]
            cells = [[row.name, row.made, *own, _explained(row)] for row, own in zip(rows, sites, strict=True)]
            lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines) + "\n"


def _explained(row: Verdict) -> str:
    explanation = EXPLANATIONS.get(row.name) if row.state in ("refused", "not built") else None
    return f"{explanation}: {row.note}" if explanation else row.note


def main(names: Sequence[str]) -> None:
    restore_interrupt()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    verdicts = []
    for name in names or sorted(CLASSES):
        verdicts.append(apart(name))
        one = verdicts[-1]
        print(" | ".join([one.name, one.made, one.state, one.verified(), one.note]), flush=True)
    if not names:
        write_text(PAGE, page(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
