"""A steered model for lm-evaluation-harness: run any of its tasks at any coefficient."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from steerkit.io.progress import progress
from steerkit.models.blocks import find_blocks
from steerkit.models.identity import fingerprint
from steerkit.models.load import load
from steerkit.steering.positions import parse_positions
from steerkit.steering.steering import Steering
from steerkit.vectors.vector import SteeringVector

Request = tuple[Any, Sequence[int], Sequence[int]]


@register_model("steerkit")
class SteeredLM(HFLM):
    """`HFLM`, the harness's model class, with a steering that is active in every forward of a request.

    On the command line use `python -m steerkit.lm_eval --model steerkit --tasks ... --model_args KEY=VALUE,...`. The
    keys are `pretrained` and `vector` (a file); optional are `layer`, `coefficient`, `positions`, `operation`,
    `foreign`, `adapter`, `dtype`, `device` and the options of `HFLM`.

    Meaning of `positions`:
        generate_until: the context is the prompt.
        loglikelihood: the context is the prompt, and the continuation counts as new tokens. With `"generated"` the
            logits of the continuation's first token are unsteered. An answer of one token (most multiple choice) is
            then not steered at all: use `"from_last_prompt_token"`, `"prompt"` or `"all"`.
        loglikelihood_rolling: each window is a separate text, and its first token is the prompt: the end-of-text token,
            or in later windows a token of the text. All others count as new tokens, also where they are context.

    With `batch_size="auto"` the largest batch is searched once, for the longest of all log-likelihoods; `auto:N` is
    the same. The harness's request cache (`use_cache`) ignores steering: use a separate file per coefficient.

    Args:
        model: a transformers (or PEFT) model; `HFLM` puts it in eval mode.
        tokenizer: its tokenizer; a copy is used, since `HFLM` sets its padding token.
        steering: has one coefficient for all requests.
        options: those of `HFLM`: batch_size, max_length, add_bos_token, ...

    Raises:
        ValueError: a steering that does not fit the model or has a coefficient per row; a continuation so long that no
            token of its context fits.

    Example:
        >>> lm_eval.simple_evaluate(model=SteeredLM(model, tokenizer, steering), tasks=["hellaswag"])
    """

    def __init__(self, model: Any, tokenizer: Any, steering: Steering, **options: Any) -> None:
        if not isinstance(steering.coefficient, float):
            raise ValueError("expected one coefficient for all requests; got one per row. Pass one number.")
        steering.check(model, find_blocks(model), fingerprint(model))
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), **options)
        self.steering = steering

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> SteeredLM:
        """Make the model from `model_args`: arguments of `load`, of `Steering` and of `HFLM`."""
        extra = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls._loaded(**{**arg_dict, **extra})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> SteeredLM:
        """Make the model from `model_args` as one string, `key=value,key=value`."""
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
        """Per request `(log-likelihood, whether greedy)`; only prompts of equal length share a forward."""
        groups: dict[int | None, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._prompt_length(request), []).append(number)
        if self.batch_size == "auto" and requests and not override_bs:  # else the harness searches in each group
            override_bs = self._detect_batch_size([max(requests, key=lambda one: len(one[1]) + len(one[2]))])
        answers: dict[int, tuple[float, bool]] = {}
        with progress("log-likelihoods", len(requests)) as advance:
            for length, numbers in groups.items():
                with self.steering.on(self.model, prompt_length=length):
                    batch = super()._loglikelihood_tokens([requests[i] for i in numbers], True, override_bs)
                answers.update(zip(numbers, batch, strict=True))
                advance(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _prompt_length(self, request: Request) -> int | None:
        """Tokens of the context that enter the model, which truncates it on the left; None for positions `all`.

        1 for a window of `loglikelihood_rolling`, which the harness marks by None in place of its texts.
        """
        if parse_positions(self.steering.positions)[0] == "all":
            return None
        texts, context, continuation = request
        kept = min(1 if texts is None else len(context), self.max_length + 1 - len(continuation))
        if kept < 1:
            raise ValueError(
                f"expected room for a token of context before a continuation of {len(continuation)} tokens; got a "
                f"model of {self.max_length} tokens. Shorten the continuation, or use positions 'all'."
            )
        return kept


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
