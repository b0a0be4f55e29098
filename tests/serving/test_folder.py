"""The folder of served vectors, and what the routes put into it and remove from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerkit.serving import folder as folder_module
from steerkit.serving.folder import Model, VectorFolder, stored_vector
from steerkit.serving.plugin import Settings
from steerkit.serving.routes import BadUpload, NotServed, _delete, _Known, _put
from steerkit.vectors.convert import write_vector
from steerkit.vectors.vector import SteeringVector

MODEL = Model("llama", 4, 8)


def vector(value: float = 1.0, *layers: int) -> SteeringVector:
    return SteeringVector({layer: torch.full((8,), value) for layer in layers or (1,)})


def known(path: Path, capacity: int = 4) -> _Known:
    return _Known(None, VectorFolder(path, MODEL, capacity=capacity), Settings(str(path), capacity=capacity))


def data_of(one: SteeringVector, tmp_path: Path) -> bytes:
    file = tmp_path.parent / f"{tmp_path.name}-sent.safetensors"
    one.save(file)
    return file.read_bytes()


def test_what_is_in_the_folder_is_served_and_a_file_is_read_once(tmp_path, monkeypatch) -> None:
    read: list[str] = []

    def reading(path: Path) -> dict[str, SteeringVector]:
        read.append(path.name)
        return original(path)

    original = folder_module.read_vectors
    monkeypatch.setattr(folder_module, "read_vectors", reading)
    served = VectorFolder(tmp_path, MODEL)
    for number in range(4):
        vector(number + 1.0).save(tmp_path / f"v{number}.safetensors")
        assert sorted(served.served()) == [f"v{i}" for i in range(number + 1)]
    assert read == [f"v{i}.safetensors" for i in range(4)]
    (tmp_path / "v2.safetensors").unlink()
    assert "v2" not in served.served()
    vector(9.0, 2).save(tmp_path / "v3.safetensors")
    assert served.served()["v3"].layers == (2,)
    assert stored_vector(tmp_path, served.served()["v3"].content) == vector(9.0, 2)
    assert read[4:] == ["v3.safetensors"]


def test_two_files_of_one_name_are_both_refused_by_name(tmp_path) -> None:
    vector(1.0).save(tmp_path / "one.safetensors")
    with pytest.warns(UserWarning, match="GGUF"):
        write_vector(vector(2.0), tmp_path / "one.gguf")
    assert "several files" in VectorFolder(tmp_path, MODEL).served()["one"].error
    with pytest.raises(BadUpload, match=r"one\.gguf"):
        _put(known(tmp_path), "one", data_of(vector(), tmp_path))


def test_a_file_that_is_removed_while_the_folder_is_read_is_not_served(tmp_path, monkeypatch) -> None:
    vector().save(tmp_path / "one.safetensors")
    original = folder_module.vector_files
    monkeypatch.setattr(folder_module, "vector_files", lambda path: [path / "gone.safetensors", *original(path)])
    assert list(VectorFolder(tmp_path, MODEL).served()) == ["one"]


def test_a_vector_beyond_the_capacity_is_refused_and_leaves_nothing(tmp_path) -> None:
    one = known(tmp_path)
    assert _put(one, "wide", data_of(vector(1.0, 0, 1, 2), tmp_path))["layers"] == (0, 1, 2)
    with pytest.raises(BadUpload, match="at most 4 pairs"):
        _put(one, "more", data_of(vector(2.0, 0, 1), tmp_path))
    assert _put(one, "wide", data_of(vector(3.0, 0, 1, 2, 3), tmp_path))["layers"] == (0, 1, 2, 3)  # in its place
    assert sorted(path.name for path in tmp_path.iterdir()) == [".by-content", "wide.safetensors"]


@pytest.mark.parametrize("name", ["../x", "", ".x", "a/b", "ä", 201 * "x"])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, name) -> None:
    with pytest.raises(BadUpload, match="expected a name of letters"):
        _put(known(tmp_path), name, data_of(vector(), tmp_path))
    with pytest.raises(BadUpload, match="expected a name of letters"):
        _delete(known(tmp_path), name)
    assert list(tmp_path.iterdir()) == []


def test_removing_a_vector_removes_no_other_file(tmp_path) -> None:
    vector().save(tmp_path / "README.safetensors")
    (tmp_path / "README.md").write_text("what these vectors are")
    one = known(tmp_path)
    one.folder.served()
    _delete(one, "README")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".by-content", "README.md"]
    with pytest.raises(NotServed, match="expected a served vector"):
        _delete(one, "README")
    assert (NotServed.status, BadUpload.status) == (404, 400)
