"""What a person sees while a sweep runs: trials done, requests spent of the budget, time left."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from pipeline.errors import LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore

TRIAL_IN_REQUESTS = 100
"""What a trial costs beside its requests, in requests: enough for an estimate of the time left."""


Mirroring = Callable[[Sequence[ResultRow]], None]
"""Takes a finished trial's rows as they come."""


class Count(NamedTuple):
    """How far a sweep is."""

    done: int
    requests: int


class ResultWatcher:
    """Counts finished trials by their files, and hands each one's rows to the mirror as they come."""

    def __init__(self, ids: Sequence[str], store: ResultStore, ledger: Ledger, account: str, mirror: Mirroring) -> None:
        self.store, self.ledger, self.account, self.mirror = store, ledger, account, mirror
        self.before = {i: self._stamp(i) for i in ids}
        self.done: set[str] = set()
        self._requests, self._read_again = 0, 0.0
        self.first = self._charged()
        self._lock = threading.Lock()

    def _stamp(self, trial: str) -> int:
        path = self.store.results / f"{trial}.arrow"
        return path.stat().st_mtime_ns if path.exists() else 0

    def _charged(self) -> int:
        """Requests charged so far; read anew while that takes at most a hundredth of the time."""
        began = time.monotonic()
        if began >= self._read_again:
            with contextlib.suppress(LedgerError):  # a damaged ledger stops the trials, which say so
                accounts = self.ledger.accounts()
                self._requests = next((a.charged.requests for a in accounts if a.name == self.account), 0)
            self._read_again = began + 100 * (time.monotonic() - began)
        return self._requests

    def count(self) -> Count:
        """Trials finished and requests charged since the start; new rows are mirrored on the way."""
        with self._lock:
            for trial, before in self.before.items():
                if trial not in self.done and self._stamp(trial) != before:
                    self.done.add(trial)
                    if rows := self.store.rows_of(trial):
                        self.mirror(rows)
        return Count(len(self.done), self._charged() - self.first)

    def close(self) -> None:
        """See the last rows."""
        self._read_again = 0.0
        self.count()


class Progress:
    """One line, redrawn every second on a terminal; written every ten seconds where output goes to a file."""

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
        """If work goes on at the pace so far; a trial's own work counts as that of some requests."""
        done = count.requests - self._first.requests + TRIAL_IN_REQUESTS * (count.done - self._first.done)
        share = done / (self.requests + TRIAL_IN_REQUESTS * self.trials)
        if share <= 0:
            return None
        return max(0.0, elapsed * (1 - share) / share)


def clock(seconds: float) -> str:
    """3:07 or 1:02:45"""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
