"""Ranges of settings, which are checked before a trial is planned."""

from __future__ import annotations

from dataclasses import field
from typing import TypeVar

T = TypeVar("T", int, float)


def number(default: T, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None) -> T:
    """Declare a setting of a `Config` with a range of its own.

    Without it an integer is 1 or more and a float is 0 or more, or from a lower default on.

    Args:
        default: Default value.
        at_least: Lowest value.
        above: Value that the setting must exceed.
        at_most: Largest value.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most}
    value: T = field(default=default, metadata={key: n for key, n in limits.items() if n is not None})
    return value
