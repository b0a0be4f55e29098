"""Families of tokenizers, small and in memory: one for each way in which real tokenizers treat spaces, merges and ends.

Every text can be represented in each of them: by the byte-level alphabet, or by byte tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SPACE = "\u2581"
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|first|>")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ("the", "sea", "is", "calm", "was", "Hello", "wor", "ld", "ing", "er", "an", "12")
CHINESE, RUSSIAN, THAI = "\u6d77\u5f88\u5e73\u9759", "\u043c\u043e\u0440\u0435 ", "\u0e17\u0e30\u0e40\u0e25"
EMOJI = " \U0001f680\U0001f469\u200d\U0001f680"
TEXTS = (
    "Hello", " was here", "the sea  is calm ", "  two blanks", "a\nb\n\n", "\n\nc", "na\u00efve caf\u00e9", CHINESE,
    RUSSIAN, EMOJI, THAI, "12*13 = 156", "<b>", "\ttab", "x",
)  # fmt: skip
"""Texts with non-Latin letters, emoji, newlines, and blanks at both ends."""


def _merges(words: tuple[str, ...], space: str) -> list[tuple[str, str]]:
    """Merges that spell words from the left, with and without a space before them, and runs of spaces."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for spelled in (word, space + word):
            for length in range(1, len(spelled)):
                merges[spelled[:length], spelled[length]] = None
    merges[space, space] = None
    return list(merges)


def _byte_level(merges: bool = False, prefix_space: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [*_merges(WORDS, "\u0120"), ("\u010a", "\u010a")] if merges else []
    vocabulary = dict.fromkeys([*alphabet, *("".join(pair) for pair in pairs)])
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(vocabulary)}, pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=merges)
    core.decoder = decoders.ByteLevel()
    return core


def _byte_fallback() -> Tokenizer:
    """BPE over characters as SentencePiece has it; a character without a token is written as its bytes."""
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?*=+-'"]
    pairs = _merges(WORDS, SPACE)
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(pair) for pair in pairs)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def _metaspace() -> Tokenizer:
    core = _byte_fallback()
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def _legacy_prepend() -> Tokenizer:
    core = _byte_fallback()
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def _gemma_like() -> Tokenizer:
    core = _byte_fallback()
    core.normalizer = normalizers.Replace(" ", SPACE)
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def _whole(core: Tokenizer, first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if first or last:
        added = {token: core.token_to_id(token) for token in {*first, *last}}
        core.post_processor = TemplateProcessing(
            single=" ".join([*first, "$A", *last]), special_tokens=list(added.items())
        )
    bos = "<s>" if "<s>" in first else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token="</s>")
    tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + CHAT
    return tokenizer


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: _whole(_byte_level()),
    "BPE with merges": lambda: _whole(_byte_level(merges=True)),
    "add_prefix_space": lambda: _whole(_byte_level(merges=True, prefix_space=True)),
    "SentencePiece, Metaspace": lambda: _whole(_metaspace(), ("<s>",)),
    "SentencePiece, Prepend and Replace": lambda: _whole(_legacy_prepend(), ("<s>",)),
    "SentencePiece, no prefix space": lambda: _whole(_gemma_like(), ("<s>",)),
    "BOS": lambda: _whole(_byte_level(merges=True), ("<s>",)),
    "BOS and EOS": lambda: _whole(_byte_level(merges=True), ("<s>",), ("</s>",)),
    "two first tokens": lambda: _whole(_byte_level(merges=True), ("<s>", "<|first|>")),
}


def model_for(tokenizer: Any, seed: int = 0) -> Any:
    """A random model with an embedding for every token, whose texts hold special tokens and ends now and then."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    with torch.no_grad():  # special tokens are written as often as others
        model.lm_head.weight[tokenizer.all_special_ids] *= 2.0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()
