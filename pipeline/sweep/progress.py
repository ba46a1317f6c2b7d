"""The progress of a running sweep: its stage, ended trials, requests, encoded images, last results, time left."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

from pipeline.budget import paid
from pipeline.errors import LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.results.row import ResultRow
from pipeline.sweep.images_left import ImagesLeft
from pipeline.sweep.run_state import ENCODING, FITTING, STARTING, State, result
from pipeline.sweep.time_left import Left, TimeLeft, Work
from pipeline.trials.plan import TrialSpec

LAST_RESULTS = 5
"""Results that are shown."""
RECENT_S = 60.0
"""Seconds after which images that were encoded no longer make it the stage of encoding: a replica stores them late."""


class Display(Protocol):
    """Shows states as they change."""

    def show(self, state: State) -> None:
        """Show a state; called every second."""

    def close(self, state: State | None) -> None:
        """End, and leave the last state, if there is one, on the screen."""


class Progress:
    """Counts ended trials, charged requests and encoded images, and shows them every second.

    Args:
        trials: the trials of the run.
        ledger: the run's ledger.
        storage_id: the storage of the trials in it.
        starts: start time (`time.monotonic`) of each running trial by index; the caller updates it.
    """

    def __init__(
        self, trials: Sequence[TrialSpec], ledger: Ledger, storage_id: str, starts: Mapping[int, float]
    ) -> None:
        self.trials, self.ledger, self.storage_id, self.starts = trials, ledger, storage_id, starts
        self.stage = STARTING
        self.beat: Callable[[float | None], None] = lambda left_s: None
        """Called every second with the seconds left, None while they are unknown."""
        self._index = {spec.trial_id: i for i, spec in enumerate(trials)}
        before = {t.trial: paid(t.bills).requests for t in ledger.trials(storage_id)}
        self._done = [min(before.get(spec.account, 0), spec.predicted.requests) for spec in trials]
        self._n_done, self._n_ended, self._n_requests = sum(self._done), 0, sum(t.predicted.requests for t in trials)
        self._results = deque[str](maxlen=LAST_RESULTS)
        self._began, self._next_read = time.monotonic(), 0.0
        self._images: ImagesLeft | None = None
        self._encoded, self._encoded_at, self._charging = 0, float("-inf"), False
        self._time_left: TimeLeft | None = None
        self._lock = threading.Lock()  # trials end in another thread
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
            if self._images is not None:
                self._images.stop()
            self._display.close(self.state() if self.stage in (ENCODING, FITTING) else None)

    def start_trials(self, images: ImagesLeft) -> None:
        """Say that trials are running, and count the images that are left with `images`."""
        works = [Work(t.choice.name, t.predicted.requests, n) for t, n in zip(self.trials, self._done, strict=True)]
        self._images, self._time_left, self.stage = images, TimeLeft(works, time.monotonic()), ENCODING
        images.start()

    def ended(self, spec: TrialSpec, rows: Sequence[ResultRow]) -> None:
        """Count a trial that ended, and note its result."""
        index, now = self._index[spec.trial_id], time.monotonic()
        with self._lock:
            self._count(index, spec.predicted.requests)
            self._n_ended += 1
            if self._time_left is not None:
                self._time_left.ended(index, self.starts.get(index, now), now)
        if self._images is not None:
            self._images.ended(spec)
        self._results.extend(result(row) for row in rows[:1])

    def state(self) -> State:
        """Return the present state."""
        now, starts = time.monotonic(), dict(self.starts)
        charged = self._charges(starts)
        total, images_left = (self._images.total, self._images.left) if self._images else (0, None)
        with self._lock:
            for index, requests in charged.items():
                self._count(index, requests)
            left = Left(None, False)
            if self._time_left is not None:
                self._time_left.observe(now, starts, charged, images_left)
                left = self._time_left.left()
        encoded = total - (images_left or 0)
        if encoded > self._encoded:
            self._encoded, self._encoded_at = encoded, now
        if self.stage in (ENCODING, FITTING):
            encoding = images_left != 0 and (not self._charging or now < self._encoded_at + RECENT_S)
            self.stage = ENCODING if encoding else FITTING
        counts = (len(self.trials), self._n_ended, self._n_requests, self._n_done)
        images, results = (total, encoded), tuple(self._results)
        return State(self.stage, *counts, now - self._began, *images, left.seconds, not left.whole, results)

    def _count(self, index: int, charged: int) -> None:
        """Count requests of a trial as done. Those that an earlier run charged are, from the start."""
        done = min(charged, self.trials[index].predicted.requests)
        self._charging = self._charging or charged > self._done[index]
        self._n_done += max(0, done - self._done[index])
        self._done[index] = max(done, self._done[index])

    def _charges(self, running: Mapping[int, float]) -> dict[int, int]:
        """Return the charged requests of running trials; none if reading took more than a hundredth of the time."""
        began, charged = time.monotonic(), dict[int, int]()
        if began >= self._next_read:
            with contextlib.suppress(LedgerError):  # the trials fail on a damaged ledger and report it
                for index in running:
                    bills = self.ledger.trial_bill(self.storage_id, self.trials[index].account)
                    charged[index] = paid(bills).requests
            self._next_read = began + 100 * (time.monotonic() - began)
        return charged

    def _loop(self) -> None:
        while True:
            state = self.state()
            self.beat(None if state.more else state.left_s)
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
