"""A steered model for lm-evaluation-harness, so that any of its tasks runs at any coefficient."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from steerkit.io.progress import progress
from steerkit.models.load import load
from steerkit.steering.positions import parse_positions
from steerkit.steering.steering import Steering
from steerkit.vectors.vector import SteeringVector

Request = tuple[Any, Sequence[int], Sequence[int]]


@register_model("steerkit")
class SteeredLM(HFLM):
    """`HFLM`, the harness's own model, with a steering that is on in every forward of a request.

    `lm_eval.simple_evaluate(model=SteeredLM(model, tokenizer, steering), tasks=[...])`, or from a terminal its own
    command line, `python -m steerkit.lm_eval --model steerkit --tasks ... --model_args KEY=VALUE,...` with the keys
    `pretrained` and `vector` (a file), and if wanted `layer`, `coefficient`, `positions`, `operation`, `foreign`,
    `adapter`, `dtype` and those of `HFLM`.

    What `positions` means:
        generate_until: as everywhere; the context is the prompt.
        loglikelihood: the context is the prompt, the continuation stands for new tokens. So `"generated"` leaves the
            logits of the continuation's first token unsteered, and an answer of one token (most multiple choice) has
            no other: there only `"from_last_prompt_token"`, `"prompt"` and `"all"` act.
        loglikelihood_rolling: each window is a text of its own; the token that the harness puts before it (the
            end-of-text token, or the last token of the window before) is the prompt.

    The harness's request cache (`use_cache`) knows nothing of steering: give each coefficient a file of its own.

    Args:
        model: a transformers (or PEFT) model; `HFLM` puts it in eval mode.
        tokenizer: its tokenizer; a copy is used, since `HFLM` sets its padding token.
        steering: with one coefficient for all requests.
        options: those of `HFLM`: batch_size, max_length, add_bos_token, ...

    Raises:
        ValueError: a steering that does not fit the model or has a coefficient per row; a continuation that leaves no
            room for its context, so that nobody can say where it begins.
    """

    def __init__(self, model: Any, tokenizer: Any, steering: Steering, **options: Any) -> None:
        if not isinstance(steering.coefficient, float):
            raise ValueError("expected one coefficient for all requests; got one per row. Evaluate them one by one.")
        with steering.on(model):  # does it fit?
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), **options)
        self.steering = steering

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> SteeredLM:
        """From the harness's `model_args`: what `load` takes, what `Steering` takes, and options of `HFLM`."""
        extra = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls._loaded(**{**arg_dict, **extra})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> SteeredLM:
        """From `model_args` as one string, `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def _loaded(
        cls,
        *,
        pretrained: str,
        vector: str,
        layer: int | None = None,
        coefficient: float = 1.0,
        positions: str = "from_last_prompt_token",
        operation: Any = "add",
        foreign: bool = False,
        adapter: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> SteeredLM:
        steering = Steering(SteeringVector.load(vector), coefficient, positions, operation, foreign, layer=layer)
        return cls(*load(pretrained, adapter=adapter, dtype=dtype, device=device), steering, **options)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self.steering.on(self.model):
            return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Per request `(log-likelihood, whether greedy)`; only contexts of equal length share a forward."""
        groups: dict[int | None, list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            groups.setdefault(self._prompt_length(len(context), len(continuation)), []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        with progress("log-likelihoods", len(requests)) as advance:
            for length, numbers in groups.items():
                with self.steering.on(self.model, prompt_length=length):
                    found = super()._loglikelihood_tokens([requests[i] for i in numbers], True, override_bs)
                answers.update(zip(numbers, found, strict=True))
                advance(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _prompt_length(self, context: int, continuation: int) -> int | None:
        """How many tokens of the context enter the model, which cuts it at its left end; None where it is all one."""
        if parse_positions(self.steering.positions)[0] == "all":
            return None
        kept = min(context, self.max_length + 1 - continuation)
        if kept < 1:
            raise ValueError(
                f"expected room for a token of context before a continuation of {continuation} tokens; the model takes "
                f"{self.max_length}. Cut the continuation, or steer at positions 'all'."
            )
        return kept


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
