"""What is known about a run at one moment, and the estimate of the time left."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.results.row import STATUSES, ResultRow

STARTING, LOADING, ENCODING, FITTING = "starting Ray", "loading the model", "encoding images", "fitting"
"""Stages of a run, in this order. While images are encoded again later, the stage is the third again."""

LOWER_BOUND_S = 300.0
"""A lower bound of the time left is shown from here on; a smaller one says little."""


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
    """Predicted requests of ended trials, and charged requests of the others, in this run or before."""
    elapsed_s: float
    images: int = 0
    """Images to encode when the run started."""
    encoded: int = 0
    """Number of them that are encoded."""
    left_s: float | None = None
    """Estimated seconds left; None without a basis for an estimate."""
    more: bool = False
    """Whether it takes longer than that, as there is no basis for a part of the work."""
    results: tuple[str, ...] = ()
    """The last results, one line each."""

    @property
    def share(self) -> float:
        """Share of the run that is done: of its time if that is known, else of its requests and trials."""
        if self.left_s is not None and not self.more:
            return self.elapsed_s / max(1e-9, self.elapsed_s + self.left_s)
        return min(1.0, (self.done_requests + self.ended) / max(1, self.requests + self.trials))

    @property
    def line(self) -> str:
        """One line of text."""
        counts = f"{self.ended}/{self.trials} trials   {self.done_requests:,}/{self.requests:,} requests   "
        if self.ended == self.trials:
            return f"{counts}{clock(self.elapsed_s)} gone"
        left = ""
        if self.left_s is not None and (not self.more or self.left_s >= LOWER_BOUND_S):
            left = f"   {'more than' if self.more else 'about'} {clock(self.left_s)} left"
        images = f" {self.encoded:,}/{self.images:,}" if self.stage == ENCODING and self.images else ""
        return f"{counts}{clock(self.elapsed_s)} gone{left}   {self.stage}{images}"


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
