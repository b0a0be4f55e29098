"""Warnings of vLLM and of its processes do not fail these tests; those of steerkit are tested elsewhere."""

from __future__ import annotations

from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    import pytest

    for item in items:
        if "tests/vllm/" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
