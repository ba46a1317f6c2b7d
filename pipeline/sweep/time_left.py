"""Estimate the time that a run still takes, from the work that is left and the rates observed so far.

The time of a trial has two parts: seconds for each request, which are observed between its charges, and seconds beside
them (its start and the evaluation), which are those of ended trials. Both are kept by method. Time in which images are
encoded has a rate of its own and counts for neither, since images are encoded once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MIN_RATE_S = 5.0
"""Observed seconds that a rate needs."""
MIN_ENDED = 3
"""Ended trials of a method that are a basis without a rate, such as trials too short to observe one."""


class Work(NamedTuple):
    """A trial of the run: its method, its predicted requests, and how many of them were charged before the run."""

    method: str
    requests: int
    charged: int = 0


class Left(NamedTuple):
    """Seconds that the work left takes; None without a basis for any of it."""

    seconds: float | None
    whole: bool
    """Whether the basis covers all of it; else it takes longer."""


@dataclass
class _Rate:
    seconds: float = 0.0
    count: int = 0

    @property
    def each(self) -> float | None:
        """Seconds of one; None without a basis."""
        return self.seconds / self.count if self.count and self.seconds >= MIN_RATE_S else None


@dataclass
class _Ended:
    """Ended trials of a method, without those that started before any trial had ended: these started their workers."""

    seconds: float = 0.0
    count: int = 0
    largest: int = 0


@dataclass
class _Waiting:
    """Trials that have not started, of one method and one number of requests."""

    count: int = 0
    requests: int = 0
    """Requests that they have left."""


@dataclass
class _Running:
    start: float
    charged: int
    at: float
    seconds: float = 0.0
    fit_s: float = 0.0
    """The part of `seconds` in which its charges were observed."""
    paying: bool = False
    """Whether it made a new charge. Before the first it starts, or replays calls that are paid."""


class TimeLeft:
    """The estimate of one run.

    Args:
        trials: its trials.
        now: a time in seconds, like every `now` and start below.
    """

    def __init__(self, trials: Sequence[Work], now: float) -> None:
        self.trials = trials
        self.images: int | None = None
        self._at, self._first_end, self._news = now, float("inf"), False
        self._busy, self._wall, self._over = 0.0, 0.0, set[int]()
        self._encoding, self._rates = _Rate(), defaultdict[str, _Rate](_Rate)
        self._ended, self._running = defaultdict[str, _Ended](_Ended), dict[int, _Running]()
        self._waiting = defaultdict[tuple[str, int], _Waiting](_Waiting)
        for work in trials:
            self._wait(work, 1)

    def observe(self, now: float, starts: Mapping[int, float], charged: Mapping[int, int], images: int | None) -> None:
        """Take in the state of the run. Time without any event belongs to the event that ends it.

        Args:
            now: the time.
            starts: start of each running trial, by index.
            charged: requests charged so far of running trials, where they are known.
            images: number of images that are still to be encoded; None while they are not counted.
        """
        for index in self._running.keys() - starts.keys():  # they lost all of their workers
            self._leave(index)
        running = {index: self._known(index, start) for index, start in starts.items() if index not in self._over}
        encoded = (self.images or 0) - (images or 0) if self.images is not None else 0
        self.images = images
        self._news = self._news or any(charged.get(i, trial.charged) > trial.charged for i, trial in running.items())
        if images != 0 and encoded <= 0 and not self._news:
            return
        if encoded > 0:
            self._encoding.seconds += now - self._at
            self._encoding.count += encoded
        elif self._busy or starts:
            self._wall += now - self._at
        for index, trial in running.items():
            self._advance(index, trial, now, charged.get(index, trial.charged), encoded <= 0)
        self._at, self._news = now, False

    def ended(self, index: int, start: float, now: float) -> None:
        """Take in the end of a trial."""
        if index in self._over:
            return
        work, trial = self.trials[index], self._known(index, start)
        self._advance(index, trial, now, max(work.requests, trial.charged), True)
        self._leave(index)
        if trial.start >= self._first_end:
            ended = self._ended[work.method]
            ended.seconds += trial.seconds - trial.fit_s
            ended.count += 1
            ended.largest = max(ended.largest, work.requests)
        self._first_end = min(self._first_end, now)
        self._news = True

    def left(self) -> Left:
        """Return the estimate."""
        if len(self._over) == len(self.trials):
            return Left(0.0, True)
        works = [(*group, waiting.requests, waiting.count) for group, waiting in self._waiting.items() if waiting.count]
        for index, trial in self._running.items():
            work = self.trials[index]
            works.append((work.method, work.requests, max(0, work.requests - trial.charged), 1))
        times = [self._seconds(method, requests, left / n) for method, requests, left, n in works]
        known = [(s, n) for s, (*_, n) in zip(times, works, strict=True) if s is not None]
        if not known or not self._wall:
            return Left(None, False)
        at_once, image_s = self._busy / self._wall, self._encoding.each
        seconds = max(sum(s * n for s, n in known) / at_once, max(s for s, _ in known))
        whole = len(known) == len(works) and (self.images == 0 or None not in (self.images, image_s))
        return Left(seconds + (self.images or 0) * (image_s or 0.0), whole)

    def _seconds(self, method: str, requests: int, left: float) -> float | None:
        """Return the seconds of a trial with this method that predicts `requests` and has `left` of them to make."""
        each, ended = self._rates[method].each, self._ended[method]
        beside = ended.seconds / ended.count if ended.count else None
        if each is not None:
            return left * each + (beside or 0.0)
        if beside is None or ended.count < MIN_ENDED or requests > 2 * ended.largest:
            return None
        return beside * (left / requests if requests else 1.0)

    def _wait(self, work: Work, n: int) -> None:
        group = self._waiting[work.method, work.requests]
        group.count += n
        group.requests += n * max(0, work.requests - work.charged)

    def _known(self, index: int, start: float) -> _Running:
        """Return a running trial, which no longer waits."""
        if index not in self._running:
            work = self.trials[index]
            self._wait(work, -1)
            self._running[index] = _Running(start, work.charged, start)
        return self._running[index]

    def _leave(self, index: int) -> None:
        """Take in that a trial no longer runs."""
        del self._running[index]
        self._over.add(index)

    def _advance(self, index: int, trial: _Running, now: float, charged: int, timed: bool) -> None:
        """Add the time since the trial was last looked at, unless images were encoded in it, and its charges."""
        work, elapsed, new = self.trials[index], now - trial.at, charged - trial.charged
        if timed:
            trial.seconds += elapsed
            self._busy += elapsed
            if trial.paying and trial.charged < work.requests:
                trial.fit_s += elapsed
                rate = self._rates[work.method]
                rate.seconds, rate.count = rate.seconds + elapsed, rate.count + new
        trial.paying = trial.paying or new > 0
        trial.at, trial.charged = now, charged
