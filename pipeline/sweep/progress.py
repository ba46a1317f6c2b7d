"""The progress of a running sweep: its stage, ended trials, charged requests, last results, time left."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from pipeline.errors import LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.results.row import STATUSES, ResultRow

TRIAL_IN_REQUESTS = 100
"""Time that a trial takes beside its requests, as a number of requests; used to estimate the time left."""
MIN_ENDED, MIN_SHARE = 3, 0.05
"""Ended trials and share of the work that an estimate of the time left needs."""
LAST_RESULTS = 5
STARTING, LOADING, ENCODING, FITTING = "starting Ray", "loading the model", "encoding images", "fitting"
"""Stages of a run, in this order. The first charge ends the third."""


@dataclass(frozen=True)
class State:
    """What is known about a run at one moment."""

    stage: str
    trials: int
    """Trials of the run."""
    ended: int
    requests: int
    """Predicted requests of the run."""
    done_requests: int
    """Requests charged in this run, or predicted for ended trials if that is more: replays are not charged again."""
    elapsed_s: float
    trials_s: float
    """Seconds since the trials were started: the time that the done part of the work took."""
    results: tuple[str, ...] = ()
    """The last results, one line each."""

    @property
    def share(self) -> float:
        """Share of the work that is done; an ended trial counts as `TRIAL_IN_REQUESTS` further requests."""
        done = self.done_requests + TRIAL_IN_REQUESTS * self.ended
        return min(1.0, done / max(1, self.requests + TRIAL_IN_REQUESTS * self.trials))

    @property
    def left_s(self) -> float | None:
        """Estimated seconds left; None without a basis for an estimate."""
        if self.ended == self.trials:
            return 0.0
        if self.ended < MIN_ENDED or self.share < MIN_SHARE:
            return None
        return self.trials_s * (1 - self.share) / self.share

    @property
    def line(self) -> str:
        """One line of text."""
        counts = f"{self.ended}/{self.trials} trials   {self.done_requests:,}/{self.requests:,} requests   "
        left = "" if self.left_s is None or self.ended == self.trials else f"   about {clock(self.left_s)} left"
        stage = f"   {self.stage}" if self.ended < self.trials else ""
        return f"{counts}{clock(self.elapsed_s)} gone{left}{stage}"


class Display(Protocol):
    """Shows states as they change."""

    def show(self, state: State) -> None:
        """Show a state; called every second."""

    def close(self, state: State | None) -> None:
        """End, and leave the last state, if there is one, on the screen."""


class Progress:
    """Counts ended trials and charged requests, and shows them every second.

    Args:
        requests: predicted requests of each trial.
        ledger: the run's ledger.
        account: its account of the sweep.
    """

    def __init__(self, requests: Sequence[int], ledger: Ledger, account: str) -> None:
        self.requests, self.ledger, self.account = list(requests), ledger, account
        self.stage = STARTING
        self.beat: Callable[[float | None], None] = lambda left_s: None
        """Called every second with the seconds left, None while they are unknown."""
        self._ended, self._ended_requests, self._results = 0, 0, deque[str](maxlen=LAST_RESULTS)
        self._began = self._trials_since = time.monotonic()
        self._charged_now, self._next_read = 0, 0.0
        self._first = self._charged()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        self._display = display()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the display; its last state stays on the screen if trials were started."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._display.close(self.state() if self.stage in (ENCODING, FITTING) else None)

    def start_trials(self) -> None:
        """Say that trials are running: the time from now on is the basis of estimates."""
        self.stage, self._trials_since = ENCODING, time.monotonic()

    def ended(self, predicted_requests: int, rows: Sequence[ResultRow]) -> None:
        """Count a trial that ended, and note its result."""
        self._ended += 1
        self._ended_requests += predicted_requests
        self._results.extend(result(row) for row in rows[:1])

    def state(self) -> State:
        """Return the present state."""
        charged = self._charged() - self._first
        if self.stage == ENCODING and (charged or self._ended):
            self.stage = FITTING
        done = min(sum(self.requests), max(charged, self._ended_requests))
        now, counts = time.monotonic(), (len(self.requests), self._ended, sum(self.requests), done)
        return State(self.stage, *counts, now - self._began, now - self._trials_since, tuple(self._results))

    def _charged(self) -> int:
        """Return all requests charged to the account; read again when that takes at most a hundredth of the time."""
        began = time.monotonic()
        if began >= self._next_read:
            with contextlib.suppress(LedgerError):  # the trials fail on a damaged ledger and report it
                accounts = self.ledger.accounts()
                self._charged_now = next((a.charged.requests for a in accounts if a.name == self.account), 0)
            self._next_read = began + 100 * (time.monotonic() - began)
        return self._charged_now

    def _loop(self) -> None:
        while True:
            state = self.state()
            self.beat(state.left_s)
            self._display.show(state)
            if self._stop.wait(1.0):
                return


class Lines:
    """Prints a line on standard error every ten seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 10

    def show(self, state: State) -> None:
        """Print a state if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 10
            print(state.line, file=sys.stderr, flush=True)

    def close(self, state: State | None) -> None:
        """Print the last state."""
        if state is not None:
            print(state.line, file=sys.stderr, flush=True)


def display() -> Display:
    """Return the live display on a terminal, and `Lines` elsewhere."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from pipeline.sweep.live import Live  # imports rich

        return Live()
    return Lines()


def result(row: ResultRow) -> str:
    """Return a trial's result as a line."""
    what = f"{row.method} on {row.test_set}, {row.shots} shot{'s' * (row.shots > 1)}, seed {row.seed}"
    score = STATUSES[row.status] if row.accuracy is None else f"{row.accuracy:.1f}%"
    return f"{what}: {score}, {row.requests:,} requests"


def clock(seconds: float) -> str:
    """Format seconds as 3:07 or 1:02:45."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
