"""Plain forwards and transformers' generate inside `on`: every way of running gives the same tokens, or is refused."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, BartForConditionalGeneration, BertConfig, BertLMHeadModel
from transformers.generation.configuration_utils import CompileConfig

import steerkit as sk
from steerkit.models.blocks import NoResidualStream, find_blocks
from steerkit.models.cache_argument import cache_argument, cache_of
from steerkit.steering.steering import Steering
from steerkit.text.prompt import Prompt
from steerkit.vectors.lens import tokens_of
from tests.reference import greedy
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = [7, 3, 2, 8, 11, 40, 41, 9, 5]
NEW = 6
POSITIONS = ("generated", "from_last_prompt_token", "prompt", "all", "generated:2", "prompt:3", "all:10")
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


STRENGTHS = {"llama": (1, -2.0), "gpt2": (0, 0.5)}
"""The layer and coefficient at which the positions give different texts."""


def columns(positions: str) -> tuple[int, int]:
    """The columns of PROMPT and its continuation that are steered."""
    name, _, limit = positions.partition(":")
    n = len(PROMPT)
    low = {"generated": n, "from_last_prompt_token": n - 1, "prompt": 0, "all": 0}[name]
    high = n if name == "prompt" else 10**6
    return low, min(high, low + int(limit)) if limit else high


def truth(model: Any, steering: Steering) -> list[int]:
    """The slow reference: the whole text anew for every token, the vector added at fixed columns."""
    low, high = columns(steering.positions)
    return greedy(model, PROMPT, NEW, (), dict(steering.vector.layers), float(steering.coefficient), low, high)


def generated(model: Any, steering: Steering, **options: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    mask = {"attention_mask": torch.ones_like(ids)}
    with steering.on(model):
        return model.generate(ids, **mask, **{**OPTIONS, **options})[0, len(PROMPT) :].tolist()


def after_a_cached_prefix(length: int, inside: bool) -> Callable[[Any, Steering], list[int]]:
    def run(model: Any, steering: Steering) -> list[int]:
        def prefix() -> Any:
            return cache_of(model(input_ids=torch.tensor([PROMPT[:length]]), use_cache=True))

        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            cache = None if inside else prefix()
            with steering.on(model, prompt_length=len(PROMPT) if inside else None):
                cache = prefix() if inside else cache
                found = model.generate(
                    ids, attention_mask=torch.ones_like(ids), **{cache_argument(model): cache}, **OPTIONS
                )
        return found[0, len(PROMPT) :].tolist()

    return run


def stepwise(chunks: tuple[int, ...], prompt_length: int | None) -> Callable[[Any, Steering], list[int]]:
    """A plain loop over a cache, the prompt in chunks of these lengths."""

    def run(model: Any, steering: Steering) -> list[int]:
        name, cache, tokens = cache_argument(model), None, []
        with torch.no_grad(), steering.on(model, prompt_length=prompt_length):
            rest, sizes = list(PROMPT), [*chunks, len(PROMPT) - sum(chunks)]
            for size in sizes:
                part, rest = rest[:size], rest[size:]
                found = model(input_ids=torch.tensor([part]), use_cache=True, **({name: cache} if cache else {}))
                cache = cache_of(found)
            for _ in range(NEW):
                tokens.append(int(found.logits[0, -1].argmax()))
                found = model(input_ids=torch.tensor([tokens[-1:]]), use_cache=True, **{name: cache})
        return tokens

    return run


def uncached(model: Any, steering: Steering) -> list[int]:
    ids = list(PROMPT)
    with torch.no_grad(), steering.on(model, prompt_length=len(PROMPT)):
        for _ in range(NEW):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def ours(model: Any, steering: Steering) -> list[int]:
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    prompt = Prompt(tuple(PROMPT), "")
    (found,) = sk.generate(model, tokenizer, [prompt], max_new_tokens=NEW, steering=steering, return_details=True)
    return list(found.ids)


WAYS: dict[str, Callable[[Any, Steering], list[int]]] = {
    "steerkit.generate": ours,
    "generate": generated,
    "generate without a cache": lambda model, steering: generated(model, steering, use_cache=False),
    "generate with a static cache": lambda model, steering: generated(model, steering, cache_implementation="static"),
    **{
        f"generate with chunks of {size}": lambda model, steering, size=size: generated(
            model, steering, prefill_chunk_size=size
        )
        for size in range(1, len(PROMPT) + 2)
    },
    **{f"generate after a prefix of {n}": after_a_cached_prefix(n, inside=True) for n in (1, 4, len(PROMPT) - 1)},
    "an uncached loop": uncached,
    "a cached loop": stepwise((), len(PROMPT)),
    "a cached loop, prompt in two steps": stepwise((5,), len(PROMPT)),
    "a cached loop, last prompt token alone": stepwise((len(PROMPT) - 1,), len(PROMPT)),
    "a cached loop, prompt in chunks": stepwise((1, 1, 3), len(PROMPT)),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", STRENGTHS)
def test_every_way_of_running_gives_the_tokens_of_the_slow_reference(kind: str, way: str, positions: str) -> None:
    model = tiny_model(kind)
    layer, coefficient = STRENGTHS[kind]
    steering = Steering(vector(model, layer), coefficient, positions)
    assert WAYS[way](model, steering) == truth(model, steering)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_the_positions_give_different_texts(kind: str) -> None:
    model = tiny_model(kind)
    layer, coefficient = STRENGTHS[kind]
    texts = {tuple(truth(model, Steering(vector(model, layer), coefficient, name))) for name in POSITIONS}
    assert len(texts) >= 6


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_reference_moves_with_the_positions(positions: str) -> None:
    model = tiny_model("gpt2")
    layer, coefficient = STRENGTHS["gpt2"]
    assert truth(model, Steering(vector(model, layer), coefficient, positions)) != greedy(model, PROMPT, NEW)


@pytest.mark.parametrize("chunks", [(), (5,), (len(PROMPT) - 1,)])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_cached_loop_without_a_prompt_length_is_refused_except_at_all_positions(
    chunks: tuple[int, ...], positions: str
) -> None:
    model = tiny_model()
    steering = Steering(vector(model, 1), -2.0, positions)
    if positions.startswith("all"):
        assert stepwise(chunks, None)(model, steering) == truth(model, steering)
    else:
        with pytest.raises(RuntimeError, match="Pass prompt_length="):
            stepwise(chunks, None)(model, steering)


@pytest.mark.parametrize("positions", ["from_last_prompt_token", "generated"])
def test_a_prefix_that_was_cached_before_the_with_is_part_of_the_prompt_for_generate(positions: str) -> None:
    model = tiny_model()
    steering = Steering(vector(model, 1), -2.0, positions)
    assert after_a_cached_prefix(4, inside=False)(model, steering) == truth(model, steering)


def test_a_cache_that_was_filled_before_the_with_is_refused_in_a_plain_forward() -> None:
    model = tiny_model()
    with torch.no_grad():
        cache = cache_of(model(input_ids=torch.tensor([PROMPT]), use_cache=True))
        with Steering(vector(model, 1)).on(model):
            model(input_ids=torch.tensor([PROMPT[:4]]), use_cache=True)
            with pytest.raises(RuntimeError, match=r"9 of them were in the cache.*Pass prompt_length="):
                model(input_ids=torch.tensor([[3]]), use_cache=True, **{cache_argument(model): cache})


def test_a_second_prompt_that_begins_like_the_first_is_a_prompt_of_its_own() -> None:
    model = tiny_model()
    steering = Steering(vector(model, 1), -2.0, "from_last_prompt_token")
    with torch.no_grad(), steering.on(model):
        model(input_ids=torch.tensor([PROMPT[:4]]), use_cache=False)
        together = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    with torch.no_grad(), steering.on(model):
        alone = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    assert torch.equal(together, alone)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}, {"num_beams": 2}]
)
def test_a_left_padded_batch_in_generate_equals_each_row_alone(positions: str, options: dict[str, Any]) -> None:
    model = tiny_model()
    rows = [PROMPT[:3], PROMPT]
    ids = torch.tensor([[0] * (len(PROMPT) - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (len(PROMPT) - len(row)) + [1] * len(row) for row in rows])
    with Steering(vector(model, 1), -2.0, positions).on(model):
        batch = model.generate(ids, attention_mask=mask, **OPTIONS, **options)[:, len(PROMPT) :].tolist()
    for row, found in zip(rows, batch, strict=True):
        one = torch.tensor([row])
        with Steering(vector(model, 1), -2.0, positions).on(model):
            alone = model.generate(one, attention_mask=torch.ones_like(one), **OPTIONS, **options)[0, len(row) :]
        assert found == alone.tolist()


# Compiled code


@pytest.fixture
def compiling() -> Any:
    """A model that transformers has compiled, as it does by default on a GPU for caches of fixed size."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile's default backend needs a C++ compiler; g++ is not installed")
    model = tiny_model()
    config = CompileConfig()
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, **OPTIONS}
    ids = torch.tensor([PROMPT])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()
    assert plain == greedy(model, PROMPT, NEW)
    assert hasattr(model, "_compiled_call")  # the default backend compiled its forward
    yield model, options
    torch._dynamo.reset()


@pytest.mark.parametrize("positions", ["from_last_prompt_token", "generated", "all"])
def test_a_model_that_transformers_compiled_before_is_steered_at_every_token(compiling, positions: str) -> None:
    model, options = compiling
    steering = Steering(vector(model, 1), -2.0, positions)
    assert generated(model, steering, **options) == truth(model, steering) != greedy(model, PROMPT, NEW)


def test_a_generate_whose_forwards_run_no_hooks_is_an_error(compiling, monkeypatch) -> None:
    """Without the switch that turns compilation off, the tokens that no hook saw are counted from outside."""
    model, options = compiling
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda self, *_: True)
    monkeypatch.setattr("steerkit.steering.watch.wrapped_method", _only_generate)
    ids = torch.tensor([PROMPT])
    with (
        Steering(vector(model, 1), -2.0).on(model),
        pytest.raises(RuntimeError, match="expected the hooks to run for all 14 tokens that were read; they ran for 9"),
    ):
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def _only_generate(owner: Any, name: str, wrap: Any) -> Any:
    from steerkit.models.hooks import wrapped_method

    return wrapped_method(owner, name if name == "generate" else "absent", wrap)


# A steering without effect


def test_a_steering_that_touches_no_position_warns() -> None:
    model = tiny_model()
    ids = torch.tensor([PROMPT])
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="positions 'generated'.* touched no position"),
        Steering(vector(model, 1), -2.0, "generated").on(model),
    ):
        model(input_ids=ids)
    with pytest.warns(UserWarning, match="touched no position"), Steering(vector(model, 1)).on(model):
        pass


def test_a_steering_that_touches_a_position_or_has_coefficient_zero_does_not_warn() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), Steering(vector(model, 1), 0.0).on(model):
            model(input_ids=torch.tensor([PROMPT]))
        with Steering(vector(model, 1)).on(model):
            sk.generate(model, tokenizer, ["ab"], max_new_tokens=1)
        with pytest.raises(ZeroDivisionError), Steering(vector(model, 1)).on(model):
            raise ZeroDivisionError


def test_the_wrapped_methods_are_the_models_own_again_afterwards() -> None:
    model = tiny_model()
    before = dict(vars(model))
    with Steering(vector(model, 1), 1.0, "all").on(model), Steering(vector(model, 2), 1.0, "all").on(model):
        generated(model, Steering(vector(model, 0), 1.0, "all"))
        assert {"forward", "generate"} <= set(vars(model))
    assert vars(model).keys() == before.keys()


# Blocks whose hooks do not run


def bypass(model: Any) -> Any:
    """Make the model call its blocks past their hooks, as some published models do."""
    for layer in model.model.layers:
        call = {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
        layer.__class__ = type(type(layer).__name__, (type(layer),), call)
    return model


def test_a_model_that_calls_the_forward_of_its_blocks_is_refused() -> None:
    with pytest.raises(NoResidualStream, match=r"the model calls `block\.forward\(\.\.\.\)`"):
        find_blocks(bypass(tiny_model()))


READINGS: dict[str, Callable[[Any, Any, sk.SteeringVector], Any]] = {
    "generate": lambda model, tokenizer, push: sk.generate(
        model, tokenizer, ["abc"], max_new_tokens=3, steering=Steering(push, 5.0, "all")
    ),
    "collect": lambda model, tokenizer, push: sk.collect(model, tokenizer, ["abc"], layers=[1]),
    "collect_means": lambda model, tokenizer, push: sk.collect_means(model, tokenizer, ["abc"], layers=[1]),
    "on": lambda model, tokenizer, push: plain_forward(model, Steering(push, 5.0, "all").on(model)),
    "on and generate": lambda model, tokenizer, push: generated(model, Steering(push, 5.0)),
    "capture_resid": lambda model, tokenizer, push: plain_forward(model, sk.capture_resid(model, [1])),
    "capture_resid of the embedding": lambda model, tokenizer, push: plain_forward(
        model, sk.capture_resid(model, "embed")
    ),
    "tokens_of": lambda model, tokenizer, push: tokens_of(model, tokenizer, push, ["abc"], k=1),
}


def plain_forward(model: Any, context: Any) -> None:
    with context, torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("reading", READINGS)
def test_blocks_that_are_called_past_their_hooks_after_the_first_look_are_noticed(reading: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    push = vector(model, 2)
    sk.generate(model, tokenizer, ["abc"], max_new_tokens=1)
    bypass(model)
    with pytest.raises(RuntimeError, match=r"expected the hooks of the blocks .* `block\.forward\(\.\.\.\)`"):
        READINGS[reading](model, tokenizer, push)


# Models that look ahead


SIZE = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **SIZE}
BART = {
    "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2, **SIZE,
}  # fmt: skip


def wide(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_bert_is_read_as_a_decoder_and_refused_as_an_encoder(is_decoder: bool) -> None:
    torch.manual_seed(0)
    model = wide(BertLMHeadModel(BertConfig(**BERT, is_decoder=is_decoder)))
    if is_decoder:
        assert len(find_blocks(model)) == 3
        return
    with pytest.raises(NoResidualStream, match="attention is bidirectional"):
        find_blocks(model)


def test_an_encoder_decoder_model_is_refused_and_its_decoder_alone_is_read() -> None:
    torch.manual_seed(0)
    with pytest.raises(NoResidualStream, match="attention is bidirectional"):
        find_blocks(wide(BartForConditionalGeneration(BartConfig(**BART))))
    assert len(find_blocks(wide(BartForCausalLM(BartConfig(**BART, is_decoder=True))))) == 3
