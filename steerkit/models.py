"""Models: load a checkpoint, and say what it is."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from steerkit import artifacts
from steerkit.blocks import Blocks, find_blocks, unwrap

ORIGIN = "_steerkit_origin"
WRAPPERS = r"^base_model\.model\.|\.base_layer|\.original_module"
ADAPTERS = r"lora_|modules_to_save|trainable_tokens|ia3_"


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
        backend: `"transformer_lens"` or `"nnsight"`: run it by that package (see `steerkit.backends.through`).
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
    checkpoint, gguf_file = _split_gguf(checkpoint, gguf_file)
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
        weights = _gguf_type(Path(checkpoint) / gguf_file)
    local = _local_only(checkpoint)
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
        model = _with_adapter(model, adapter, trust_pickle)
    model.eval()
    _check_whole(checkpoint, find_blocks(model, blocks), report)
    if backend is not None:
        from steerkit.backends import through

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
        artifacts.read_json(folder / "config.json")
    pickles = [] if trust_pickle else sorted(folder.glob("pytorch_model*.bin*"))
    if pickles and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"expected safetensors in {folder}; got the pickle {pickles[0].name}, which can hold code. Convert it "
            "(load it where you trust it, and `save_pretrained`), or say trust_pickle=True."
        )


def _local_only(name: str) -> dict[str, bool]:
    """What tells transformers to look on this machine only, for a hub id where nothing takes a connection at the hub.

    Its client would ask six times for every file, in 23 seconds or more, and has no setting for that. Behind a proxy
    only the client knows the way.
    """
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    path = name.startswith((".", "/", "~")) or Path(name).exists()
    if path or constants.HF_HUB_OFFLINE or {hub.scheme, "all"} & set(getproxies()):
        return {}
    port = hub.port or {"http": 80}.get(hub.scheme, 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError:
        return {"local_files_only": True}
    return {}


def _split_gguf(checkpoint: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    path = Path(checkpoint)
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"expected a GGUF file at {path}; there is none. Check the path.")
        return str(path.parent), path.name
    return str(checkpoint), gguf_file


def _gguf_type(path: Path) -> str | None:
    """The commonest quantisation of the file's tensors, by number of weights."""
    if not path.is_file():
        return "GGUF, dequantised"
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    try:
        for tensor in GGUFReader(path).tensors:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    except (ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"expected a whole GGUF file at {path}; got {error}. Fetch it again.") from error
    if not sizes:
        raise ValueError(f"expected weights in {path}; got a GGUF file without any. Fetch it again.")
    return f"{max(sizes, key=lambda kind: sizes[kind])}, dequantised"


def _with_adapter(model: nn.Module, adapter: str | Path, trust_pickle: bool) -> nn.Module:
    import peft
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError
    from transformers.utils import cached_file

    try:
        if not trust_pickle:
            cached_file(str(adapter), "adapter_model.safetensors", **_local_only(str(adapter)))
    except OSError as error:
        raise ValueError(
            f"expected an adapter with safetensors at {adapter}; got none. Check the path; a pickled one needs "
            "trust_pickle=True, and can hold code."
        ) from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter))
        wanted = load_peft_weights(str(adapter), device="cpu")
    except SafetensorError as error:
        raise ValueError(f"expected a whole adapter at {adapter}; got {error}. Fetch it again.") from error
    there = peft.get_peft_model_state_dict(adapted)
    lost = [k for k, v in wanted.items() if k not in there or not torch.equal(there[k].cpu(), v.to(there[k].dtype))]
    if lost:
        raise ValueError(
            f"expected all {len(wanted)} tensors of the adapter {adapter} in the model; {len(lost)} did not land, "
            f"e.g. {lost[0]!r}: it was made for another base model, or other module names. Load it on that one."
        )
    return adapted


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


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in inspect.signature(unwrap(model).forward).parameters


def fingerprint(model: nn.Module) -> tuple[str, str | None]:
    """What weights these are: `(base, adapter)`, 16 hexadecimal digits each; adapter is None where none is active.

    SHA-256 over each parameter's name, shape and 64 evenly spaced values rounded to bfloat16, so that the same
    checkpoint in float32, float64 or bfloat16 and on any device has the same fingerprint (float16 rounds otherwise and
    has its own). Of several adapters those count that are active now.
    """
    active = _active_adapters(model)
    digests = {False: hashlib.sha256(), True: hashlib.sha256()}
    found = {False}
    named = [(re.sub(WRAPPERS, "", name), name, parameter) for name, parameter in model.named_parameters()]
    for plain, name, parameter in sorted(named, key=lambda entry: entry[0]):
        ours = hasattr(model, "peft_config") and bool(re.search(ADAPTERS, name))
        if ours and not any(f".{one}." in f".{name}." for one in active):
            continue
        found.add(ours)
        flat = _stored(model, name, parameter).detach().reshape(-1)
        sample = flat[(torch.arange(64) * max(flat.numel() - 1, 0) // 63).to(flat.device)].cpu()
        sample = sample.to(torch.bfloat16).float() if sample.is_floating_point() else sample
        digests[ours].update(f"{plain}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    base, adapter = (digests[ours].hexdigest()[:16] for ours in (False, True))
    return base, adapter if True in found else None


def _stored(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, also where accelerate keeps them on the disk and puts them in place for a forward."""
    if not parameter.is_meta:
        return parameter
    owner, _, short = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(owner), "_hf_hook", None)
    if getattr(hook, "weights_map", None) is None:
        raise ValueError(f"expected the values of {name}; the model was built without them. Load its weights first.")
    return hook.weights_map[short]


def _active_adapters(model: nn.Module) -> set[str]:
    """The names of the adapters that act in a forward now; none where they are disabled."""
    if not hasattr(model, "peft_config"):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}


def describe(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """Provenance of a model as plain data: checkpoint, type, weights, fingerprints, dtype, kernel, blocks, versions."""
    base = unwrap(model)
    blocks = find_blocks(model)
    origin: Mapping[str, Any] = getattr(base, ORIGIN, {})
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    weights, adapter = fingerprint(model)
    about = {
        "checkpoint": origin.get("checkpoint") or getattr(base.config, "_name_or_path", "") or type(base).__name__,
        "weights": origin.get("weights", dtype),
        "model_fingerprint": weights,
        "adapter_fingerprint": adapter,
        "model_type": getattr(base.config, "model_type", None),
        "dtype": dtype,
        "attention": getattr(base.config, "_attn_implementation", None),
        "device": str(next(base.parameters()).device),
        "blocks": blocks.path,
        "n_layers": len(blocks),
        "d_model": blocks.d_model,
        "versions": artifacts.versions(),
    }
    if tokenizer is not None:
        template = getattr(tokenizer, "chat_template", None)
        about["template_sha256"] = artifacts.sha256(str(template)) if template else None
    return about
