"""The parts of the client: the rate, the log of calls, the fingerprint of a model."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.budget import HttpBill
from pipeline.cards import Rate
from pipeline.remote import probe
from pipeline.remote.call_log import FILE, CallLog, total_of
from pipeline.remote.limiter import Limiter


class Clock:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@given(
    calls=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 500)), min_size=1, max_size=40),
    rates=st.tuples(*[st.one_of(st.none(), st.integers(1, 600))] * 3),
)
def test_no_minute_has_more_than_its_rate_and_a_call(
    calls: list[tuple[int, int]], rates: tuple[int | None, ...]
) -> None:
    """The rate holds in every window, apart from the one call that begins it, which may be larger than the rate."""
    clock = Clock()
    requests, images_, tokens_ = rates
    rate_of_card = Rate(requests_per_minute=requests, images_per_minute=images_, tokens_per_minute=tokens_)
    limiter = Limiter(rate_of_card, clock, clock.sleep)
    at: list[tuple[float, int, int, int]] = []

    async def send() -> None:
        for images, tokens in calls:
            await limiter.take(images, tokens)
            at.append((clock.now, 1, images, tokens))

    asyncio.run(send())
    for unit, rate in enumerate(rates, 1):
        for i, (began, *_) in enumerate(at):
            inside = [call[unit] for call in at[i:] if call[0] < began + 60]
            assert rate is None or sum(inside[:-1]) <= rate + 1e-6


def test_a_pause_holds_every_caller_and_unused_tokens_are_given_back() -> None:
    clock = Clock()
    limiter = Limiter(Rate(tokens_per_minute=60), clock, clock.sleep)

    async def send() -> list[float]:
        limiter.pause(5)
        waited = [await limiter.take(0, 30)]
        limiter.used(30, 10)
        return [*waited, await limiter.take(0, 1)]

    assert asyncio.run(send()) == pytest.approx([5, 10])


SENT = HttpBill(calls=1, images=3, bytes=100, micro_usd=50)


def test_the_log_is_the_same_after_a_restart(tmp_path: Path) -> None:
    log = CallLog(tmp_path)
    log.ended(log.sent("a", "k1", SENT), "answered", 200, tokens=5, micro_usd=40)
    log.ended(log.sent("a", "k1", SENT), "refused", 429)
    log.ended(log.sent("b", "k2", SENT), "lost")
    log.ended(log.sent("b", "k3", SENT), "unsent")
    a, b = log.bill("a"), log.bill("b")
    assert a == HttpBill(calls=2, images=6, bytes=200, tokens=5, rate_limited=1, micro_usd=40)
    assert b == HttpBill(calls=1, images=3, bytes=100, uncertain=1, micro_usd=50)
    again = CallLog(tmp_path)
    assert (again.bill("a"), again.bill("b"), again.bill("c")) == (a, b, HttpBill())
    assert again.total() == total_of(tmp_path) == a + b
    assert [again.times(key) for key in ("k1", "k2", "other")] == [2, 1, 0]


def test_a_call_that_a_killed_process_sent_is_uncertain(tmp_path: Path) -> None:
    CallLog(tmp_path).sent("a", "k", SENT)
    log = CallLog(tmp_path)
    assert log.bill("a") == HttpBill(calls=1, images=3, bytes=100, uncertain=1, micro_usd=50)
    number = log.sent("a", "k", SENT)
    log.ended(number, "answered", 200, micro_usd=1)
    assert CallLog(tmp_path).bill("a").uncertain == 1 and CallLog(tmp_path).bill("a").calls == 2


def test_a_damaged_line_is_counted_and_the_others_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = CallLog(tmp_path)
    log.ended(log.sent("a", "k", SENT), "answered", 200)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes() + b'deadbeef {"n": 9}\n0123')
    with caplog.at_level(logging.WARNING):
        again = CallLog(tmp_path)
    assert again.bill("a").calls == 1 and "2 lines are damaged" in caplog.text
    again.ended(again.sent("b", "k", SENT), "answered", 200)
    assert CallLog(tmp_path).bill("b").calls == 1, "a line after a torn one is whole"


def test_a_storage_without_a_log_sent_nothing(tmp_path: Path) -> None:
    assert total_of(tmp_path) == HttpBill() and not list(tmp_path.iterdir())


def test_a_fingerprint_survives_rounding_and_tells_models_apart() -> None:
    values = np.random.default_rng(3).uniform(-0.3, 0.3, (4, 4))
    one = probe.fingerprint(values)
    for noise in (0.0, 1e-7, 9.9e-4, -9.9e-4):
        assert probe.same_model(one, probe.fingerprint(values + noise))
    assert not probe.same_model(one, probe.fingerprint(values + 2e-3))
    assert not probe.same_model(one, probe.fingerprint(values[::-1]))
    assert probe.difference(one, probe.fingerprint(values + 0.01)) == pytest.approx(0.01, abs=2e-4)


def test_the_pictures_of_the_probes_differ_at_every_size() -> None:
    for size in (8, 64, 224):
        pictures = probe.pictures(size)
        assert {picture.size for picture in pictures} == {(size, size)} and len(pictures) == len(probe.WORDS) == 4
        assert len({picture.tobytes() for picture in pictures}) == 4
