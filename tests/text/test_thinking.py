"""Thoughts: what follows them is the reply, and what stands in them is none."""

from __future__ import annotations

import warnings

import pytest

import steerkit as sk
from steerkit.text.thinking import opens_thought, reply_of
from tests.tiny import tiny_model, tiny_tokenizer

OPENS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not quick %}<think>\n{% endif %}{% endif %}"
)
CHAT = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("12", "12"),
        ("<think>5</think> 12", " 12"),
        ("5, no</think>12", "12"),  # the prompt opened the thought
        ("<think>5", None),
        ("<think>a</think>b<think>c", None),
        ("<thinking>5</thinking>12", "12"),
        ("<THINK>5</THINK>12", "12"),
        ("I <think> so", None),
        ("a < think > b", "a < think > b"),
    ],
)
def test_the_reply_is_what_follows_the_last_thought(text: str, reply: str | None) -> None:
    assert reply_of(text) == reply
    assert opens_thought(text) == (reply is None)


def test_a_pair_after_a_prompt_that_opens_a_thought_is_named() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = OPENS
    with pytest.warns(UserWarning, match="the prompt ends inside a thought"):
        sk.collect(model, tokenizer, [sk.ContrastPair(CHAT, " I am glad. 4", " I am sad. 4")], layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closed = sk.ContrastPair(CHAT, "ok</think> I am glad. 4", "ok</think> I am sad. 4")
        sk.collect(model, tokenizer, [closed], layers=1)
        plain = sk.ContrastPair(CHAT, " I am glad. 4", " I am sad. 4")
        sk.collect(model, tokenizer, [plain], layers=1, chat_template_kwargs={"quick": True})
