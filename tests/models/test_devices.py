"""A model that is spread over several devices reads and steers as one on a single device."""

from __future__ import annotations

import pytest
import torch

import steerkit as sk
from steerkit.models.identity import fingerprint
from tests.capture.test_capture import TEXTS, relative
from tests.tiny import tiny_model, tiny_tokenizer

SPREAD = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
def test_blocks_kept_on_the_disk_read_and_steer_as_those_in_memory(folder) -> None:
    plain, tokenizer = sk.load(folder)
    spread, _ = sk.load(folder, device=SPREAD)
    assert next(spread.model.layers[1].parameters()).is_meta  # it really is elsewhere
    assert fingerprint(spread) == fingerprint(plain)
    whole, parts = (sk.collect(model, tokenizer, TEXTS, position="mean") for model in (plain, spread))
    assert relative(whole.resid, parts.resid) < 1e-6
    vector = sk.SteeringVector({1: torch.linspace(-6, 6, 32), 2: torch.ones(32)})
    steering = sk.Steering(vector, 1.0, "from_last_prompt_token", layer="all")
    texts = [sk.generate(model, tokenizer, TEXTS, max_new_tokens=6, steering=steering) for model in (plain, spread)]
    assert texts[0] == texts[1]
    assert texts[0] != sk.generate(plain, tokenizer, TEXTS, max_new_tokens=6)


def test_fewer_bits_are_refused_where_they_cannot_be_had(folder) -> None:
    with pytest.raises(ValueError, match="4 or 8"):
        sk.load(folder, bits=3)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="a GPU and the package bitsandbytes"):
            sk.load(folder, bits=4)
