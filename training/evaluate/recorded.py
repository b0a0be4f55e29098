"""Recorded: an answerer whose replies are on disk as they arrive, so that an interrupted evaluation resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerkit.io.ranks import rank_and_world
from steerkit.io.rows import append_rows, read_rows
from training.debates.answerers import Answerer, Reply, Request, Sampling, check_unique_ids
from training.debates.debate import CALLS, CALLS_OF_ALL
from training.evaluate.chunks import prompt_sha256


@dataclass(frozen=True)
class Recorded:
    """An answerer that appends each reply to `calls.jsonl` as it arrives, and reads the replies that are there.

    A reply on disk is that of the request with its id, its prompt and its token limit; failed calls are asked again.
    What else determines replies (the model, the temperature, the seed) must be the same for all calls of a folder.
    Each process of torchrun has a file of its own and reads those of all.

    Args:
        answerer: the answerer.
        folder: folder of the files.

    Example:
        >>> rows = one_answer(problems, Shared(Recorded(answerer, Path("runs/calls"))), bare, Sampling())
    """

    answerer: Answerer
    folder: Path

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield the replies: first those on disk, then the others as they arrive.

        Raises:
            ValueError: two requests with the same id; see also the answerer.
        """
        check_unique_ids("requests", (request.id for request in requests))
        hashes = {request.id: prompt_sha256(self.tokenizer, request.prompt) for request in requests}
        known = self._known(hashes, sampling.max_new_tokens)
        yield from known.values()
        rank, _ = rank_and_world()
        path = self.folder / (f"calls-{rank}.jsonl" if rank else CALLS)
        missing = [request for request in requests if request.id not in known]
        for reply in self.answerer(missing, sampling) if missing else ():
            about = {"limit": sampling.max_new_tokens, "prompt_sha256": hashes[reply.id]}
            append_rows(path, [{**asdict(reply), **about}])
            yield reply

    def _known(self, hashes: Mapping[str, str], limit: int) -> dict[str, Reply]:
        """The replies on disk, by id; `hashes` has the hash of each prompt."""
        found = {}
        for path in sorted(self.folder.glob(CALLS_OF_ALL)):
            for row in read_rows(path):
                of = row.pop("prompt_sha256"), row.pop("limit")
                if row["text"] is not None and of == (hashes.get(row["id"]), limit):
                    found[row["id"]] = Reply(**row)
        return found

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the answerer; None where it has none in this process."""
        return getattr(self.answerer, "tokenizer", None)

    def about(self) -> dict[str, Any]:
        """Return the provenance of the answerer."""
        return self.answerer.about()
