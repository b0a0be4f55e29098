"""What other packages read and write, against what steerkit reads and writes itself."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tokenizers import decoders

import steerkit as sk
from steerkit.generation.engine import Continuation, Row
from steerkit.generation.generate import decode
from steerkit.models.backends import BACKENDS, through
from steerkit.models.identity import fingerprint
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import pad
from tests.capture.test_capture import hooks, relative
from tests.steering.test_steering import PROMPTS, vector
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

TEXTS = ["a", "Two words", "A longer text, with a comma.", "x = 3 // three", "héllo wörld"]
PAIRS = [sk.ContrastPair(f"Question {i}?", "1. yes it is", "it is not so", group=str(i)) for i in range(3)]
SPANS = [sk.SpannedText("Agent one says this. Agent two says that.", ((0, 20), (21, 41)), ("one", "two"))]


@pytest.fixture(params=list(BACKENDS))
def backend(request) -> str:
    pytest.importorskip(request.param, reason="its package is not installed (extra `backends`)")
    return request.param


def readable() -> Any:
    """The tiny tokenizer, but that different ids are different texts: it does not make UTF-8 of its bytes."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def state(model: Any) -> dict[str, Any]:
    """All that a backend could have changed in a model."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    return {
        "logits": logits,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "attention": model.config._attn_implementation,
        "config": model.config.to_json_string(),
        "hooks": hooks(model),
    }


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_backend_reads_the_stream_that_we_read(kind: str, backend: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    other = through(model, tokenizer, backend)
    layers = ["embed", *range(len(sk.collect(model, tokenizer, ["a"]).layers))]
    for texts in (TEXTS, PAIRS, SPANS):
        for position in ("mean", "last", "first"):
            ours = sk.collect(model, tokenizer, texts, layers=layers, position=position)
            theirs = sk.collect(other, tokenizer, texts, layers=layers, position=position)
            assert relative(ours.resid, theirs.resid) < 1e-5
            assert theirs.items.equals(ours.items) and theirs.layers == ours.layers
    one = sk.collect(other, tokenizer, TEXTS, layers=[1], position="mean")
    assert relative(ours.at(1), ours.at(0)) > 1e-2
    assert one.meta["blocks"] == backend
    means = sk.collect_means(other, tokenizer, PAIRS, layers=[1])
    assert relative(sk.collect_means(model, tokenizer, PAIRS, layers=[1]).of("positive"), means.of("positive")) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_steered_texts_are_the_same_token_for_token(kind: str, backend: str) -> None:
    model, tokenizer = tiny_model(kind), readable()
    other = through(model, tokenizer, backend)
    plain = sk.generate(other, tokenizer, PROMPTS, max_new_tokens=10)
    assert plain == sk.generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    for positions in ("generated", "from_last_prompt_token", "prompt", "all", "generated:3"):
        for operation, coefficient in (("add", 0.4), ("ablate", 1.0)):
            steering = sk.Steering(vector(model, 1, 2), coefficient, positions, operation, layer="all")
            ours = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=10, steering=steering)
            with steering.on(other):
                assert sk.generate(other, tokenizer, PROMPTS, max_new_tokens=10) == ours
            changed = sum(a != b for a, b in zip(ours, plain, strict=True))
            assert changed >= (3 if operation == "add" else 1), (positions, operation)


END = 185  # a token that steered rows reach at different steps, and some never
POSITIONS = ["generated", "from_last_prompt_token", "all"]


class _Ends:
    eos_token_id = END


def ending(positions: str) -> tuple[Any, sk.Steering, list[Continuation]]:
    """A model, a steering, and what we write with it: rows that end early, and at different steps."""
    model = tiny_model("gpt2")
    steering = sk.Steering(vector(model, 1), 0.2, positions)
    model.generation_config.eos_token_id = END
    ours = written(model, steering)
    assert len({one.n_tokens for one in ours}) > 2 and any(one.finished for one in ours)
    assert all(a.ids != b.ids for a, b in zip(ours, written(model, None), strict=True))
    return model, steering, ours


def written(model: Any, steering: sk.Steering | None) -> list[Continuation]:
    """The continuations of `PROMPTS`, as ids."""
    steerings = () if steering is None else tuple(steering.per_row(1))
    rows = [Row(encode_prompt(tiny_tokenizer(), prompt), steerings) for prompt in PROMPTS]
    found = dict(pair for batch in decode(model, _Ends, rows, PROMPTS, max_new_tokens=12) for pair in batch)
    return [found[number] for number in range(len(rows))]


@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_that_end_early_end_there_in_each_backend(positions: str, backend: str) -> None:
    model, steering, ours = ending(positions)
    assert written(through(model, tiny_tokenizer(), backend), steering) == ours


@pytest.mark.parametrize("positions", POSITIONS)
def test_transformer_lens_own_generate_with_our_vector_writes_our_text(tmp_path, positions: str) -> None:
    lens = pytest.importorskip("transformer_lens", reason="its package is not installed (extra `backends`)")
    from transformers import AutoTokenizer

    model, steering, ours = ending(positions)
    tiny_tokenizer().save_pretrained(tmp_path)  # it reads the tokenizer anew from where it was
    model.config.architectures = [type(model).__name__]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge = lens.TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, device="cpu")
    ids, mask, _ = pad([encode_prompt(tokenizer, prompt) for prompt in PROMPTS], "left")
    added = steering.coefficient * steering.vector.layers[1]

    def write(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        return pushed(stream, added, positions, begins=stream.shape[1] > 1)

    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", write)]):
        out = bridge.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=END)
    rows = out[:, ids.shape[1] :].tolist()
    assert [tuple(row[: row.index(END)] if END in row else row) for row in rows] == [one.ids for one in ours]


@pytest.mark.parametrize("positions", POSITIONS)
def test_nnsights_own_generate_with_our_vector_writes_our_text(positions: str) -> None:
    nnsight = pytest.importorskip("nnsight", reason="its package is not installed (extra `backends`)")
    model, steering, ours = ending(positions)
    traced = nnsight.TransformersModel(model, tokenizer=tiny_tokenizer(), task="text-generation")
    added = steering.coefficient * steering.vector.layers[1]
    for prompt, one in zip(PROMPTS, ours, strict=True):  # one by one: its loop has to know the number of steps
        ids = torch.tensor([encode_prompt(tiny_tokenizer(), prompt)])
        settings = {"max_new_tokens": one.n_tokens, "do_sample": False, "eos_token_id": END, "pad_token_id": 0}
        with traced.generate(ids, **settings) as tracer:
            for step in tracer.iter[0 : one.n_tokens]:
                block = traced.transformer.h[1]
                block.output = pushed(block.output, added, positions, begins=step == 0)
            out = tracer.result.save()
        assert tuple(out[0, ids.shape[1] :].tolist()) == (*one.ids, *[END] * one.finished)


def pushed(stream: torch.Tensor, added: torch.Tensor, positions: str, begins: bool) -> torch.Tensor:
    """The stream of a chunk with the vector where `positions` says; `begins`: the chunk is the prompt."""
    if not begins or positions == "all":
        return stream + added
    if positions == "generated":
        return stream
    return torch.cat([stream[:, :-1], stream[:, -1:] + added], dim=1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_callers_model_and_tokenizer_are_not_changed(kind: str, backend: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    before, said = state(model), (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    other = through(model, tokenizer, backend)
    sk.collect(other, tokenizer, TEXTS)
    sk.generate(other, tokenizer, PROMPTS, max_new_tokens=3, steering=sk.Steering(vector(model, 1)))
    assert hooks(other) == 0
    after = state(model)
    assert torch.equal(before.pop("logits"), after.pop("logits"))
    old, new = before.pop("weights"), after.pop("weights")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert before == after
    assert said == (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))


def test_weights_are_shared_and_a_vector_read_in_one_steers_the_other(backend: str) -> None:
    model, tokenizer = tiny_model(), readable()
    other = through(model, tokenizer, backend)
    assert fingerprint(other) == fingerprint(model)
    assert {id(p) for p in other.parameters()} == {id(p) for p in model.parameters()}
    theirs = sk.difference_in_means(sk.collect(other, tokenizer, PAIRS, position="mean"))
    steering = sk.Steering(theirs.at(1), 4.0, "from_last_prompt_token")
    ours = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8, steering=steering)
    assert sk.generate(other, tokenizer, PROMPTS, max_new_tokens=8, steering=steering) == ours
    assert ours != sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    before = sk.collect(other, tokenizer, TEXTS)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    assert relative(before.resid, sk.collect(other, tokenizer, TEXTS).resid) > 1e-2
    assert relative(sk.collect(model, tokenizer, TEXTS).resid, sk.collect(other, tokenizer, TEXTS).resid) < 1e-5


def test_a_plain_forward_is_read_and_steered_too(backend: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    other = through(model, tokenizer, backend)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[1])])
    steering = sk.Steering(vector(model, 1), 1.0, "all")
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        assert relative(plain[0], other(ids).logits[0]) < 1e-5
        with steering.on(model), sk.capture_resid(model, [1, 2]) as ours:
            expected = model(input_ids=ids).logits
        with steering.on(other), sk.capture_resid(other, [1, 2]) as theirs:
            steered = other(input_ids=ids).logits
    assert relative(expected[0], steered[0]) < 1e-5 and relative(plain[0], steered[0]) > 1e-2
    assert all(relative(ours[layer][0], theirs[layer][0]) < 1e-5 for layer in (1, 2))


def test_dropout_is_off_even_where_the_model_was_in_training_mode(backend: str) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    still = sk.collect(model, tokenizer, TEXTS)
    model.train()
    other = through(model, tokenizer, backend)
    assert relative(still.resid, sk.collect(other, tokenizer, TEXTS).resid) < 1e-5
    assert all(module.training for module in model.modules())


def test_a_sweep_runs_through_a_backend(backend: str) -> None:
    model, tokenizer = tiny_model(), readable()
    prompts = [{"id": str(i), "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    options: dict[str, Any] = {"layers": [1, 2], "coefficients": [-1.5, 0, 1.5], "max_new_tokens": 5}
    ours = sk.sweep(model, tokenizer, vector(model, 1, 2), prompts, **options).table
    theirs = sk.sweep(through(model, tokenizer, backend), tokenizer, vector(model, 1, 2), prompts, **options)
    assert theirs.table["text"].tolist() == ours["text"].tolist()
    assert ours["text"].nunique() > len(prompts)


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
def test_a_real_checkpoint_is_read_and_steered_through_each_backend(smollm, backend: str) -> None:
    model, tokenizer = smollm
    other = through(model, tokenizer, backend)
    layers = ["embed", 0, 14, 29]
    ours = sk.collect(model, tokenizer, TEXTS, layers=layers, position="mean")
    theirs = sk.collect(other, tokenizer, TEXTS, layers=layers, position="mean")
    assert relative(ours.resid, theirs.resid) < 1e-5
    prompts = ["The capital of France is", "Once upon a time there was a small", "Rain"]
    steering = sk.Steering(vector(model, 14, size=2.0), 1.0, "from_last_prompt_token")
    steered = sk.generate(model, tokenizer, prompts, max_new_tokens=8, steering=steering)
    assert sk.generate(other, tokenizer, prompts, max_new_tokens=8, steering=steering) == steered
    assert (
        sum(a != b for a, b in zip(steered, sk.generate(model, tokenizer, prompts, max_new_tokens=8), strict=True)) >= 2
    )


def test_a_checkpoint_is_loaded_through_a_backend(tmp_path, backend: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = sk.load(tmp_path, backend=backend)
    plain, _ = sk.load(tmp_path)
    acts = sk.collect(model, tokenizer, TEXTS)
    assert relative(sk.collect(plain, tokenizer, TEXTS).resid, acts.resid) < 1e-5
    assert acts.meta["checkpoint"] == str(tmp_path) and acts.meta["blocks"] == backend


def test_an_unknown_backend_is_refused_with_the_list(llama) -> None:
    with pytest.raises(ValueError, match=r"among \['transformer_lens', 'nnsight'\]; got 'baukit'"):
        through(*llama, "baukit")


def test_a_missing_package_says_what_to_install(llama, monkeypatch) -> None:
    for name in BACKENDS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'imad-steerkit\[backends\]'"):
            through(*llama, name)


def test_a_model_with_an_adapter_is_refused_with_what_to_do(backend: str) -> None:
    import peft

    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="merge_and_unload"):
        through(adapted, tiny_tokenizer(), backend)
