"""The public face: one default per concept, forgiving arguments, short reprs, comparable objects."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.sweeps.layers import label_of, layer_sets, natural_order
from steerkit.sweeps.projections import sweep_projections
from steerkit.text.prompt import render
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Hello", "One two three"]


def vector(model: Any, *layers: int, seed: int = 0, size: float = 4.0) -> sk.SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    return sk.SteeringVector({layer: size * torch.randn(width, generator=generator) for layer in layers})


def default(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


# One default per concept


def test_steering_positions_default_to_from_last_prompt_token_everywhere() -> None:
    for function in (sk.Steering, sk.sweep):
        assert default(function, "positions") == "from_last_prompt_token", function


def test_a_steered_evaluation_has_the_default_positions_of_steering() -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from steerkit.lm_eval import SteeredLM

    assert default(SteeredLM._loaded, "positions") == default(sk.Steering, "positions")


def test_read_position_defaults_to_last_and_top_p_to_one_everywhere() -> None:
    for function in (sk.collect, sk.collect_means):
        assert default(function, "position") == "last"
    for function in (sk.generate, sk.sweep):
        assert default(function, "top_p") == 1.0


def test_steering_keeps_its_positional_order_and_takes_the_layer_by_keyword_only() -> None:
    names = list(inspect.signature(sk.Steering).parameters)
    assert names == ["vector", "coefficient", "positions", "operation", "foreign", "layer", "site", "when", "dose"]
    one = vector(tiny_model(), 1)
    steering = sk.Steering(one, 2.0, "generated", "ablate", True)
    assert (steering.coefficient, steering.positions, steering.operation) == (2.0, "generated", "ablate")
    with pytest.raises(TypeError):
        sk.Steering(one, 2.0, "generated", "add", False, 1)  # type: ignore[misc]


# Layers


def test_a_vector_that_holds_one_layer_needs_no_layer_argument() -> None:
    model = tiny_model()
    assert sk.Steering(vector(model, 2)).layer == 2
    table = sk.sweep(model, tiny_tokenizer(), vector(model, 2), PROMPTS, coefficients=1, max_new_tokens=2).table
    assert set(table["layer"]) == {2}


def test_a_vector_that_holds_several_layers_raises_and_names_them() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"holds 2: \[1, 3\].*layer=3"):
        sk.Steering(vector(model, 1, 3))
    with pytest.raises(ValueError, match=r"holds 2: \[1, 3\]"):
        sk.sweep(model, tiny_tokenizer(), vector(model, 1, 3), PROMPTS, coefficients=1, max_new_tokens=2)


def test_a_chosen_layer_steers_as_the_vector_of_that_layer_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    both = vector(model, 1, 3)

    def texts(steering: sk.Steering | None) -> list[str]:
        return sk.generate(model, tokenizer, PROMPTS, max_new_tokens=6, steering=steering)

    assert texts(sk.Steering(both, layer=3)) == texts(sk.Steering(both.at(3))) != texts(None)
    assert texts(sk.Steering(both, layer=(1, 3))) == texts(sk.Steering(both, layer="all")) != texts(None)
    assert sk.Steering(both, layer=torch.tensor([1, 3])) == sk.Steering(both, layer="all")
    assert sk.Steering(both, layer=np.int64(3)).layer == 3


def test_layers_and_coefficients_are_scalars_lists_ranges_arrays_or_tensors() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    settings: dict[str, Any] = {"max_new_tokens": 2, "stream_norms": {}}
    wanted = sk.sweep(model, tokenizer, vector(model, 1, 2), PROMPTS, layers=[2], coefficients=[0, 0.5, 1], **settings)
    for layers, coefficients in (
        (2, torch.linspace(0, 1, 3)),
        (torch.tensor(2), np.linspace(0, 1, 3)),
        (range(2, 3), (0, 0.5, 1)),
        (np.array([2]), [0.5, 1.0]),
    ):
        found = sk.sweep(
            model, tokenizer, vector(model, 1, 2), PROMPTS, layers=layers, coefficients=coefficients, **settings
        )
        pd.testing.assert_frame_equal(found.table, wanted.table)
    one = sk.sweep(model, tokenizer, vector(model, 1), PROMPTS, coefficients=1.0, **settings)
    assert set(one.table["coefficient"]) == {0.0, 1.0}


def test_layers_keep_their_natural_order_and_type_in_tables_also_when_read_from_a_file(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    layers = ["all", (1, 2), 3, 1, 2]
    result = sk.sweep(
        model, tokenizer, vector(model, 1, 2, 3), PROMPTS, layers=layers, coefficients=1, max_new_tokens=2, out=tmp_path
    )
    for found in (result, sk.SweepResult.load(tmp_path)):
        assert list(dict.fromkeys(found.table["layer"])) == [1, 2, 3, "1+2", "all"]
        assert (found.table["layer"] == 2).sum() == 2 * len(PROMPTS)
        scored = found.score("distinct_2")
        assert list(scored.curve("distinct_2").drop_duplicates("layer")["layer"]) == [1, 2, 3, "1+2", "all"]
        assert list(scored.gain("distinct_2")["layer"]) == [1, 2, 3, "1+2", "all"]
    for suffix in ("csv", "parquet"):
        result.save(tmp_path / f"copy.{suffix}")
        assert list(sk.SweepResult.load(tmp_path / f"copy.{suffix}").table["layer"]) == list(result.table["layer"])
    alone = sk.sweep(model, tokenizer, vector(model, 2), PROMPTS, coefficients=1, max_new_tokens=2)
    assert pd.api.types.is_integer_dtype(alone.table["layer"])


def test_several_layers_at_once_are_not_one_after_the_other() -> None:
    assert layer_sets((1, 2)) == [1, 2]  # a tuple alone is a list of layers, as for `collect`
    assert layer_sets([(1, 2)]) == [(1, 2)]
    assert [label_of(place) for place in layer_sets([(8, 10), 3, "all"])] == ["8+10", 3, "all"]
    assert sorted(["all", "8+10", 12, "2+3", 2], key=natural_order) == [2, 12, "2+3", "8+10", "all"]


def test_texts_steered_at_several_layers_are_projected_on_the_last_of_them() -> None:
    model, tokenizer, both = tiny_model(), tiny_tokenizer(), vector(tiny_model(), 1, 2)
    layers = [2, (1, 2), "all"]
    table = sk.sweep(
        model, tokenizer, both, PROMPTS, layers=layers, coefficients=1, max_new_tokens=4, stream_norms={}
    ).table
    plain = sweep_projections(model, tokenizer, table[table["coefficient"] == 0], {"vector": both})
    parts = [part["projection"].tolist() for _, part in plain.groupby(plain["layer"].astype(str))]
    assert len(parts) == 3 and parts[0] == parts[1] == parts[2]


# Comparison and display


def test_steerings_can_be_compared_hashed_and_put_into_sets_and_dictionaries() -> None:
    model = tiny_model()
    one, two = sk.Steering(vector(model, 1), 1.0), sk.Steering(vector(model, 1), 2.0)
    per_row = sk.Steering(vector(model, 1), torch.tensor([1.0, 2.0]))
    assert one != two and per_row != one and one == one.scaled(1.0)
    assert one in [two, one] and per_row in [one, per_row] and None not in [one]
    assert len({one, two, per_row}) == 3
    assert {one: "a"}[one.scaled(1.0)] == "a"


def test_a_sweep_result_has_a_short_repr_that_counts_prompts_and_an_html_one() -> None:
    model = tiny_model()
    rows = [{"prompt": text, "group": "g"} for text in PROMPTS]
    result = sk.sweep(model, tiny_tokenizer(), vector(model, 1), rows, coefficients=1, max_new_tokens=2)
    assert repr(result) == "SweepResult(4 rows, 1 vectors, 1 layers, 2 coefficients, 2 prompts in 1 groups)"
    assert "<table" in result._repr_html_() and len(repr(result)) < 200


def test_version_and_subpackages_are_attributes_after_import_and_cost_nothing_before() -> None:
    code = (
        "import sys, steerkit as sk; light = 'torch' not in sys.modules; "
        "names = [sk.plots.__name__, sk.scores.__name__, sk.stats.__name__, sk.controls.__name__]; "
        "import json; print(json.dumps([light, sk.__version__, names, sorted(set(names) & set(dir(sk)))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light, version, names, _ = json.loads(done.stdout)
    assert light and version.count(".") == 2
    assert names == ["steerkit.show.plots", "steerkit.scores", "steerkit.stats", "steerkit.vectors.controls"]


# Prompts and generation


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if tools %}[tools {{ tools | length }}]{% endif %}{% if enable_thinking %}[think]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_template_arguments_reach_the_chat_template_in_render_generate_and_sweep() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "hi"}]
    assert render(tokenizer, chat).text == "<user>hi<assistant>"
    given = {"enable_thinking": True, "tools": [{"type": "function"}], "add_generation_prompt": False}
    text = "<user>hi[tools 1][think]"
    assert render(tokenizer, chat, given).text == text
    one = {"max_new_tokens": 6}
    with_arguments = sk.generate(model, tokenizer, [chat], chat_template_kwargs=given, **one)
    assert (
        with_arguments == sk.generate(model, tokenizer, [text], **one) != sk.generate(model, tokenizer, [chat], **one)
    )
    swept = sk.sweep(
        model, tokenizer, vector(model, 1), [chat], coefficients=0, chat_template_kwargs=given, max_new_tokens=6
    )
    assert swept.table["prompt"].tolist() == [text] and swept.table["text"].tolist() == with_arguments


def test_generate_returns_details_with_text_ids_finish_reason_and_one_log_probability_per_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    steering = sk.Steering(vector(model, 1, size=1.0), 1.0)
    prompts = [*PROMPTS, "x"]
    for temperature in (0.0, 1.0):
        settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "steering": steering}
        records = sk.generate(model, tokenizer, prompts, return_details=True, batch_rows=2, **settings)
        assert [record.text for record in records] == sk.generate(model, tokenizer, prompts, **settings)
        for prompt, record in zip(prompts, records, strict=True):
            assert len(record.log_probs) == len(record.ids) and max(record.log_probs) <= 0
            ended = record.ids[-1] == 256
            assert record.finish_reason == ("stop" if ended else "length") and (ended or len(record.ids) == 12)
            ids = torch.tensor([[*tokenizer(prompt)["input_ids"], *record.ids]])
            start = ids.shape[1] - len(record.ids)
            with torch.no_grad(), steering.on(model, prompt_length=start):
                logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            slow = logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(record.log_probs), slow, atol=1e-4, rtol=1e-4)


def test_an_end_token_that_was_generated_is_among_the_ids_and_has_a_log_probability() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    first = sk.generate(model, tokenizer, ["Hello"], max_new_tokens=1, return_details=True)[0].ids[0]
    model.generation_config.eos_token_id = [256, first]
    record = sk.generate(model, tokenizer, ["Hello"], max_new_tokens=5, return_details=True)[0]
    assert record.ids == (first,) and record.finish_reason == "stop" and len(record.log_probs) == 1
    assert record.text == ""


# Controls


def test_a_control_is_known_by_its_role_and_not_by_its_name() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    named = {"random_forest_persona": vector(model, 1), "calm": vector(model, 1, seed=1)}
    named |= sk.controls.random({"calm": named["calm"]}, n=2)
    result = sk.sweep(model, tokenizer, named, PROMPTS, coefficients=1, max_new_tokens=6)
    roles = result.table.drop_duplicates("vector").set_index("vector")
    assert roles["role"].to_dict() == {
        "random_forest_persona": "vector",
        "calm": "vector",
        "calm/random-0": "random",
        "calm/random-1": "random",
    }
    assert roles.loc["calm/random-0", "control_of"] == "calm"
    gains = result.score("distinct_2").gains("distinct_2")
    assert set(zip(gains["vector"], gains["over"], strict=True)) == {
        ("random_forest_persona", "coefficient 0"),
        ("calm", "coefficient 0"),
        ("calm", "random"),
    }
    assert set(result.score("distinct_2").gain("distinct_2")["vector"]) == {"random_forest_persona", "calm"}


def test_roles_survive_the_vector_file_and_the_table_file(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    named = {"v": vector(model, 1), **sk.controls.random({"v": vector(model, 1)}, n=1)}
    for number, one in enumerate(named.values()):
        one.save(tmp_path / f"{number}.safetensors")
    loaded = {name: sk.SteeringVector.load(tmp_path / f"{i}.safetensors") for i, name in enumerate(named)}
    sk.sweep(model, tokenizer, loaded, PROMPTS, coefficients=1, max_new_tokens=2, out=tmp_path / "run")
    assert sk.SweepResult.load(tmp_path / "run").roles() == {"v": ("vector", None), "v/random-0": ("random", "v")}
