"""The page: self-contained, inert whatever the data, and true to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from steerkit.show.report import _cells, _facts, _table, write_report
from steerkit.sweeps.result import SweepResult
from tests.sweep_tables import tokens

EVIL = "</script><img src=x onerror=alert(1)>'\"&amp;\u2028<!--"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
META = {
    "checkpoint": "HuggingFaceTB/SmolLM2-135M-Instruct", "weights": "Q4_1, dequantised", "dtype": "float32",
    "model_fingerprint": "0f1e2d3c", "adapter_fingerprint": None, "device": "cpu", "n_layers": 30, "d_model": 576,
    "versions": {"python": "3.11.9", "torch": "2.6.0"}, "operation": "add", "positions": "generated", "seed": 7,
    "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 64, "n_prompts": 3, "samples": 1,
}  # fmt: skip
VOID = {"meta", "img", "input", "link", "br", "hr"}


def sweep(vectors: tuple[str, ...] = ("formal", "terse"), text: str = "{} {} {}", prompts: int = 3) -> SweepResult:
    rows = [
        {"vector": vector, "layer": layer, "coefficient": c, "prompt_id": f"q{i}", "sample": 0, "group": f"q{i}",
         "prompt": f"<|user|>\nQuestion {i}?<|end|>\n<|assistant|>", "reference": "Yes." if i else None,
         "text": text.format(vector, c, i) if c else f"plain {i}", "n_tokens": 3, "finished": c < 2, "seed": 7,
         "relative_dose": abs(c) / 10, "trait": float("nan") if i else c / 3}
        for vector in vectors for layer in (8, 12) for c in (-2.0, 0.0, 2.0) for i in range(prompts)
    ]  # fmt: skip
    return SweepResult(pd.DataFrame(rows), META)


class Page(HTMLParser):
    """The elements of a page, its text by tag, and whether every tag that was opened is closed in turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_bytes()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(self.raw.decode())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, *tags: str) -> list[str]:
        return [text.strip() for tag, text in self.text if tag in tags]

    @property
    def style(self) -> str:
        return re.findall(r"<style>(.*?)</style>", self.raw.decode(), re.S)[0]

    @property
    def script(self) -> str:
        return re.findall(r'<script type="module">(.*?)</script>', self.raw.decode(), re.S)[0]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(re.findall(r'id="data">(.*?)</script>', self.raw.decode(), re.S)[0])


@pytest.fixture
def page(tmp_path: Path):
    png = tmp_path / "figure.png"
    png.write_bytes(PIXEL)

    def write(**changes: Any) -> Page:
        given: dict[str, Any] = {
            "title": "Three personas", "summary": ["The first.", "The second."], "notes": ["A note."],
            "tables": {"Gains": pd.DataFrame({"name": ["formal", "terse"], "gain": [0.25, float("nan")]})},
            "figures": {"A curve.": png}, "sweep": sweep(),
        }  # fmt: skip
        write_report(tmp_path / "folder" / "page.html", **{**given, **changes})
        return Page(tmp_path / "folder" / "page.html")

    return write


def test_importing_the_report_loads_no_torch_and_no_matplotlib() -> None:
    code = "import sys, steerkit.show.report; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_page_has_its_parts_and_needs_no_other_file(page: Any) -> None:
    found = page()
    assert found.raw.startswith(b'<!DOCTYPE html>\n<html lang="en">')
    assert found.words("title", "h1") == ["Three personas"] * 2
    assert found.words("h2") == ["Summary", "Texts and curves", "Figures", "Tables", "Notes", "Keys"]
    assert found.words("li") == ["The first.", "The second.", "A note."]
    assert {tag for tag, _ in found.elements}.isdisjoint({"link", "iframe", "object", "base", "form"})
    assert not re.search(rb"https?:|//[a-z]+\.|url\(|@import", found.raw.replace(b"http://www.w3.org/2000/svg", b""))
    assert [image["src"] for image in found.all("img")] == [f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"]
    assert [image["alt"] for image in found.all("img")] == found.words("figcaption") == ["A curve."]
    bare = page(summary=(), tables=None, figures=None, notes=())
    assert bare.words("h2") == ["Texts and curves", "Keys"]
    assert bare.words("a") == ["Link to this text"] and bare.all("nav") == []


def test_the_policy_lets_only_the_pages_own_script_run(page: Any) -> None:
    found = page()
    (policy,) = [meta["content"] for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    style, script = (
        base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in (found.style, found.script)
    )
    assert dict(part.strip().split(" ", 1) for part in str(policy).split(";")) == {
        "default-src": "'none'", "img-src": "data:", "style-src": f"'sha256-{style}'",
        "script-src": f"'sha256-{script}'", "base-uri": "'none'", "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }  # fmt: skip
    assert len(found.all("script")) == 2
    assert "{{" not in found.style and "{%" not in found.script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", found.script)
    assert not any(name.startswith("on") or name == "style" for _, attributes in found.elements for name in attributes)


def test_hostile_text_stays_text_wherever_it_stands(page: Any, tmp_path: Path) -> None:
    harmless = page()
    result = sweep(vectors=(EVIL, "terse"), text=EVIL + "{} {} {}")
    table = result.table.assign(prompt=EVIL, reference=EVIL, prompt_id=EVIL + result.table["prompt_id"]).rename(
        columns={"trait": EVIL}
    )
    meta = {**META, "checkpoint": EVIL, "weights": EVIL, "versions": {EVIL: EVIL}, "seed": EVIL}
    found = page(
        title=EVIL, summary=[EVIL, EVIL], notes=[EVIL], figures={EVIL: tmp_path / "figure.png"},
        tables={EVIL: pd.DataFrame({EVIL: [EVIL, "x"], "gain": [1, 2]})}, sweep=SweepResult(table, meta),
    )  # fmt: skip
    assert EVIL.encode() not in found.raw
    assert b"<img src=x" not in found.raw
    assert "\u2028" not in found.script
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]
    assert found.words("h1") == found.words("figcaption") == found.words("caption") == [EVIL.strip()]
    assert found.data["names"]["vector"][0] == found.data["scores"][0] == EVIL
    assert EVIL + "terse 2.0 0" in found.data["strings"]
    embedded = re.findall(rb'id="data">(.*?)</script>', found.raw, re.S)[0]
    assert not re.search(rb"[<>&]|\xe2\x80[\xa8\xa9]", embedded)


def test_every_row_of_the_sweep_is_in_the_data(page: Any) -> None:
    result = sweep()
    data = page(sweep=result).data
    rows, names, strings = data["rows"], data["names"], data["strings"]
    assert data["scores"] == ["trait", "n_tokens"]
    for place, row in enumerate(result.table.itertuples()):
        prompt = rows["prompt_id"][place]
        assert names["vector"][rows["vector"][place]] == row.vector
        assert names["layer"][rows["layer"][place]] == str(row.layer)
        assert names["prompt_id"][prompt] == row.prompt_id
        assert strings[data["prompts"][prompt]] == row.prompt
        assert (rows["reference"][place] is None) == (row.prompt_id == "q0")
        assert rows["coefficient"][place] == row.coefficient
        assert strings[rows["text"][place]] == row.text
        assert rows["finished"][place] == row.finished
        assert rows["relative_dose"][place] == row.relative_dose
        trait = rows["scores"][0][place]
        assert trait is None if np.isnan(row.trait) else trait == pytest.approx(row.trait, rel=1e-5)
    assert len(strings) == len(set(strings))


def test_a_sweep_with_no_more_than_its_keys_will_do(page: Any) -> None:
    keys = ["vector", "layer", "coefficient", "prompt_id", "sample", "group", "text"]
    data = page(sweep=SweepResult(sweep().table[keys].assign(layer="8+12"))).data
    assert data["names"]["layer"] == ["8+12"]
    assert data["scores"] == []
    assert [data["strings"][place] for place in data["prompts"]] == ["q0", "q1", "q2"]


def test_two_thousand_rows_stay_small_and_texts_are_there_once(page: Any) -> None:
    result = sweep(vectors=tuple("abcdef"), prompts=56)
    words = " ".join(f"word{k}" for k in range(120))
    result = SweepResult(result.table.assign(text=result.table["text"] + words), META)
    assert len(result.table) > 2000
    raw = page(sweep=result).raw
    assert len(raw) < 5e6
    assert raw.count(b"plain 55word0 ") == 1


def test_the_provenance_is_told_in_words(page: Any) -> None:
    found = page()
    facts = dict(zip(found.words("dt"), found.words("dd"), strict=False))  # the keys come after them
    assert facts == {
        "Checkpoint": "HuggingFaceTB/SmolLM2-135M-Instruct", "Weights": "Q4_1, dequantised; computed in float32 on cpu",
        "Fingerprint": "0f1e2d3c", "Model": "30 blocks, width 576", "Steering": "add, positions: generated",
        "Decoding": "greedy, up to 64 new tokens", "Prompts": "3", "Seed": "7",
        "Versions": "python 3.11.9, torch 2.6.0",
    }  # fmt: skip
    changed = {"weights": "float32", "adapter_fingerprint": "ab", "temperature": 0.7, "top_p": 0.9, "samples": 4}
    facts = dict(_facts(SweepResult(sweep().table, {**META, **changed})))
    assert facts["Weights"] == "computed in float32 on cpu"
    assert facts["Fingerprint"] == "0f1e2d3c, adapter ab"
    assert facts["Decoding"] == "temperature 0.7, top p 0.9, up to 64 new tokens"
    assert facts["Prompts"] == "3, 4 samples each"
    facts = dict(_facts(SweepResult(sweep().table)))
    assert list(facts) == ["Checkpoint", "Weights", "Fingerprint", "Seed", "Versions"]
    assert set(facts.values()) == {"not recorded"}


def test_the_provenance_names_the_positions_of_each_vector_where_they_differ() -> None:
    table = sweep().table.assign(role="vector", control_of=None, positions="all")
    assert dict(_facts(SweepResult(table, META)))["Steering"] == "add, positions: all"
    table["positions"] = table["vector"].map({"formal": "all", "terse": "generated:4"})
    merged = SweepResult(table, {**META, "positions": ["all", "generated:4"]})
    assert dict(_facts(merged))["Steering"] == "add, positions: formal: all; terse: generated:4"


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ([0.25, -0.1234567, float("nan")], ["0.250", "\u22120.123", "\u2013"]),
        ([1.0, 0.0461, 0.00049, 1e-9], ["1.000", "0.046", "0.00049", "1e\u221209"]),
        ([-8.0, 0.0, 2.0, None], ["\u22128", "0", "2", "\u2013"]),
        ([1234.5678, 2.0], ["1234.6", "2.0"]),
        ([0.0123, 0.05], ["0.0123", "0.0500"]),
        ([12, -3], ["12", "\u22123"]),
        ([True, False], ["yes", "no"]),
        (["a", None, 1.5, True], ["a", "\u2013", "1.5", "True"]),
        ([float("nan")], ["\u2013"]),
        ([float("inf"), 1.5], ["inf", "1.500"]),
    ],
)
def test_numbers_are_written_for_readers(column: list[Any], cells: list[str]) -> None:
    assert _cells(pd.Series(column)) == cells


def test_tables_show_an_index_that_says_something(page: Any) -> None:
    frame = pd.DataFrame({-2.0: [1.5], 0.5: [2.5]})
    levels = pd.MultiIndex.from_tuples([("a", 8)], names=["vector", "layer"])
    tables = {
        "filtered": frame.set_axis([7]), "named": frame.rename_axis("layer"), "text": frame.set_axis(["formal"]),
        "levels": pd.DataFrame([[1.5]], levels, pd.MultiIndex.from_tuples([("trait", 2.0)])),
    }  # fmt: skip
    heads = [_table(name, table)["head"] for name, table in tables.items()]
    assert heads[:3] == [["\u22122", "0.5"], ["layer", "\u22122", "0.5"], ["", "\u22122", "0.5"]]
    assert heads[3] == ["vector", "layer", "trait / 2"]
    found = page(tables=tables)
    assert found.words("caption") == list(tables)
    assert [region["aria-label"] for region in found.all("div") if region.get("role") == "region"] == list(tables)


def test_controls_are_labelled_and_the_changing_text_is_announced(page: Any) -> None:
    result = sweep()
    found = page(projections=tokens(result.table))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    controls = {str(attributes["id"]) for tag, attributes in found.elements if tag in ("select", "input")}
    assert controls == {"vector", "layer", "prompt_id", "sample", "find", "coefficient", "shade", "single-keys"}
    wrapped = {"shade", "single-keys"}  # these are inside their labels
    assert {label["for"] for label in found.all("label") if "for" in label} == controls - wrapped
    assert set(re.findall(r'at\("([a-z_-]+)"\)', found.script)) <= set(ids)
    (live,) = [attributes for _, attributes in found.elements if "aria-live" in attributes]
    assert live["aria-live"] == "polite"
    assert {link["href"] for link in found.all("a")} <= {f"#{name}" for name in ids}
    assert b"prefers-color-scheme: dark" in found.raw
    assert b"width=device-width" in found.raw


def test_equal_data_gives_equal_bytes_and_an_error_leaves_the_old_page(page: Any, tmp_path: Path) -> None:
    raw = page().raw
    assert page().raw == raw
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"PNG at .*text\.png"):
        page(figures={"x": tmp_path / "text.png"})
    with pytest.raises(FileNotFoundError):
        page(figures={"x": tmp_path / "absent.png"})
    with pytest.raises(ValueError, match="sweep with rows"):
        page(sweep=SweepResult(sweep().table.iloc[:0]))
    for name in ("summary", "notes"):
        with pytest.raises(TypeError, match=f"list of sentences as {name}"):
            page(**{name: "One sentence."})
    folder = tmp_path / "folder"
    assert (folder / "page.html").read_bytes() == raw
    assert [path.name for path in folder.iterdir()] == ["page.html"]


def test_any_text_a_model_can_write_is_kept(page: Any) -> None:
    odd = "\ud83d lone \U0001f600 \x00 \r\n \u2029 \u200f {{ x }} {% y %}"
    table = sweep().table
    table["text"] = pd.Series([odd] * len(table), dtype=object)
    data = page(sweep=SweepResult(table, META), title="\udc80").data
    assert data["strings"][data["rows"]["text"][0]] == odd
