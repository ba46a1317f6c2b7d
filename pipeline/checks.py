"""Checks of a configuration's values: each returns the value as its type, or raises ConfigError naming the key."""

from __future__ import annotations

from typing import Any, TypeVar

from pipeline.blackbox.bill import Limits
from pipeline.errors import ConfigError, did_you_mean

T = TypeVar("T")


def whole(key: str, value: Any, minimum: int = 1) -> int:
    """A whole number of `minimum` or more; true, 1.0 and 1e3 are none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{key}={value}: expected a whole number of {minimum} or more")
    return value


def limit(key: str, value: Any) -> int | None:
    """A whole number of 1 or more, or null for no limit."""
    return None if value is None else whole(key, value)


def auto(key: str, value: Any) -> int | str:
    """A whole number of 1 or more, or 'auto'."""
    return "auto" if value == "auto" else whole(key, value)


def seconds(key: str, value: Any) -> float:
    """A finite number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"{key}={value}: expected a number of seconds, 0 or more")
    return float(value)


def flag(key: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value}: expected true or false")
    return value


def text(key: str, value: Any) -> str:
    """A name or a path; a number is taken as its digits."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or value == "":
        raise ConfigError(f"{key}={value}: expected a name or a path")
    return str(value)


def maybe_text(key: str, value: Any) -> str | None:
    """A name or a path, or null."""
    return None if value is None else text(key, value)


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ConfigError(f"{key}: " + did_you_mean("choice", str(value), allowed))
    return str(value)


def words(key: str, value: Any) -> tuple[str, ...]:
    """One name or a list of different ones."""
    return _different(key, [str(v) for v in _as_list(value)])


def numbers(key: str, value: Any, minimum: int = 1) -> tuple[int, ...]:
    """One whole number or a list of different ones."""
    return _different(key, [whole(key, v, minimum) for v in _as_list(value)])


def allotments(requests: Any, images: Any) -> tuple[Limits, ...]:
    """One allotment; or, where requests or images is a list, one for each point of either list."""
    if not isinstance(requests, list) and not isinstance(images, list):
        return (Limits(limit("budget.requests", requests), limit("budget.images", images)),)
    points = [Limits(requests=limit("budget.requests", r)) for r in ([] if requests is None else _as_list(requests))]
    points += [Limits(images=limit("budget.images", i)) for i in ([] if images is None else _as_list(images))]
    if not points:
        raise ConfigError("budget.requests and budget.images are empty lists: give at least one point, or null")
    return tuple(dict.fromkeys(points))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _different(key: str, values: list[T]) -> tuple[T, ...]:
    if not values:
        raise ConfigError(f"{key}=[]: expected at least one")
    repeated = [v for v in values if values.count(v) > 1]
    if repeated:
        raise ConfigError(f"{key}: {repeated[0]!r} is listed twice")
    return tuple(values)
