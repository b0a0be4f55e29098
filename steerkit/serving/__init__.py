"""Serving: exact steering per request on the stock engine of vLLM, and engines and clients for our own jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit.serving.client import Server as Server
    from steerkit.serving.client import ServerError as ServerError
    from steerkit.serving.vllm import VLLM as VLLM

__all__ = ["VLLM", "Server", "ServerError"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in __all__:
        module = "vllm" if name == "VLLM" else "client"
        return getattr(importlib.import_module(f"steerkit.serving.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
