"""The progress line of a running sweep: trials done, requests charged, time left."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Self

from pipeline.errors import LedgerError
from pipeline.ledger.ledger import Ledger

TRIAL_IN_REQUESTS = 100
"""Time that a trial takes beside its requests, as a number of requests; used to estimate the time left."""


class Count(NamedTuple):
    """How far a run is."""

    done: int
    """Trials that ended."""
    requests: int
    """Requests charged since the run started."""


class ProgressCounter:
    """Counts ended trials, which the caller adds to `done`, and the requests charged to an account of the ledger."""

    def __init__(self, ledger: Ledger, account: str) -> None:
        self.ledger, self.account, self.done = ledger, account, 0
        self._requests, self._next_read = 0, 0.0
        self._first = self._charged()

    def count(self) -> Count:
        """Return the counts since the start of the run."""
        return Count(self.done, self._charged() - self._first)

    def _charged(self) -> int:
        """Return all requests charged to the account; read again when that takes at most a hundredth of the time."""
        began = time.monotonic()
        if began >= self._next_read:
            with contextlib.suppress(LedgerError):  # the trials fail on a damaged ledger and report it
                accounts = self.ledger.accounts()
                self._requests = next((a.charged.requests for a in accounts if a.name == self.account), 0)
            self._next_read = began + 100 * (time.monotonic() - began)
        return self._requests


class Progress:
    """Prints the progress line: redrawn every second on a terminal, printed every ten seconds elsewhere.

    Args:
        trials: number of trials of the run.
        requests: their predicted requests.
        count: returns how far the run is; called every second from a thread.
        beat: called every second with the seconds left, None while they are unknown.
    """

    def __init__(
        self, trials: int, requests: int, count: Callable[[], Count], beat: Callable[[float | None], None]
    ) -> None:
        self.trials, self.requests, self.count, self.beat = trials, requests, count, beat
        self.terminal = sys.stderr.isatty()
        self.began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        self._first = self.count()
        self.beat(None)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        count, elapsed = self.count(), time.monotonic() - self.began
        self._show(count, elapsed, self._seconds_left(count, elapsed), last=True)

    def _loop(self) -> None:
        every, ticks = 1 if self.terminal else 10, 0
        while not self._stop.wait(1.0):
            ticks += 1
            count, elapsed = self.count(), time.monotonic() - self.began
            left_s = self._seconds_left(count, elapsed)
            self.beat(left_s)
            if ticks % every == 0:
                self._show(count, elapsed, left_s)

    def _show(self, count: Count, elapsed: float, left_s: float | None, last: bool = False) -> None:
        left = "time left unknown" if left_s is None else f"about {clock(left_s)} left"
        line = (
            f"{count.done}/{self.trials} trials   {count.requests:,}/{self.requests:,} requests   "
            f"{clock(elapsed)} gone   {left}"
        )
        start, end = ("\r\033[K", "\n" if last else "") if self.terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)

    def _seconds_left(self, count: Count, elapsed: float) -> float | None:
        """Extrapolate from the pace so far; an ended trial counts as `TRIAL_IN_REQUESTS` further requests."""
        done = count.requests - self._first.requests + TRIAL_IN_REQUESTS * (count.done - self._first.done)
        share = done / (self.requests + TRIAL_IN_REQUESTS * self.trials)
        if share <= 0:
            return None
        return max(0.0, elapsed * (1 - share) / share)


def clock(seconds: float) -> str:
    """Format seconds as 3:07 or 1:02:45."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
