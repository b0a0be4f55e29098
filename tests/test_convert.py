from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import steerkit as sk
from steerkit import headers
from steerkit.convert import from_steering_vectors, unsaid, write_vectors
from steerkit.vectors import SteeringVector
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
WIDTH = 32
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])


def values(*layers: int, seed: int = 0, size: float = 4.0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: size * torch.randn(WIDTH, generator=generator) for layer in layers}


def made(*layers: int, **meta) -> SteeringVector:
    about = {"checkpoint": "tiny", "model_type": "llama", "model_fingerprint": "0" * 16, "adapter_fingerprint": None}
    rest = {"n_layers": 4, "d_model": WIDTH, "read_position": "mean", "template_sha256": None, "data_sha256": "f" * 64}
    return SteeringVector(values(*layers or (1, 2)), {**about, **rest, "n": 6, "method": "pca", **meta})


def same(a: SteeringVector, b: SteeringVector) -> bool:
    return list(a.layers) == list(b.layers) and all(torch.equal(a.layers[k], b.layers[k]) for k in a.layers)


def raw_safetensors(path: Path, header: object, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """A file with this header, as text or to be turned into JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {"layer.1": torch.ones(WIDTH)}, path, metadata={"steerkit": text})


def raw_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "controlvector", **fields) -> None:
    """A GGUF file as another program writes it, with the package's own writer; `__` in a field's name is a dot."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](name.replace("__", "."), value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def their_gguf(path: Path, layers: dict[int, torch.Tensor]) -> None:
    directions = {f"direction.{k}": v.numpy() for k, v in layers.items()}
    raw_gguf(path, directions, controlvector__model_hint="llama", controlvector__layer_count=len(layers))


def their_script(path: Path, layers: dict[int, torch.Tensor]) -> None:
    ((layer, value),) = layers.items()
    torch.save({"steering_vector": value, "config": {"layer": layer, "base_model": "b", "num_samples": 9}}, path)


def their_agents(path: Path, layers: dict[int, torch.Tensor]) -> None:
    ((layer, value),) = layers.items()
    torch.save({"vectors": {"A1_vs_others": value}, "counts": {"A1_vs_others": 7}, "config": {"layer": layer}}, path)


def their_activations(path: Path, layers: dict[int, torch.Tensor]) -> None:
    torch.save({"layer_activations": layers, "layer_type": "decoder_block"}, path)


def their_probe(path: Path, layers: dict[int, torch.Tensor], **changed: str) -> None:
    ((layer, value),) = layers.items()
    about = {"schema_version": "3", "layer": str(layer), "n_total_layers": "4", "model_id": "tiny"}
    about |= {"hook_site": "resid_post", "hook_name": f"blocks.{layer}.hook_resid_post", "default_method": "logistic"}
    save_file({"direction.logistic": value}, path, metadata={**about, **changed})


THEIRS = [their_gguf, their_script, their_agents, their_activations, their_probe]


def read(path: Path) -> dict[str, SteeringVector]:
    """The file's vectors, whatever is said along the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return sk.read_vectors(path)


def write(vector: SteeringVector, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sk.write_vector(vector, path)


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
    with torch.no_grad(), sk.Steering(vector, 1.0, "all", foreign=True).on(model):
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
    assert same(back, ours * 2.0) and back.meta["model_type"] == "llama" and "model_fingerprint" in unsaid(back)


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
        with pytest.raises(ValueError, match="expected a whole GGUF file"):
            sk.read_vectors(tmp_path / "v.gguf")


def test_the_agents_of_the_papers_scripts_are_imported_where_they_were_read_with_all_their_rounds(tmp_path) -> None:
    v, w = values(20)[20], values(20, seed=1)[20]
    config = {"base_model": "llama", "sft_model": "./sft", "layer": 20, "normalized": False, "hidden_size": WIDTH}
    whole = {"vectors": {"A1_vs_others": v, "A2_vs_others": w}, "counts": {"A1_vs_others": 5, "A2_vs_others": 5}}
    rounds = {"round_1": {"A1_vs_others": w}, "round_2": {"A1_vs_others": v}}
    torch.save({**whole, "round_specific_vectors": rounds, "config": config}, tmp_path / "agents.pt")
    with pytest.warns(UserWarning, match="after block 20 and imported there.*before block 20, which is layer 19 here"):
        found = sk.read_vectors(tmp_path / "agents.pt")
    assert list(found) == ["A1_vs_others", "A2_vs_others", "round_1_A1_vs_others", "round_2_A1_vs_others"]
    assert all(list(vector.layers) == [20] for vector in found.values())
    assert torch.equal(found["A2_vs_others"].layers[20], w) and torch.equal(found["round_1_A1_vs_others"].layers[20], w)
    meta = found["A1_vs_others"].meta
    assert meta["n"] == 5 and meta["checkpoint"] == "llama" and meta["source"]["sft_model"] == "./sft"
    assert meta["read_position"] == "last" and "n" in unsaid(found["round_1_A1_vs_others"])


def test_the_suppression_vector_of_the_papers_scripts_is_named_by_its_file(tmp_path) -> None:
    value = values(15)[15].bfloat16()
    config = {"base_model": "b", "task": "evil", "layer": 15, "num_samples": 40}
    torch.save({"steering_vector": value, "config": config, "statistics": {"final_norm": 1.0}}, tmp_path / "evil.pt")
    vector = read(tmp_path / "evil.pt")["evil"]
    assert torch.equal(vector.layers[15], value.float()) and vector.meta["n"] == 40
    assert vector.meta["read_position"] == -2 and vector.meta["source"]["task"] == "evil"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steering_vector": torch.ones(3), "config": {}}, r"config\['layer'\].*got None"),
        ({"steering_vector": torch.ones(3), "config": {"layer": -1}}, r"config\['layer'\].*got -1"),
        ({"steering_vector": torch.ones(3), "config": {"layer": True}}, r"config\['layer'\].*got True"),
        ({"steering_vector": torch.ones(3), "config": [1]}, r"config\['layer'\]"),
        ({"steering_vector": [1.0, 2.0], "config": {"layer": 1}}, "real numbers; got list"),
        ({"steering_vector": torch.ones(2, 3), "config": {"layer": 1}}, r"float32 \[2, 3\]"),
        ({"steering_vector": torch.ones(3, dtype=torch.int32), "config": {"layer": 1}}, "int32"),
        ({"steering_vector": torch.ones(3).to_sparse(), "config": {"layer": 1}}, "real numbers"),
        ({"steering_vector": torch.ones(1).expand(10**12), "config": {"layer": 1}}, "it has fewer"),
        ({"steering_vector": torch.tensor([float("nan")]), "config": {"layer": 1}}, "finite vector"),
        ({"vectors": {}, "config": {"layer": 1}}, "one vector at least"),
        ({"vectors": torch.ones(3), "config": {"layer": 1}}, "vectors to be a dictionary"),
        ({"layer_activations": {0: torch.ones(3)}, "layer_type": "self_attn"}, "'decoder_block'.*'self_attn'"),
        ({"layer_activations": {-1: torch.ones(3)}, "layer_type": "decoder_block"}, "block indices from 0; got -1"),
        ({"layer_activations": {}, "layer_type": "decoder_block"}, "one layer at least"),
        ({0: torch.ones(3), 1: torch.ones(4)}, "equal widths"),
        ({"0": torch.ones(3)}, "known format.*GGUF control vectors"),
        ({}, "known format"),
        (torch.ones(3), "known format"),
        ([torch.ones(3)], "known format"),
    ],
)
def test_torch_files_that_do_not_say_a_place_or_hold_no_vector_are_refused(content, message: str, tmp_path) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=message):
        sk.read_vectors(tmp_path / "v.pt")


def test_a_dictionary_of_layers_alone_is_read_with_a_warning_that_it_does_not_say_its_place(tmp_path) -> None:
    torch.save(values(0, 3), tmp_path / "v.pt")
    with pytest.warns(UserWarning, match="does not say where its vectors were read"):
        vector = sk.read_vectors(tmp_path / "v.pt")["v"]
    assert same(vector, SteeringVector(values(0, 3)))


class Foreign:
    """What a pickle can do: act when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_needs_code_is_refused_by_name_and_its_code_does_not_run(legacy, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"steering_vector": Foreign()}, "v.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"a pickle that runs posix\.mkdir.*Nothing in it was run"):
        sk.read_vectors("v.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["v.pt"]
    torch.load("v.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the control: what the file does where it is trusted"


def test_a_pickled_object_of_steering_vectors_is_refused_with_what_to_save_instead(tmp_path) -> None:
    other = pytest.importorskip("steering_vectors", reason="steering-vectors comes with `make bench`")
    torch.save(other.SteeringVector(values(1)), tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"steering_vectors\.steering_vector\.SteeringVector.*torch\.save"):
        sk.read_vectors(tmp_path / "v.pt")


def test_the_probes_of_the_other_steerkit_come_by_method(tmp_path) -> None:
    directions = {f"direction.{m}": values(1, seed=i)[1] for i, m in enumerate(("logistic", "diff_of_means"))}
    about = {
        "layer": "2",
        "n_total_layers": "4",
        "model_id": "m",
        "hook_site": "resid_post",
        "default_method": "logistic",
    }
    save_file(directions, tmp_path / "joy.probe.safetensors", metadata={**about, "auto_alpha": "2.5"})
    found = sk.read_vectors(tmp_path / "joy.probe.safetensors")
    assert sorted(found) == ["diff_of_means", "logistic"]
    for method, vector in found.items():
        assert torch.equal(vector.layers[2], directions[f"direction.{method}"]) and vector.meta["method"] == method
    assert found["logistic"].meta["source"]["auto_alpha"] == "2.5" and found["logistic"].meta["checkpoint"] == "m"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": "-1", "hook_name": "hook_embed"}, "layer -1 of 4 at 'hook_embed'"),
        ({"layer": "4", "hook_name": "ln_final.hook_normalized"}, "layer 4 of 4"),
        ({"hook_site": "resid_pre"}, "after a block"),
        ({"hook_name": "blocks.1.hook_resid_pre"}, "at 'blocks.1.hook_resid_pre'"),
        ({"layer": "one"}, "layer one of 4"),
        ({"n_total_layers": ""}, "after a block"),
        ({"kind": "multinomial"}, "weights of a classifier"),
    ],
)
def test_probes_that_were_not_read_after_a_block_are_refused(changed, message: str, tmp_path) -> None:
    their_probe(tmp_path / "v.safetensors", values(1), **changed)
    with pytest.raises(ValueError, match=message):
        sk.read_vectors(tmp_path / "v.safetensors")


def test_the_header_says_operation_place_convention_units_and_provenance(tmp_path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    pairs = [sk.ContrastPair(f"q{i}", "yes yes", "no, not", f"g{i}") for i in range(3)]
    vector = sk.difference_in_means(sk.collect(model, tokenizer, pairs, position="mean"))
    vector.save(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        header = json.loads(file.metadata()["steerkit"])
    assert header.items() >= headers.FIXED.items() and header["operation"] == "add"
    assert header["units"] == "raw" and header["content"] == vector.content()
    assert not unsaid(vector) and header.keys() >= headers.PROVENANCE.keys()
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
    assert rows >= {*headers.FIXED, *headers.DERIVED, *headers.PROVENANCE}
    for key, value in headers.FIXED.items():
        assert f"| `{key}` | `{value}` |" in text


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
        ({**GOOD, "hook_point": "resid_pre"}, "hook_point 'resid_post' in the header; got 'resid_pre'"),
        ({**GOOD, "hook_point": ["resid_post"]}, "hook_point"),
        ({**GOOD, "layer_convention": "1-based"}, "layer_convention"),
        ({k: v for k, v in GOOD.items() if k != "hook_point"}, "hook_point 'resid_post' in the header; got None"),
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
        ('{"format": NaN}', "NaN is no number of JSON"),
        ('{"n": 1, "n": 2}', "a key stands there twice"),
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


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"hook_point": "mlp_out"}, "its meta says {'hook_point': 'mlp_out'}"),
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

    from steerkit.cli import app

    def run(*arguments: object) -> dict[str, str]:
        done = CliRunner().invoke(app, ["convert", *map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output + repr(done.exception)
        return json.loads(done.stdout)

    v, w = values(2)[2], values(2, seed=1)[2]
    torch.save({"vectors": {"A1_vs_others": v, "A2_vs_others": w}, "config": {"layer": 2}}, tmp_path / "agents.pt")
    said = run(tmp_path / "agents.pt", tmp_path / "agents.gguf")
    assert said["A1_vs_others"].startswith("SteeringVector(1 layers, d_model 32")
    assert said["A2_vs_others written"] == str(tmp_path / "agents-A2_vs_others.gguf")
    assert "model_fingerprint" in said["A1_vs_others not said"] and "read_position" not in said["A1_vs_others not said"]
    assert said["lost"].count("before block 2") == 1 and said["lost"].count("other readers of GGUF") == 1
    back = run(tmp_path / "agents-A2_vs_others.gguf", tmp_path / "one.safetensors")
    assert back["lost"] == "nothing" and torch.equal(SteeringVector.load(tmp_path / "one.safetensors").layers[2], w)
    plain = CliRunner().invoke(app, ["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")])
    assert plain.exit_code == 0 and "lost" in plain.stdout and "two.safetensors" in plain.stdout


def test_the_command_line_ends_in_one_line_on_what_cannot_be_converted(tmp_path) -> None:
    (tmp_path / "v.pt").write_bytes(b"nothing")
    command = [sys.executable, "-m", "steerkit.cli", "convert", str(tmp_path / "v.pt"), str(tmp_path / "v.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and "known format" in done.stderr
    assert not (tmp_path / "v.gguf").exists()
