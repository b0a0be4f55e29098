"""What a server is asked: neutral sampling settings, tokens with the tokenizer's own BOS, the right converted file."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import steerkit as sk
from steerkit.cli.main import app
from steerkit.doctor.served import examine_served
from steerkit.serving import client, plugin
from steerkit.serving.checkpoint import checkpoint_folder, fingerprint_of_folder
from steerkit.serving.client import NEUTRAL, _body
from steerkit.serving.remote import Sent
from tests.tiny import tiny_model, tiny_tokenizer


def test_a_request_names_every_sampling_setting_that_a_checkpoint_could_set() -> None:
    body = _body(Sent((1,), 1))
    assert NEUTRAL.items() <= body.items() and body["repetition_penalty"] == 1.0


def test_serve_takes_no_settings_of_the_checkpoint_and_no_other_host_without_a_key(tmp_path: Path, monkeypatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("steerkit.cli.serve.find_spec", lambda name: object())
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append((command, environment)))
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "vectors").mkdir()
    call = ["serve", "./model", "--vectors", "vectors"]
    assert CliRunner().invoke(app, call, catch_exceptions=False).exit_code == 0
    (command, environment) = started.pop()
    assert command[command.index("--generation-config") + 1] == "vllm"
    assert json.loads(command[command.index("--additional-config") + 1])["steerkit"]["fingerprint"]
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    with pytest.raises(ValueError, match="expected --api-key for a server that other machines reach"):
        CliRunner().invoke(app, [*call, "--host", "0.0.0.0"], catch_exceptions=False)
    assert CliRunner().invoke(app, [*call, "--host", "0.0.0.0", "--api-key", "k"]).exit_code == 0 and started
    with pytest.raises(OSError, match="owner/none"):
        CliRunner().invoke(app, ["serve", "owner/none", "--vectors", "vectors"], catch_exceptions=False)
    with (
        socket.socket() as taken,
        pytest.raises(ValueError, match=r"expected a free port; 127.0.0.1:\d+ cannot be used"),
    ):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        CliRunner().invoke(app, [*call, "--port", str(taken.getsockname()[1])], catch_exceptions=False)


def test_a_field_that_is_not_about_steering_is_left_to_vllm() -> None:
    request = SimpleNamespace(vllm_xargs={}, model_extra={"user_id": 3, "mm_processor_kwargs": {}, "cache_tag": "a"})
    assert plugin._checked_params("to_sampling_params", lambda self: "accepted", request) == "accepted"


@pytest.mark.parametrize(
    ("extra", "outside"),
    [
        ({}, {"steerkit": {"vector": "x"}}),
        ({}, {"steering": {"vector": "x"}}),
        ({}, {"vector": "x", "layer": 1}),
        ({}, {"extra_body": {"vllm_xargs": {}}}),
        ({}, {"vllm_xarg": {"steerkit": "{}"}}),
        ({"vector": "x", "coefficient": "2"}, {}),
        ({"steer_kit": "{}"}, {}),
    ],
)
def test_a_steering_in_another_place_of_the_body_is_refused(extra, outside, monkeypatch) -> None:
    monkeypatch.setattr(plugin, "_refused", lambda message: ValueError(message))
    request = SimpleNamespace(vllm_xargs=extra, model_extra=outside)
    with pytest.raises(ValueError, match="steerkit"):
        plugin._checked_params("to_sampling_params", lambda self: pytest.fail("accepted"), request)


def test_a_converted_file_is_not_that_of_another_file_of_its_name_nor_an_older_one(tmp_path: Path, monkeypatch) -> None:
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.gguf").write_bytes(b"x" * (number + 1))
    sizes = {"1": 0, "2": 5, "3": 9}
    monkeypatch.setattr(
        sk, "load", lambda file: (tiny_model(seed=sizes[str(Path(file).stat().st_size)]), tiny_tokenizer())
    )
    found = []
    for folder in ("a", "b", "a"):
        written = checkpoint_folder(str(tmp_path / folder / "model.gguf"), tmp_path / "cache")
        found.append(fingerprint_of_folder(Path(written)))
    assert found[0] != found[1] and found[0] == found[2]
    (tmp_path / "a" / "model.gguf").write_bytes(b"xxx")
    again = checkpoint_folder(str(tmp_path / "a" / "model.gguf"), tmp_path / "cache")
    assert fingerprint_of_folder(Path(again)) not in found


def test_the_harness_reads_a_context_with_the_tokenizer_s_own_bos() -> None:
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
    from steerkit.serving.lm_eval import SteeredServer

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|user|>"
    bos = tokenizer.convert_tokens_to_ids("<|user|>")
    first = [("<|user|>", bos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=first)
    sent: list[Any] = []
    server = SimpleNamespace(model=lambda: {"context": 64}, completions=lambda bodies: sent.extend(bodies) or [])
    model = SteeredServer(server, tokenizer)  # type: ignore[arg-type]
    plain = tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert model.tok_encode("Hi") == [bos, *plain] == model.tok_encode("<|user|>Hi")
    assert model.tok_encode("Hi", add_special_tokens=False) == plain and model.prefix_token_id == bos
    with pytest.raises(ValueError, match=r"generation settings among .*got .'num_beams'"):
        model.generate_until([SimpleNamespace(args=("Hi", {"num_beams": 4}))])


def test_a_server_that_never_answered_is_a_finding_after_a_short_wait(monkeypatch) -> None:
    monkeypatch.setattr(client, "FIRST_PATIENCE_S", 0.0)
    (finding,) = examine_served("http://127.0.0.1:9")
    assert (finding.check, finding.state) == ("server", "failed") and "127.0.0.1:9" in finding.detail
    assert "vllm" not in sys.modules
