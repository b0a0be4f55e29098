"""Checkpoint: read model and tokenizer with transformers, and check that folder and weights are complete."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from steerkit.io.json import read_json
from steerkit.models.blocks import Blocks


def check_folder(checkpoint: str, trust_pickle: bool) -> None:
    """Refuse a path that holds no checkpoint, or only pickled weights. Hub ids are not checked.

    Raises:
        FileNotFoundError: no such path, or no `config.json` in it.
        ValueError: the path is a file, its `config.json` is not JSON, or its weights are pickled and not trusted.
    """
    folder = Path(checkpoint)
    if not folder.exists() and checkpoint.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"expected a checkpoint at {folder}; there is none. Check the path, or pass a hub id: owner/name."
        )
    if folder.is_file():
        raise ValueError(f"expected a folder, a .gguf file or a hub id; got the file {folder}. Name its folder.")
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        read_json(folder / "config.json")
    pickles = [] if trust_pickle else sorted(folder.glob("pytorch_model*.bin*"))
    if pickles and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"expected safetensors in {folder}; got the pickle {pickles[0].name}, which can hold code. Convert it "
            "with `save_pretrained` on a machine where you trust it, or pass trust_pickle=True."
        )


def check_weights(checkpoint: str, blocks: Blocks, report: Mapping[str, Any]) -> None:
    """Refuse weights that do not match the configuration: transformers initialises missing ones, and drops others.

    Args:
        checkpoint: its name, for the message.
        blocks: the blocks of the loaded model.
        report: transformers' `output_loading_info`, with `missing_keys` and `unexpected_keys`.

    Raises:
        ValueError: tensors are missing, or belong to blocks beyond the last configured one.
    """
    block = re.compile(rf"(?:^|\.){re.escape(blocks.path.rpartition('.')[2])}\.([0-9]+)\.")
    missing = sorted(report["missing_keys"])
    surplus = sorted(
        key for key in report["unexpected_keys"] if (match := block.search(key)) and int(match[1]) >= len(blocks)
    )
    if missing or surplus:
        raise ValueError(
            f"expected the weights of {len(blocks)} blocks, as in the configuration of {checkpoint}; got "
            f"{len(missing)} tensors too few and {len(surplus)} in further blocks, e.g. {(missing + surplus)[0]!r}. "
            "Correct its config.json, or fetch it again."
        )


def from_transformers(
    checkpoint: str, options: Mapping[str, Any], model_options: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Read a checkpoint with transformers' Auto classes.

    Args:
        checkpoint: hub id or folder.
        options: arguments of `from_pretrained` of both tokenizer and model.
        model_options: further arguments of the model's.

    Returns:
        `(model, tokenizer, report)`; the report is transformers' `output_loading_info`.

    Raises:
        ImportError: transformers or a package that it needs cannot be imported: the installation is broken.
        OSError: no such checkpoint, or the hub cannot be reached.
        ValueError: the checkpoint is damaged.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint, output_loading_info=True, **options, **model_options
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each parser of transformers raises its own
        raise explained(error, checkpoint, bool(options.get("local_files_only"))) from error
    model, report = loaded
    return model, tokenizer, report


def explained(error: Exception, checkpoint: str, offline: bool) -> Exception:
    """The error to raise for an error of `from_pretrained`: for the installation, the hub or the checkpoint."""
    if reason := _import_failure(error):
        return ImportError(
            f"expected an installation that can import the code of {checkpoint}; got {reason} The checkpoint is not "
            "the cause. Install or reinstall the package that this is about; torch, torchvision and transformers must "
            "be releases that fit each other (remove torchvision if you do not need it: pip uninstall torchvision)."
        )
    if isinstance(error, OSError):
        unreachable = (
            "the hub does not answer, and this machine keeps no copy of it. Check the network, or pass a folder."
        )
        return OSError(
            f"expected a checkpoint named {checkpoint}; {unreachable if offline else ' '.join(str(error).split())}"
        )
    return ValueError(
        f"expected a whole checkpoint at {checkpoint}; got {type(error).__name__}: {error}. Fetch it again, or look at "
        "the file that this is about."
    )


def _import_failure(error: BaseException) -> str | None:
    """The messages of an error that comes from a failed import, with its causes; None for any other error.

    A failed import is an `ImportError`, or any error that was raised while the code of a module ran.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if not any(isinstance(link, ImportError) or _in_module_code(link) for link in chain):
        return None
    messages = dict.fromkeys(f"{type(link).__name__}: {str(link).rstrip('.')}." for link in chain)
    return " Cause: ".join(messages)


def _in_module_code(error: BaseException) -> bool:
    """Whether an error was raised while a module's code ran, i.e. during its import."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "<module>":
            return True
        traceback = traceback.tb_next
    return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and log lines of transformers, by redirecting stderr: its GGUF bar has no switch."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
