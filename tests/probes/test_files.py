"""Files of erasers and probes: they come back bit by bit, and what is no such file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import steerkit as sk
from steerkit.probes import erasure as module
from steerkit.probes.erasure import Erasure, fit_erasure
from steerkit.steering.operations import named


def acts(labels: Any = "abc", layers: tuple[Any, ...] = ("embed", 3), seed: int = 0, **meta: Any) -> sk.Activations:
    resid = torch.randn(60, len(layers), 8, generator=torch.Generator().manual_seed(seed))
    resid[:20] += 1
    return sk.Activations(resid, layers, pd.DataFrame({"label": list(labels) * (60 // len(labels))}), meta, "mlp_out")


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["steerkit"])


def test_an_eraser_comes_back_bit_by_bit_with_its_name_and_provenance(tmp_path: Path) -> None:
    data = acts(checkpoint="c", model_fingerprint="m", adapter_fingerprint=None, n_layers=9)
    eraser = sk.leace(data, shrinkage=0.1)
    eraser.save(tmp_path / "e.safetensors")
    back = sk.Eraser.load(tmp_path / "e.safetensors")
    assert (back.classes, back.meta, back.site) == (eraser.classes, eraser.meta, "mlp_out")
    assert list(back.layers) == ["embed", 3]
    for layer, one in back.layers.items():
        for part in ("mean", "right", "left"):
            assert torch.equal(getattr(one, part), getattr(eraser.at(layer), part))
        assert one.content() == eraser.at(layer).content()
    assert torch.equal(back.apply(data).resid, eraser.apply(data).resid)
    assert sk.erase(back, 3).operation == sk.erase(eraser, 3).operation
    assert sk.erase(back, 3).vector == sk.erase(eraser, 3).vector


def test_a_probe_comes_back_bit_by_bit_with_its_place_and_provenance(tmp_path: Path) -> None:
    cases: list[tuple[sk.Probe, Any]] = [
        (sk.fit_probe(acts(checkpoint="c"), "label", layer=3), "b"),
        (sk.fit_probe(acts([1, 0]), "label", layer="embed"), 1),
        (sk.fit_probe(torch.randn(9, 4), [True, False, True] * 3), True),
    ]
    for number, (probe, cls) in enumerate(cases):
        probe.save(tmp_path / f"{number}.safetensors")
        back = sk.Probe.load(tmp_path / f"{number}.safetensors")
        assert (back.classes, back.layer, back.site, back.meta) == (probe.classes, probe.layer, probe.site, probe.meta)
        assert torch.equal(back.weights, probe.weights) and torch.equal(back.bias, probe.bias)
        assert torch.equal(back.direction(cls), probe.direction(cls))
        assert list(map(type, back.classes)) == list(map(type, probe.classes))


def test_the_file_of_an_eraser_has_the_header_of_a_vectors_file(tmp_path: Path) -> None:
    sk.leace(acts()).save(tmp_path / "e.safetensors")
    header = header_of(tmp_path / "e.safetensors")
    assert header["format"] == "steerkit.eraser/1" and header["layer_convention"] == "0-based block index"
    assert (header["hook_point"], header["layers"], header["classes"]) == ("mlp_out", ["embed", 3], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"expected tensors named layer\.N"):
        sk.SteeringVector.load(tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"expected format 'steerkit\.probe/1'.*got 'steerkit\.eraser/1'"):
        sk.Probe.load(tmp_path / "e.safetensors")


def test_an_erasure_is_named_by_what_it_was_fitted_on_and_not_by_its_last_bits(monkeypatch) -> None:
    data = acts()
    names = {sk.leace(data).at(3).content()}
    first = sk.erase(sk.leace(data), 3)

    def rounded_otherwise(*given: Any) -> Erasure:
        found = fit_erasure(*given)
        return replace(found, right=found.right * (1 + 1e-7), left=found.left * (1 + 1e-7))

    with monkeypatch.context() as patched:
        patched.setattr(module, "fit_erasure", rounded_otherwise)
        again = sk.leace(data)
    names.add(again.at(3).content())
    assert len(names) == 1
    assert sk.erase(again, 3).operation == first.operation and sk.erase(again, 3).vector == first.vector
    others = [
        sk.leace(data, shrinkage=0.1), sk.leace(acts("acb")), sk.leace(acts(seed=1)),
        replace(again, layers={3: replace(again.at(3), source="")}),
    ]  # fmt: skip
    names.update(one.at(3).content() for one in others)
    assert len(names) == 5
    assert named(sk.erase(others[-1], 3).operation).name != first.operation


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Change header and tensors of a file; its hash of the content is that of the changed tensors."""
    from steerkit.probes.file import content

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["steerkit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={"steerkit": json.dumps({**header, "content": content(tensors)})})


HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "another format": lambda header, _: header.update(format="steerkit.eraser/2"),
    "another site": lambda header, _: header.update(hook_point="ln_final"),
    "another convention": lambda header, _: header.update(layer_convention="1-based"),
    "no classes": lambda header, _: header.pop("classes"),
    "one class": lambda header, _: header.update(classes=["a"]),
    "a class twice": lambda header, _: header.update(classes=["a", "a", "b"]),
    "classes that are lists": lambda header, _: header.update(classes=[["a"], ["b"], ["c"]]),
    "layer -1": lambda header, _: header.update(layers=[-1, 3], layer=-1),
    "layer true": lambda header, _: header.update(layers=[True, 3], layer=True),
    "layers that are none": lambda header, _: header.update(layers=3, layer="3"),
    "a tensor that is missing": lambda _, tensors: tensors.pop(sorted(tensors)[0]),
    "float32": lambda _, tensors: tensors.update({name: one.float() for name, one in tensors.items()}),
    "NaN": lambda _, tensors: tensors.update({name: one * float("nan") for name, one in tensors.items()}),
    "a vector for a matrix": lambda _, tensors: tensors.update({name: one[0] for name, one in tensors.items()}),
}


@pytest.mark.parametrize("kind", ["eraser", "probe"])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_eraser_or_probe_is_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    (sk.leace(acts()) if kind == "eraser" else sk.fit_probe(acts(), "label", layer=3)).save(path)
    rewritten(path, HOSTILE[name])
    with pytest.raises(ValueError, match=r"expected .*x\.safetensors|x\.safetensors: expected "):
        (sk.Eraser if kind == "eraser" else sk.Probe).load(path)


def test_a_damaged_or_missing_file_and_one_without_a_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    sk.leace(acts()).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"expected content .*was damaged"):
        sk.Eraser.load(path)
    save_file({"mean.3": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="expected the header 'steerkit'"):
        sk.Eraser.load(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected a safetensors file with the eraser"):
        sk.Eraser.load(path)
    with pytest.raises(FileNotFoundError, match="expected the eraser at"):
        sk.Eraser.load(tmp_path / "none.safetensors")


def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    probe = sk.fit_probe(torch.randn(9, 4), [("a", 1), ("b", 2), ("a", 1)] * 3)
    with pytest.raises(ValueError, match="expected classes that are strings or numbers"):
        probe.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"expected meta without the fields of the file; got \['format'\]"):
        sk.leace(acts(format="x")).save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_activations_of_another_model_are_erased_only_where_that_is_allowed() -> None:
    known = {"model_fingerprint": "m", "adapter_fingerprint": None}
    eraser = sk.leace(acts(**known))
    other = acts(**{**known, "model_fingerprint": "other"})
    with pytest.raises(ValueError, match=r"expected activations of the eraser's model.*pass foreign=True"):
        eraser.apply(other)
    assert eraser.apply(other, foreign=True).meta["erased"] == "label"
