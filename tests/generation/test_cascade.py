"""Cascade attention: it is plain attention over a row's own tokens, whatever the other rows are."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit as sk
from steerkit.generation.batches import exact
from steerkit.generation.cascade import BLOCK, Cascade, CascadeEngine, _Group, whole_blocks
from steerkit.generation.engine import Row
from steerkit.models.kernels import kernels_of, missing, set_kernels, use_kernels
from tests.bits import differences, population
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

HEADS, KV_HEADS, D = 6, 2, 16


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of the last queries of one row `[head, pos, d]` to all its keys, in float64."""
    q, k, v = q.double(), k.double().repeat_interleave(HEADS // KV_HEADS, 0), v.double().repeat_interleave(3, 0)
    at = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    seen = torch.arange(k.shape[1]) <= at
    if window is not None:
        seen &= torch.arange(k.shape[1]) > at - window
    return (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("seed", range(12))
def test_attention_in_two_parts_is_attention_over_all_keys(seed: int, window: int | None) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def drawn(heads: int, count: int) -> Tensor:
        return torch.randn(heads, count, D, generator=generator)

    lengths = sorted((rng.choice((0, 1, rng.randint(1, 90), 32, 64)) for _ in range(rng.randint(1, 6))), reverse=True)
    prompt_of = [rng.randrange(len(lengths)) for _ in range(rng.randint(1, 20))]
    if seed % 3 == 0:
        prompt_of.sort()
    cascade = Cascade(lengths, prompt_of, room=6)
    prompts = [(drawn(HEADS, n), drawn(KV_HEADS, n), drawn(KV_HEADS, n)) for n in lengths]
    groups, offset = [], 0
    for number, n in enumerate(lengths):
        if n:
            tokens = torch.zeros(1, whole_blocks(n), dtype=torch.long)
            tokens[0, :n] = torch.arange(offset, offset + n)
            bucket, place = cascade.place(number)
            numbers = tokens.flatten()[:n]
            groups.append(_Group(bucket, slice(place, place + 1), 0, 0, tokens, torch.arange(n), numbers))
            offset += n
    if groups:
        cascade.filling = groups
        q, k, v = (torch.cat([part[i] for part in prompts], 1)[None] for i in range(3))
        out = cascade.attend(0, q, k, v, 0.25, window)[0]
        cascade.filling, offset = None, 0
        for (q, k, v), n in zip(prompts, lengths, strict=True):
            expected = plain(q, k, v, 0.25, window)
            assert torch.allclose(out[:, offset : offset + n].double(), expected, atol=1e-5)
            offset += n
    rows = [(prompts[one][1], prompts[one][2]) for one in prompt_of]
    for steps in (1, 2, 1, 1):
        new = [(drawn(HEADS, steps), drawn(KV_HEADS, steps), drawn(KV_HEADS, steps)) for _ in rows]
        q, k, v = (torch.stack([one[i] for one in new]) for i in range(3))
        out = cascade.attend(0, q, k, v, 0.25, window)
        cascade.start += steps
        rows = [(torch.cat([a, k], 1), torch.cat([b, v], 1)) for (a, b), (_, k, v) in zip(rows, new, strict=True)]
        for found, (q, _, _), (k, v) in zip(out, new, rows, strict=True):
            assert torch.allclose(found.double(), plain(q, k, v, 0.25, window), atol=1e-5)
        kept = sorted(rng.sample(range(len(rows)), max(1, len(rows) * 2 // 3)))
        cascade.keep(kept)
        rows = [rows[i] for i in kept]


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"gemma2"}))
def test_models_of_ordinary_attention_share_their_prompts(kind: str) -> None:
    assert exact(tiny_model(kind)).shared


def test_a_model_that_caps_its_attention_logits_does_not() -> None:
    assert not exact(tiny_model("gemma2")).shared


def test_prompts_are_stored_once_each_without_the_padding_of_longer_ones() -> None:
    model = tiny_model()
    prompts = [(5,) * 70, (6,) * 20, (7,) * 20]
    with torch.inference_mode():
        engine = CascadeEngine(model, [Row(prompt) for prompt in prompts for _ in range(4)], 3)
    shapes = [keys.shape for keys, _ in engine.cascade.prompts[0]]
    assert [(shape[0], shape[2]) for shape in shapes] == [(1, 3 * BLOCK), (2, BLOCK)]


def test_masks_grow_with_the_length_of_a_prompt_and_not_with_its_square_and_go_when_it_is_read(monkeypatch) -> None:
    model, fill, held = tiny_model(context=1024), Cascade._fill, []

    def masks(cascade: Cascade) -> int:
        kept = [one for value in vars(cascade).values() if isinstance(value, dict) for one in value.values()]
        return sum(one.numel() for one in kept if isinstance(one, Tensor))

    def counted(self: Cascade, *arguments: Any) -> Tensor:
        out = fill(self, *arguments)
        held.append(masks(self))
        return out

    monkeypatch.setattr(Cascade, "_fill", counted)
    most = []
    for blocks in (5, 20):
        held.clear()
        with torch.inference_mode():
            engine = CascadeEngine(model, [Row((5,) * (blocks * BLOCK + 1))], 3)
        most.append(max(held))
        assert masks(engine.cascade) == 0
    assert 0 < most[1] <= 4 * most[0]


def test_two_models_in_two_threads_write_the_texts_that_each_writes_alone() -> None:
    models, tokenizer = [tiny_model(seed=seed) for seed in (0, 1)], tiny_tokenizer()

    def written(model: Any) -> list[str]:
        return sk.generate(model, tokenizer, ["hello world", "abc"], max_new_tokens=4)

    alone = [written(model) for model in models]
    together = threading.Barrier(len(models))

    def wait(*_: Any) -> None:
        together.wait(10)

    for model in models:  # a forward that has begun waits for that of the other model
        model.model.layers[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(written, models)) == alone


@pytest.fixture
def two_threads():
    """Attention's work arrays lie at other addresses in a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


needs_onednn = pytest.mark.skipif(missing() is not None, reason=f"oneDNN's linear layers: {missing()}")


@needs_onednn
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kind: str, seed: int) -> None:
    model = tiny_model(kind, seed=seed)
    set_kernels(model, "onednn")
    rows = population(model, 72, 90, 1, shared=(0, 40, 70)[seed], seed=seed)
    found = differences(model, rows, 5, alone=8, seed=seed)
    assert found["rows compared"] > 150 and found["rows with other bits"] == 0


@needs_onednn
@pytest.mark.usefixtures("two_threads")
def test_a_row_of_the_real_checkpoint_has_the_same_bits_alone_and_in_any_batch(smollm) -> None:
    model = smollm[0]
    with use_kernels(model, "onednn"):
        found = differences(model, population(model, 24, 50, 14), 12, sizes=(2, 3, 7), alone=4)
    assert found["rows compared"] > 25 and found["rows with other bits"] == 0


def test_with_torchs_path_the_same_rows_have_other_bits_on_this_processor(smollm) -> None:
    if kernels_of(smollm[0], "auto") == "torch":
        pytest.skip("torch's path is the faster one on this processor, and may keep bits too")
    with use_kernels(smollm[0], "torch"):
        found = differences(smollm[0], population(smollm[0], 8, 30, 14), 2, sizes=(2, 7), alone=3)
    assert found["rows with other bits"] > 0
