"""Statistics of the leaderboard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.special import stdtrit


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    numbers = [v for v in values if v is not None]
    return float(np.mean(numbers)) if numbers else None


def mean_ci95(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Return the mean and the half-width of its 95% CI (Student's t); the latter is None for fewer than two values."""
    x = np.asarray(list(values), dtype=np.float64)
    if len(x) < 2:
        return mean_or_none(x), None
    return float(x.mean()), float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / np.sqrt(len(x)))


def harmonic(a: float, b: float) -> float:
    """Return the harmonic mean of two non-negative numbers; 0 if one of them is 0."""
    return 2 * a * b / (a + b) if a and b else 0.0


def resampled_means(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Return bootstrap means [resamples] of `values` [N].

    A resample is drawn as a multinomial over the distinct values, which is fast as differences of correctness have few.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return np.asarray(draws @ distinct / len(values))


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the ranks [..., K] of values [..., K], 1 for the highest; equal values share the mean of their ranks."""
    x = np.asarray(values, dtype=np.float64)
    better, equal = ((x[..., None, :] > x[..., :, None]).sum(-1), (x[..., None, :] == x[..., :, None]).sum(-1))
    return np.asarray(better + (equal + 1) / 2)
