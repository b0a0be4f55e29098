"""The scripts of docs/recipes: at most 15 lines, and each runs on a tiny model in which the effect was planted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit as sk
from analysis.recipes.jobs import script
from steerkit.sweeps.result import FewWarning
from steerkit.text.prompt import encode_prompt
from tests.hub_stub import hub
from tests.scripted_server import Call, Scripted, answer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.vectors.test_sae import OLD as SAE_CONFIG
from tests.vectors.test_sae import write as write_autoencoder

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.md"))


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_script_has_at_most_15_lines_of_100_characters(page: Path) -> None:
    lines = [line for line in script(page.stem).splitlines() if line.strip()]
    assert len(lines) <= 15 and max(map(len, lines)) <= 100


def keep(folder: Path, name: str, model: Any, tokenizer: Any) -> None:
    """Write a checkpoint to the folder that a page loads."""
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


MAY_CHANGE = re.compile(r"[A-Z]+|http://127\.0\.0\.1:8000")
"""What a test may replace in a page's code: a placeholder in capitals, or the address of a server."""


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, str]) -> dict[str, Any]:
    """Run a page's own code in a folder, with its placeholders filled in; return its variables."""
    code = script(name)
    for old, new in changes.items():
        assert MAY_CHANGE.fullmatch(old), old
        code, count = re.subn(rf"(?<![A-Z]){re.escape(old)}(?![A-Z])", new, code)
        assert count, old
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, f"{name}.md", "exec"), names)
    return names


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch) -> None:
    """The answers of judges are kept in a folder of the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def refusing_model(mark: str = "!", refusal: str = "S") -> tuple[Any, Any]:
    """A model that writes a refusal if a prompt holds a mark.

    The mark's token writes a direction, a head averages it over all positions. A refusal of several letters becomes a
    token.
    """
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    if len(refusal) > 1:
        tokenizer.add_tokens([refusal])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(7))
    direction /= direction.norm()
    marked, question, refused = (encode_prompt(tokenizer, one)[0] for one in (mark, "?", refusal))
    with torch.no_grad():
        for block in model.model.layers:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= torch.outer(direction, direction @ weight)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding -= torch.outer(embedding @ direction, direction)
        embedding[marked] = embedding[question] + 12 * direction
        attention = model.model.layers[0].self_attn
        for part in (attention.q_proj, attention.k_proj):
            part.weight.zero_()
            part.bias.zero_()
        attention.v_proj.weight[0] = 40 * direction
        attention.o_proj.weight[:, 0] = direction
        head -= torch.outer(head @ direction, direction)
        head[refused] = 2 * direction - 0.3
    return model, tokenizer


def write_refusal_data(folder: Path, test_mark: str = "!") -> None:
    """Prompts of both kinds; harmful ones end in the mark that is refused, or in `test_mark` in the test split."""
    words = ["the sky", "a tree", "my book", "that river", "one door", "some rain", "her song", "no lamp", "a cat"]
    splits = ["train"] * 4 + ["validation"] * 3 + ["test"] * 2
    for kind, mark, order in (("harmful", "!", words), ("harmless", "?", words[::-1])):
        ends = {"train": mark, "validation": mark, "test": test_mark if kind == "harmful" else mark}
        rows = [{"split": at, "instruction": f"{word}{ends[at]}"} for at, word in zip(splits, order, strict=True)]
        write_lines(folder / f"{kind}.jsonl", rows)


def test_the_refusal_recipe_turns_refusals_on_by_addition_and_off_by_ablation(tmp_path, monkeypatch, capsys) -> None:
    write_refusal_data(tmp_path / "DATA")
    keep(tmp_path, "CHECKPOINT", *refusing_model(refusal="Sorry"))
    with pytest.warns(FewWarning):
        run("refusal", tmp_path, monkeypatch, {})
    rates, added, ablated = re.split(r"\n(?= +gain )", capsys.readouterr().out)
    assert "{'harmful': 1.0, 'harmless': 0.0}" in rates.replace("np.float64(", "").replace(")", "")
    assert "not testable" not in rates
    for table, gain in ((added, 1.0), (ablated, -1.0)):
        plain, random = table.splitlines()[1:]
        assert re.search(rf"^0 +{gain}0* .* coefficient 0$", plain) and random.endswith(" random")


def test_the_refusal_recipe_leaves_the_ablation_out_where_fewer_than_half_of_the_harmful_prompts_are_refused(
    tmp_path, monkeypatch, capsys
) -> None:
    write_refusal_data(tmp_path / "DATA", test_mark="?")
    keep(tmp_path, "CHECKPOINT", *refusing_model(refusal="Sorry"))
    with pytest.warns(FewWarning):
        run("refusal", tmp_path, monkeypatch, {})
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].endswith("ablation: not testable on this model") and printed.count(" random\n") == 1


def test_the_persona_recipe_finds_a_planted_trait_and_steers_test_questions_with_it(tmp_path, monkeypatch) -> None:
    words = ["the sky", "a tree", "my book", "that river", "one door", "some rain", "her song", "no lamp"]
    asked = [[{"role": "user", "content": f"{word}?"}] for word in words]
    marks = {"positive": "!", "negative": "?"}
    rows = [
        {"label": label, "prompt": [{"role": "system", "content": f"Be{mark}"}, *chat]}
        for label, mark in marks.items()
        for chat in asked[:3]
    ]
    write_lines(tmp_path / "DATA" / "read.jsonl", rows)
    write_lines(tmp_path / "DATA" / "valid.jsonl", [{"prompt": chat} for chat in asked[3:5]])
    write_lines(tmp_path / "DATA" / "test.jsonl", [{"prompt": chat} for chat in asked[5:]])
    keep(tmp_path, "CHECKPOINT", *refusing_model())
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def rate(call: Call, _: int) -> None:
        text = call.question.partition("<text>\n")[2].partition("\n</text>")[0]
        call.json(answer(str(100 * text.count("S") // max(1, len(text)))))

    with Scripted(rate) as server, pytest.warns(FewWarning):
        changes = {"http://127.0.0.1:8000": server.url, "LAYERS": "[0, 1, 2]"}
        names = run("persona-vectors", tmp_path, monkeypatch, changes)
    assert names["kept"]["label"].tolist() == ["positive"] * 3 + ["negative"] * 3
    vector = sk.SteeringVector.load(tmp_path / "VECTOR.safetensors")
    assert vector == names["v"] and sorted(vector.layers) == [0, 1, 2, 3]
    gains = names["gains"]
    assert (gains["gain"] > 60).all() and set(gains["over"]) == {"coefficient 0", "random"} and set(gains["n"]) == {3}


def test_the_monitoring_recipe_shows_the_trait_at_the_end_of_the_prompt_and_in_the_text(tmp_path, monkeypatch) -> None:
    model, tokenizer = refusing_model(mark=".")
    keep(tmp_path, "CHECKPOINT", model, tokenizer)
    direction = model.lm_head.weight[encode_prompt(tokenizer, "S")[0]].detach() + 0.3
    sk.SteeringVector({2: direction}, {"model_type": "qwen2"}).save(tmp_path / "VECTOR.safetensors")
    names = run("monitoring", tmp_path, monkeypatch, {"LAYER": "2"})
    table, written = names["table"], names["written"]
    cheerful, plain = (part for _, part in table.groupby("text"))
    assert float(cheerful["after"][cheerful["prompt_end"]].iloc[0]) > float(plain["after"][plain["prompt_end"]].iloc[0])
    new = cheerful[~cheerful["in_prompt"]]
    assert new["after"].tolist() == pytest.approx(written[0].projections["mood"]["after"].tolist(), rel=1e-4)
    assert {path.name for path in tmp_path.glob("*.pdf")} == {"monitoring.pdf", "monitoring-steered.pdf"}


def test_the_checkpoint_recipe_tells_a_slightly_changed_model_from_another_one(tmp_path, monkeypatch, capsys) -> None:
    sft = tiny_model()
    with torch.no_grad():
        for parameter in sft.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    models = {"BASE": tiny_model(), "SFT": sft, "IMAD": tiny_model(seed=1)}
    for name, model in models.items():
        keep(tmp_path, name, model, tiny_tokenizer())
    sk.write_pairs(tmp_path / "PAIRS.jsonl", [sk.ContrastPair(f"word {i}", " yes", " no", str(i)) for i in range(12)])
    names = run("checkpoints", tmp_path, monkeypatch, {})
    vectors = names["vectors"]
    assert vectors["BASE"].cosine(vectors["SFT"])[3] > 0.9 > abs(vectors["BASE"].cosine(vectors["IMAD"])[3])
    assert {path.name for path in tmp_path.glob("*.pdf")} == {"profiles.pdf", "cosines.pdf"}
    printed = capsys.readouterr().out
    assert printed.count(r"\\") == 1 + len(models) and "BASE & " in printed


def test_the_lm_eval_recipe_gives_the_cost_of_a_steering_per_item_and_against_random_directions(
    tmp_path, monkeypatch, capsys
) -> None:
    harness = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"Question {i}: what {'is' * (1 + i % 3)} {i}?", "answer": i % 2} for i in range(12)]
    write_lines(tmp_path / "tasks" / "questions.jsonl", rows)
    task = (
        "task: arc_easy\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/tasks/questions.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: ["A", "B"]\n'
        'doc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\nmetadata:\n  version: 1\n'
    )
    (tmp_path / "tasks" / "arc_easy.yaml").write_text(task)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(harness, "simple_evaluate", partial(harness.simple_evaluate, task_manager=manager))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    keep(tmp_path, "CHECKPOINT", model, tokenizer)
    letters = [encode_prompt(tokenizer, letter)[0] for letter in "AB"]
    rows_of_letters = model.lm_head.weight[letters].detach()
    sk.SteeringVector({3: rows_of_letters[0] - rows_of_letters[1]}).save(tmp_path / "VECTOR.safetensors")
    names = run("lm-eval", tmp_path, monkeypatch, {"LAYER": "3", "COEFFICIENT": "40.0"})
    assert names["right"]["steered"].tolist() == [1.0, 0.0] * 6  # A everywhere
    assert names["right"]["plain"].tolist() != names["right"]["steered"].tolist()
    assert "Interval(" in capsys.readouterr().out


def test_the_sharing_recipe_uploads_file_and_card_and_downloads_the_same_vector(tmp_path, monkeypatch, capsys) -> None:
    import huggingface_hub

    meta = {"checkpoint": "org/model", "d_model": 8, "n_layers": 4, "read_position": "last", "method": "mean"}
    vector = sk.SteeringVector({2: torch.arange(8.0)}, meta)
    vector.save(tmp_path / "VECTOR.safetensors")
    with hub() as stub:
        made = partial(huggingface_hub.HfApi, endpoint=stub.url, token="hf_of_the_test")
        monkeypatch.setattr(huggingface_hub, "HfApi", made)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the stub is on this machine
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        names = run("sharing", tmp_path, monkeypatch, {"USER": "someone"})
        files = stub.files["someone/cheerful-vector"]
    assert names["pulled"] == vector and names["pulled"].meta["checkpoint"] == "org/model"
    assert files["vector.safetensors"] == (tmp_path / "VECTOR.safetensors").read_bytes()
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.library_name == "steerkit" and "- checkpoint: `org/model`" in card.text
    assert capsys.readouterr().out.startswith("True org/model")


def test_the_baking_recipe_writes_checkpoints_that_write_the_steered_texts(tmp_path, monkeypatch, capsys) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    keep(tmp_path, "CHECKPOINT", model, tokenizer)
    vector = sk.SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(3))})
    vector.save(tmp_path / "VECTOR.safetensors")
    names = run("baking", tmp_path, monkeypatch, {"LAYER": "2"})
    printed = capsys.readouterr().out.splitlines()
    (text,) = sk.generate(model, tokenizer, ["The sea is"], max_new_tokens=8, steering=sk.Steering(vector, 1.0, "all"))
    assert printed[0].startswith("added") and repr(text) in printed[0] and printed[1].startswith("ablated")
    assert not names["baked"].config.tie_word_embeddings


def test_the_sae_recipe_reads_a_feature_and_steers_with_its_row(tmp_path, monkeypatch, capsys) -> None:
    keep(tmp_path, "CHECKPOINT", tiny_model(), tiny_tokenizer())
    write_autoencoder(tmp_path / "SAE", SAE_CONFIG)  # of resid_pre of layer 2
    names = run("sae", tmp_path, monkeypatch, {"ROW": "3", "COEFFICIENT": "8.0"})
    assert names["row"].index == 3 and (names["table"]["before"] > names["row"].above).sum() > 0
    assert "SteeringVector(resid_pre" in capsys.readouterr().out


def test_the_caa_recipe_measures_test_questions_at_the_layer_that_others_chose(tmp_path, monkeypatch) -> None:
    rows = []
    for i in range(32):
        answers = [" (A)", " (B)"][:: 1 if i % 2 else -1]
        question = f"Is {i} good?\n\nChoices:\n (A) Yes.\n (B) No."
        rows.append(
            {"question": question, "answer_matching_behavior": answers[0], "answer_not_matching_behavior": answers[1]}
        )
    write_lines(tmp_path / "DATA" / "BEHAVIOR.jsonl", rows)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    keep(tmp_path, "CHECKPOINT", model, tokenizer)
    names = run("caa", tmp_path, monkeypatch, {"LAYERS": "[1, 2]"})
    gains, best = names["gains"], names["best"]
    assert best == names["slopes"].groupby("layer")["slope"].mean().idxmax() and set(gains["layer"]) == {best}
    assert set(gains["n"]) == {16} and set(gains["k"]) == {0, 19}
    assert gains.groupby("over")["dose"].agg(list).tolist() == [[-0.4, -0.2, 0.2, 0.4]] * 2
    questions = [{row["prompt"][0]["content"] for row in names[part]} for part in ("valid", "test")]
    assert not questions[0] & questions[1] and len(names["acts"].items) == 2 * 8
    for part in ("valid", "test"):  # A is the matching answer as often as B
        letters = [row["choices"][0] for row in names[part]]
        assert letters.count(" (A)") == letters.count(" (B)") == len(letters) // 2
    assert (tmp_path / "runs" / "test" / "rows.jsonl").is_file()
    table = names["swept"].table.query("vector == 'caa' and layer == @best and dose == 0.2")
    assert set(table["relative_dose"].round(6)) == {0.2}
    steering = sk.Steering(names["vectors"]["caa"], table["coefficient"].iloc[0], layer=best)
    prompts, choices = ([row[key] for row in names["test"]] for key in ("prompt", "choices"))

    def mean(steering: sk.Steering | None) -> float:
        scored = sk.score_choices(model, tokenizer, prompts, choices, steering=steering)
        return float(scored.groupby("prompt")["probability"].first().mean())

    wanted = gains[(gains["over"] == "coefficient 0") & (gains["dose"] == 0.2)]["gain"].item()
    assert wanted == pytest.approx(mean(steering) - mean(None), abs=1e-5)
    assert (tmp_path / "caa.pdf").is_file()


def test_the_recipe_of_a_growing_sweep_generates_only_missing_rows_and_prints_latex(
    tmp_path, monkeypatch, capsys
) -> None:
    write_lines(tmp_path / "PROMPTS.jsonl", [{"id": str(i), "prompt": f"word {i}"} for i in range(10)])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    keep(tmp_path, "CHECKPOINT", model, tokenizer)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    sk.SteeringVector({2: torch.linspace(-4, 4, 32)}).save(tmp_path / "VECTOR.safetensors")

    def rate(call: Call, _: int) -> None:
        text = call.question.partition("<text>\n")[2].partition("\n</text>")[0]
        call.json(answer(str(len(text) % 7)))

    with Scripted(rate) as server, pytest.warns(FewWarning):
        names = run("growing-sweep", tmp_path, monkeypatch, {"http://127.0.0.1:8000": server.url, "LAYER": "2"})
        sent = [call.question for call in server.calls]
    assert len(sent) == len(set(sent)) == names["grown"].table["text"].nunique()
    rows = [json.loads(line) for line in (tmp_path / "runs" / "trait" / "rows.jsonl").read_text().splitlines()]
    keys = [json.dumps(row["key"]) for row in rows]
    assert len(keys) == len(set(keys)) == 10 + 20 * 3 * 10  # the unsteered texts once
    assert len(names["first"].table) == 2 * 5 and len(names["grown"].table) == 20 * 4 * 10
    assert capsys.readouterr().out.count(r"\\") == 1 + len(names["gains"]) == 7
