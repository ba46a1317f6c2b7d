"""The progress of a running sweep: its stage, ended trials, charged requests, last results, time left."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from pipeline.errors import LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.results.row import ResultRow
from pipeline.sweep.run_state import ENCODING, FITTING, STARTING, State, result

LAST_RESULTS = 5
"""Results that are shown."""


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
