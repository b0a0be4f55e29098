"""A tokenizer whose rules change: its hash changes, and a prefix is not doubled."""

from __future__ import annotations

from tokenizers.processors import TemplateProcessing

import steerkit as sk
from steerkit.models.identity import tokenizer_sha256
from tests.tiny import tiny_tokenizer


def test_a_post_processor_that_is_changed_later_changes_the_hash_and_changing_it_back_changes_it_back() -> None:
    tokenizer = tiny_tokenizer()
    before, rule = tokenizer_sha256(tokenizer), tokenizer.backend_tokenizer.post_processor
    special = [("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=special)
    assert tokenizer_sha256(tokenizer) != before
    if rule is not None:
        tokenizer.backend_tokenizer.post_processor = rule
        assert tokenizer_sha256(tokenizer) == before


def test_a_rendered_chat_passed_as_a_string_has_its_prefix_once_also_without_a_bos_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    tokenizer.bos_token = None
    first = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[gMASK]", "<sop>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=first)
    tokenizer.chat_template = "[gMASK]<sop>{% for one in messages %}{{ one.content }}{% endfor %}"
    chat = sk.render(tokenizer, [{"role": "user", "content": "Hi"}])
    assert sk.render(tokenizer, chat.text).ids == chat.ids
    assert sk.render(tokenizer, "Hi").ids == chat.ids
