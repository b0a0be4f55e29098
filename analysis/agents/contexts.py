"""What a model goes on to say under a push, held against what an agent said itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from analysis.agents.fidelity import Named, first_texts, unnamed
from steerkit.sweeps.result import SweepResult
from steerkit.text.tags import without_tags
from steerkit.text.traces import DebateTrace

TEMPERATURE, TOP_P = 0.7, 0.9


def continuations(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    vectors: Mapping[str, sk.SteeringVector],
    layers: Sequence[int],
    coefficients: Sequence[float],
    before: Named,
    extent: str,
    max_new_tokens: int,
    seed: int = 0,
    out: Path | None = None,
) -> SweepResult:
    """Steered continuations without their tags, scored by ROUGE-L against each agent's own first text.

    Sampled as the paper samples (arXiv 2604.24881, section 4), one text a context, all coefficients with the same
    random numbers: a greedy text shows only whom the model would have played anyway, and who is that has nothing to
    gain. Without identity all agents share a context: it is continued once, and held against each agent's text.

    Args:
        before: the context, see `analysis.fidelity`.
        extent: where vectors are added, see `steerkit.Steering`.
    """
    said = {trace.question: first_texts(trace) for trace in traces}
    identity = before is not unnamed
    if identity:
        prompts = [
            {"prompt": before(trace, agent), "id": f"{trace.question}/{agent}", "group": trace.question}
            for trace in traces
            for agent in said[trace.question]
        ]
    else:
        prompts = [{"prompt": trace.prompt, "id": trace.question} for trace in traces]
    result = sk.sweep(
        model, tokenizer, vectors, prompts, coefficients=[0.0, *coefficients], layers=layers, positions=extent,
        max_new_tokens=max_new_tokens, seed=seed, foreign=True, out=out, temperature=TEMPERATURE, top_p=TOP_P,
    )  # fmt: skip
    table = result.table
    if identity:
        table = table.assign(agent=[key.rpartition("/")[2] for key in table["prompt_id"]])
    else:
        agents = sorted({agent for texts in said.values() for agent in texts})
        table = pd.concat([table.assign(agent=agent) for agent in agents], ignore_index=True)
        table["prompt_id"] = table["prompt_id"] + "/" + table["agent"]
    references = [said[group].get(agent, "") for group, agent in zip(table["group"], table["agent"], strict=True)]
    texts = [without_tags(text) for text in table["text"]]
    return SweepResult(table.assign(text=texts, reference=references), {**result.meta, "identity": identity}).score(
        "rouge_l"
    )
