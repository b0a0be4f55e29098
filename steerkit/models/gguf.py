"""GGUF files: their path, a fast reader of their header, their RoPE scaling, and their quantisation."""

from __future__ import annotations

import contextlib
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
GROUP = 1 << 20  # numbers that are dequantised at once
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file.

    Args:
        name: its name in the file.
        shape: its shape in torch's order.
        kind: the number of its quantisation.
        file: the file that holds it; a split model has several.
        start: where its data begins in the file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path
    start: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself, read once.

    Args:
        path: the first file of the model.
        values: key -> value; an array is a list.
        types: key -> numbers of its type, as gguf-py lists them.
        tensors: the tensors of all files of the model.
    """

    path: Path
    values: Mapping[str, Any] = field(repr=False)
    types: Mapping[str, list[int]] = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)

    @property
    def architecture(self) -> str:
        """The architecture's name in the file, e.g. `llama`."""
        return str(self.values["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture, e.g. `rope.scaling.type`."""
        return self.values.get(f"{self.architecture}.{key}", default)

    @property
    def quantization(self) -> str:
        """The quantisation of the file: its own name for it, and the number of tensors of each kind."""
        from gguf import GGMLQuantizationType, LlamaFileType

        counts = Counter(GGMLQuantizationType(tensor.kind).name for tensor in self.tensors)
        kinds = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        with contextlib.suppress(KeyError, ValueError):
            name = LlamaFileType(self.values["general.file_type"]).name
            return f"{name.removeprefix('MOSTLY_').removeprefix('ALL_')} ({kinds}), dequantised"
        return f"{kinds}, dequantised"


def shards_of(path: Path) -> list[Path]:
    """The files of a model, in order: a split one has several, `NAME-00001-of-00003.gguf` and so on.

    Raises:
        FileNotFoundError: a file of a split model is missing.
    """
    found = _SHARD.search(path.name)
    if found is None:
        return [path]
    stem, count = path.name[: found.start()], int(found[2])
    files = [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"expected all {count} files of the split model {stem} in {path.parent}; missing: {missing[:3]}. Fetch "
            "them."
        )
    return files


def read_header(path: str | Path) -> Header:
    """Read the header of a GGUF file, or of all files of a split model.

    Raises:
        ValueError: the file is damaged, or holds no tensors.
        FileNotFoundError: a file of a split model is missing.

    Example:
        >>> read_header("SmolLM2-135M-Instruct.Q4_1.gguf").architecture
        'llama'
    """
    path = Path(path)
    values: dict[str, Any] = {}
    types: dict[str, list[int]] = {}
    tensors: list[Tensor] = []
    for file in shards_of(path):
        try:
            own, own_types, own_tensors = _read_file(file)
        except (struct.error, ValueError, LookupError, OverflowError, MemoryError) as error:
            raise ValueError(f"expected a whole GGUF file at {file}; got {error}. Fetch it again.") from error
        values, types = {**own, **values}, {**own_types, **types}
        tensors += own_tensors
    if not tensors:
        raise ValueError(f"expected weights in {path}; got a GGUF file without any. Fetch it again.")
    if "general.architecture" not in values:
        raise ValueError(f"expected the key general.architecture in {path}; got {sorted(values)[:8]}. Fetch it again.")
    return Header(shards_of(path)[0], values, types, tuple(tensors))


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, list[int]], list[Tensor]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError(f"the first bytes {data[:4]!r}")
        version, tensor_count, value_count = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format; versions 2 and 3 can be read")
        cursor = _Cursor(data, 24)
        values: dict[str, Any] = {}
        types: dict[str, list[int]] = {}
        for _ in range(value_count):
            key = cursor.string()
            kind = cursor.number("I")
            values[key], types[key] = cursor.value(kind)
        found = []
        for _ in range(tensor_count):
            name = cursor.string()
            shape = tuple(reversed([cursor.number("Q") for _ in range(cursor.number("I"))]))
            found.append((name, shape, cursor.number("I"), cursor.number("Q")))
        alignment = int(values.get("general.alignment", 32))
        start = (cursor.position + alignment - 1) // alignment * alignment
        tensors = []
        for name, shape, kind, offset in found:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if start + offset + prod(shape) // block * size > len(data):
                raise ValueError(f"no room for the tensor {name}: the file is cut off")
            tensors.append(Tensor(name, shape, kind, path, start + offset))
    return values, types, tensors


class _Cursor:
    """A position in the bytes of a header."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        end = self.position + length
        if end > len(self.data):
            raise ValueError("a text that goes beyond the end of the file")
        text = self.data[self.position : end].decode("utf-8", "surrogateescape")
        self.position = end
        return text

    def value(self, kind: int) -> tuple[Any, list[int]]:
        """A value and the numbers of its type."""
        if kind == STRING:
            return self.string(), [STRING]
        if kind != ARRAY:
            return self.number(_FIXED[kind]), [kind]
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            return self._strings(count), [ARRAY, STRING]
        if inner == ARRAY:
            return [self.value(ARRAY)[0] for _ in range(count)], [ARRAY, ARRAY]
        code = _FIXED[inner]
        values = list(struct.unpack_from(f"<{count}{code}", self.data, self.position))
        self.position += count * struct.calcsize(f"<{code}")
        return values, [ARRAY, inner]

    def _strings(self, count: int) -> list[str]:
        """Many texts, without a call for each."""
        data, position, texts = self.data, self.position, []
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = position + 8
            position = start + length_at(data, position)[0]
            texts.append(data[start:position].decode("utf-8", "surrogateescape"))
        if position > len(data):
            raise ValueError("a list of texts that goes beyond the end of the file")
        self.position = position
        return texts


# transformers' parser, fed with a header that is read once


@contextlib.contextmanager
def header_in_place(header: Header) -> Iterator[None]:
    """Inside the `with`, transformers reads this header, and does not parse the file again with gguf-py.

    The map from names in the file to names in the model is made once, and not once for every module. Weights are
    dequantised in groups of 2^20 numbers, and not of 16 rows.
    """
    import gguf
    import gguf.quants
    from transformers import modeling_gguf_pytorch_utils as parser

    reader = _reader(header)
    with (
        mock.patch("gguf.GGUFReader", lambda path, *_, **__: reader),
        mock.patch("gguf.get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        mock.patch.object(parser, "_gguf_parse_value", lambda value, _: value),
        mock.patch.object(gguf.quants, "_apply_over_grouped_rows", _in_large_groups),
    ):
        yield


def _in_large_groups(
    func: Callable[[np.ndarray], np.ndarray], arr: np.ndarray, otype: Any, oshape: tuple[int, ...]
) -> np.ndarray:
    """`func` over groups of rows, with the signature of gguf-py's function."""
    rows = arr.reshape(-1, arr.shape[-1])
    out: np.ndarray = np.empty(oshape, otype)
    flat = out.reshape(len(rows), -1)
    step = max(1, GROUP // flat.shape[1])
    for start in range(0, len(rows), step):
        flat[start : start + step] = func(rows[start : start + step])
    return out


def _reader(header: Header) -> Any:
    """The interface of `gguf.GGUFReader` that transformers uses; values are parsed already."""
    from gguf import GGMLQuantizationType

    fields = {}
    for key, value in header.values.items():
        parts = value if isinstance(value, list) else [value]
        fields[key] = SimpleNamespace(name=key, parts=parts, data=range(len(parts)), types=header.types[key])
    tensors = [
        SimpleNamespace(
            name=tensor.name,
            tensor_type=GGMLQuantizationType(tensor.kind),
            shape=np.array(tensor.shape[::-1]),
            n_elements=prod(tensor.shape),
            data=data_of(tensor),
        )
        for tensor in header.tensors
    ]
    return SimpleNamespace(fields=fields, tensors=tensors)


def data_of(tensor: Tensor) -> np.ndarray:
    """The data of a tensor, mapped from its file: numbers, or the bytes of its blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    kind = GGMLQuantizationType(tensor.kind)
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I32": np.int32, "I16": np.int16, "I8": np.int8}
    data = np.asarray(np.memmap(tensor.file, mode="r"))
    if kind.name in plain:
        dtype = np.dtype(plain[kind.name])
        stop = tensor.start + prod(tensor.shape) * dtype.itemsize
        return data[tensor.start : stop].view(dtype).reshape(tensor.shape)
    block, size = GGML_QUANT_SIZES[kind]
    stop = tensor.start + prod(tensor.shape) // block * size
    return data[tensor.start : stop].reshape(quant_shape_to_byte_shape(tensor.shape, kind))


# What transformers passes over


def rope_of(header: Header) -> dict[str, Any] | None:
    """The RoPE scaling of a file, in transformers' terms without `rope_theta`; None without a scaling.

    Linear, YaRN and LongRoPE scaling stand in the header. Llama 3's stands in the tensor `rope_freqs.weight`, which
    divides the frequencies. Where the factors are those of transformers' `llama3` rule, its parameters are found;
    other factors are given as they are (`longrope` with the same factors for short and long texts).

    Raises:
        ValueError: a kind of scaling that cannot be computed, or one without the numbers that it needs.
    """
    factors = {tensor.name: data_of(tensor) for tensor in header.tensors if tensor.name in ROPE_TENSORS}
    kind = header.get("rope.scaling.type", "none" if header.get("rope.scale_linear") is None else "linear")
    factor = float(header.get("rope.scaling.factor", header.get("rope.scale_linear", 1.0)))
    original = header.get("rope.scaling.original_context_length")
    scale = float(header.get("rope.scaling.attn_factor", 1.0))
    if "rope_freqs.weight" in factors:
        return _llama3(header, factors["rope_freqs.weight"].astype(np.float64))
    if len(factors) == 2:
        long, short = (factors[f"rope_factors_{name}.weight"].astype(float).tolist() for name in ("long", "short"))
        found: dict[str, Any] = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        if scale != 1.0:
            found["attention_factor"] = scale
        if original is not None:
            found["original_max_position_embeddings"] = int(original)
        return found
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(header, factor, original, scale)
    raise ValueError(
        f"expected a RoPE scaling of none, linear, yarn, or longrope with its tensors, in {header.path.name}; got "
        f"{kind!r}. Load the original safetensors checkpoint."
    )


def _yarn(header: Header, factor: float, original: Any, scale: float) -> dict[str, Any]:
    if original is None:
        raise ValueError(
            f"expected rope.scaling.original_context_length beside YaRN's factor in {header.path.name}; it is missing. "
            "Load the original safetensors checkpoint."
        )
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    for name in ("beta_fast", "beta_slow"):
        if (value := header.get(f"rope.scaling.yarn_{name}")) is not None:
            found[name] = float(value)
    if scale != 1.0:
        found["attention_factor"] = scale * (0.1 * float(np.log(factor)) + 1.0)
    return found


def _llama3(header: Header, factors: np.ndarray) -> dict[str, Any]:
    """The parameters of transformers' `llama3` rule that give these factors, or the factors themselves."""
    theta = float(header.get("rope.freq_base", 10000.0))
    inverse = 1.0 / theta ** (np.arange(len(factors)) / len(factors))
    wavelength = 2 * np.pi / inverse
    factor = float(factors.max())
    for original in (2**power for power in range(5, 18)):
        for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0)):
            smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
            scaled = np.where(
                wavelength > original / low,
                inverse / factor,
                np.where(wavelength < original / high, inverse, (1 - smooth) * inverse / factor + smooth * inverse),
            )
            if np.allclose(inverse / scaled, factors, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    listed = factors.astype(float).tolist()
    context = int(header.get("context_length", 4096))
    return {
        "rope_type": "longrope",
        "long_factor": listed,
        "short_factor": listed,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": context,
    }


def apply_rope(config: Any, header: Header) -> None:
    """Write a file's RoPE scaling into a configuration; transformers passes it over.

    A model with a second, local RoPE (Gemma 3) is scaled in its full-attention layers only, as llama.cpp does.

    Raises:
        ValueError: see `rope_of`; a configuration without RoPE parameters.
    """
    scaling = rope_of(header)
    if scaling is None:
        return
    current = getattr(config, "rope_parameters", None)
    if not isinstance(current, dict):
        raise ValueError(
            f"expected a configuration with RoPE parameters for the scaling {scaling['rope_type']!r} of "
            f"{header.path.name}; {type(config).__name__} has none. Load the original safetensors checkpoint."
        )
    part: dict[str, Any] = current.get("full_attention", current)
    theta = part.get("rope_theta", header.get("rope.freq_base", 10000.0))
    partial = {name: part[name] for name in ("partial_rotary_factor",) if name in part}
    part.clear()
    part.update({"rope_theta": theta, **partial, **scaling})
    config.rope_parameters = current


def check_tensors(model: Any, header: Header) -> None:
    """`ValueError` for tensors of the file that the loaded model has no place for: they would be passed over."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    known = get_gguf_hf_weights_map(model, processor)
    if kind.perform_fallback_tensor_mapping is not TensorProcessor.perform_fallback_tensor_mapping:
        return  # a mixture of experts names its tensors while they are read
    surplus = [tensor.name for tensor in header.tensors if tensor.name not in known and tensor.name not in ROPE_TENSORS]
    if surplus:
        raise ValueError(
            f"expected only tensors that {type(model).__name__} has in {header.path.name}; got {len(surplus)} more, "
            f"e.g. {surplus[0]!r}. Load the original safetensors checkpoint."
        )


def follow_flags(tokenizer: Any, header: Header) -> None:
    """Make a tokenizer put BOS and EOS around a text as the file's flags say, where transformers does not.

    Raises:
        ValueError: a flag without the token that it is about, or a slow tokenizer.
    """
    from tokenizers.processors import TemplateProcessing

    flags = {name: header.values.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos")}
    ids = {name: header.values.get(f"tokenizer.ggml.{name}_token_id") for name in flags}
    now = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    more = len(now) > len(bare)
    has = {"bos": more and now[0] == ids["bos"], "eos": more and now[-1] == ids["eos"]}
    wanted = {name: has[name] if flag is None else bool(flag) for name, flag in flags.items()}
    if wanted == has:
        return
    missing = [name for name, add in wanted.items() if add and ids[name] is None]
    if missing or not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"expected the token ids that the flags of {header.path.name} ask for ({wanted}), and a fast tokenizer; "
            f"missing: {missing or 'a fast tokenizer'}. Load the original safetensors checkpoint."
        )
    tokens = {name: tokenizer.convert_ids_to_tokens(ids[name]) for name, add in wanted.items() if add}
    single = " ".join([*([tokens["bos"]] if wanted["bos"] else []), "$A", *([tokens["eos"]] if wanted["eos"] else [])])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, ids[name]) for name, token in tokens.items()]
    )
