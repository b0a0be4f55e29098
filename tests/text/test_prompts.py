"""Prompts: what the chat template receives, and which token ids a prompt and its spans become."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import steerkit as sk
from steerkit.text import spans
from steerkit.text.prompt import Rendered, encode_prompt, render
from steerkit.text.spans import SpannedText, passage_of
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
    assert render(tokenizer, [USER]) == "<|user|>Hi<|end|><|assistant|>"
    assert render(tokenizer, "Hi") == "Hi"


def test_enable_thinking_reaches_the_template(tokenizer) -> None:
    assert render(tokenizer, [USER], {"enable_thinking": False}).endswith("<|assistant|><think></think>")
    assert render(tokenizer, [USER], {"enable_thinking": True}).endswith("<|assistant|>")


def test_tools_reach_the_template(tokenizer) -> None:
    tools = [{"name": "add"}, {"name": "divide"}]
    text = render(tokenizer, [USER], {"tools": tools})
    assert text == "<|tools|>add,divide<|end|><|user|>Hi<|end|><|assistant|>"


def test_a_chat_that_ends_with_the_assistant_gets_no_second_header_without_a_generation_prompt(tokenizer) -> None:
    text = render(tokenizer, [USER, ASSISTANT], {"add_generation_prompt": False})
    assert text == "<|user|>Hi<|end|><|assistant|>Well<|end|>"
    assert text.count("<|assistant|>") == 1
    assert render(tokenizer, [USER, ASSISTANT]).count("<|assistant|>") == 2


@pytest.mark.parametrize("further", [{}, {"add_generation_prompt": False}])
def test_continue_final_message_leaves_the_last_message_open(tokenizer, further: dict[str, Any]) -> None:
    text = render(tokenizer, [USER, ASSISTANT], {"continue_final_message": True, **further})
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
    text = render(tokenizer, [USER])
    assert isinstance(text, Rendered)
    assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, [USER])
    assert encode_prompt(tokenizer, str(text)) == (tokenizer.bos_token_id, *encode_prompt(tokenizer, [USER]))
    assert not isinstance(render(tokenizer, "Hi"), Rendered)


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


def test_the_first_piece_of_a_spanned_text_is_encoded_once(monkeypatch) -> None:
    tokenizer = with_first_token(tiny_tokenizer())
    encoded: list[str] = []
    for name in ("encode", "encode_with_own"):
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
