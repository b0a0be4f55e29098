"""Files of vectors, whoever wrote them: each acts where it was read, comes back as it was, or is refused whole."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

import steerkit as sk
from steerkit.vectors.convert import from_steering_vectors, write_vectors
from steerkit.vectors.vector import SteeringVector
from tests.tiny import tiny_model
from tests.vector_files import THEIRS, made, read, same, their_gguf, values, write

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])


def hooked(model, layers: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits with each vector added to what its block returns, by plain hooks: the slow truth of "after block l"."""
    handles = [
        model.model.layers[layer].register_forward_hook(lambda _, __, out, value=value: out + value)
        for layer, value in layers.items()
    ]
    try:
        with torch.no_grad():
            return model(input_ids=IDS).logits
    finally:
        for handle in handles:
            handle.remove()


def steered(model, vector: SteeringVector) -> torch.Tensor:
    with torch.no_grad(), sk.Steering(vector, 1.0, "all", foreign=True, layer="all").on(model):
        return model(input_ids=IDS).logits


def shifted(vector: SteeringVector, by: int) -> SteeringVector:
    return SteeringVector({layer + by: value for layer, value in vector.layers.items()}, vector.meta)


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda write: write.__name__)
def test_an_imported_vector_acts_where_its_project_read_it_and_a_shift_by_one_would_be_seen(theirs, tmp_path) -> None:
    model, layers = tiny_model(), values(2)
    theirs(tmp_path / "v.file", layers)
    (vector,) = read(tmp_path / "v.file").values()
    truth = hooked(model, layers)
    assert torch.allclose(steered(model, vector), truth, atol=1e-5)
    assert float((hooked(model, {}) - truth).abs().max()) > 0.1
    for by in (-1, 1):
        assert float((steered(model, shifted(vector, by)) - truth).abs().max()) > 0.1


def test_steering_vectors_own_hooks_give_the_same_logits_both_ways() -> None:
    other = pytest.importorskip("steering_vectors", reason="steering-vectors comes with `make bench`")
    model, layers = tiny_model(), values(1, 3)
    theirs = other.SteeringVector(layers)
    ours = from_steering_vectors(theirs)
    with torch.no_grad(), theirs.apply(model):
        truth = model(input_ids=IDS).logits
    assert torch.allclose(steered(model, ours), truth, atol=1e-5)
    assert float((hooked(model, {}) - truth).abs().max()) > 0.1
    back = other.SteeringVector(dict(ours.layers))
    assert all(torch.equal(back.layer_activations[k], v) for k, v in layers.items())
    with pytest.raises(ValueError, match=r"'decoder_block'.*'mlp'"):
        from_steering_vectors(other.SteeringVector(layers, "mlp"))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"hook_point": "mlp_out"}, "got {'hook_point': 'mlp_out'}"),
        ({"n": "six"}, "n in the header to be int"),
        ({"note": "x" * 2**20}, "at most 1048576 characters"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_what_could_not_be_read_again_is_not_written(suffix, meta, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        sk.write_vector(made(1, **meta), tmp_path / f"v{suffix}")
    assert not list(tmp_path.iterdir())


def every_format(folder: Path) -> list[Path]:
    """One file of each format that can be read."""
    write(made(1, 2), folder / "ours.safetensors")
    write(made(1, 2), folder / "ours.gguf")
    for theirs in THEIRS:
        theirs(folder / theirs.__name__, values(1))
    return sorted(folder.iterdir())


def test_a_file_cut_off_anywhere_is_refused(tmp_path) -> None:
    for path in every_format(tmp_path):
        whole = path.read_bytes()
        assert read(path)
        for size in sorted({0, 1, 4, 8, 9, 12, *range(16, len(whole), max(1, len(whole) // 60)), len(whole) - 1}):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="expected"):
                read(path)


@pytest.mark.parametrize("name", ["ours.safetensors", "ours.gguf"])
def test_a_flipped_byte_is_refused_or_leaves_every_value_as_it_was(name: str, tmp_path) -> None:
    vector, path = made(1, 2), tmp_path / name
    write(vector, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            (found,) = read(path).values()
        except ValueError:
            refused += 1
        else:
            assert same(found, vector), place
    assert refused > len(whole) // 9


def test_the_first_bytes_say_what_a_file_is_and_not_its_suffix(tmp_path) -> None:
    write(made(1), tmp_path / "v.gguf")
    (tmp_path / "v.gguf").rename(tmp_path / "v.safetensors")
    assert same(sk.read_vectors(tmp_path / "v.safetensors")["v"], made(1))
    with pytest.raises(ValueError, match="expected a safetensors file"):
        SteeringVector.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04", b"\x80\x04.", b"text, no vector", b"\x93NUMPY"])
def test_what_is_no_vector_file_is_refused(content: bytes, tmp_path) -> None:
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.safetensors"):
        sk.read_vectors(tmp_path / "v.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        sk.read_vectors(tmp_path)


def test_tensors_without_a_header_are_refused_with_the_formats_that_are_known(tmp_path) -> None:
    save_file({"layer.1": torch.ones(3)}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"known format.*llama\.cpp.*2604\.24881.*steering-vectors.*PyPI"):
        sk.read_vectors(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"expected format 'steerkit\.vector/1'.*steerkit\.read_vectors"):
        SteeringVector.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize("name", ["v", "v.pt", "v.bin"])
def test_an_output_of_another_suffix_is_refused_with_those_that_can_be_written(name: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.safetensors or \.gguf; got '.*v"):
        sk.write_vector(made(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_layer_beyond_the_model_is_refused_where_the_vector_is_put_on_it(tmp_path) -> None:
    their_gguf(tmp_path / "v.gguf", values(4))
    vector = sk.read_vectors(tmp_path / "v.gguf")["v"]
    with pytest.raises(ValueError, match="layer from 0 to 3"):
        steered(tiny_model(), vector)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    write(made(1), tmp_path / "v.gguf")
    before = (tmp_path / "v.gguf").read_bytes()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sk.write_vector(made(2), tmp_path / "v.gguf")
    assert (tmp_path / "v.gguf").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_of_several_vectors_all_are_written_or_none(tmp_path) -> None:
    for name in ("v.gguf", "v.pt"):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"layers from 1|ends in \.safetensors"):
            warnings.simplefilter("ignore", UserWarning)
            write_vectors({"one": made(1), "zero": made(0)}, tmp_path / name)
    with pytest.raises(ValueError, match="names that differ"):
        write_vectors({"a b": made(1), "a/b": made(1)}, tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())


def test_no_name_in_a_file_writes_outside_the_folder(tmp_path) -> None:
    paths = write_vectors({"../../x": made(1), "": made(2)}, tmp_path / "in" / "v.safetensors")
    assert {path.parent for path in paths.values()} == {tmp_path / "in"}
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["v-.._.._x.safetensors", "v-.safetensors"]


def test_the_command_line_says_what_was_read_what_was_not_said_and_what_is_lost(tmp_path) -> None:
    from typer.testing import CliRunner

    from steerkit.cli.main import app

    def run(*arguments: object) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["convert", *map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output + repr(done.exception)
        return json.loads(done.stdout)

    v, w = values(2)[2], values(2, seed=1)[2]
    torch.save({"vectors": {"A1_vs_others": v, "A2_vs_others": w}, "config": {"layer": 2}}, tmp_path / "agents.pt")
    said = run(tmp_path / "agents.pt", tmp_path / "agents.gguf")
    first, second = said["vectors"]
    assert (first["name"], second["name"]) == ("A1_vs_others", "A2_vs_others")
    assert first["vector"].startswith("SteeringVector(1 layers, d_model 32")
    assert second["written"] == str(tmp_path / "agents-A2_vs_others.gguf")
    assert "model_fingerprint" in first["not_recorded"] and "read_position" not in first["not_recorded"]
    lost = " ".join(said["lost"])
    assert lost.count("before block 2") == 1 and lost.count("other readers of GGUF") == 1
    back = run(tmp_path / "agents-A2_vs_others.gguf", tmp_path / "one.safetensors")
    assert back["lost"] == [] and torch.equal(SteeringVector.load(tmp_path / "one.safetensors").layers[2], w)
    plain = CliRunner().invoke(app, ["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")])
    assert plain.exit_code == 0 and "lost" in plain.stdout and "two.safetensors" in plain.stdout


def test_the_command_line_ends_in_one_line_on_what_cannot_be_converted(tmp_path) -> None:
    (tmp_path / "v.pt").write_bytes(b"nothing")
    command = [sys.executable, "-m", "steerkit.cli", "convert", str(tmp_path / "v.pt"), str(tmp_path / "v.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and "known format" in done.stderr
    assert not (tmp_path / "v.gguf").exists()


def test_a_file_is_recognised_whatever_the_length_of_its_header(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header, whose first byte may be that of a pickle, 0x80."""
    first_bytes = set()
    for extra in range(0, 264, 4):
        path = tmp_path / "v.safetensors"
        SteeringVector({1: torch.ones(4)}, {"note": "x" * extra}).save(path)
        first_bytes.add(path.read_bytes()[0])
        assert list(sk.read_vectors(path)["v"].layers) == [1]
    assert 0x80 in first_bytes
