"""What `make test-lab` runs: the documented commands with small sizes, local files and the address of its server."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the extra `train` is not installed")
from tests.lab import HUB, SIZES, sized
from tests.training.test_documented_stages import URL, documented


def test_the_lab_replaces_every_hub_id_address_and_server_model_of_the_documented_commands() -> None:
    calls = [sized(call, "http://127.0.0.1:1", Path("/served"), Path("/data")) for call in documented()]
    words = [part for call in calls for part in call]
    assert not [part for part in words if any(name in part for name in (URL, *HUB))]
    after = {call[i + 1] for call in calls for i, part in enumerate(call) if part.startswith("http://127.0.0.1:1/")}
    assert after == {"/served"}
    assert all(setting in call for call in calls for setting in SIZES.get(call[0], ()))
