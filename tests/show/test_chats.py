"""Prompts as chats: no word of a prompt is lost, whatever its template."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import steerkit as sk
from steerkit.show.chats import Turn, prompt_labels, split_turns, turns_of
from steerkit.show.explorer import explorer_data
from tests.tiny import tiny_model, tiny_tokenizer

CHATML = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IM = ("<|im_start|>", "<|im_end|>")
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = "<\uff5cbegin\u2581of\u2581sentence\uff5c>Be kind.<\uff5cUser\uff5c>Why?<\uff5cAssistant\uff5c><think>\n"


@pytest.mark.parametrize(
    ("prompt", "tokens", "turns"),
    [
        (CHATML.format("Why?"), IM, [("system", "Be kind."), ("user", "Why?")]),
        (
            "<|system|>\nBe kind.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
            ("<|system|>", "<|user|>", "<|end|>", "<|assistant|>"),
            [("system", "Be kind."), ("user", "Why?")],
        ),
        (
            DEEPSEEK,
            ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
            [("", "Be kind."), ("user", "Why?"), ("assistant", "<think>")],
        ),
        (
            "<|begin_of_text|>" + LLAMA.format("user", "user\nis a word.<|eot_id|>") + LLAMA.format("assistant", ""),
            LLAMA_TOKENS,
            [("user", "user\nis a word.")],
        ),
        (
            "<bos><start_of_turn>user\nThe user\nleft.<end_of_turn>\n<start_of_turn>model\n",
            ("<bos>", "<start_of_turn>", "<end_of_turn>"),
            [("user", "The user\nleft.")],
        ),
        (
            "<s>[INST] Who? [/INST] I.</s>",
            ("<s>", "</s>", "[INST]", "[/INST]"),
            [("user", "Who?"), ("assistant", "I.")],
        ),
        (CHATML.format("").replace("Be kind.", ""), IM, []),
    ],
    ids=["ChatML", "Phi-3", "DeepSeek", "Llama 3", "Gemma", "Mistral", "empty messages"],
)
def test_a_rendered_chat_is_split_at_special_tokens(prompt: str, tokens: tuple[str, ...], turns: list[Turn]) -> None:
    assert split_turns(prompt, tokens) == turns


def test_tags_in_a_users_text_are_kept() -> None:
    own = "what does <b>x</b> mean? <user>\n[INST]"
    assert split_turns(CHATML.format(own), IM)[-1] == ("user", own)


@pytest.mark.parametrize("tokens", [(), ("<s>",)])
def test_a_prompt_that_is_no_chat_has_no_turns(tokens: tuple[str, ...]) -> None:
    assert split_turns("<p>user\nhello</p> text", tokens) == split_turns("<s>A tale.", tokens) == []


def test_stored_messages_win_over_a_template_that_cannot_be_split() -> None:
    messages = json.dumps([{"role": "user", "content": "Why <b>so</b>? "}])
    vicuna = "A chat. USER: Why <b>so</b>? ASSISTANT:"
    assert turns_of(vicuna, messages, ("<s>",)) == [("user", "Why <b>so</b>? ")]
    assert turns_of(vicuna, None, ("<s>",)) == []
    with_system = turns_of(CHATML.format("Why <b>so</b>?"), messages, IM)
    assert with_system == [("system", "Be kind."), ("user", "Why <b>so</b>?")]  # as the template added it


def test_labels_are_made_of_the_last_message_and_of_what_is_not_shared() -> None:
    def labels(*prompts: str, tokens: tuple[str, ...] = IM) -> list[str]:
        return prompt_labels(prompts, [split_turns(prompt, tokens) for prompt in prompts])

    own = ["How do I bake?", "How do I sail?\nTell me  all.", "x" * 100]
    found = labels(*map(CHATML.format, own))
    assert found == ["How do I bake?", "How do I sail? Tell me all.", "x" * 69 + "\u2026"]
    assert labels("Once upon") == ["Once upon"] and labels("same", "same") == ["same", "same"]
    mixed = [CHATML.format("How do tides work?"), "The sea is", "He said <b>stop</b> now"]
    assert labels(*mixed) == ["How do tides work?", "The sea is", "He said <b>stop</b> now"]
    moods = [CHATML.format("Why?").replace("kind", mood) for mood in ("glad", "gruff")]
    assert labels(*moods) == ["Be glad.", "Be gruff."]


def test_a_sweep_keeps_the_messages_and_the_special_tokens_of_its_prompts() -> None:
    tokenizer: Any = tiny_tokenizer()
    vector = sk.SteeringVector({1: torch.ones(32)})
    chat = [{"role": "user", "content": "what does <b>x</b> mean?"}]
    prompts = ["<p>user\nhello</p>", chat, sk.render(tokenizer, chat)]
    result = sk.sweep(tiny_model(), tokenizer, vector, prompts, coefficients=[1.0], max_new_tokens=2)
    kept = result.table.drop_duplicates("prompt_id")["messages"].tolist()
    assert json.loads(kept[1]) == chat and not any(isinstance(kept[k], str) for k in (0, 2))
    assert set(result.meta["special_tokens"]) == {"<|user|>", "<|end|>", "<|assistant|>"}
    turns = explorer_data(result)["turns"]
    assert turns == [[], [("user", "what does <b>x</b> mean?")], [("user", "what does <b>x</b> mean?")]]
    plain = sk.sweep(tiny_model(), tokenizer, vector, ["Hello"], coefficients=[1.0], max_new_tokens=2)
    assert "messages" not in plain.table
