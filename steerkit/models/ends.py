"""End tokens: which tokens end a text, one definition for generation, rewards, training and scores."""

from __future__ import annotations

from typing import Any

from torch import nn

from steerkit.models.model import unwrap

REPLY = "steerkit"
END_OF_TEXT = "<|endoftext|>"


def ends_of(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The token ids that end a text.

    These are the end tokens of the generation configuration, the tokenizer's `eos_token`, and the token that the
    chat template writes after an assistant's reply, if it is one special or added token (`<|im_end|>`, `<|eot_id|>`).
    The tokenizer's padding token is one of them if it is `<|endoftext|>`. The generation configuration of Qwen2.5 lists
    it as an end, and a GGUF file has no such list.

    Example:
        >>> ends_of(model, tokenizer)
        frozenset({2})
    """
    configured = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    padding = getattr(tokenizer, "pad_token_id", None) if getattr(tokenizer, "pad_token", "") == END_OF_TEXT else None
    known = (*several, getattr(tokenizer, "eos_token_id", None), end_of_turn(tokenizer), padding)
    return frozenset(int(token) for token in known if token is not None)


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an assistant's reply; None without a template or such a token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": REPLY}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # the template is a program in the checkpoint: it may refuse these messages with any error
        return None
    after = text.rpartition(REPLY)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    marked = {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", {})}
    return int(ids[0]) if ids and ids[0] in marked else None
