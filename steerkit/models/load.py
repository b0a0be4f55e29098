"""Load a checkpoint: hub id, folder or GGUF file, with its tokenizer and an adapter."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from steerkit.io.json import read_json
from steerkit.models.adapters import with_adapter
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.gguf import quantization_of, split_gguf
from steerkit.models.hub import offline_options
from steerkit.models.identity import ORIGIN


def load(
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | Mapping[str, str | int] | None = None,
    bits: int | None = None,
    blocks: str | None = None,
    backend: str | None = None,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready to be read and steered.

    Args:
        checkpoint: a hub id, a local folder, or the path of a `.gguf` file (dequantised to a dense model).
        adapter: a PEFT adapter (hub id or folder) to put on it, unmerged.
        gguf_file: the GGUF file's name inside `checkpoint`.
        dtype: default float32 on a CPU, the checkpoint's own elsewhere.
        device: default the first GPU if there is one, else the CPU. `"auto"`, or a map from module to device, spreads
            the model over several devices, the disk among them.
        bits: 4 or 8 quantises the weights as they are loaded; needs a GPU and the package bitsandbytes.
        blocks: path of the list of decoder blocks, where the rule does not find it.
        backend: `"transformer_lens"` or `"nnsight"`: run it by that package (see `steerkit.models.backends.through`).
        trust_remote_code: run Python code that the checkpoint brings. It can do anything that you can.
        trust_pickle: read weights from pickles too (`.bin`), where there are no safetensors. A pickle can hold code;
            torch's restricted reader refuses it, but has had holes.

    Returns:
        `(model, tokenizer)`: plain transformers (or PEFT) objects; the model in eval mode, its blocks verified.

    Raises:
        OSError: nothing loadable at `checkpoint`.
        NoResidualStream: its residual stream could not be found and verified.
        ValueError: weights that are cut off, pickled and not trusted, or fewer or more than the configuration says; an
            adapter that did not land in the model; `bits` where they cannot be had.
    """
    checkpoint, gguf_file = split_gguf(checkpoint, gguf_file)
    spread = device if device == "auto" or isinstance(device, Mapping) else None
    target = torch.device(
        device if isinstance(device, str | torch.device) and spread is None
        else "cuda" if torch.cuda.is_available() else "cpu"
    )  # fmt: skip
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected a device that is there; got {device!r} without a GPU. Say device='cpu'.")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"expected a dtype such as 'float32' or 'bfloat16'; got {dtype!r}. Choose one.")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    weights = None
    if gguf_file is None:
        _check_folder(checkpoint, trust_pickle)
    else:
        from transformers import GgufConfig

        options["gguf_file"] = gguf_file
        weights = quantization_of(Path(checkpoint) / gguf_file)
    local = offline_options(checkpoint)
    options |= local
    special: dict[str, Any] = {"adapter_kwargs": local} if local else {}
    if gguf_file is not None:
        special["quantization_config"] = GgufConfig(dequantize=True)
    elif not trust_pickle:
        special["use_safetensors"] = True
    if spread is not None:
        special["device_map"] = spread
    if bits is not None:
        special["quantization_config"] = _quantised(bits, gguf_file)
    special["dtype"] = dtype if dtype is not None else torch.float32 if target.type == "cpu" else "auto"
    model, tokenizer, report = _from_transformers(checkpoint, options, special)
    if not getattr(model, "hf_device_map", None) and bits is None:
        model = model.to(target)
    name = f"{checkpoint}/{gguf_file}" if gguf_file else str(checkpoint)
    setattr(model, ORIGIN, {"checkpoint": name, "weights": weights or str(model.dtype).removeprefix("torch.")})
    if adapter is not None:
        model = with_adapter(model, adapter, trust_pickle)
    model.eval()
    _check_whole(checkpoint, find_blocks(model, blocks), report)
    if backend is not None:
        from steerkit.models.backends import through

        model = through(model, tokenizer, backend)
    return model, tokenizer


def _quantised(bits: int, gguf_file: str | None) -> Any:
    from importlib.util import find_spec

    if bits not in (4, 8) or gguf_file is not None:
        raise ValueError(
            f"expected bits to be 4 or 8, and no GGUF file, which has its own; got {bits!r}. Leave it out."
        )
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        raise ValueError(
            f"expected a GPU and the package bitsandbytes for {bits}-bit weights; one is missing. Leave `bits` out."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def _from_transformers(checkpoint: str, options: Any, special: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and transformers' account of which weights it found; `OSError` or `ValueError` if it fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
            found: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint, output_loading_info=True, **options, **special
            )
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        gone = "the hub does not answer, and this machine keeps no copy of it. Check the network, or name a folder."
        said = gone if options.get("local_files_only") else f"{error}"
        raise OSError(f"expected a checkpoint named {checkpoint}; {said}") from error
    except Exception as error:  # each parser below has its own
        raise ValueError(
            f"expected a whole checkpoint at {checkpoint}; got {type(error).__name__}: {error}. Fetch it again, or "
            "look at the file that this is about."
        ) from error
    return found[0], tokenizer, found[1]


def _check_whole(checkpoint: str, blocks: Blocks, report: Mapping[str, Any]) -> None:
    """`ValueError` for weights that are not those of the configuration, which transformers draws at random or drops."""
    block = re.compile(rf"(?:^|\.){re.escape(blocks.path.rpartition('.')[2])}\.([0-9]+)\.")
    beyond = [k for k in report["unexpected_keys"] if (at := block.search(k)) and int(at[1]) >= len(blocks)]
    if lost := sorted(report["missing_keys"]) + sorted(beyond):
        raise ValueError(
            f"expected the weights that the configuration of {checkpoint} says, {len(blocks)} blocks; got "
            f"{len(report['missing_keys'])} tensors too few and {len(beyond)} in further blocks, e.g. {lost[0]!r}. "
            "Mend its config.json, or fetch it again."
        )


def _check_folder(checkpoint: str, trust_pickle: bool) -> None:
    """Refuse a path that holds no checkpoint, or one with pickles only; a hub id is for transformers to find."""
    folder = Path(checkpoint)
    if not folder.exists() and checkpoint.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"expected a checkpoint at {folder}; there is none. Check the path, or give a hub id: owner/name."
        )
    if folder.is_file():
        raise ValueError(f"expected a folder, a .gguf file or a hub id; got the file {folder}. Name its folder.")
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        read_json(folder / "config.json")
    pickles = [] if trust_pickle else sorted(folder.glob("pytorch_model*.bin*"))
    if pickles and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"expected safetensors in {folder}; got the pickle {pickles[0].name}, which can hold code. Convert it "
            "(load it where you trust it, and `save_pretrained`), or say trust_pickle=True."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers inside the `with` (its GGUF bar knows no other switch)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
