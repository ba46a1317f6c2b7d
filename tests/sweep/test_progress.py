"""The progress line of a run and its counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from methods.base import Bill
from pipeline.errors import LedgerError
from pipeline.sweep.progress import Count, Progress, ProgressCounter, clock


class FakeLedger:
    """A ledger with one account, which can be damaged."""

    requests, damaged = 100, False

    def accounts(self) -> list[Any]:
        if self.damaged:
            raise LedgerError("damaged")
        return [SimpleNamespace(name="other", charged=Bill(7)), SimpleNamespace(name="a", charged=Bill(self.requests))]


def test_counts_begin_at_the_start_of_the_run() -> None:
    ledger: Any = FakeLedger()
    counter = ProgressCounter(ledger, "a")
    ledger.requests, counter.done, counter._next_read = 130, 2, 0.0
    assert counter.count() == Count(2, 30)


def test_a_damaged_ledger_leaves_the_last_count() -> None:
    ledger: Any = FakeLedger()
    counter = ProgressCounter(ledger, "a")
    ledger.damaged, counter._next_read = True, 0.0
    assert counter.count() == Count(0, 0)


def test_the_last_line_has_all_counts(capsys: pytest.CaptureFixture[str]) -> None:
    beats: list[float | None] = []
    done = [Count(0, 0)]
    with Progress(2, 1000, lambda: done[0], beats.append):
        done[0] = Count(2, 1000)
    assert capsys.readouterr().err.splitlines()[-1] == "2/2 trials   1,000/1,000 requests   0:00 gone   about 0:00 left"
    assert beats[0] is None


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (187.9, "3:07"), (3765, "1:02:45")])
def test_seconds_are_shown_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
