"""lm-evaluation-harness on a served model, at any steering."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import simple_parse_args_string

from steerkit.io.progress import progress
from steerkit.serving.client import NEUTRAL, Server, extra_arguments
from steerkit.serving.request import KEY, PROMPT

Request = tuple[Any, Sequence[int], Sequence[int]]


@register_model("steerkit-server")
class SteeredServer(TemplateLM):
    """A model for the harness whose requests go to a server that `steerkit serve` has started.

    On the command line use `python -m steerkit.serving.lm_eval --model steerkit-server --tasks ... --model_args
    base_url=http://127.0.0.1:8000,vector=NAME,layer=16,coefficient=2`. The meaning of `positions` is that of
    `steerkit.lm_eval`: of a log-likelihood, the context is the prompt, and the continuation counts as new tokens.

    Args:
        server: the server.
        tokenizer: the served model's.
        steering: a specification (see `steerkit.serving.request`); None: unsteered.
        max_gen_toks: largest number of new tokens, where a task does not say.

    Raises:
        ServerError: the server refuses the steering; before any task runs.

    Example:
        >>> model = SteeredServer(sk.serving.Server(url), tokenizer, {"vector": "cheerful", "layer": 16})
        >>> lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])
    """

    def __init__(
        self, server: Server, tokenizer: Any, steering: Mapping[str, Any] | None = None, max_gen_toks: int = 256
    ) -> None:
        super().__init__()
        self.server, self.tokenizer, self.max_gen_toks = server, copy.deepcopy(tokenizer), max_gen_toks
        self.extra = {} if steering is None else {KEY: dict(steering)}
        self.context = int(server.model()["context"])
        trial = {"prompt": [0], "max_tokens": 1, "temperature": 0, **extra_arguments(self.extra)}
        list(server.completions([trial]))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> SteeredServer:
        """Make the model from `model_args`: the address, fields of the specification, a tokenizer, max_gen_toks."""
        given = dict(arg_dict)
        server = Server(given.pop("base_url"))
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(given.pop("tokenizer", server.model()["checkpoint"]))
        count = int(given.pop("max_gen_toks", 256))
        return cls(server, tokenizer, given or None, count)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> SteeredServer:
        """Make the model from `model_args` as one string, `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with the tokenizer's own special tokens, unless the text begins with the BOS token."""
        bos = self.tokenizer.bos_token
        own = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=own)["input_ids"])

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Per request `(log-likelihood, whether greedy)`."""
        rows = []
        for _, context, continuation in requests:
            room = self.context - 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    f"expected room for a token of context before a continuation of {len(continuation)} tokens; got a "
                    f"context of {self.context}. Shorten the continuation."
                )
            rows.append((list(context)[-room:], list(continuation)))
        bodies = [
            {
                **NEUTRAL,
                "prompt": [*context, *continuation],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
                **extra_arguments({**self.extra, PROMPT: len(context)} if self.extra else {}),
            }
            for context, continuation in rows
        ]
        scores = {}
        for number, answer in self._answers("log-likelihoods", bodies):
            continuation = rows[number][1]
            given = answer["choices"][0]["prompt_logprobs"][-len(continuation) :]
            each = [entry[str(token)] for entry, token in zip(given, continuation, strict=True)]
            scores[number] = sum(one["logprob"] for one in each), all(one["rank"] == 1 for one in each)
        return [scores[number] for number in range(len(rows))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "expected a task of choices or generation; a served model has no rolling log-likelihoods here. Use "
            "`python -m steerkit.lm_eval`."
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        bodies = []
        for one in requests:
            text, given = one.args
            options = dict(given)
            stops = handle_stop_sequences(options.pop("until", None), self.tokenizer.eos_token)
            count = int(options.pop("max_gen_toks", self.max_gen_toks))
            ids = self.tok_encode(text)[-(self.context - count) :]
            sampled = bool(options.pop("do_sample", False))
            given_temperature = float(options.pop("temperature", 0))
            chosen = {name: options.pop(name) for name in ("top_p", "top_k", "min_p") if name in options}
            if options:
                raise ValueError(
                    f"expected generation settings among until, max_gen_toks, do_sample, temperature, top_p, top_k and "
                    f"min_p; got {sorted(options)}. Take them out of the task."
                )
            bodies.append(
                {
                    **NEUTRAL,
                    **(chosen if sampled else {}),
                    "prompt": ids,
                    "max_tokens": count,
                    "temperature": given_temperature if sampled else 0.0,
                    "seed": 1234,
                    "stop": stops,
                    **extra_arguments(self.extra),
                }
            )
        texts = {number: answer["choices"][0]["text"] for number, answer in self._answers("generation", bodies)}
        return [texts[number] for number in range(len(bodies))]

    def _answers(self, what: str, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        with progress(what, len(bodies)) as advance:
            for found in self.server.completions(bodies):
                yield found
                advance(1)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
