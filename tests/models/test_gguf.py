"""GGUF files: logits are those of the safetensors model, nothing is passed over, and the cache is whole."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import steerkit as sk
from steerkit.models import dense_cache
from steerkit.models.dense_cache import cache_folder
from steerkit.models.gguf import follow_flags, read_header, rope_of, shards_of
from steerkit.models.identity import describe, fingerprint

WIDTH, LAYERS, HEADS, KV, INNER, VOCABULARY = 64, 2, 4, 2, 128, 300
BOS, EOS = 257, 258
IDS = torch.arange(5, 205)[None]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> Path:
    """Each test has a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "steerkit" / "gguf"


def llama(rope: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    parameters = {"rope_theta": 10000.0, **(rope or {"rope_type": "default"})}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=4096, tie_word_embeddings=False,
        rope_parameters=parameters,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write(path: Path, model: Any, values: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
    """A model as a GGUF file, as llama.cpp's converter writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(4096)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, alphabet[0] + alphabet[1]]
    tokens += [f"<x{number}>" for number in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * (VOCABULARY - 257))
    writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    for key, value in (values or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name, value in {**named_tensors(model), **(tensors or {})}.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named_tensors(model: Any) -> dict[str, np.ndarray]:
    state = {name: value.numpy() for name, value in model.state_dict().items()}

    def permuted(x: np.ndarray, heads: int) -> np.ndarray:
        return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output.weight": state["lm_head.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(LAYERS):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        found[f"{theirs}attn_q.weight"] = permuted(state[f"{ours}self_attn.q_proj.weight"], HEADS)
        found[f"{theirs}attn_k.weight"] = permuted(state[f"{ours}self_attn.k_proj.weight"], KV)
        for name, part in (
            ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"), ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):  # fmt: skip
            found[f"{theirs}{name}.weight"] = state[f"{ours}{part}.weight"]
    return found


def off(model: Any, reference: Any) -> float:
    """How far the logits are from those of a reference, relative to their size."""
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, reference(input_ids=IDS).logits
    return float((ours - theirs).norm() / theirs.norm())


# RoPE scaling

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def frequencies(reference: Any) -> np.ndarray:
    """What `rope_freqs.weight` holds: by what the plain frequencies are divided."""
    plain = llama().model.rotary_emb.inv_freq
    return (plain / reference.model.rotary_emb.inv_freq).numpy().astype(np.float32)


def irregular() -> tuple[Any, np.ndarray]:
    """A model with factors that no rule of transformers gives."""
    factors = np.linspace(1.0, 3.0, WIDTH // HEADS // 2).astype(np.float32) ** 2
    model = llama()
    model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    return model, factors


def rope_case(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A reference model, and how its file says so."""
    if name == "none":
        return llama(), {}, {}
    if name == "linear":
        return llama(LINEAR), {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}, {}
    if name == "yarn":
        values = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
        return llama(YARN), {**values, "llama.rope.scaling.original_context_length": 64}, {}
    if name == "llama3":
        reference = llama(LLAMA3)
        return reference, {}, {"rope_freqs.weight": frequencies(reference)}
    reference, factors = irregular()
    return reference, {}, {"rope_freqs.weight": factors}


@pytest.mark.parametrize("name", ["none", "linear", "yarn", "llama3", "irregular factors"])
def test_the_logits_are_those_of_the_safetensors_model_also_from_the_cache(name: str, tmp_path: Path) -> None:
    reference, values, tensors = rope_case(name)
    path = write(tmp_path / "m.gguf", reference, values, tensors)
    if name != "none":
        assert off(llama(), reference) > 0.1  # the scaling matters
    for _ in range(2):
        model, _tokenizer = sk.load(path)
        assert off(model, reference) < 1e-4
    assert len(list(cache_folder().iterdir())) == 1


def test_the_parameters_of_llama_3_are_found_from_its_factors(tmp_path: Path) -> None:
    reference = llama({**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192})
    path = write(tmp_path / "m.gguf", reference, tensors={"rope_freqs.weight": frequencies(reference)})
    found = rope_of(read_header(path))
    assert found is not None and found["rope_type"] in ("llama3", "longrope")
    assert off(sk.load(path)[0], reference) < 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"llama.rope.scaling.type": "dynamic", "llama.rope.scaling.factor": 2.0}, "RoPE scaling.*got 'dynamic'"),
        ({"llama.rope.scaling.type": "longrope"}, "RoPE scaling.*got 'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "original_context_length.*missing"),
    ],
)
def test_a_rope_scaling_that_cannot_be_computed_is_refused(values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sk.load(write(tmp_path / "m.gguf", llama(), values))
    assert not cache_folder().exists()


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(ValueError, match=r"got 1 more, e\.g\. 'blk\.0\.attn_q_norm\.weight'"):
        sk.load(write(tmp_path / "m.gguf", llama(), tensors=extra))


# The header


def test_the_header_is_the_one_that_gguf_py_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", llama(), {"general.file_type": 0, "x.flag": True, "x.number": 0.5})
    header, slow = read_header(path), gguf.GGUFReader(path)
    for key, value in slow.fields.items():
        if key.startswith("GGUF."):
            continue
        contents = value.contents()
        assert header.values[key] == contents or header.values[key] == pytest.approx(contents)
    assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in slow.tensors]
    for ours, theirs in zip(header.tensors, slow.tensors, strict=True):
        assert ours.start == theirs.data_offset and ours.kind == theirs.tensor_type
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))


def test_provenance_names_the_files_own_quantisation(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = {"token_embd.weight": llama().state_dict()["model.embed_tokens.weight"].numpy().astype(np.float16)}
    write(path, llama(), {"general.file_type": 1}, tensors)
    for _ in range(2):
        assert describe(sk.load(path)[0])["weights"] == "F16 (F32 20, F16 1), dequantised"


@pytest.mark.parametrize("damage", ["cut", "magic", "version", "empty"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", llama())
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[:-100],
            "magic": b"GGML" + data[4:],
            "version": data[:4] + struct.pack("<I", 9) + data[8:],
            "empty": data[:30],
        }[damage]
    )
    with pytest.raises(ValueError, match="expected a whole GGUF file"):
        sk.load(path)


def split(path: Path, folder: Path, count: int = 3) -> Path:
    """A file cut into several, as llama.cpp's gguf-split does."""
    folder.mkdir()
    model = llama()
    tensors = named_tensors(model)
    names = sorted(tensors)
    for number in range(count):
        part = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        own = names[number::count]
        if number == 0:
            whole = write(path, model)
            reader = gguf.GGUFReader(whole)
            writer = gguf.GGUFWriter(part, "llama")
            for key, value in reader.fields.items():
                if key.startswith("GGUF.") or key == "general.architecture":
                    continue
                kind = value.types[0]
                inner = value.types[1] if len(value.types) > 1 else None
                writer.add_key_value(key, value.contents(), kind, inner)
        else:
            writer = gguf.GGUFWriter(part, "llama")
        for name in own:
            writer.add_tensor(name, tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_all_files_of_a_split_model_are_read(tmp_path: Path) -> None:
    first = split(tmp_path / "whole.gguf", tmp_path / "parts")
    assert len(shards_of(first)) == 3
    assert off(sk.load(first)[0], llama()) < 1e-4
    first.with_name("m-00003-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected all 3 files.*missing: \['m-00003-of-00003\.gguf'\]"):
        sk.load(first)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_the_tokenizer_follows_the_flags_of_the_file(bos: bool | None, eos: bool | None, tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    path = write(tmp_path / "m.gguf", llama(), {key: flag for key, flag in flags.items() if flag is not None})
    for _ in range(2):
        tokenizer = sk.load(path)[1]
        ids, bare = tokenizer("ab")["input_ids"], tokenizer("ab", add_special_tokens=False)["input_ids"]
        if bos is not None:
            assert (ids[0] == BOS) == bos
        if eos is not None:
            assert (ids[-1] == EOS) == eos
        assert len(bare) == 2 and len(ids) == 2 + (ids[0] == BOS) + (ids[-1] == EOS)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_a_tokenizer_that_does_otherwise_than_the_flags_say_is_corrected(bos: bool, eos: bool, tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    path = write(tmp_path / "m.gguf", llama(), flags)
    others = {key: not flag for key, flag in flags.items()}
    tokenizer = sk.load(write(tmp_path / "other.gguf", llama(), others))[1]
    assert tokenizer("ab")["input_ids"] == [*[BOS][bos:], 64, 65, *[EOS][eos:]]
    follow_flags(tokenizer, read_header(path))
    assert tokenizer("ab")["input_ids"] == [*[BOS][not bos :], 64, 65, *[EOS][not eos :]]


# The cache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf", llama())


def test_a_second_load_reads_the_cache_and_gives_the_same_model(file: Path, monkeypatch) -> None:
    first, tokenizer = sk.load(file)
    monkeypatch.setattr("steerkit.models.gguf_model._dequantised", lambda *_: pytest.fail("the file was read again"))
    second, again = sk.load(file)
    assert fingerprint(first) == fingerprint(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert tokenizer("ab <x3>")["input_ids"] == again("ab <x3>")["input_ids"]
    assert describe(first, tokenizer) == describe(second, again)
    moved = file.with_name("other.gguf")
    shutil.copy(file, moved)
    assert describe(sk.load(moved)[0])["checkpoint"].endswith("other.gguf")  # found by its content


def test_other_content_and_another_dtype_have_entries_of_their_own(file: Path, own_cache: Path) -> None:
    sk.load(file)
    sk.load(file, dtype="bfloat16")
    write(file, llama(), {"x.note": "other"})
    sk.load(file)
    assert len(list(own_cache.iterdir())) == 3


def test_without_the_cache_nothing_is_written(file: Path, own_cache: Path) -> None:
    sk.load(file, gguf_cache=False)
    assert not own_cache.exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "no list", "bad list"])
def test_a_damaged_entry_is_made_again(damage: str, file: Path, own_cache: Path) -> None:
    reference = sk.load(file)[0]
    (entry,) = own_cache.iterdir()
    weights, about = entry / "model.safetensors", entry / dense_cache.ABOUT
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "missing":
        (entry / "tokenizer.json").unlink()
    elif damage == "no list":
        about.unlink()
    else:
        about.write_text("{}")
    assert off(sk.load(file)[0], reference) == 0
    assert json.loads(about.read_text())["files"]["model.safetensors"] == weights.stat().st_size


def test_a_full_disk_costs_the_cache_and_not_the_load(file: Path, own_cache: Path, monkeypatch) -> None:
    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.warns(UserWarning, match=r"cannot be kept.*No space left.*gguf_cache=False"):
        model, _ = sk.load(file)
    assert off(model, llama()) < 1e-4
    assert not list(own_cache.iterdir())


def test_of_two_processes_that_write_an_entry_the_first_ones_is_kept(file: Path, own_cache: Path) -> None:
    code = f"import steerkit as sk; sk.load({str(file)!r})"
    environment = {**os.environ, "HF_HOME": str(own_cache.parents[1]), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    (entry,) = own_cache.iterdir()
    assert dense_cache.is_complete(entry)


def test_an_entry_that_appears_while_another_is_written_is_not_replaced(file: Path, own_cache: Path) -> None:
    model, tokenizer = sk.load(file)
    (entry,) = own_cache.iterdir()
    before = (entry / dense_cache.ABOUT).read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_cache.write_entry(entry, model, tokenizer, {"weights": "other"})
    assert (entry / dense_cache.ABOUT).read_text() == before and list(own_cache.iterdir()) == [entry]
