from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.sweeps.direction import first_tokens_of
from steerkit.text.prompt import encode_prompt
from tests.reference import steered_logits
from tests.tiny import tiny_model, tiny_tokenizer

WORDS = ["the sky", "a green tree", "my old book", "that river", "one red door", "some rain", "her song", "no lamp"]
OTHERS = ["the sea", "a small town", "my new coat", "that road", "one blue cup", "some snow", "her voice", "no window"]
TRAIN, VALIDATION = (
    {"harmful": [f"{word}!" for word in WORDS[part]], "harmless": [f"{word}?" for word in OTHERS[part]]}
    for part in (slice(4), slice(4, 8))
)


def planted() -> tuple[Any, Any, torch.Tensor]:
    """A model in which only the token "!" writes a direction, and that direction alone raises the logit of "N"."""
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(7))
    direction /= direction.norm()
    mark, question, refusal = (encode_prompt(tokenizer, one)[0] for one in "!?N")
    with torch.no_grad():
        for block in model.model.layers:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= torch.outer(direction, direction @ weight)
        embedding = model.model.embed_tokens.weight
        embedding -= torch.outer(embedding @ direction, direction)
        embedding[mark] = embedding[question] + 12 * direction
        head = model.lm_head.weight
        head -= torch.outer(head @ direction, direction)
        head[refusal] = 2 * direction - 0.3
    return model, tokenizer, direction


def chosen(model: Any, tokenizer: Any, **options: Any) -> sk.SteeringVector:
    return sk.choose_direction(
        model, tokenizer, TRAIN, VALIDATION, **{"tokens": ["N"], "positions": [-1, -2], **options}
    )


def test_a_planted_direction_is_found_at_its_position_and_its_scores_are_those_of_plain_forwards() -> None:
    model, tokenizer, direction = planted()
    vector = chosen(model, tokenizer)
    ((layer, value),) = vector.layers.items()
    assert float(value @ direction / value.norm()) > 0.9
    table = pd.DataFrame(vector.meta["table"])
    assert len(table) == 8 and set(zip(table["position"], table["layer"], strict=True)) == {
        (position, one) for position in (-1, -2) for one in range(4)
    }
    eligible = table[table["eligible"]]
    best = eligible.loc[eligible["bypass"].idxmin()]
    assert (int(best["layer"]), int(best["position"]), vector.meta["read_position"]) == (layer, -1, -1)
    last = table[(table["layer"] == 3) & (table["position"] == -1)].iloc[0]
    assert last["induce"] > 0 and last["kl"] < 0.1 and not last["eligible"]  # among the last 20 % of the layers
    assert list(table[table["eligible"]]["layer"]) == [0, 1, 2]
    assert vector.meta["unsteered"]["harmful"] > 0 > vector.meta["unsteered"]["harmless"]
    assert best["bypass"] < vector.meta["unsteered"]["harmful"] - 1 and best["induce"] > 0 and best["kl"] < 0.1

    refusal = encode_prompt(tokenizer, "N")[0]

    def metric(ids: list[int], layers: dict[int, torch.Tensor], columns: range, ablate: bool) -> float:
        logits = steered_logits(model, ids, layers, 1.0, columns, ablate)[-1].double()
        p = float(logits.softmax(-1)[refusal])
        return math.log(p) - math.log(1 - p)

    prompts = {label: [list(encode_prompt(tokenizer, one)) for one in VALIDATION[label]] for label in VALIDATION}
    everywhere = dict.fromkeys(range(4), value)
    bypass = [metric(ids, everywhere, range(1, len(ids)), True) for ids in prompts["harmful"]]
    induce = [metric(ids, {layer: value}, range(len(ids)), False) for ids in prompts["harmless"]]
    kl = []
    for ids in prompts["harmless"]:
        plain = steered_logits(model, ids, {}, 0.0, range(0))[-1].double().log_softmax(-1)
        new = steered_logits(model, ids, everywhere, 1.0, range(1, len(ids)), True)[-1].double().log_softmax(-1)
        kl.append(float((plain.exp() * (plain - new)).sum()))
    for name, values in (("bypass", bypass), ("induce", induce), ("kl", kl)):
        assert best[name] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-5), name


def test_the_first_token_of_a_refusal_counts_with_and_without_a_space_and_a_space_alone_does_not() -> None:
    tokenizer = tiny_tokenizer()
    (plain,) = encode_prompt(tokenizer, "N")
    assert first_tokens_of(tokenizer, ["N"]) == [plain]
    tokenizer.add_tokens([" N"])
    assert first_tokens_of(tokenizer, ["N"]) == [plain, *encode_prompt(tokenizer, " N")]


def test_the_chosen_vector_is_a_difference_in_means_and_its_file_keeps_the_table(tmp_path) -> None:
    model, tokenizer, _ = planted()
    vector = chosen(model, tokenizer)
    (layer,) = vector.layers
    acts = sk.collect(model, tokenizer, TRAIN, layers=[layer], position=-1)
    assert vector == sk.difference_in_means(acts, "harmful", "harmless")
    vector.save(tmp_path / "refusal.safetensors")
    assert sk.SteeringVector.load(tmp_path / "refusal.safetensors").meta["table"] == vector.meta["table"]
    assert list(vector.at_all(layer).layers) == [0, 1, 2, 3]


def test_a_position_at_which_all_prompts_are_alike_has_a_candidate_that_is_never_chosen() -> None:
    model, tokenizer, _ = planted()
    alike = {label: [f"as{one}" for one in "!?"[label == "harmless"]] for label in TRAIN}
    vector = sk.choose_direction(model, tokenizer, alike, VALIDATION, tokens=["N"], positions=[-1, -2])
    zero = [row for row in vector.meta["table"] if row["position"] == -2]
    assert not any(row["eligible"] for row in zero) and all(row["kl"] == 0 for row in zero)
    assert {row["bypass"] for row in zero} == {vector.meta["unsteered"]["harmful"]}


def test_no_direction_that_meets_the_conditions_and_bad_arguments_are_errors_that_say_so() -> None:
    model, tokenizer, _ = planted()
    with pytest.raises(ValueError, match=r"kl < 1e-12.* got none of 8: "):
        chosen(model, tokenizer, max_kl=1e-12)
    for options, message in [
        ({"tokens": []}, "texts that begin a refusal"),
        ({"tokens": "N"}, "texts that begin a refusal"),
        ({"max_kl": 0}, "max_kl above 0"),
        ({"positive": "bad"}, "prompts of 'bad' and 'harmless'"),
        ({"positions": [-99]}, "inside every span"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen(model, tokenizer, **options)
    with pytest.raises(ValueError, match="8 are training prompts too"):
        sk.choose_direction(model, tokenizer, TRAIN, TRAIN, tokens=["N"])
