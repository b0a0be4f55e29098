"""The table of a sweep, and the rows on disk that it is made of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from steerkit.capture.activations import Layer
from steerkit.generation.choices import Scored, probabilities
from steerkit.generation.engine import Continuation
from steerkit.generation.generate import text_of
from steerkit.io.json import canonical_json
from steerkit.steering.dose import relative_dose
from steerkit.steering.steering import Steering
from steerkit.sweeps.layers import natural_order
from steerkit.sweeps.plan import Place, Planned
from steerkit.text.prompt import Prompt, PromptLike, messages_of
from steerkit.vectors.controls import roles_of
from steerkit.vectors.vector import SteeringVector


def written_row(one: Planned, prompt: Sequence[int], continuation: Continuation, tokenizer: Any) -> dict[str, Any]:
    """A generated row as it is stored; one whose logits overflowed has neither text nor n_tokens."""
    lost = continuation.overflowed
    steered = {} if continuation.steered is None else {"steered": continuation.steered}
    return {
        "key": list(one.key),
        "prompt_ids": list(prompt),
        "ids": list(continuation.all_ids),
        "text": None if lost else text_of(tokenizer, continuation),
        "n_tokens": None if lost else continuation.n_tokens,
        "finished": continuation.finished,
        **steered,
    }


def scored_row(one: Planned, prompt: Sequence[int], ids: Sequence[int], scored: Scored) -> dict[str, Any]:
    """A choice as it is stored; one whose logits overflowed has neither text, n_tokens nor log-probability."""
    lost = scored.log_prob != scored.log_prob
    steered = {} if scored.steered is None else {"steered": scored.steered}
    return {
        "key": list(one.key),
        "prompt_ids": list(prompt),
        "ids": list(ids),
        "text": None if lost else one.choice,
        "n_tokens": None if lost else len(ids),
        "finished": False,
        "log_prob": None if lost else scored.log_prob,
        **steered,
    }


def sweep_table(
    plan: Sequence[Planned],
    written: Mapping[tuple[Any, ...], Mapping[str, Any]],
    named: Mapping[str, SteeringVector],
    steerings: Mapping[Place, Steering],
    norms: Mapping[Layer, float],
    settings: Mapping[str, Any],
    prompts: Mapping[str, Prompt],
) -> pd.DataFrame:
    """One row per vector, layer, coefficient, prompt and sample (or choice); coefficient 0 under each vector and layer.

    Args:
        written: the stored rows by key.
        norms: of the stream per layer, for `relative_dose`.
        settings: become columns.
    """
    roles = roles_of(named)
    unsteered = {place: steering.scaled(0.0) for place, steering in steerings.items()}
    own = ("id", "group", "prompt", "choices")
    messages = {one.prompt["id"]: _messages(one.prompt["prompt"]) for one in plan}
    chats = any(text is not None for text in messages.values())
    further = dict.fromkeys(key for one in plan for key in one.prompt if key not in own)
    rows = []
    for one in plan:
        row, found, cell = one.prompt, written[one.key], one.cell
        for place in steerings if cell.place is None else [cell.place]:
            role, control_of = roles[place[0]]
            scored = {"choice": one.choice, "log_prob": found["log_prob"]} if one.choice is not None else {}
            rows.append(
                {
                    "vector": place[0],
                    "role": role,
                    "control_of": control_of,
                    "layer": place[1],
                    "coefficient": cell.coefficient,
                    **({} if cell.dose is None else {"dose": cell.dose}),
                    "prompt_id": row["id"],
                    "sample": one.sample,
                    "group": row["group"],
                    "prompt": prompts[row["id"]].text,
                    "prompt_ids": prompts[row["id"]].ids,
                    **({"messages": messages[row["id"]]} if chats else {}),
                    **{column: row.get(column) for column in further},
                    **scored,
                    "text": found["text"],
                    "ids": tuple(found["ids"]),
                    "n_tokens": found["n_tokens"],
                    **({} if scored else {"finished": found["finished"]}),
                    **({"share_steered": _share_steered(found, cell.place is None)} if "when" in settings else {}),
                    "relative_dose": relative_dose(cell.steering or unsteered[place], norms),
                    **{k: v for k, v in settings.items() if k != "samples"},
                }
            )
    vector_order = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in steerings))}
    rows.sort(key=lambda row: (vector_order[row["vector"]], natural_order(row["layer"]), row["coefficient"]))
    table = pd.DataFrame(rows)
    if "log_prob" in table:
        one_prompt = table.groupby(["vector", "layer", "coefficient", "prompt_id"], sort=False)
        log_probs = table["log_prob"].astype(float)
        shares = one_prompt["log_prob"].transform(lambda values: probabilities(values.astype(float)))
        table = table.assign(log_prob=log_probs)
        table.insert(table.columns.get_loc("log_prob") + 1, "probability", shares.astype(float))
    return table


def _messages(prompt: PromptLike) -> str | None:
    """The messages of a chat as JSON; None for a string or a `Prompt`."""
    return None if isinstance(prompt, str | Prompt) else canonical_json(messages_of(prompt))


def _share_steered(written: Mapping[str, Any], unsteered: bool) -> float:
    """The share of the positions that decided a row's tokens where it was steered; NaN where that is not known."""
    steered = written.get("steered", 0 if unsteered else None)
    return steered / written["n_tokens"] if written["n_tokens"] and steered is not None else float("nan")


def warn_of_overflows(table: pd.DataFrame) -> None:
    """Warn of rows without a text, by vector, layer and coefficient."""
    lost = table[table["text"].isna()]
    if len(lost):
        places = lost[["vector", "layer", "coefficient"]].drop_duplicates().itertuples(index=False, name=None)
        named = ", ".join(f"{vector!r} at layer {layer}, coefficient {value:g}" for vector, layer, value in places)
        warnings.warn(
            f"the logits of {len(lost)} of {len(table)} rows overflowed; these rows have no text, and their scores are "
            f"NaN: {named}. Lower the coefficient, or load the model in bfloat16 or float32.",
            UserWarning,
            stacklevel=3,
        )
