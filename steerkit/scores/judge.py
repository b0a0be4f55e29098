"""Judges: texts rated by a language model on a server, or by a rule. Imports no torch."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from steerkit.io.chat import ChatServer
from steerkit.io.files import sha256
from steerkit.io.json import canonical_json
from steerkit.io.rows import append_rows, read_rows
from steerkit.stats.checks import check_sequence
from steerkit.stats.format import MINUS
from steerkit.text.thinking import reply_of

if TYPE_CHECKING:
    from jaxtyping import Float

GIVE_UP = 16
"""A server that answers none of so many texts is asked for no more."""
NAMED = 50  # texts that an error names
FORMAT = 1  # of the message; another one gives other answers
_NUMBER = re.compile(r"(?<![\w.,])-?[0-9]+(?:\.[0-9]+)?(?![\w,]|\.[0-9])")
_ON_OTHER_SCALE = re.compile(r"(?:/|\bout of)\s*[0-9]|[0-9]\s*of\s*[0-9]", re.IGNORECASE)
_ITEM = re.compile(r"\s*[0-9]+[.)]\s+\w")
_RATED = re.compile(r"^\W*-?[0-9]|\b(?:score|rating|rate|answer)\b[^.\n]{0,40}?[0-9]", re.IGNORECASE)


class JudgeError(RuntimeError):
    """A judge's server gave no answer for a text."""


class JudgeWarning(UserWarning):
    """Some of a judge's answers are not a score."""


@dataclass(frozen=True)
class Judge:
    """A rubric, a scale, and the server or rule that rates texts; made by `judge`.

    Args:
        rubric: what is rated.
        scale: lowest and highest score.
        by: the server, or a rule from a text to an answer.
        max_tokens: maximum length of an answer in tokens.
        cache: file of the answers; None for a rule.
    """

    rubric: str
    scale: tuple[float, float]
    by: ChatServer | Callable[[str], str]
    max_tokens: int
    cache: Path | None

    def about(self) -> dict[str, Any]:
        """What determines the answers: model or rule, rubric, scale, length and format of the message."""
        name = (
            {"model": self.by.model} if isinstance(self.by, ChatServer) else {"rule": getattr(self.by, "__name__", "")}
        )
        about = {"rubric": self.rubric, "scale": list(self.scale), "max_tokens": self.max_tokens, "format": FORMAT}
        return {**name, **about}

    @property
    def reads_prompts(self) -> bool:
        """Whether the rubric contains `{prompt}`, so that the judge reads the prompt beside the text."""
        return "{prompt}" in self.rubric

    def message(self, text: str, prompt: str = "") -> str:
        """The message to the model: the rubric, the text, and the form of the answer."""
        rubric = self.rubric if "{text}" in self.rubric else f"{self.rubric}\n\n<text>\n{{text}}\n</text>"
        filled = re.sub(r"\{(text|prompt)\}", lambda found: {"text": text, "prompt": prompt}[found[1]], rubric)
        return f"{filled}\n\nAnswer with one number from {self.scale[0]:g} to {self.scale[1]:g} and nothing else."

    def scores(
        self,
        texts: Sequence[str | None],
        prompts: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> Float[np.ndarray, " n"]:
        """The scores of n texts: numbers on the scale, NaN where an answer is not a score or a text is None.

        Each distinct text is rated once (each distinct pair of prompt and text, if the rubric contains `{prompt}`).
        Answers are written to the cache as they arrive, and the same call asks only for the missing ones.

        Args:
            texts: n texts, or None (in a table NaN) for a text that does not exist.
            prompts: n prompts, needed if the rubric contains `{prompt}`.
            names: what each text is called in an error; default its index.

        Raises:
            TypeError: a text that is no string, or a rule whose answer is none.
            ValueError: no prompts, or not n; a text that UTF-8 cannot hold; a cache that holds something else.
            JudgeError: the server gave no answer for some texts, after all attempts. All other answers are then in the
                cache, and the message names these texts. It is raised at once where the server answers none of the
                first 16.

        Warns:
            JudgeWarning: with the number of answers that are not a score.

        Example:
            >>> sk.judge(rule=lambda text: str(len(text)), scale=(0, 10)).scores(["sea", "land", "sea"])
            array([3., 4., 3.])
        """
        check_sequence("texts", texts)
        if self.reads_prompts and (prompts is None or len(prompts) != len(texts)):
            got = "none" if prompts is None else str(len(prompts))
            raise ValueError(
                f"expected {len(texts)} prompts for a rubric with {{prompt}}; got {got}. Pass one per text."
            )
        read = prompts if self.reads_prompts and prompts is not None else [""] * len(texts)
        pairs = [(prompt, None if _is_nan(text) else text) for prompt, text in zip(read, texts, strict=True)]
        first: dict[tuple[str, str], str] = {}
        for number, (prompt, text) in enumerate(pairs):
            if not isinstance(text, str | None):
                raise TypeError(f"expected each text as a string, or None for none; got {text!r:.40}. Convert it.")
            if text is not None:
                first.setdefault((prompt, text), names[number] if names else f"text {number}")
        answers = self._answers(first)
        scores = {pair: read_score(answer, self.scale) for pair, answer in answers.items()}
        if unread := [pair for pair, score in scores.items() if math.isnan(score)]:
            warnings.warn(
                f"expected a number from {self.scale[0]:g} to {self.scale[1]:g} as every answer; got {len(unread)} of "
                f"{len(scores)} answers without one, e.g. {answers[unread[0]]!r:.80}: their scores are NaN. Reword the "
                "rubric, pass a larger max_tokens, or use another judge.",
                JudgeWarning,
                stacklevel=2,
            )
        return np.array([scores.get(pair, math.nan) for pair in pairs], float)  # type: ignore[arg-type]

    def _answers(self, names: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], str]:
        """The answer for each pair of prompt and text."""
        if not isinstance(self.by, ChatServer):
            answers = {(prompt, text): self.by(text) for prompt, text in names}
            if other := [answer for answer in answers.values() if not isinstance(answer, str)]:
                raise TypeError(f"expected a text from the rule; got {other[0]!r:.40}. Return str(score).")
            return answers
        assert self.cache is not None
        about = self.about()
        key_of = {(p, t): sha256(canonical_json({**about, "message": self.message(t, p)})) for p, t in names}
        rows = read_rows(self.cache) if self.cache.exists() else []
        if any(not {"key", "answer"} <= set(row) for row in rows):
            raise ValueError(f"expected the answers of a judge in {self.cache}; got other rows. Name another file.")
        known = {row["key"]: row["answer"] for row in rows}
        pair_of = {key: pair for pair, key in key_of.items() if key not in known}
        for key, answer in self._ask(self.by, {key: names[pair] for key, pair in pair_of.items()}, pair_of):
            known[key] = answer
        return {pair: known[key] for pair, key in key_of.items()}

    def _ask(
        self, server: ChatServer, names: Mapping[str, str], pair_of: Mapping[str, tuple[str, str]]
    ) -> Iterator[tuple[str, str]]:
        """Ask the server for the answers with these keys; yield each when it is in the cache.

        Texts are sent in the order of their hashes, so that the first ones are a sample of all.

        Raises:
            JudgeError: after all others were answered, naming each text without an answer; or where the server
                answers none of the first `GIVE_UP`.
        """
        assert self.cache is not None
        bodies = [(key, self._body(*pair_of[key])) for key in sorted(pair_of)]
        failed: dict[str, str] = {}
        answered = 0
        for reply in server.complete(bodies):
            if reply.text is None:
                failed[names[reply.id]] = str(reply.error)
                if len(failed) == GIVE_UP and not answered:
                    break
                continue
            answered += 1
            prompt, text = pair_of[reply.id]
            row = {"key": reply.id, "text": text, "answer": reply.text}
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.cache}.lock"):
                append_rows(self.cache, [{**row, "prompt": prompt} if self.reads_prompts else row])
            yield reply.id, reply.text
        if failed:
            listed = [*list(failed)[:NAMED], *([f"{len(failed) - NAMED} more"] if len(failed) > NAMED else [])]
            unsent = len(bodies) - len(failed) - answered
            stopped = f" The other {unsent} were not waited for." if unsent else ""
            raise JudgeError(
                f"expected an answer for every text; got none for {len(failed)} of {len(bodies)}: {'; '.join(listed)}. "
                f"The first error: {next(iter(failed.values()))}.{stopped} {answered} answers were added to "
                f"{self.cache}; the same call asks only for the others."
            )

    def _body(self, prompt: str, text: str) -> dict[str, Any]:
        message = {"role": "user", "content": self.message(text, prompt)}
        return {"messages": [message], "temperature": 0, "seed": 0, "max_tokens": self.max_tokens}


def judge(
    url: str | None = None,
    model: str | None = None,
    rubric: str = "",
    scale: tuple[float, float] = (0, 100),
    *,
    rule: Callable[[str], str] | None = None,
    cache: str | Path | None = None,
    max_tokens: int = 16,
    **server: Any,
) -> Judge:
    """A judge for `SweepResult.score`: a language model on an OpenAI-compatible server that rates one text at a time.

    The model reads the rubric, the text, and "Answer with one number from 0 to 100 and nothing else."; it decodes at
    temperature 0. Several requests run at a time, and failed ones are retried (see `steerkit.io.chat.ChatServer`). Each
    distinct text is sent once, and each answer is written to a file as it arrives, so that a killed call resumes. An
    answer is identified by model name, rubric, scale, `max_tokens` and text, not by the address of the server.

    An answer is a score if it contains exactly one number, on the scale, at its start or after a word such as "score";
    `85/100` and `85 out of 100` count as 85. A number out of another one, such as `10/10` on a scale to 100, is none. A
    number that the judge quotes from the text is mistaken for a score if it is the only one and follows such a word: "a
    score of 5 exclamation marks" is 5. The thought of a reasoning model is left out. Every other answer is NaN and
    counted.

    A judge has errors of its own: compare its scores with labels of people on a sample. `docs/concepts/scores.md` lists
    the known biases: position, length and self-preference.

    Args:
        url: address of the server, e.g. `http://127.0.0.1:8000`; `/v1` is added if there is no path.
        model: name of the model on the server.
        rubric: what is rated, and what the ends of the scale mean. The text takes the place of `{text}`, or follows
            the rubric; the prompt, as the swept model read it, takes the place of `{prompt}`.
        scale: lowest and highest score.
        rule: in place of a server, a function from a text to an answer, such as `lambda text: "100"`; for tests.
        cache: file of the answers, in JSON lines; default a file per judge in the folder of the Hugging Face caches.
        max_tokens: maximum length of an answer; a reasoning model needs room for its thought.
        server: further arguments of `ChatServer`, such as `concurrency` or `api_key_env`.

    Raises:
        ValueError: not exactly one of url and rule; no model or rubric; a scale without width; an invalid address.

    Example:
        >>> rubric = "How cheerful is the text? 0: not at all. 100: as cheerful as a text can be."
        >>> cheerful = sk.judge("http://127.0.0.1:8000", "qwen2.5-7b-instruct", rubric)
        >>> judged = result.score(cheerful, column="cheerful")

    Source: Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685 (single-answer
    grading).
    """
    low, high = (float(end) for end in scale)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"expected a scale (low, high) with low < high; got {scale!r}. Pass such as (0, 100).")
    if (url is None) == (rule is None):
        got = "none of them" if url is None else "both"
        raise ValueError(f"expected a url or a rule; got {got}. Pass the address of a server.")
    if rule is not None:
        if cache is not None or server:
            raise ValueError(f"expected no cache or server with a rule; got {[*server, 'cache'][:3]}. Leave them out.")
        return Judge(rubric, (low, high), rule, max_tokens, None)
    if not model or not rubric.strip():
        raise ValueError(f"expected a model and a rubric; got {model!r} and {rubric!r:.40}. Pass both.")
    if max_tokens < 1:
        raise ValueError(f"expected max_tokens from 1; got {max_tokens!r}. Pass a larger number.")
    made = Judge(rubric, (low, high), ChatServer(str(url), model, **server), max_tokens, Path())
    file = cache_folder() / f"{sha256(canonical_json(made.about()))[:16]}.jsonl" if cache is None else Path(cache)
    if file.is_dir():
        raise IsADirectoryError(f"expected a file as cache; got the folder {file}. Name a file in it.")
    return Judge(rubric, (low, high), made.by, max_tokens, file)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def cache_folder() -> Path:
    """Where answers are kept by default: `steerkit/judges` in the folder of the Hugging Face caches (`HF_HOME`)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "steerkit" / "judges"


def read_score(answer: str, scale: tuple[float, float] = (0, 100)) -> float:
    """The score in a judge's answer; NaN if it contains no number, several, or one that is not a score (see `judge`).

    Example:
        >>> [read_score(answer) for answer in ("85", "**Score:** 85/100", "10/10", "1. The text is", "85 or 90", "120")]
        [85.0, 85.0, nan, nan, nan, nan]
    """
    reply = reply_of(answer)
    if reply is None or _ITEM.match(reply) or not _RATED.search(reply):
        return math.nan
    reply = re.sub(rf"\s*(?:/|out of)\s*{scale[1]:g}(?!\w|\.[0-9])", "", reply, flags=re.IGNORECASE)
    if _ON_OTHER_SCALE.search(reply):
        return math.nan
    numbers = {float(number) for number in _NUMBER.findall(reply.replace(MINUS, "-"))}
    return numbers.pop() if len(numbers) == 1 and scale[0] <= min(numbers) <= scale[1] else math.nan
