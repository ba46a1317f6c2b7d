"""Spread of an estimate over seeds: its confidence interval if there is one (`standing.over_seeds`), else the range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Spread of a mean over seeds."""

    low: float
    high: float
    is_interval: bool
    """True: 95% confidence interval. False: smallest and largest value."""


def spread(record: Mapping[str, Any], name: str) -> Spread | None:
    """Return the spread of a column of the leaderboard, e.g. `accuracy`; None for fewer than two seeds.

    Args:
        record: A record of the leaderboard.
        name: The column of the mean; `NAME_ci95` holds the half-width of its interval, `NAME_min` and
            `NAME_max` the range.
    """
    mean, half_width = record.get(name), record.get(f"{name}_ci95")
    seeds = record.get(f"{name}_pairs", record.get("seeds")) or 0
    if mean is None or seeds < 2:
        return None
    if half_width is not None:
        return Spread(mean - half_width, mean + half_width, True)
    low, high = record.get(f"{name}_min"), record.get(f"{name}_max")
    return None if low is None or high is None else Spread(low, high, False)


def estimate(record: Mapping[str, Any], name: str, sign: str = "") -> str:
    """Return a mean with its spread: '57.8 ± 1.2', for two seeds '57.8 (56.1 to 59.5)', for one '57.8'; else '-'."""
    mean, around = record.get(name), spread(record, name)
    if mean is None:
        return "-"
    if around is None:
        return f"{mean:{sign}.1f}"
    if around.is_interval:
        return f"{mean:{sign}.1f} ± {around.high - mean:.1f}"
    if f"{around.low:.1f}" == f"{around.high:.1f}":
        return f"{mean:{sign}.1f}"
    return f"{mean:{sign}.1f} ({around.low:{sign}.1f} to {around.high:{sign}.1f})"


def excludes_zero(record: Mapping[str, Any], name: str) -> bool:
    """Return whether the mean has a 95% confidence interval that does not contain 0."""
    around = spread(record, name)
    return around is not None and around.is_interval and (around.low > 0 or around.high < 0)
