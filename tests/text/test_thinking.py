"""Thinking: the reply is the text after the last thought, and a chat template is examined before its text is lost."""

from __future__ import annotations

import pytest

from steerkit.text.thinking import drops_system, opens_thinking, reply_of, template_opens_thinking
from tests.tiny import tiny_tokenizer

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
HARMONY = "<|channel|>analysis<|message|>maybe 5<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("12", "12"),
        (" 12\n", " 12\n"),
        ("<think>5</think>\n\n12", "12"),
        ("5</think>12", "12"),
        ("<think>5", None),
        ("12 <think>5", None),
        ("<think>5</think>", ""),
        ("<think>5</think> 6 <think>7</think> 8", "8"),
        ("<think>5</think> 6 <think>7", None),
        ("<Thinking>5</Thinking>12", "12"),
        ("<thought>5</thought>12", "12"),
        ("<reasoning>5</reasoning>12", "12"),
        ("[THINK]5[/THINK]12", "12"),
        (HARMONY, None),
        (HARMONY + "<|channel|>final<|message|>12", "12"),
        ("I think 5 < 6, and [thinking] so", "I think 5 < 6, and [thinking] so"),
        ("", ""),
    ],
)
def test_the_reply_is_what_follows_the_last_thought(text: str, reply: str | None) -> None:
    assert reply_of(text) == reply
    assert reply_of(text, opened=True) == (reply if "<" in text.replace("< 6", "") or "[TH" in text else None)


def test_a_prompt_opens_a_thought_if_its_last_tag_does() -> None:
    assert opens_thinking("<|user|>2+2<|assistant|><think>\n")
    assert opens_thinking("a</think> b <think>")
    assert not opens_thinking("<|assistant|><think>\n\n</think>\n\n")
    assert not opens_thinking("2+2")


@pytest.mark.parametrize(
    ("template", "drops", "opens"),
    [
        (TURNS, False, False),
        (TURNS + "assistant: <think>\n", False, True),
        (TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}", False, False),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", True, False),
        ("{{ raise_exception('no system role') }}", False, False),
        (None, False, False),
    ],
)
def test_a_template_that_drops_the_system_message_or_opens_a_thought_is_found(template, drops, opens) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert (drops_system(tokenizer), template_opens_thinking(tokenizer)) == (drops, opens)


def test_a_templates_arguments_decide_with_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TURNS + "{% if think %}<think>{% endif %}"
    assert template_opens_thinking(tokenizer, {"think": True}) and not template_opens_thinking(tokenizer)
