"""A figure with the interval by which a claim is judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from pipeline.results.stats import student


class Measured(NamedTuple):
    """A figure with the interval that counts: Student's 95 % over seeds, or the least and greatest of repetitions."""

    value: float
    low: float | None
    """None where there is one value alone."""
    high: float | None
    unit: str = "points"

    @classmethod
    def over_seeds(cls, values: Iterable[float], unit: str = "points") -> Measured:
        """Mean and Student's 95 % interval; nan of nothing."""
        mean, half = student(values)
        if mean is None:
            return cls(math.nan, None, None, unit)
        return cls(mean, None if half is None else mean - half, None if half is None else mean + half, unit)

    @classmethod
    def of_runs(cls, values: Sequence[float], unit: str) -> Measured:
        """Median, least and greatest."""
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
    """Several figures in a line, as in "4: 44.3, 16: 44.1"."""
    return ", ".join(f"{label}: {value:.{digits}f}" for label, value in values.items())
