"""Inspect: a model provider, so that any task of `inspect_ai` runs on a served model at any steering.

    inspect eval task.py --model steerkit/NAME --model-base-url http://127.0.0.1:8000/v1 \\
        -M vector=cheerful -M layer=16 -M coefficient=2
"""

from __future__ import annotations

import os
from typing import Any

from inspect_ai.model import GenerateConfig, ModelAPI, get_model, modelapi

from steerkit.serving.client import Server, extra_arguments
from steerkit.serving.request import FIELDS, KEY


@modelapi(name="steerkit")
class SteeredAPI(ModelAPI):
    """A server that `steerkit serve` has started, as a model of Inspect.

    Messages go through Inspect's own provider for OpenAI-compatible servers; each request carries the steering.

    Args:
        model_name: name of the model on the server.
        base_url: address of the server; default the variable STEERKIT_BASE_URL.
        api_key: its key; default the variable STEERKIT_API_KEY, or none.
        config: defaults of generation.
        model_args: fields of the specification (see `steerkit.serving.request`); none: unsteered.

    Raises:
        ValueError: no address, or an unknown field.
        ServerError: the server does not steer, or refuses the steering.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  as Inspect's own providers
        **model_args: Any,
    ) -> None:
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        address = base_url or os.environ.get("STEERKIT_BASE_URL")
        if not address:
            raise ValueError(
                "expected the address of a server; got none. Pass --model-base-url, or set STEERKIT_BASE_URL."
            )
        if unknown := sorted(set(model_args) - set(FIELDS)):
            raise ValueError(f"expected arguments among {FIELDS}; got {unknown}. Remove or rename them.")
        self.extra = extra_arguments({KEY: model_args} if model_args else {})
        server = Server(address)
        trial = {"prompt": [0], "max_tokens": 1, "temperature": 0, **self.extra}
        list(server.completions([trial]))  # a bad steering is refused here, and not as a failed sample
        key = api_key or os.environ.get("STEERKIT_API_KEY") or "none"
        self.inner = get_model(
            f"openai-api/steerkit/{model_name}", base_url=server.urls[0], api_key=key, config=config, memoize=False
        ).api

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> Any:
        body = {**(config.extra_body or {}), **self.extra}
        return await self.inner.generate(
            input, tools, tool_choice, config.model_copy(update={"extra_body": body or None})
        )

    async def aclose(self) -> None:
        await self.inner.aclose()

    def connection_key(self) -> str:
        """Requests to one server share Inspect's limit of connections."""
        return str(self.inner.base_url)
