from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import steerkit as sk
from steerkit.capture.batches import read_passages
from steerkit.generation import sampling
from steerkit.generation.batches import BATCH_ROWS, MOST_ROWS, default_rows, in_batches
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.generation.sampling import random_stream, sample
from steerkit.models.blocks import find_blocks
from steerkit.models.kernels import missing, set_kernels
from steerkit.models.model import widest_float
from steerkit.text.prompt import Prompt, encode_prompt
from steerkit.text.spans import Passage
from steerkit.text.tokens import pad
from tests.reference import greedy
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

MIXED = ["Hello", "A rather longer prompt than that", "x = 1", "?", "Hello", "once upon a time", "12 + 3", "abc"]


def test_unsteered_greedy_text_equals_transformers_generate(smollm) -> None:
    model, tokenizer = smollm
    prompts = ["The capital of France is", "Once upon a time there was a", "2, 4, 6, 8,"]
    ids, mask, _ = pad([encode_prompt(tokenizer, p) for p in prompts], "left")
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    theirs = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert sk.generate(model, tokenizer, prompts, max_new_tokens=12) == theirs


def test_steered_text_of_the_real_checkpoint_equals_one_at_a_time_without_a_cache(smollm) -> None:
    model, tokenizer = smollm
    prompts = [
        [{"role": "user", "content": question}] for question in ("What is rain?", "Name two colours of the rainbow.")
    ]
    steering = sk.Steering(vector(model, 14, size=2.0), 1.0, "from_last_prompt_token")
    ours = sk.generate(model, tokenizer, prompts, max_new_tokens=6, steering=steering)
    slow = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        slow.append(tokenizer.decode(greedy(model, ids, 6, (2,), dict(steering.vector.layers), 1.0, len(ids) - 1)))
    assert ours == slow
    assert ours != sk.generate(model, tokenizer, prompts, max_new_tokens=6)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_rows_text_does_not_depend_on_its_neighbours_or_the_batch_size(llama, temperature: float) -> None:
    model, tokenizer = llama
    options = {"max_new_tokens": 12, "temperature": temperature, "top_p": 0.95, "seed": 3}
    steering = sk.Steering(vector(model, 1), 0.4, "from_last_prompt_token")
    whole = sk.generate(model, tokenizer, MIXED, steering=steering, **options)
    for size in (1, 3, 8):
        assert sk.generate(model, tokenizer, MIXED, steering=steering, batch_rows=size, **options) == whole
    alone = [sk.generate(model, tokenizer, [p], steering=steering, **options)[0] for p in MIXED[:4]]
    assert alone == whole[:4]
    assert len(set(whole)) >= 4
    if temperature:
        assert whole[0] != whole[4]  # the same prompt twice: two samples
        assert sk.generate(model, tokenizer, MIXED, steering=steering, **{**options, "seed": 4}) != whole


def test_rows_that_end_leave_the_batch_and_cost_only_their_own_tokens() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    rows = [Row(encode_prompt(tokenizer, p)) for p in MIXED]
    new = 16
    free = dict(pair for batch in decode(model, _Ends(None), rows, MIXED, max_new_tokens=new) for pair in batch)
    ends = _Ends(free[1].ids[3])  # a token that some rows reach, at different steps
    model.generation_config.eos_token_id = None
    found = dict(pair for batch in decode(model, ends, rows, MIXED, max_new_tokens=new) for pair in batch)
    lengths = set()
    for number, row in enumerate(rows):
        slow = greedy(model, row.prompt, new, [ends.eos_token_id])
        assert list(found[number].ids) == slow
        assert found[number].finished == (len(slow) < new)
        assert found[number].n_tokens == len(slow) + (len(slow) < new)
        lengths.add(len(slow))
    assert len(lengths) > 1


class _Ends:
    def __init__(self, eos_token_id: int | None) -> None:
        self.eos_token_id = eos_token_id


def test_sampling_follows_the_nucleus_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 600, generator=generator)
    temperature, top_p, n = 0.8, 0.7, 40_000
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    tokens = sample(logits.expand(n, -1), uniform, temperature, top_p)
    probabilities = torch.softmax(logits[0] / temperature, -1)
    order = probabilities.argsort(descending=True)
    kept = order[(probabilities[order].cumsum(0) - probabilities[order]) < top_p]
    expected = torch.zeros(600).scatter(0, kept, probabilities[kept])
    expected /= expected.sum()
    counts = torch.bincount(tokens, minlength=600) / n
    assert set(tokens.tolist()) <= set(kept.tolist())
    assert float((counts - expected).abs().sum()) < 0.05
    assert 5 < len(kept) < 600


def test_a_flat_distribution_wider_than_the_first_look_is_sampled_whole() -> None:
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    tokens = sample(torch.zeros(2000, 1000), uniform, 1.0, 0.999)
    assert len(set(tokens.tolist())) == 1000
    assert torch.equal(sample(torch.zeros(2000, 1000), uniform, 1.0, 1.0), torch.arange(1000).repeat_interleave(2))


def test_a_row_with_a_flat_distribution_or_with_nan_does_not_change_the_tokens_of_other_rows() -> None:
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(1)) * 4
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = sample(logits, uniform, 1.0, 0.9)
    logits[3], logits[7, 5] = 0, float("nan")
    flat = sample(logits[3:4], uniform[3:4], 1.0, 0.9)
    wanted[3], wanted[7] = flat[0], sampling.OVERFLOWED
    assert torch.equal(sample(logits, uniform, 1.0, 0.9), wanted)


def test_top_p_near_zero_is_greedy() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(sample(logits, uniform, 1.0, 1e-9), logits.argmax(-1))


def test_random_streams_depend_on_their_key_alone() -> None:
    assert np.array_equal(random_stream((0, "a", 1), 5), random_stream((0, "a", 1), 9)[:5])
    assert not np.array_equal(random_stream((0, "a", 1), 5), random_stream((0, "a", 2), 5))
    assert not np.array_equal(random_stream((0, "a", 1), 5), random_stream((1, "a", 1), 5))


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    whole = sk.generate(model, tokenizer, MIXED, max_new_tokens=6)
    forward, widest = model.forward, []

    def small(**kwargs):
        widest.append(len(kwargs["input_ids"]))
        if widest[-1] > 3:
            raise torch.OutOfMemoryError
        return forward(**kwargs)

    small.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model, "forward", small)
    assert sk.generate(model, tokenizer, MIXED, max_new_tokens=6) == whole
    assert max(widest) > 3
    widest.clear()
    assert sk.generate(model, tokenizer, MIXED, max_new_tokens=6) == whole
    assert max(widest) <= 3  # the batch that fitted is remembered: nothing fails a second time


def test_the_callers_tokenizer_and_model_are_not_changed() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer), model.config.to_json_string())
    model.train()
    sk.generate(model, tokenizer, MIXED, max_new_tokens=2, steering=sk.Steering(vector(model, 1)))
    assert model.training
    assert before == (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer), model.config.to_json_string())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "non-empty list of prompts"),
        ({"prompts": "one"}, "non-empty list of prompts"),
        ({"prompts": [""]}, "at least one character"),
        ({"prompts": [[]]}, "list of {'role', 'content'} messages"),
        ({"prompts": [[{"text": "x"}]]}, "list of {'role', 'content'} messages"),
        ({"prompts": ["x" * 250]}, "context of 256; got 250"),
        ({"max_new_tokens": 0}, "integer from 1"),
        ({"max_new_tokens": 2.0}, "integer from 1"),
        ({"temperature": -1}, "finite temperature"),
        ({"temperature": float("nan")}, "finite temperature"),
        ({"top_p": 0}, "top_p above 0"),
        ({"top_p": 1.1}, "top_p above 0"),
        ({"steering": [None, None]}, "per prompt, 1; got 2"),
    ],
)
def test_bad_requests_say_what_was_expected(llama, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sk.generate(*llama, **{"prompts": ["a"], "max_new_tokens": 8, **options})


def test_messages_need_a_chat_template(llama) -> None:
    with pytest.raises(ValueError, match="chat template"):
        sk.generate(llama[0], tiny_tokenizer(template=False), [[{"role": "user", "content": "x"}]], max_new_tokens=1)


def test_a_prompt_string_gets_the_first_token_once_and_a_rendered_chat_never() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", bos), ("<|end|>", 256)]
    )
    plain = tuple(tokenizer("ab", add_special_tokens=False)["input_ids"])
    assert tokenizer("ab")["input_ids"] == [bos, *plain, 256]
    assert encode_prompt(tokenizer, "ab") == (bos, *plain)
    assert encode_prompt(tokenizer, "<|begin|>ab") == (bos, *plain)
    assert encode_prompt(tokenizer, Prompt(plain, "ab")) == plain


class NoFloat64(TorchDispatchMode):
    """Fails where a float64 tensor is made, as MPS does."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_no_float64_is_made_on_a_device_that_has_none(top_p: float, monkeypatch) -> None:
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64
    logits, uniform = torch.randn(64, 300), torch.rand(64)
    wanted = sample(logits, uniform, 0.8, top_p)
    monkeypatch.setattr(sampling, "widest_float", lambda device: torch.float32)
    with NoFloat64():
        narrow = sample(logits, uniform, 0.8, top_p)
    assert torch.equal(narrow, wanted)
    monkeypatch.undo()
    with pytest.raises(AssertionError), NoFloat64():
        sample(logits, uniform, 0.8, top_p)


@pytest.mark.parametrize("job", ["rows", "passages"])
def test_between_two_batches_the_model_is_as_it_was(job: str) -> None:
    model = tiny_model()
    set_kernels(model, "onednn" if missing() is None else "torch")
    model.train()
    kinds = [type(module) for module in model.modules()]
    if job == "rows":
        batches: Any = in_batches(model, [Row((5, 6)), Row((7,))], 2, lambda _, numbers: list(numbers), batch_rows=1)
    else:
        passages = [Passage((5, 6, 7), ((0, 3),), ("0",), str(i)) for i in range(2)]
        mean = lambda stream, rows, starts, stops: stream[rows, stops - 1]  # noqa: E731
        batches = read_passages(model, find_blocks(model), [1], passages, mean, 3)
    next(batches)  # and is left there, as by an interruption
    assert [type(module) for module in model.modules()] == kinds and model.training
    assert not torch.is_inference_mode_enabled()


def test_a_small_model_is_decoded_in_larger_batches_on_a_cpu_and_a_large_one_is_not() -> None:
    small, large = torch.nn.Linear(10, 10), torch.nn.Linear(4000, 4000)
    assert default_rows(small) == MOST_ROWS and default_rows(large) == BATCH_ROWS["cpu"]
    assert BATCH_ROWS["cpu"] < default_rows(torch.nn.Linear(1000, 2000)) < MOST_ROWS
