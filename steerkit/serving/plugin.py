"""The plugin of vLLM: entry point `vllm.general_plugins`. The only file that wraps vLLM's own classes.

It does nothing unless the engine is started with `additional_config={"steerkit": {...}}` (see `Settings`), which
reaches the front end, the engine core and the workers, and is part of the key of vLLM's compile cache. Every wrap was
tested with the versions in `TESTED`; another version is refused unless the settings say `"untested": true`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from steerkit.serving.request import (
    DRAW,
    KEY,
    KEYS,
    READ,
    SLOTS,
    Asked,
    BadRequest,
    cache_keys,
    check_keys,
    from_wire,
    meant_for_steering,
    parse_all,
    to_wire,
)

TESTED = ("0.32",)
PLUGIN = "steerkit"
"""Name of the settings in `additional_config`, and of the entry point."""


@dataclass(frozen=True)
class Settings:
    """Settings of the plugin, the value of `additional_config["steerkit"]`.

    Args:
        vectors: folder of the served vectors.
        slots: largest number of vectors that one request may use at one layer.
        capacity: largest number of (vector, layer) pairs that are served.
        sums: largest number of sums of the stream that are read at a time; 0: none can be read.
        foreign: also serve vectors that were read from other weights.
        fingerprint: of the served weights; None: vectors are not compared with it.
        untested: accept a version of vLLM on which the plugin was not tested.
    """

    vectors: str
    slots: int = SLOTS
    capacity: int = 512
    sums: int = 0
    foreign: bool = False
    fingerprint: str | None = None
    untested: bool = False

    @classmethod
    def of(cls, config: Any) -> Settings | None:
        """The settings of an engine's configuration; None if it does not ask for steering.

        Raises:
            ValueError: an unknown setting, no folder, or an untested version of vLLM.
        """
        additional = config.additional_config
        given = additional.get(PLUGIN) if isinstance(additional, Mapping) else None
        if given is None:
            return None
        known = {one.name for one in fields(cls)}
        if not isinstance(given, Mapping) or set(given) - known or "vectors" not in given:
            raise ValueError(f"expected settings among {sorted(known)}, vectors at least; got {given!r}. Correct them.")
        settings = cls(**given)
        if not Path(settings.vectors).is_dir():
            raise ValueError(f"expected a folder of vectors; got {settings.vectors!r}, which is none. Make it.")
        version = vllm_version()
        if not settings.untested and version.rpartition(".")[0] not in TESTED:
            raise ValueError(
                f"expected vLLM {' or '.join(TESTED)}, on which steering was tested; got {version}. Install one of "
                'these, or set "untested": true and run `steerkit doctor` on the server.'
            )
        return settings

    def as_dict(self) -> dict[str, Any]:
        """The settings as `of` reads them."""
        return asdict(self)


def vllm_version() -> str:
    """The version of vLLM, whose CPU build has another name."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def register() -> None:
    """Wrap vLLM's classes; called in every process of vLLM. A second call does nothing."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_worker import Worker

    _wrap(Worker, "load_model", _load_model)
    Worker.steerkit_sums = _sums
    Worker.steerkit_counts = _counts
    Worker.steerkit_overflowed = _overflowed
    _wrap(InputProcessor, "__init__", _front_end)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(kv_cache_utils, "generate_block_hash_extra_keys", _extra_keys)
    for protocol, names in _protocols():
        for name in names:
            if hasattr(protocol, name):
                _wrap(protocol, name, functools.partial(_checked_params, name))


def _protocols() -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The HTTP requests and their methods that make sampling parameters."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for protocol in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        yield protocol, ("to_sampling_params", "to_beam_search_params")


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by one that calls `wrapper(original, *args, **kwargs)`."""
    original = getattr(owner, name)
    if getattr(original, "_steerkit", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._steerkit = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


# ---------------------------------------------------------------------------------------------------------- front end


def _process_inputs(
    original: Callable[..., Any], self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Check a request's specification and replace it by the checked one; a bad one never reaches the engine."""
    extra = getattr(params, "extra_args", None)
    if not extra:
        return original(self, request_id, prompt, params, *args, **kwargs)
    if not any(name.lower().startswith("steer") for name in extra):
        return original(self, request_id, prompt, params, *args, **kwargs)
    try:
        check_keys(extra)
        folder, settings = _folder_of(self)
        if kwargs.get("resumable"):
            raise BadRequest("expected a whole prompt with steering; got a streamed one. Send the prompt at once.")
        if kwargs.get("lora_request") is not None and not settings.foreign:
            raise BadRequest(
                "expected the served weights with steering; got a request with an adapter, whose stream is another. "
                "Leave it out, or start the server with --foreign."
            )
        if not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt or "prompt_embeds" in prompt:
            raise BadRequest("expected a prompt of tokens with steering; got another. Send text or token ids.")
        asked = parse_all(
            extra,
            folder.served() if KEY in extra else {},
            slots=settings.slots,
            n_prompt=len(prompt["prompt_token_ids"]),
            n_new=params.max_tokens or self.model_config.max_model_len,
            n_layers=folder.model.n_layers,
        )
        if (asked.read is not None or asked.draw is not None) and params.n != 1:
            raise BadRequest(f"expected one text of a request with {READ!r} or {DRAW!r}; got n={params.n}. Send n=1.")
        if asked.read is not None and not settings.sums:
            raise BadRequest(
                'expected an engine that reads; this one does not. Start it with "sums": 4 in its settings.'
            )
    except BadRequest as error:
        raise _refused(str(error)) from None
    checked = params.clone()
    checked.extra_args = {name: value for name, value in extra.items() if name not in KEYS}
    if asked != Asked(prompt=asked.prompt):
        checked.extra_args[KEY] = {**to_wire(asked), "n_layers": folder.model.n_layers}
    if asked.read is not None:
        checked.skip_reading_prefix_cache = True  # tokens from the cache pass through no block
    return original(self, request_id, prompt, checked, *args, **kwargs)


def _front_end(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """Keep the served folder of an engine's front end; the server of this process, if there is one, has one engine."""
    original(self, *args, **kwargs)
    settings = Settings.of(self.vllm_config)
    self._steerkit = None if settings is None else (folder_of_config(self.vllm_config, settings), settings)
    _front_ends[:] = [self]


_front_ends: list[Any] = []
"""The front end that was made last in this process."""


def _folder_of(processor: Any) -> tuple[Any, Settings]:
    """The served folder of an engine's front end."""
    known: tuple[Any, Settings] | None = processor._steerkit
    if known is None:
        raise BadRequest(
            f"expected an engine that steers; got {KEY!r} in a request to one that was started without. Start it "
            'with additional_config={"steerkit": {"vectors": FOLDER}}.'
        )
    return known


def folder_of_config(config: Any, settings: Settings) -> Any:
    """The served folder of an engine, with what its vectors must fit."""
    from steerkit.serving.folder import Model, VectorFolder

    about = config.model_config
    model = Model(
        about.hf_config.model_type,
        about.hf_text_config.num_hidden_layers,
        about.get_hidden_size(),
        settings.fingerprint,
        str(about.dtype).removeprefix("torch."),
    )
    return VectorFolder(Path(settings.vectors), model, settings.foreign, settings.capacity)


def listing_of(config: Any, folder: Any, settings: Settings) -> dict[str, Any]:
    """What a client needs to know: the model, the limits, and every vector with its layers or its error."""
    about = config.model_config
    generation = about.try_get_generation_config() or {}
    ends = generation.get("eos_token_id", getattr(about.hf_text_config, "eos_token_id", None))
    model = {
        **asdict(folder.model),
        "checkpoint": str(about.model),
        "context": about.max_model_len,
        "cache_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
        "vocabulary": about.get_vocab_size(),
        "ends": [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None],
        "replicas": config.parallel_config.data_parallel_size,
        "device": str(config.device_config.device_type),
        "vllm": vllm_version(),
    }
    served = sorted(folder.served().values(), key=lambda one: one.name)
    limits = {"slots": settings.slots, "capacity": settings.capacity, "sums": settings.sums}
    return {"model": model, **limits, "vectors": [asdict(one) for one in served]}


def _refused(message: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(message, parameter=KEY)
    return error


def _checked_params(name: str, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Check a request of HTTP before a stream has begun, and refuse what vLLM would ignore: steering with beams."""
    extra = getattr(self, "vllm_xargs", None) or {}
    try:
        check_keys(extra)
        if outside := [one for one in getattr(self, "model_extra", None) or {} if meant_for_steering(one)]:
            raise BadRequest(
                f"expected the steering in vllm_xargs, as JSON text; got {outside} beside it. Send "
                '{"vllm_xargs": {"steerkit": "{...}"}}.'
            )
        if set(KEYS) & set(extra):
            if name == "to_beam_search_params":
                raise BadRequest(
                    "expected sampling or greedy decoding with steering; got beam search. Leave use_beam_search out."
                )
            if _front_ends:  # what depends on the prompt's length is checked when it is known
                folder, settings = _folder_of(_front_ends[-1])
                context = _front_ends[-1].model_config.max_model_len
                limits = {"n_prompt": context, "n_new": context, "n_layers": folder.model.n_layers}
                parse_all(extra, folder.served() if KEY in extra else {}, slots=settings.slots, **limits)
    except BadRequest as error:
        raise _refused(str(error)) from None
    return original(self, *args, **kwargs)


# -------------------------------------------------------------------------------------------------------- prefix cache


def _extra_keys(original: Callable[..., Any], request: Any, start: int, end: int, start_mm: int) -> Any:
    """Add to the hash of a block what its keys and values depend on beside the tokens."""
    keys, next_mm = original(request, start, end, start_mm)
    params = request.sampling_params
    wire = params.extra_args.get(KEY) if params is not None and params.extra_args else None
    if wire is None:
        return keys, next_mm
    asked = getattr(request, "_steerkit_asked", None)
    if asked is None:
        asked = request._steerkit_asked = from_wire(wire)
    ours = cache_keys(asked.pushes, asked.prompt or request.num_prompt_tokens, end, wire["n_layers"])
    return ((*(keys or ()), *ours) or None), next_mm


# ------------------------------------------------------------------------------------------------------------- workers


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """After the weights are loaded: find the blocks, probe what they return, and hook them."""
    settings = Settings.of(self.vllm_config)
    loaded = original(self, *args, **kwargs)
    if settings is not None:
        install(self.model_runner, self.vllm_config, settings)
    return loaded


def _sums(worker: Any, keys: Sequence[str]) -> dict[str, Any]:
    """For `collective_rpc`: see `Steerer.take_sums`."""
    taken: dict[str, Any] = worker.model_runner._steerkit.take_sums(keys)
    return taken


def _counts(worker: Any) -> dict[str, int]:
    """For `collective_rpc`: what the worker has counted, see `steerkit.serving.buffers.COUNTS`."""
    return dict(worker.model_runner._steerkit.counts)


def _overflowed(worker: Any, names: Sequence[str]) -> dict[str, int]:
    """For `collective_rpc`: which of these draws overflowed, and after how many tokens; they are forgotten."""
    known = worker.model_runner._steerkit.draws.overflowed
    return {name: known.pop(name) for name in names if name in known}


def install(runner: Any, config: Any, settings: Settings) -> None:
    """Hook the blocks of a worker's model, and fill the buffers at each step of its runner.

    Raises:
        RuntimeError: a setting of the engine with which steering would be wrong, or was not tested.
        UnknownLayout: see `steerkit.serving.layout`.
    """
    from steerkit.models.hooks import change_output
    from steerkit.serving.buffers import Steerer
    from steerkit.serving.folder import stored_vector
    from steerkit.serving.layout import find_blocks, probe

    check_engine(config)
    model = runner.get_model()
    model_config = config.model_config
    n_layers, d_model = model_config.hf_text_config.num_hidden_layers, model_config.get_hidden_size()
    blocks = find_blocks(model, n_layers)
    device = next(model.parameters()).device
    with _uncompiled(model):
        layout = probe(blocks, lambda: _dummy_run(runner))
    folder = Path(settings.vectors)
    tokens = config.scheduler_config.max_num_batched_tokens
    steerer = Steerer(
        n_layers,
        d_model,
        tokens,
        settings.slots,
        settings.capacity,
        settings.sums,
        device,
        lambda content: stored_vector(folder, content),
    )
    for block, buffers in zip(layout.blocks, steerer.layers, strict=True):
        block.add_module("steerkit", buffers)

        def steered(module: Any, output: Any) -> Any:
            hidden, residual = layout.split(output)
            return layout.joined(output, module.steerkit(hidden, residual))

        change_output(block, steered)
    runner._steerkit = steerer
    compute_logits = model.compute_logits

    def chosen_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(*args, **kwargs)
        steerer.choose(logits)
        return logits

    model.compute_logits = chosen_logits
    follow(runner, steerer)


def follow(runner: Any, steerer: Any) -> None:
    """Tell the steerer of every step which requests are in it, after the runner has taken them in."""
    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        steerer.counts["preemptions"] += len(scheduler_output.preempted_req_ids or ())
        for name in scheduler_output.finished_req_ids:
            steerer.finish(name)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            wire = params.extra_args.get(KEY) if params is not None and params.extra_args else None
            if wire is not None:
                steerer.requests[new.req_id] = from_wire(wire)
        result = execute(scheduler_output, *args, **kwargs)
        steerer.rest()
        return result

    runner.execute_model = execute_model
    if hasattr(runner, "_prepare_inputs"):
        prepare = runner._prepare_inputs

        def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare(scheduler_output, *args, **kwargs)
            batch = runner.input_batch
            n = batch.num_reqs
            steerer.begin(
                batch.req_ids[:n],
                runner.query_start_loc.np[: n + 1],
                batch.num_computed_tokens_cpu[:n],
                batch.num_prompt_tokens[:n],
            )
            return prepared

        runner._prepare_inputs = prepare_inputs
    else:
        prepare_batch = runner.prepare_inputs

        def prepare_batch_inputs(*args: Any, **kwargs: Any) -> Any:
            batch = prepare_batch(*args, **kwargs)
            n = len(batch.req_ids)
            prompts = runner.req_states.prompt_len.np[batch.idx_mapping_np[:n]]
            steerer.begin(batch.req_ids, batch.query_start_loc_np[: n + 1], batch.num_computed_tokens_np[:n], prompts)
            return batch

        runner.prepare_inputs = prepare_batch_inputs


def check_engine(config: Any) -> None:
    """`RuntimeError` for settings of an engine with which steering would be wrong.

    With most of them tokens are split, dropped or repeated between blocks; a connector may share blocks by their tokens
    alone.
    """
    parallel, cache = config.parallel_config, config.cache_config
    found = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "micro-batches (DBO)": bool(
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)
        ),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "batch-sharded sampling": bool(getattr(parallel, "enable_batch_sharded_sampling", False)),
        "a connector of key-value caches": config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": bool(getattr(cache, "kv_sharing_fast_prefill", False)),
        "sequence parallelism": bool(getattr(config.compilation_config.pass_config, "enable_sp", False)),
    }
    if active := [name for name, there in found.items() if there]:
        raise RuntimeError(
            f"expected an engine without {', '.join(active)}, with which steering is not exact. Turn it off."
        )


@contextlib.contextmanager
def _uncompiled(model: Any) -> Iterator[None]:
    """Run the model's own code inside the `with`: what a probe does must not be compiled in."""
    marked = [module for module in model.modules() if getattr(module, "do_not_compile", None) is False]
    for module in marked:
        module.do_not_compile = True
    try:
        yield
    finally:
        for module in marked:
            module.do_not_compile = False


def _dummy_run(runner: Any, tokens: int = 4) -> Any:
    """What follows the last block, for a few tokens."""
    import torch

    # runner V2 has no graphs yet, which only a profiling run does without
    options = {"is_profile": True, "skip_attn": True} if runner.vllm_config.use_v2_model_runner else {}
    with torch.inference_mode():
        hidden, *_ = runner._dummy_run(tokens, **options)
    return hidden[:tokens].clone()
