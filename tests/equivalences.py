"""The core equivalences, for any model and tokenizer: what is generated is what is stored, read and scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import steerkit as sk
from steerkit.generation.sampling import random_stream
from steerkit.models.ends import ends_of
from steerkit.scores.fluency import log_probabilities
from steerkit.show.explorer import explorer_data
from steerkit.sweeps.projections import sweep_projections
from steerkit.sweeps.result import SweepResult, ids_of
from steerkit.text.prompt import encode_prompt, render
from steerkit.text.spans import SpannedText, passage_of
from steerkit.text.tokens import decode, encode
from tests.reference import greedy, hidden_states, steered_logits


def largest_difference(measured: Tensor, reference: Tensor) -> float:
    """The largest relative difference of a token's vector, `|measured - reference| / |reference|`."""
    off = (measured.double() - reference.double()).norm(dim=-1) / reference.double().norm(dim=-1)
    return float(off.max())


def direction(model: Any, layer: int, size: float = 1.0) -> sk.SteeringVector:
    """A fixed random vector at a layer, as long as the stream there, times `size`."""
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(width, generator=generator)
    with torch.no_grad(), sk.capture_resid(model, layer) as streams:
        model(input_ids=torch.arange(5, 15)[None] % model.config.vocab_size, use_cache=False)
    norm = streams[layer][0, 1:].float().norm(dim=-1).mean()
    return sk.SteeringVector({layer: vector / vector.norm() * norm * size})


def check_boundaries(tokenizer: Any, texts: Sequence[str]) -> int:
    """Prompt and continuation decode to their text, spans to exactly theirs; returns the number of spans."""
    count = 0
    for text in texts:
        ids = encode(tokenizer, text)
        assert decode(tokenizer, ids, skip_special=False) == text, text
        prompt = render(tokenizer, text)
        assert prompt.followed_by(tokenizer, text).ids == (*prompt.ids, *ids)
        whole = "Hello" + text + "was"
        for parts in (((0, 5), (5, 5 + len(text))), ((5, 5 + len(text)), (5 + len(text), len(whole)))):
            for first in (None, "Q: "):
                passage = passage_of(tokenizer, SpannedText(whole, parts, prompt=first), "g")
                for (start, stop), (low, high) in zip(passage.spans, parts, strict=True):
                    assert 0 <= start < stop <= len(passage.ids)
                    lead = start == passage.spans[0][0] and low == 0 and first is None
                    found = decode(tokenizer, passage.ids[start:stop], skip_special=False)
                    assert found == whole[low:high] or (lead and found == " " + whole[low:high])
                    count += 1
        pair = sk.ContrastPair("Hello", text, text + "x")
        for passage, continuation in zip(pair.passages(tokenizer, "g"), (text, text + "x"), strict=True):
            ((start, stop),) = passage.spans
            assert passage.ids[:start] == encode_prompt(tokenizer, "Hello") and stop == len(passage.ids)
            assert passage.ids[start:] == encode(tokenizer, continuation)
    return count


def check_generation(model: Any, tokenizer: Any, prompts: Sequence[Any], layer: int, new: int) -> dict[str, int]:
    """Steered and plain texts in one batch equal those one at a time, and without a cache, token for token."""
    steering = sk.Steering(direction(model, layer), 1.0)
    steerings = [None if number % 2 else steering for number in range(len(prompts))]
    options = {"max_new_tokens": new, "return_details": True}
    together = sk.generate(model, tokenizer, list(prompts), steering=steerings, **options)
    plain = sk.generate(model, tokenizer, list(prompts), **options)
    ends = ends_of(model, tokenizer)
    for prompt, steered, found in zip(prompts, steerings, together, strict=True):
        (alone,) = sk.generate(model, tokenizer, [prompt], steering=steered, **options)
        assert alone.ids == found.ids
        ids = encode_prompt(tokenizer, prompt)
        layers = dict(steering.vector.layers) if steered else None
        slow = greedy(model, ids, len(found.ids), (), layers, 1.0, len(ids) - 1)
        assert list(found.ids) == slow[: len(found.ids)]
        assert len(found.ids) == new or found.ids[-1] in ends
        assert found.text == decode(tokenizer, found.ids)
    changed = sum(a.ids != b.ids for a, b in zip(together, plain, strict=True))
    return {"prompts": len(prompts), "tokens": sum(len(one.ids) for one in together), "changed": changed}


def check_spans(model: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> float:
    """Spans read in one forward equal separate forwards up to their end; returns the largest relative difference."""
    worst = 0.0
    whole = "".join(texts)
    ends = np.cumsum([len(text) for text in texts]).tolist()
    spans = tuple(zip([0, *ends], ends, strict=False))
    for cut in ("spans", "whole"):
        text = SpannedText(whole, spans, cut=cut, prompt="Q: ")
        read = sk.collect(model, tokenizer, [text], layers=layer, position="last").at(layer)
        passage = passage_of(tokenizer, text, "g")
        for vector, (_, stop) in zip(read, passage.spans, strict=True):
            alone = hidden_states(model, passage.ids[:stop])[layer + 1][-1]
            worst = max(worst, largest_difference(vector, alone))
    return worst


def check_sweep(
    model: Any, tokenizer: Any, prompts: Sequence[Any], layer: int, new: int, folder: Path
) -> dict[str, float]:
    """What a sweep generates is what it stores, resumes, scores, projects, reports and hands to a judge."""
    vector = direction(model, layer)
    options: dict[str, Any] = {"coefficients": [-1, 1], "layers": layer, "max_new_tokens": new}
    options |= {"temperature": 1.0, "seed": 5}
    whole = sk.sweep(model, tokenizer, vector, list(prompts), **options, out=folder / "run")
    ends = ends_of(model, tokenizer)
    rows = folder / "run" / "rows.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    (folder / "run" / "table.parquet").unlink()
    resumed = sk.sweep(model, tokenizer, vector, list(prompts), **options, out=folder / "run", batch_rows=3)
    loaded = SweepResult.load(folder / "run")
    assert ids_of(loaded.table) == ids_of(resumed.table)
    assert loaded.table["text"].tolist() == resumed.table["text"].tolist()
    rounded = 0
    for mine, other in zip(whole.table.itertuples(), resumed.table.itertuples(), strict=True):
        assert mine.prompt_ids == other.prompt_ids
        if mine.ids != other.ids:
            assert _is_decided_by_rounding(model, mine, other, vector, options)
            rounded += 1
    for column in ("csv", "parquet"):
        whole.save(folder / f"t.{column}")
        assert ids_of(SweepResult.load(folder / f"t.{column}").table) == ids_of(whole.table)
    judged: list[str] = []
    scored = whole.score(lambda row: float(judged.append(row["text"]) or len(judged)), column="judged")
    scored = scored.score("perplexity", model=model, tokenizer=tokenizer)
    tokens = sweep_projections(model, tokenizer, whole.table, {"vector": vector})
    page = explorer_data(SweepResult(whole.table), tokens)
    projected = tokens.groupby(["coefficient", "prompt_id"])["token_id"].apply(tuple)
    worst = 0.0
    for number, row in enumerate(scored.table.itertuples()):
        assert tuple(row.prompt_ids) == encode_prompt(tokenizer, prompts[int(row.prompt_id)])
        text = decode(tokenizer, [token for token in row.ids if token not in ends or token != row.ids[-1]])
        assert row.text == judged[number] == page["strings"][page["rows"]["text"][number]] == text
        assert projected[row.coefficient, row.prompt_id] == tuple(row.ids)
        (logs,) = log_probabilities(model, tokenizer, [prompts[int(row.prompt_id)]], [row.ids])
        with torch.no_grad():
            ids = torch.tensor([[*row.prompt_ids, *row.ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].double()
        truth = logits.log_softmax(-1).gather(-1, torch.tensor(row.ids)[:, None])[:, 0]
        worst = max(worst, float((logs.double() - truth).abs().max()))
        assert abs(float(np.log(row.perplexity)) + float(truth.mean())) < 1e-3
    written = [tuple(encode(tokenizer, text)) for text in whole.table["text"]]
    other = sum(tuple(ids) != again for ids, again in zip(whole.table["ids"], written, strict=True))
    counts = {"rows": len(whole.table), "decided by rounding": rounded, "ids unlike those of their text": other}
    return {**counts, "largest difference in nats": worst}


def _is_decided_by_rounding(model: Any, mine: Any, other: Any, vector: sk.SteeringVector, options: Any) -> bool:
    """Whether two rows part where the random number is next to a boundary between two tokens.

    In float32 a row's logits differ in their last digits with the rows that share its batch.
    """
    step = next(i for i, (a, b) in enumerate(zip(mine.ids, other.ids, strict=False)) if a != b)
    number = random_stream((options["seed"], mine.prompt_id, 0), options["max_new_tokens"])[step]
    ids, steered = (*mine.prompt_ids, *mine.ids[:step]), range(len(mine.prompt_ids) - 1, 10**9)
    logits = steered_logits(model, ids, dict(vector.layers), mine.coefficient, steered)[-1]
    boundaries = (logits.double() / options["temperature"]).softmax(-1).cumsum(0)
    return float((boundaries - number).abs().min()) < 1e-5
