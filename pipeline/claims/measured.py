"""A measured value with the interval from which a verdict is derived."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from pipeline.results.stats import mean_ci95


class Measured(NamedTuple):
    """A value with an interval: the 95% CI (t) over seeds, or the smallest and largest of repeated measurements."""

    value: float
    low: float | None
    """Lower end; None for a single value."""
    high: float | None
    """Upper end; None for a single value."""
    unit: str = "points"

    @classmethod
    def over_seeds(cls, values: Iterable[float], unit: str = "points") -> Measured:
        """Return the mean and its 95% CI (t); NaN for no values."""
        mean, ci95 = mean_ci95(values)
        if mean is None:
            return cls(math.nan, None, None, unit)
        return cls(mean, None if ci95 is None else mean - ci95, None if ci95 is None else mean + ci95, unit)

    @classmethod
    def of_runs(cls, values: Sequence[float], unit: str) -> Measured:
        """Return the median, with the smallest and the largest value."""
        return cls(median(values), min(values), max(values), unit)

    def __str__(self) -> str:
        sign = "+" if self.unit == "points" else ""
        digits = 1 if self.unit in ("points", "degrees") else 2
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.{digits}f} {self.unit}"
        return (
            f"{self.value:{sign}.{digits}f} ({self.low:{sign}.{digits}f} to {self.high:{sign}.{digits}f}) {self.unit}"
        )


def each(values: Mapping[str, float], digits: int = 1) -> str:
    """Return several values on one line, e.g. "4: 44.3, 16: 44.1"."""
    return ", ".join(f"{label}: {value:.{digits}f}" for label, value in values.items())
