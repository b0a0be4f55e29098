"""Torch files and probes of other projects: imported where they were read, refused where they do not say."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

import steerkit as sk
from steerkit.vectors.convert import missing_fields
from steerkit.vectors.vector import SteeringVector
from tests.vector_files import WIDTH, read, same, their_probe, values


def test_the_agents_of_the_papers_scripts_are_imported_where_they_were_read_with_all_their_rounds(tmp_path) -> None:
    v, w = values(20)[20], values(20, seed=1)[20]
    config = {"base_model": "llama", "sft_model": "./sft", "layer": 20, "normalized": False, "hidden_size": WIDTH}
    whole = {"vectors": {"A1_vs_others": v, "A2_vs_others": w}, "counts": {"A1_vs_others": 5, "A2_vs_others": 5}}
    rounds = {"round_1": {"A1_vs_others": w}, "round_2": {"A1_vs_others": v}}
    torch.save({**whole, "round_specific_vectors": rounds, "config": config}, tmp_path / "agents.pt")
    with pytest.warns(UserWarning, match="imported at layer 20, .*before block 20, which is layer 19 here"):
        found = sk.read_vectors(tmp_path / "agents.pt")
    assert list(found) == ["A1_vs_others", "A2_vs_others", "round_1_A1_vs_others", "round_2_A1_vs_others"]
    assert all(list(vector.layers) == [20] for vector in found.values())
    assert torch.equal(found["A2_vs_others"].layers[20], w) and torch.equal(found["round_1_A1_vs_others"].layers[20], w)
    meta = found["A1_vs_others"].meta
    assert meta["n"] == 5 and meta["checkpoint"] == "llama" and meta["source"]["sft_model"] == "./sft"
    assert meta["read_position"] == "last" and "n" in missing_fields(found["round_1_A1_vs_others"])


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
        ({"steering_vector": torch.ones(1).expand(10**12), "config": {"layer": 1}}, "got fewer"),
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
    with pytest.warns(UserWarning, match="does not name the hook point of its vectors"):
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
    with pytest.raises(ValueError, match=r"a pickle that runs posix\.mkdir.*No code in it was run"):
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
