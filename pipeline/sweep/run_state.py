"""What is known about a run at one moment, and the estimate of the time left."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.results.row import STATUSES, ResultRow

TRIAL_IN_REQUESTS = 100
"""Time that a trial takes beside its requests, as a number of requests; used to estimate the time left."""
MIN_ENDED, MIN_SHARE = 3, 0.05
"""Ended trials and share of the work that an estimate of the time left needs."""
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
