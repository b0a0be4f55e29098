"""The check-up of a served model: a sound engine passes, and each wrong one fails the check that is for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from steerkit.doctor import served
from steerkit.doctor.served import PROBE, examine_served
from steerkit.serving.remote import Finished, Sent
from steerkit.serving.request import KEY
from tests.serving.fake import Fake
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(served, "FLOOD", 6)
    monkeypatch.setattr(served, "BLOCKS", 1)
    monkeypatch.setattr(served, "NEW_TOKENS", 8)
    monkeypatch.setattr(served, "LONG", 12)


def steered(one: Sent) -> bool:
    return KEY in one.extra and one.extra[KEY][0]["coefficient"] != 0


class Deaf(Fake):
    """Answers every request unsteered."""

    def answer(self, one: Sent) -> tuple[int, ...]:
        return super().answer(replace(one, extra={}))


class ZeroIsOne(Fake):
    """Takes coefficient 0 for the strongest."""

    def answer(self, one: Sent) -> tuple[int, ...]:
        given = one.extra.get(KEY)
        zero = given is not None and given[0]["coefficient"] == 0
        return super().answer(replace(one, extra={KEY: [{**given[0], "coefficient": 1e4}]}) if zero else one)


class Neighbours(Fake):
    """Steers all requests of a batch as one of them."""

    def complete(self, requests: Sequence[Sent]) -> Iterator[Finished]:
        extra = next((one.extra for one in requests if steered(one)), {})
        return super().complete([replace(one, extra=extra) for one in requests])


class Unsalted(Fake):
    """Has a prefix cache that does not know of steering: a prompt is read as when it came first."""

    first: dict[tuple[int, ...], Any]

    def answer(self, one: Sent) -> tuple[int, ...]:
        self.first = self.__dict__.get("first", {})
        if one.salt is None and len(one.prompt) >= 32:
            one = replace(one, extra=self.first.setdefault(one.prompt[:32], one.extra))
        return super().answer(one)


class Forgetful(Fake):
    """Forgets the steering of requests that it has preempted: those of a batch beyond the first seven."""

    def complete(self, requests: Sequence[Sent]) -> Iterator[Finished]:
        kept = [one if number < 7 else replace(one, extra={}) for number, one in enumerate(requests)]
        return super().complete(kept)


def states(kind: type[Fake], tmp_path: Any) -> dict[str, str]:
    fake = kind(tiny_model("llama"), tiny_tokenizer(), tmp_path / "vectors")
    found = {one.check: one.state for one in examine_served(fake)}
    assert PROBE not in {one["name"] for one in fake.listing()["vectors"]}
    return found


def test_a_sound_engine_fails_no_check(tmp_path) -> None:
    found = states(Fake, tmp_path)
    assert found.pop("steerkit's engine") == "note"  # its weights are in no folder
    assert set(found.values()) == {"ok"}


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Deaf, "steering"),
        (ZeroIsOne, "coefficient 0"),
        (Neighbours, "batch"),
        (Unsalted, "prefix cache"),
        (Unsalted, "conversation"),
        (Forgetful, "preemption"),
    ],
)
def test_an_engine_that_steers_wrong_fails_the_check_for_it(kind, check, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(served, "CHECKS", {name: one for name, one in served.CHECKS.items() if name == check})
    assert states(kind, tmp_path)[check] == "failed"


def test_a_cache_that_cannot_be_filled_is_noted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(served, "FULL", 128)
    monkeypatch.setattr(served, "CHECKS", {"preemption": served.CHECKS["preemption"]})
    assert states(Fake, tmp_path)["preemption"] == "note"
