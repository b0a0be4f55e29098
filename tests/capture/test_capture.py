from __future__ import annotations

import gc
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.capture import collect as capture
from steerkit.capture.batches import token_batches
from steerkit.capture.collect import collect, collect_means
from steerkit.capture.norms import stream_norms
from steerkit.capture.resid import capture_resid
from steerkit.models.blocks import find_blocks
from steerkit.models.hooks import observe_streams
from steerkit.text.prompt import encode_prompt
from steerkit.text.spans import SpannedText
from steerkit.text.tokens import encode
from tests.reference import hidden_states
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

TEXTS = [
    "a",
    "Two words",
    "A longer text, with a comma.",
    "x = 3 // three",
    "héllo wörld",
    "short one",
    "12 + 7 = 19",
    "the end",
]
PAIRS = [sk.ContrastPair(f"Question {i}?", "1. yes it is", "it is not so", group=str(i // 2)) for i in range(6)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest |a - b| / |a| over tokens."""
    a, b = a.detach(), b.detach()
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1)).max())


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", CONFIGS)
def test_captured_streams_equal_hidden_states_and_the_last_is_before_the_final_norm(kind: str) -> None:
    model = tiny_model(kind)
    ids = list(range(3, 25))
    states = hidden_states(model, ids)
    layers = ["embed", *range(len(find_blocks(model)))]
    with torch.no_grad(), capture_resid(model, layers) as streams:
        model(input_ids=torch.tensor([ids]))
    for layer in layers[:-1]:
        index = 0 if layer == "embed" else layer + 1
        assert torch.equal(streams[layer][0], states[index])
    last = streams[layers[-1]][0]
    norm = next(
        m
        for name, m in model.named_modules()
        if name.endswith((".norm", "ln_f", "final_layer_norm")) and "layers." not in name
    )
    assert relative(states[-1], norm(last)) < 1e-6
    assert relative(states[-1], last) > 0.01


def test_captured_streams_of_the_real_checkpoint_equal_hidden_states(smollm) -> None:
    model, tokenizer = smollm
    ids = encode_prompt(tokenizer, "The residual stream is a sum of what every block wrote.")
    states = hidden_states(model, ids)
    acts = collect(model, tokenizer, ["The residual stream is a sum of what every block wrote."], position=3)
    for layer in range(29):
        assert relative(states[layer + 1][3], acts.at(layer)[0]) < 1e-5
    assert relative(states[30][3], acts.at(29)[0]) > 0.1
    assert relative(states[30][3], model.model.norm(acts.at(29)[0])) < 1e-5


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
@pytest.mark.parametrize("position", ["last", "first", "mean", 0, -1])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_batches_of_one_and_of_eight_and_a_slow_loop_agree(kind: str, position: str | int) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    one = collect(model, tokenizer, TEXTS, position=position, batch_tokens=1)
    eight = collect(model, tokenizer, TEXTS, position=position, batch_tokens=10_000)
    assert relative(one.resid, eight.resid) < 1e-5
    for row, text in enumerate(TEXTS):
        states = torch.stack(hidden_states(model, encode_prompt(tokenizer, text)))[1:-1]
        slow = states.mean(1) if position == "mean" else states[:, 0 if position in ("first", 0) else -1]
        assert relative(slow, one.resid[row, :-1]) < 1e-5


def test_a_pair_is_read_over_the_tokens_of_its_continuations_only(llama) -> None:
    model, tokenizer = llama
    acts = collect(model, tokenizer, PAIRS[:1], layers=[1], position="mean")
    prompt = encode_prompt(tokenizer, PAIRS[0].prompt)
    for row, text in enumerate([PAIRS[0].positive, PAIRS[0].negative]):
        states = hidden_states(model, (*prompt, *encode(tokenizer, text)))[2]
        assert relative(states[len(prompt) :].mean(0), acts.resid[row, 0]) < 1e-5
    assert acts.items["label"].tolist() == ["positive", "negative"]
    assert acts.items["start"].tolist() == [len(prompt)] * 2
    assert acts.items["group"].tolist() == ["0", "0"]


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
def test_spans_of_one_text_equal_separate_forwards(llama) -> None:
    model, tokenizer = llama
    text = "Agent one says this. Agent two says that, at length. Then a tail."
    spans = ((0, 20), (21, 52))
    acts = collect(model, tokenizer, [SpannedText(text, spans, ("one", "two"))], position="mean")
    for row, (start, stop) in enumerate(spans):
        lead = len(encode_prompt(tokenizer, text[:start])) if start else 0
        alone = SpannedText(text[:stop], ((start, stop),))
        separate = collect(model, tokenizer, [alone], position="mean")
        assert relative(separate.resid[0], acts.resid[row]) < 1e-5
        slow = torch.stack(hidden_states(model, encode_prompt(tokenizer, text)))[1:-1, lead : lead + stop - start].mean(
            1
        )
        assert relative(slow, acts.resid[row, :-1]) < 1e-5
    assert acts.items["label"].tolist() == ["one", "two"]


def test_spans_of_the_real_tokenizer_never_share_a_token(smollm) -> None:
    _, tokenizer = smollm
    text = "It is 12.\n\nNext: it is 13.\n\nDone."
    end = text.index("\n\nNext")
    spans = ((0, end), (end + 2, text.rindex("\n\n")))
    cut = SpannedText(text, spans)
    from steerkit.text.spans import passage_of

    passage = passage_of(tokenizer, cut, "0")
    for (start, stop), (a, b) in zip(passage.spans, spans, strict=True):
        assert tokenizer.decode(passage.ids[start:stop]) == text[a:b]
    whole = passage_of(tokenizer, SpannedText(text, spans, cut="whole"), "0")
    assert whole.ids == tuple(tokenizer(text)["input_ids"])


def test_running_means_equal_the_means_of_all_activations(llama) -> None:
    model, tokenizer = llama
    acts = collect(model, tokenizer, PAIRS, position="mean")
    means = collect_means(model, tokenizer, PAIRS, position="mean", batch_tokens=64)
    for label in ("positive", "negative"):
        slow = acts.resid[torch.tensor((acts.items["label"] == label).tolist())].double().mean(0)
        assert torch.allclose(means.of(label), slow, rtol=1e-5, atol=1e-6)
    assert means.counts == (6, 6)
    a, b = sk.difference_in_means(acts), sk.difference_in_means(means)
    assert all(torch.allclose(a.layers[layer], b.layers[layer], atol=1e-5) for layer in a.layers)


def test_the_forward_ends_at_the_deepest_layer_and_no_logits_are_computed(llama) -> None:
    model, tokenizer = llama
    ran: list[str] = []
    watched = {0: model.model.layers[2], 1: model.model.layers[3], 2: model.lm_head}
    with observe_streams(watched, lambda which, *_: ran.append("block 2" if which == 0 else "later")):
        collect(model, tokenizer, TEXTS, layers=[1, 2])
    assert set(ran) == {"block 2"}


def test_no_hook_is_left_after_success_an_exception_or_a_bad_layer() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert hooks(model) == 0
    collect(model, tokenizer, TEXTS)
    with pytest.raises(ZeroDivisionError), capture_resid(model, [0, 2]):
        assert hooks(model) == 2
        model(input_ids=torch.tensor([[1, 2]]))
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="from 0 to 3"), capture_resid(model, [1, 99]):
        pass
    model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(model, tokenizer, TEXTS)
    assert hooks(model) == 1  # the one that this test put there


def test_a_model_in_training_mode_is_read_without_dropout_and_stays_in_training_mode() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    still = collect(model, tokenizer, TEXTS)
    model.train()
    assert torch.equal(collect(model, tokenizer, TEXTS).resid, still.resid)
    assert model.training


def test_a_second_forward_in_one_capture_is_an_error(llama) -> None:
    model, _ = llama
    with pytest.raises(RuntimeError, match="expected one forward"), capture_resid(model, 0):
        model(input_ids=torch.tensor([[1]]))
        model(input_ids=torch.tensor([[2]]))


def test_activations_that_are_not_finite_are_refused(llama) -> None:
    items = pd.DataFrame({"label": ["a", "b"]})
    resid = torch.zeros(2, 3, 4)
    resid[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="item 1 at layer 7"):
        sk.Activations(resid, (3, 5, 7), items)


def test_stream_norms_leave_out_the_prompt_and_position_zero(llama) -> None:
    model, tokenizer = llama
    prompts, texts = ["Hello there", "A"], [" friend", " longer answer"]
    norms = stream_norms(model, tokenizer, prompts, texts, [0, 2])
    slow = {0: [], 2: []}
    for prompt, text in zip(prompts, texts, strict=True):
        lead = encode_prompt(tokenizer, prompt)
        states = hidden_states(model, (*lead, *encode(tokenizer, text)))
        for layer in slow:
            slow[layer] += states[layer + 1][len(lead) :].norm(dim=-1).tolist()
    for layer, values in slow.items():
        assert norms[layer] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_token_batches_hold_every_row_once_and_keep_their_budget() -> None:
    lengths = [5, 1, 9, 3, 3, 20, 2, 9]
    batches = token_batches(lengths, 18)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 18 for batch in batches)


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(llama, monkeypatch) -> None:
    model, tokenizer = llama
    whole = collect(model, tokenizer, TEXTS, batch_tokens=10_000)
    forward, sizes = model.forward, []

    def small(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError
        return forward(*args, **kwargs)

    small.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model, "forward", small)
    assert relative(whole.resid, collect(model, tokenizer, TEXTS, batch_tokens=10_000).resid) < 1e-5
    assert max(sizes) == 8 and sum(size for size in sizes if size <= 3) == 8


def test_captured_activations_are_ordinary_tensors_that_autograd_takes(llama) -> None:
    acts = collect(*llama, TEXTS, layers=[1])
    weight = torch.zeros(32, requires_grad=True)
    (acts.at(1) @ weight).sum().backward()
    assert weight.grad is not None
    gc.collect()


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
def test_means_read_some_texts_at_a_time_and_refuse_a_bad_one_before_any(monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = [f"text {number} " * (1 + number % 3) for number in range(11)]
    whole = sk.collect_means(model, tokenizer, texts, position="mean")
    monkeypatch.setattr(capture, "WINDOW", 3)
    parts = sk.collect_means(model, tokenizer, texts, position="mean")
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-6, atol=1e-7)
    assert (parts.counts, parts.labels, parts.meta) == (whole.counts, whole.labels, whole.meta)
    ran: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="at most 256 tokens"):
        sk.collect_means(model, tokenizer, [*texts, "x" * 300])
    assert ran == []
    handle.remove()


class InPlace(torch.nn.Module):
    """A block that writes its output into the tensor that it received, and returns that."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return hidden_states.copy_(self.inner(hidden_states.clone(), *rest, **options))


def test_streams_of_blocks_that_work_in_place_are_those_of_blocks_that_do_not() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids, layers = list(range(3, 25)), [0, 1, 2, 3]

    def found() -> tuple[dict[Any, torch.Tensor], pd.DataFrame, pd.DataFrame]:
        with torch.no_grad(), capture_resid(model, layers) as streams:
            model(input_ids=torch.tensor([ids]))
        vector = sk.SteeringVector({layer: torch.ones(32) for layer in range(4)})
        vectors = {f"at {layer}": vector.at(layer) for layer in range(4)}
        read = sk.project(model, tokenizer, ["x = 1"], vectors)
        return dict(streams), sk.logit_lens(model, tokenizer, ["x = 1"], layers="all"), read

    plain = found()
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = InPlace(block)
    assert find_blocks(model).in_place
    with pytest.raises(ValueError, match="block 0 of this model overwrites"):
        sk.collect(model, tokenizer, ["x"], layers=["embed"])
    streams, lens, read = found()
    for layer in layers:
        torch.testing.assert_close(streams[layer], plain[0][layer], rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(lens, plain[1], rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(read, plain[2], rtol=1e-4, atol=1e-5)
