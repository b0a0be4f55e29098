"""VLLM: an engine of vLLM in this process, for sweeps and capture."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from steerkit.serving.checkpoint import checkpoint_folder, fingerprint_of_folder
from steerkit.serving.folder import NAME, VectorFolder, vector_files
from steerkit.serving.plugin import PLUGIN, Settings, folder_of_config, listing_of
from steerkit.serving.remote import BY_CONTENT, Finished, Remote, Sent
from steerkit.vectors.vector import SteeringVector

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1"}
"""Set where they are not: vLLM would take 4 GiB for the cache, leave one processor idle, and send usage statistics."""


class VLLM(Remote):
    """An engine of vLLM in this process.

    Args:
        checkpoint: hub id, folder or GGUF file.
        vectors: folder of the vectors that it uses; it is made. What earlier jobs have put there is removed when there
            is no room.
        sums: largest number of labels that `collect_means` reads at a time.
        capacity: largest number of (vector, layer) pairs.
        foreign: also serve vectors that were read from other weights.
        options: further arguments of `vllm.LLM`, e.g. `dtype="float32"`, `max_model_len=2048`.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError, UnknownLayout: the model cannot be steered there; see `steerkit.serving.plugin`.

    Example:
        >>> with sk.serving.VLLM("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32") as engine:
        ...     result = sk.sweep(None, tokenizer, vector, prompts, layers=14, coefficients=[-1, 0, 1], engine=engine)
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        vectors: str | Path = "runs/vllm-vectors",
        sums: int = 4,
        capacity: int = 512,
        foreign: bool = False,
        **options: Any,
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        Path(vectors).mkdir(parents=True, exist_ok=True)
        folder = checkpoint_folder(str(checkpoint), Path("runs/checkpoints"))
        print_of = fingerprint_of_folder(Path(folder)) if Path(folder).is_dir() else None
        self.settings = Settings(
            str(Path(vectors).resolve()), capacity=capacity, sums=sums, foreign=foreign, fingerprint=print_of
        )
        from vllm import LLM

        self.llm: Any = LLM(
            model=str(folder),
            additional_config={PLUGIN: self.settings.as_dict()},
            disable_log_stats=options.pop("disable_log_stats", True),
            **options,
        )
        self.config = self.llm.llm_engine.vllm_config
        self.folder: VectorFolder = folder_of_config(self.config, self.settings)

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and its processes; its memory is free afterwards. The engine cannot be used again."""
        self.llm.llm_engine.engine_core.shutdown()

    def listing(self) -> dict[str, Any]:
        """See `Remote`."""
        return listing_of(self.config, self.folder, self.settings)

    def put(self, name: str, vector: SteeringVector) -> None:
        """See `Remote`."""
        if NAME.fullmatch(name) is None:
            raise ValueError(f"expected a name of letters, digits, '.', '_' and '-'; got {name!r}. Rename the vector.")
        path = self.folder.path / f"{name}.safetensors"
        vector.save(path)
        if error := self.folder.served()[name].error:
            path.unlink()
            raise ValueError(f"expected a vector that fits the served model; got {name!r}: {error}. Pass another.")

    def make_room(self, kept: Collection[str], pairs: int) -> None:
        """See `Remote`; the vectors that were put longest ago go first."""
        known = self.folder.served()
        room = self.settings.capacity - sum(len(one.layers) for one in known.values())
        files = [file for file in map(Path, vector_files(self.folder.path)) if file.name.startswith(BY_CONTENT)]
        for file in sorted(files, key=lambda one: one.stat().st_mtime_ns):
            if room >= pairs:
                return
            if file.stem not in kept:
                room += len(known[file.stem].layers)
                file.unlink()

    def delete(self, name: str) -> None:
        """See `Remote`."""
        (self.folder.path / f"{name}.safetensors").unlink(missing_ok=True)

    def complete(self, requests: Sequence[Sent]) -> Iterator[Finished]:
        """See `Remote`."""
        for number, output in self._outputs(requests):
            yield number, tuple(output.outputs[0].token_ids)

    def log_probs(self, requests: Sequence[Sent]) -> Iterator[tuple[int, tuple[float, ...]]]:
        """See `Remote`."""
        for number, output in self._outputs(requests, prompt_logprobs=0):
            one = requests[number]
            first = len(one.prompt) - one.scored
            entries = zip(output.prompt_logprobs[first:], one.prompt[first:], strict=True)
            yield number, tuple(float(entry[token].logprob) for entry, token in entries)

    def _outputs(self, requests: Sequence[Sent], **options: Any) -> Iterator[tuple[int, Any]]:
        """Yield `(number, vLLM's output)` of requests as they are finished."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        waiting = {}
        try:
            for number, one in enumerate(requests):
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=one.count,
                    ignore_eos=True,
                    stop_token_ids=list(one.stops),
                    extra_args=dict(one.extra) or None,
                    detokenize=False,
                    **options,
                )
                name = f"steerkit-{id(requests)}-{number}"
                prompt: dict[str, Any] = {"prompt_token_ids": list(one.prompt)}
                if one.salt is not None:
                    prompt["cache_salt"] = one.salt
                engine.add_request(name, prompt, params)
                waiting[name] = number
            while waiting:
                for output in engine.step():
                    if output.finished:
                        yield waiting.pop(output.request_id), output
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def call(self, name: str, argument: Any) -> list[Any]:
        """See `Remote`."""
        arguments = () if argument is None else (argument,)
        return list(self.llm.collective_rpc(f"steerkit_{name}", args=arguments))[:1]  # all workers have the same
