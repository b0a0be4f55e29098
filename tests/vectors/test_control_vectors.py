"""GGUF control vectors: read and written as llama.cpp, repeng and the gguf package have them."""

from __future__ import annotations

import json
import struct

import gguf
import numpy as np
import pytest
import torch

import steerkit as sk
from steerkit.vectors.convert import missing_fields
from steerkit.vectors.vector import SteeringVector
from tests.vector_files import WIDTH, made, raw_gguf, read, same, values, write


def test_a_direction_acts_after_the_block_that_llama_cpp_adds_it_to(tmp_path) -> None:
    layers = values(1, 2, 3)
    write(SteeringVector(layers), tmp_path / "v.gguf")
    buffer = np.zeros((4, WIDTH), np.float32)  # its loader: direction.k to row k - 1, "layer 1 at [0]"
    for tensor in gguf.GGUFReader(tmp_path / "v.gguf").tensors:
        buffer[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data
    applied = {
        block: torch.tensor(buffer[block - 1]) for block in range(1, 4)
    }  # its adapter: row il - 1 after block il
    assert all(torch.equal(applied[layer], value) for layer, value in layers.items())


def test_a_control_vector_of_ours_comes_back_with_everything_and_says_what_others_will_not_see(tmp_path) -> None:
    vector = made(1, 3, versions={"torch": "2"}, read_layers=["embed", 0, 1, 2, 3], seed=0.5)
    with pytest.warns(UserWarning, match="not: hook point, units, checkpoint, model_fingerprint.*read_position"):
        sk.write_vector(vector, tmp_path / "v.gguf")
    back = sk.read_vectors(tmp_path / "v.gguf")["v"]
    assert same(back, vector) and back.meta == vector.meta
    back.save(tmp_path / "v.safetensors")
    again = sk.read_vectors(tmp_path / "v.safetensors")["v"]
    assert same(again, vector) and again.meta == vector.meta
    assert list(map(str, sorted(p.name for p in tmp_path.iterdir()))) == ["v.gguf", "v.safetensors"]


def test_the_gguf_package_reads_our_control_vector_with_the_keys_that_repeng_writes(tmp_path) -> None:
    vector = made(1, 3)
    write(vector, tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "controlvector" and said["controlvector.model_hint"] == "llama"
    assert said["controlvector.layer_count"] == 2
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    assert json.loads(said["steerkit.header"])["hook_point"] == "resid_post"
    assert {t.name: t.tensor_type.name for t in reader.tensors} == {"direction.1": "F32", "direction.3": "F32"}
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, vector.layers[int(tensor.name[-1])].numpy())
    write(SteeringVector(values(1)), tmp_path / "w.gguf")
    assert gguf.GGUFReader(tmp_path / "w.gguf").get_field("controlvector.model_hint").contents() == "unknown"


def test_repeng_reads_ours_and_we_read_repengs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names it; numpy 2 dropped it
    extract = pytest.importorskip("repeng.extract", reason="repeng is not installed")
    ours = made(1, 2)
    write(ours, tmp_path / "ours.gguf")
    theirs = extract.ControlVector.import_gguf(tmp_path / "ours.gguf")
    assert theirs.model_type == "llama" and sorted(theirs.directions) == [1, 2]
    assert all(np.array_equal(theirs.directions[k], v.numpy()) for k, v in ours.layers.items())
    (theirs * 2.0).export_gguf(tmp_path / "theirs.gguf")
    back = sk.read_vectors(tmp_path / "theirs.gguf")["theirs"]
    assert same(back, ours * 2.0) and back.meta["model_type"] == "llama" and "model_fingerprint" in missing_fields(back)


def test_layer_0_is_read_from_a_control_vector_and_not_written_to_one(tmp_path) -> None:
    fields = {"model_hint": "qwen2.5", "method": "diffmean", "layer_count": 2, "normalize": 1.0, "token_pos": -1.0}
    directions = {f"direction.{k}": v.numpy() for k, v in values(0, 1).items()}
    raw_gguf(tmp_path / "v.gguf", directions, **{f"controlvector__{k}": v for k, v in fields.items()}, tags=["a", "b"])
    vector = sk.read_vectors(tmp_path / "v.gguf")["v"]
    assert same(vector, SteeringVector(values(0, 1))) and vector.meta["model_type"] == "qwen2.5"
    assert (
        vector.meta["source"]["controlvector.normalize"] == 1.0
        and vector.meta["source"]["controlvector.token_pos"] == -1
    )
    with pytest.raises(ValueError, match=r"layers from 1.*got \[0, 1\].*\.at\(\*\[1\]\)"):
        sk.write_vector(vector, tmp_path / "w.gguf")
    with pytest.raises(ValueError, match=r"Write a \.safetensors file"):
        sk.write_vector(vector.at(0), tmp_path / "w.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]
    write(vector.at(1), tmp_path / "w.gguf")
    assert same(read(tmp_path / "w.gguf")["w"], vector.at(1))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_control_vectors_of_other_float_types_keep_their_values(dtype, tmp_path) -> None:
    value = np.arange(WIDTH, dtype=dtype) / 8
    raw_gguf(tmp_path / "v.gguf", {"direction.1": value})
    assert sk.read_vectors(tmp_path / "v.gguf")["v"].layers[1].tolist() == value.tolist()


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({"direction.01": np.float32}, {}, "named direction.N.*'direction.01'"),
        ({"direction.-1": np.float32}, {}, "named direction.N"),
        ({"direction.1.5": np.float32}, {}, "named direction.N"),
        ({"direction.1": np.float32, "bias": np.float32}, {}, "named direction.N.*'bias'"),
        ({"direction.1": np.int32}, {}, "tensors of F16, F32, F64; got .*I32"),
        (
            {"direction.1": np.float32},
            {"architecture": "llama"},
            "'controlvector'; got 'llama'.*steerkit.load",
        ),
        ({"direction.1": np.float32}, {"hook_site": "resid_pre"}, "after a block; got hook_site 'resid_pre'"),
        (
            {"direction.1": np.float32},
            {"hook_name": "ln_final.hook_normalized"},
            "hook_name 'ln_final.hook",
        ),
        ({"direction.4": np.float32}, {"n_total_layers": 4}, r"layers \[4\] of 4"),
        ({"direction.1": np.float32}, {"steerkit__header": "{"}, "expected JSON in the header"),
    ],
)
def test_gguf_files_that_are_no_control_vector_for_a_block_are_refused(tensors, fields, message: str, tmp_path) -> None:
    raw_gguf(tmp_path / "v.gguf", {name: np.ones(WIDTH, dtype) for name, dtype in tensors.items()}, **fields)
    with pytest.raises(ValueError, match=message):
        sk.read_vectors(tmp_path / "v.gguf")


def test_no_control_vector_has_two_dimensions_or_nothing_in_it(tmp_path) -> None:
    raw_gguf(tmp_path / "v.gguf", {"direction.1": np.ones((2, 4), np.float32)})
    with pytest.raises(ValueError, match=r"float32 \[d_model\]; got torch.float32 \[2, 4\]"):
        sk.read_vectors(tmp_path / "v.gguf")
    raw_gguf(tmp_path / "w.gguf", {})
    with pytest.raises(ValueError, match=r"one tensor direction\.N at least"):
        sk.read_vectors(tmp_path / "w.gguf")


def test_a_gguf_file_that_claims_an_endless_array_is_refused_at_once(tmp_path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    endless = text(b"a") + struct.pack("<IIQ", 9, 0, 2**60)  # an array of 2**60 bytes
    nested = text(b"a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 5000
    for field in (endless, nested):
        (tmp_path / "v.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
        with pytest.raises(ValueError, match="expected a complete GGUF file"):
            sk.read_vectors(tmp_path / "v.gguf")
