from __future__ import annotations

import json

import pandas as pd
import pytest

from steerkit.demo.pages import shown_gains, shown_means
from steerkit.demo.questions import PLAIN, instruction_pairs, read_questions, split
from steerkit.demo.run import SCORES, DemoSettings, run_demo
from steerkit.demo.traits import PERSONAS, TRAITS, has_answer
from steerkit.io.json import canonical_json
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table
from steerkit.text.pairs import read_pairs
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = DemoSettings(
    train=12,
    choose=3,
    dose=3,
    test=4,
    max_new_tokens=6,
    first_coefficients=(1.0,),
    coefficients=(0.0, 1.0, 2.0),
    controls=2,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    model, tokenizer = tiny_model(context=2048), tiny_tokenizer()
    return model, tokenizer, out, run_demo(model, tokenizer, out, SMALL)


def test_the_demo_writes_every_table_figure_and_page(demo) -> None:
    _, _, out, summary = demo
    tables = ["gains.csv", "means.csv", "dose_curves.csv", "places.csv", "test.parquet", "validation.parquet"]
    for name in (*tables, "probes-answers-mean.csv", "probes-instructions-last.csv"):
        table, meta = read_table(out / "tables" / name)
        assert len(table) and meta["columns"] == list(table.columns)
        assert table["weights"].eq("float32").all()
    for name in ("dose", "gains", "probes-answers-mean", "probes-instructions-last"):
        assert (out / "figures" / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert (out / "figures" / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    page = (out / "report.html").read_text()
    assert "float32" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert set(summary["verdicts"]) == set(PERSONAS) == set(json.loads((out / "choice.json").read_text()))
    gains = pd.read_csv(out / "tables" / "gains.csv")
    assert len(gains) == 3 * 4 * 3
    verdicts, _ = read_table(out / "tables" / "verdicts.csv")
    assert verdicts["persona"].tolist() == list(PERSONAS)
    assert {"right_unsteered", "right_steered", "right_kept_low", "gain_over_zero_high", "layer"} <= set(verdicts)
    assert gains["weights"].eq("float32").all()
    assert (gains["p_holm"].dropna() >= gains["p"].dropna()).all()


def test_every_table_of_the_report_fits_a_desktop_and_its_labels_keep_their_words_on_a_phone(demo, tab) -> None:
    page = demo[2] / "report.html"
    tab.window(1280)
    tab.open(page)
    boxes = "[...document.querySelectorAll('#summary .scroll, #tables .scroll')]"
    assert tab.js(f"{boxes}.map((e) => e.scrollWidth - e.clientWidth)") == [0] * 5
    tab.window(400)
    labels = "[...document.querySelectorAll('#summary td, #tables td')].map((e) => getComputedStyle(e, '::before'))"
    assert set(tab.js(f"{labels}.map((s) => s.overflowWrap)")) == {"normal"}
    assert tab.js(f"Math.min(...{labels}.map((s) => parseFloat(s.width)))") > 100
    assert tab.js("document.documentElement.scrollWidth") <= 400


def test_a_printed_figure_fits_a_page_with_its_caption(demo, tab) -> None:
    tab.window(1032, media="print")
    tab.open(demo[2] / "report.html")
    height = tab.js("Math.max(...[...document.querySelectorAll('figure')].map((e) => e.offsetHeight))")
    assert 100 < height < 186 / 25.4 * 96  # A4, landscape, without its margins


def test_the_reports_tables_have_plain_names_and_p_of_controls_by_rank_only(demo) -> None:
    tables = demo[2] / "tables"
    gains = shown_gains(read_table(tables / "gains.csv")[0])
    controls = gains["over"] != "coefficient 0"
    assert gains.loc[controls, "p (sign-flip, Holm)"].isna().all() and gains.loc[~controls, "p by rank"].isna().all()
    means = shown_means(read_table(tables / "means.csv")[0])
    shown = {str(value) for table in (gains, means) for column in table for value in (column, *table[column])}
    assert not any(name in shown for name in (*SCORES, "p_rank", "p_holm", *PERSONAS))
    assert {"numbered steps: random directions", "ROUGE-L with the reference"} <= shown
    assert not gains["score"].isna().any() and not means["vector"].isna().any()


def test_every_dose_has_its_controls_and_the_test_has_its_random_directions(demo) -> None:
    _, _, out, summary = demo
    test = pd.read_parquet(out / "tables" / "test.parquet")
    for persona, choice in summary["choices"].items():
        mine = test[test["persona"] == persona]
        names = {persona} | {f"{persona}/{kind}-{k}" for kind in ("random", "shuffled") for k in range(2)}
        assert set(mine["vector"]) == names
        assert set(mine["coefficient"]) == {0.0, choice["coefficient"]}
        doses = mine[mine["coefficient"] != 0].groupby("vector")["relative_dose"].mean()
        assert doses.max() - doses.min() < 1e-6 * doses.max()
        assert set(mine["layer"]) == {choice["layer"]}
        assert mine["prompt_id"].nunique() == 4
        scored = mine[mine["n_tokens"] > 1].groupby("vector")["perplexity"].count()
        for kind in ("random", "shuffled"):
            assert scored[f"{persona}/{kind}-1"] == 0 < scored[f"{persona}/{kind}-0"]


def test_the_provenance_of_a_joined_table_is_that_of_all_its_parts(demo) -> None:
    _, _, out, summary = demo
    for name in ("validation", "test"):
        table, meta = read_table(out / "tables" / f"{name}.parquet")
        named = set(table["vector"])
        assert named == set(meta["vectors"])
        positions = meta["positions"] if isinstance(meta["positions"], list) else [meta["positions"]]
        assert set(positions) == set(table["positions"]) == {one["positions"] for one in summary["choices"].values()}


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("1. 3 x 6.50 = 19.50\n2. Change: 6.25.", "6.25", 1.0), ("She has 50 g.", "750 g", 0.0),
        ("at 12:35", "12:35", 1.0), ("at 12:53", "12:35", 0.0), ("It is 3,060.0 m", "3,060 metres", 1.0),
        ("On saturday, then", "Saturday", 1.0), ("", "42", 0.0), ("It is 42.", "42", 1.0),
        ("[5,6]", "6", 1.0), ("1,2345", "2345", 1.0), ("6,25", "625", 0.0), ("1,234,567", "1234567", 1.0),
        ("3,060,1", "3060", 0.0), ("3,060, then", "3060", 1.0),
    ],
)  # fmt: skip
def test_a_text_has_the_answer_where_it_names_its_number(text, answer, right) -> None:
    assert has_answer(text, answer) == right


def test_the_answer_of_another_question_is_seldom_in_a_right_text() -> None:
    questions = read_questions()
    own = [has_answer(q.answers[style], q.answer) for q in questions for style in (PLAIN, *PERSONAS)]
    others = [has_answer(q.answers["plain"], questions[i - 1].answer) for i, q in enumerate(questions)]
    assert sum(own) / len(own) > 0.9 and sum(others) / len(others) < 0.1


def test_no_question_is_in_two_parts(demo) -> None:
    parts = json.loads((demo[2] / "splits.json").read_text())
    ids = [i for part in parts.values() for i in part]
    assert len(ids) == len(set(ids)) == 12 + 3 + 3 + 4
    pairs = read_pairs(demo[2] / "pairs" / "steps-answers.jsonl")
    assert {pair.group for pair in pairs} == set(parts["train"])


def test_a_resumed_demo_repeats_nothing_and_ends_the_same(demo, monkeypatch) -> None:
    model, tokenizer, out, summary = demo
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in ("summary.json",)}
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("a forward ran"))
    again = run_demo(model, tokenizer, out, SMALL)
    assert canonical_json(again["verdicts"]) == canonical_json(summary["verdicts"])  # a NaN equals itself
    changed = [p.name for p, data in before.items() if p.read_bytes() != data]
    assert changed == []


def test_the_demo_refuses_a_folder_of_other_settings(demo) -> None:
    model, tokenizer, out, _ = demo
    with pytest.raises(ConfigurationChanged, match="max_new_tokens: 6 -> 7"):
        run_demo(model, tokenizer, out, DemoSettings(**{**SMALL.__dict__, "max_new_tokens": 7}))


def test_there_are_enough_pairs_and_test_questions_for_each_persona() -> None:
    questions = read_questions()
    sizes = DemoSettings()
    assert sizes.train >= 64 and sizes.test >= 32 and sizes.controls >= 19 and len(sizes.coefficients) >= 9
    parts = split(questions, {k: getattr(sizes, k) for k in ("train", "choose", "dose", "test")})
    assert [len(part) for part in parts.values()] == [sizes.train, sizes.choose, sizes.dose, sizes.test]
    assert len({q.question for q in questions}) == len(questions)
    assert all(set(q.answers) == {PLAIN, *PERSONAS} for q in questions)
    with pytest.raises(ValueError, match="at most 132"):
        split(questions, {"all": 133})


@pytest.mark.parametrize("persona", PERSONAS)
def test_a_trait_score_is_high_on_its_own_persona_and_zero_on_plain_answers(persona: str) -> None:
    questions = read_questions()

    def mean(manner: str) -> float:
        return sum(TRAITS[persona](q.answers[manner]) for q in questions) / len(questions)

    assert mean(PLAIN) == 0
    others = [manner for manner in PERSONAS if manner != persona]
    assert mean(persona) > 0.15 > 10 * max(mean(manner) for manner in others)


@pytest.mark.parametrize(
    ("persona", "text", "score"),
    [
        ("steps", "1. Do this.\n2. Do that.", 1.0),
        ("steps", "Step 1: do this\nand so on", 0.5714),
        ("steps", "The answer is 1.5 and 2. Done", 0.0),
        ("steps", "", 0.0),
        ("critique", "It is 4. Let me check: 2 + 2 is 4.", 0.7273),
        ("critique", "The cheque is in the mail.", 0.0),
        ("program", "x = 3 // three\ny = x + 1", 1.0),
        ("program", "So x = 3 and y = 4 here.", 0.0),
        ("program", "if a == b then it is fine", 0.0),
        ("program", "x == 3", 0.0),
        ("program", "return total;", 1.0),
    ],
)
def test_trait_scores_of_hand_worked_texts(persona: str, text: str, score: float) -> None:
    words = len(text.split())
    found = TRAITS[persona](text)
    assert found == pytest.approx(score, abs=1e-4), (found, words)


def test_instruction_pairs_end_where_the_model_begins_to_answer() -> None:
    tokenizer = tiny_tokenizer()
    for pair in instruction_pairs(tokenizer, read_questions()[:3], "steps"):
        assert pair.positive.endswith("<|assistant|>") and pair.negative.endswith("<|assistant|>")
        assert "numbered list" in pair.positive and "short paragraph" in pair.negative
        assert pair.positive not in pair.prompt.text


def test_references_cut_to_the_demos_length_show_every_style_but_self_critique(smollm) -> None:
    _, tokenizer = smollm
    scores = {}
    for persona in PERSONAS:
        texts = [question.answers[persona] for question in read_questions()]
        cut = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:32]) for text in texts]
        scores[persona] = [TRAITS[persona](text) for text in cut]
    assert len(scores["critique"]) == 132 and scores["critique"].count(0) == 127  # docs/demo.md says so
    for persona in ("steps", "program"):
        assert sum(scores[persona]) / 132 > 0.95
