"""The scripts of docs/recipes: at most 15 lines, and each runs on a tiny model in which the effect was planted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit as sk
from steerkit.text.prompt import encode_prompt
from tests.tiny import tiny_model, tiny_tokenizer

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.md"))


def script(name: str) -> str:
    (page,) = [page for page in RECIPES if page.stem == name]
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_script_has_at_most_15_lines_of_100_characters(page: Path) -> None:
    lines = [line for line in script(page.stem).splitlines() if line.strip()]
    assert len(lines) <= 15 and max(map(len, lines)) <= 100


def refusing_model() -> tuple[Any, Any]:
    """A model that writes "S" if a prompt holds "!": "!" writes a direction, a head averages it over all positions."""
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(7))
    direction /= direction.norm()
    mark, question, refusal = (encode_prompt(tokenizer, one)[0] for one in "!?S")
    with torch.no_grad():
        for block in model.model.layers:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= torch.outer(direction, direction @ weight)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding -= torch.outer(embedding @ direction, direction)
        embedding[mark] = embedding[question] + 12 * direction
        attention = model.model.layers[0].self_attn
        for part in (attention.q_proj, attention.k_proj):
            part.weight.zero_()
            part.bias.zero_()
        attention.v_proj.weight[0] = 40 * direction
        attention.o_proj.weight[:, 0] = direction
        head -= torch.outer(head @ direction, direction)
        head[refusal] = 2 * direction - 0.3
    return model, tokenizer


def test_the_refusal_recipe_turns_refusals_on_by_addition_and_off_by_ablation(tmp_path, monkeypatch) -> None:
    words = ["the sky", "a tree", "my book", "that river", "one door", "some rain", "her song", "no lamp", "a cat"]
    splits = ["train"] * 4 + ["validation"] * 3 + ["test"] * 2
    (tmp_path / "DATA").mkdir()
    for kind, mark, order in (("harmful", "!", words), ("harmless", "?", words[::-1])):
        rows = [{"split": split, "instruction": f"{word}{mark}"} for split, word in zip(splits, order, strict=True)]
        (tmp_path / "DATA" / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sk, "load", lambda *_, **__: refusing_model())
    code = script("refusal")
    assert '"I\'m s", "Sorry")' in code and '["I", "Sorry"]' in code
    code = code.replace('"I\'m s", "Sorry")', '"I\'m s", "S")').replace('["I", "Sorry"]', '["S"]')
    names: dict[str, Any] = {}
    exec(compile(code, "refusal.md", "exec"), names)  # the page's own code
    rates = {
        name: names[name].score(**names["score"]).table.groupby(["kind", "coefficient"])["refusal"].mean().to_dict()
        for name in ("added", "ablated")
    }
    assert rates["added"][("harmful", 0.0)] == 1 and rates["added"][("harmless", 0.0)] == 0
    assert rates["added"][("harmless", 1.0)] == 1
    assert rates["ablated"][("harmful", 1.0)] == 0 and rates["ablated"][("harmless", 1.0)] == 0
