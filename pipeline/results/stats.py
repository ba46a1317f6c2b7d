"""The statistics of the leaderboard, each checked against worked values in its tests."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.special import stdtrit


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    numbers = [v for v in values if v is not None]
    return float(np.mean(numbers)) if numbers else None


def student(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean, and half of Student's 95 % interval around it (None under two values)."""
    x = np.asarray(list(values), dtype=np.float64)
    if len(x) < 2:
        return mean_or_none(x), None
    return float(x.mean()), float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / np.sqrt(len(x)))


def harmonic(a: float, b: float) -> float:
    """Harmonic mean of two numbers of 0 or more; 0 where one of them is."""
    return 2 * a * b / (a + b) if a and b else 0.0


def resampled_means(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of `values` [N] drawn N times with replacement, [resamples].

    Such a draw is exactly a multinomial over the distinct values, of which differences of right and wrong have few.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return np.asarray(draws @ distinct / len(values))


def ranks(values: Iterable[float]) -> np.ndarray:
    """1 for the highest; equal values share the mean of their ranks."""
    x = np.asarray(list(values), dtype=np.float64)
    better, equal = (x[None, :] > x[:, None]).sum(1), (x[None, :] == x[:, None]).sum(1)
    return np.asarray(better + (equal + 1) / 2)
