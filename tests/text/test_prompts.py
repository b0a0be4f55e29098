"""Prompts: what the chat template receives, and which token ids a prompt and its spans become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import steerkit as sk
from steerkit.text import spans
from steerkit.text.prompt import Prompt, encode_prompt, render
from steerkit.text.spans import SpannedText, passage_of
from steerkit.text.tokens import encode
from tests.reference import greedy
from tests.tiny import tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | map(attribute='name') | join(',') }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Well"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def test_messages_end_with_the_assistants_header_by_default(tokenizer) -> None:
    assert render(tokenizer, [USER]).text == "<|user|>Hi<|end|><|assistant|>"
    assert render(tokenizer, "Hi").text == "Hi"


def test_enable_thinking_reaches_the_template(tokenizer) -> None:
    assert render(tokenizer, [USER], {"enable_thinking": False}).text.endswith("<|assistant|><think></think>")
    assert render(tokenizer, [USER], {"enable_thinking": True}).text.endswith("<|assistant|>")


def test_tools_reach_the_template(tokenizer) -> None:
    tools = [{"name": "add"}, {"name": "divide"}]
    text = render(tokenizer, [USER], {"tools": tools}).text
    assert text == "<|tools|>add,divide<|end|><|user|>Hi<|end|><|assistant|>"


def test_a_chat_that_ends_with_the_assistant_gets_no_second_header_without_a_generation_prompt(tokenizer) -> None:
    text = render(tokenizer, [USER, ASSISTANT], {"add_generation_prompt": False}).text
    assert text == "<|user|>Hi<|end|><|assistant|>Well<|end|>"
    assert text.count("<|assistant|>") == 1
    assert render(tokenizer, [USER, ASSISTANT]).text.count("<|assistant|>") == 2


@pytest.mark.parametrize("further", [{}, {"add_generation_prompt": False}])
def test_continue_final_message_leaves_the_last_message_open(tokenizer, further: dict[str, Any]) -> None:
    text = render(tokenizer, [USER, ASSISTANT], {"continue_final_message": True, **further}).text
    assert text == "<|user|>Hi<|end|><|assistant|>Well"


def test_template_arguments_that_exclude_each_other_are_refused(tokenizer) -> None:
    both = {"continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(ValueError, match=r"the chat template takes.*the template's arguments"):
        render(tokenizer, [USER, ASSISTANT], both)


def test_generate_reads_the_prompt_that_its_template_arguments_give(tokenizer) -> None:
    model = tiny_model()
    options = {"add_generation_prompt": False}
    chat = [USER, ASSISTANT]
    written = sk.generate(model, tokenizer, [chat], max_new_tokens=6, chat_template_kwargs=options)
    assert written == sk.generate(model, tokenizer, [render(tokenizer, chat, options)], max_new_tokens=6)
    assert encode_prompt(tokenizer, chat, options) == encode_prompt(tokenizer, render(tokenizer, chat, options))


def test_rendered_messages_get_no_first_token_and_the_same_text_as_a_plain_string_does() -> None:
    tokenizer = with_first_token(tiny_tokenizer())
    prompt = render(tokenizer, [USER])
    assert prompt.source == "chat" and prompt.n_added == 0
    assert render(tokenizer, prompt) is prompt
    assert encode_prompt(tokenizer, prompt) == encode_prompt(tokenizer, [USER]) == prompt.ids
    assert encode_prompt(tokenizer, str(prompt)) == (tokenizer.bos_token_id, *prompt.ids)
    plain = render(tokenizer, "Hi")
    assert plain.source == "text" and plain.n_added == 1 and plain.ids[0] == tokenizer.bos_token_id


def test_a_prompt_of_ids_is_read_as_it_is() -> None:
    model, tokenizer = tiny_model(), with_first_token(tiny_tokenizer())
    ids = (65, 66, 67)
    prompt = Prompt.of_ids(tokenizer, torch.tensor(ids))
    assert prompt.ids == ids and prompt.source == "ids" and prompt.text == tokenizer.decode(ids)
    (written,) = sk.generate(model, tokenizer, [prompt], max_new_tokens=6, return_details=True)
    assert list(written.ids) == greedy(model, ids, 6)
    acts = sk.collect(model, tokenizer, [prompt], layers=1)
    assert acts.items["n_tokens"].tolist() == [3]


@pytest.mark.parametrize("ids", [(), (1, -1), (1, 2.5), ("a",)])
def test_a_prompt_of_no_or_wrong_ids_is_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match="at least one token id, each an integer from 0"):
        Prompt(ids, "")


def test_a_prompt_followed_by_a_text_keeps_its_own_ids() -> None:
    tokenizer = prefix_space_tokenizer()
    prompt = render(tokenizer, "Hello")
    longer = prompt.followed_by(tokenizer, " was")
    assert longer.ids == (*prompt.ids, *encode(tokenizer, " was")) and longer.text == "Hello was"
    assert longer.n_added == prompt.n_added


# Spans


def with_first_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a BOS token that it puts before every text."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: BPE with merges, a space put before every text, and BOS."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyz.:^|HW"
    merges = [("\u2581", "H"), ("l", "l"), ("\u2581H", "e"), ("\u2581", "w"), ("a", "s"), ("\u2581w", "as")]
    vocabulary = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(vocabulary)}, merges))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return with_first_token(PreTrainedTokenizerFast(tokenizer_object=core))


@pytest.mark.parametrize("cut", ["spans", "whole"])
@pytest.mark.parametrize("make", [tiny_tokenizer, lambda: with_first_token(tiny_tokenizer()), prefix_space_tokenizer])
def test_a_span_at_the_start_of_a_text_holds_exactly_its_own_tokens(make, cut: str) -> None:
    tokenizer = make()
    text = SpannedText("Hello was here", ((0, 5), (9, 14)), cut=cut)
    passage = passage_of(tokenizer, text, "g")
    for start, stop in passage.spans:
        assert 0 <= start < stop <= len(passage.ids)
    first, last = passage.spans
    assert tokenizer.decode(list(passage.ids[slice(*first)])).strip() == "Hello"
    assert tokenizer.decode(list(passage.ids[slice(*last)])).strip() == "here"
    assert first[0] == (1 if tokenizer.bos_token_id is not None else 0)


@pytest.mark.parametrize("first", [False, True], ids=["no BOS", "BOS"])
def test_spans_of_a_prompt_of_ids_are_in_these_ids_or_it_is_refused(first: bool) -> None:
    tokenizer = with_first_token(tiny_tokenizer()) if first else tiny_tokenizer()
    own = tuple(tokenizer("Hello was", add_special_tokens=False)["input_ids"])
    for cut in ("spans", "whole"):
        passage = passage_of(tokenizer, SpannedText(Prompt.of_ids(tokenizer, own), ((6, 9),), cut=cut), "g")
        assert passage.ids == own and passage.spans == ((6, 9),)
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "<|end|>"]  # as its text, one special token
    prompt = Prompt.of_ids(tokenizer, spelled)
    for cut, fix in (
        ("spans", "Pass cut='whole' if .*sk.render"),
        ("whole", "Make the prompt of its text by sk.render"),
    ):
        with pytest.raises(ValueError, match=f"expected a prompt whose ids are those of its text.*{fix}"):
            passage_of(tokenizer, SpannedText(prompt, ((0, 7),), cut=cut), "g")


def test_the_first_piece_of_a_spanned_text_is_encoded_once(monkeypatch) -> None:
    tokenizer = with_first_token(tiny_tokenizer())
    encoded: list[str] = []
    for name in ("encode", "render"):
        original = getattr(spans, name)

        def counted(tokenizer: Any, text: str, original: Any = original) -> Any:
            encoded.append(text)
            return original(tokenizer, text)

        monkeypatch.setattr(spans, name, counted)
    for ranges in (((0, 2), (3, 5)), ((3, 5),)):
        encoded.clear()
        passage_of(tokenizer, SpannedText("ab cd ef", ranges), "g")
        assert "".join(encoded) == "ab cd ef"
        assert len(encoded) == len(set(encoded))


@pytest.mark.parametrize("cut", ["spans", "whole"])
@pytest.mark.parametrize("make", [tiny_tokenizer, lambda: with_first_token(tiny_tokenizer()), prefix_space_tokenizer])
def test_a_span_after_a_prompt_holds_the_continuations_tokens(make, cut: str) -> None:
    tokenizer = make()
    text = SpannedText(" was here", ((0, 4), (4, 9)), cut=cut, prompt="Hello")
    passage = passage_of(tokenizer, text, "g")
    prompt = encode_prompt(tokenizer, "Hello")
    assert passage.ids[: len(prompt)] == prompt
    (first, middle), (again, last) = passage.spans
    assert first == len(prompt) and middle == again and last == len(passage.ids)
    assert passage.ids[first:middle] == encode(tokenizer, " was")
