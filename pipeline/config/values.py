"""Check the values of a configuration.

Each function returns the value with its type, or raises ConfigError with the key in its message.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pipeline.budget import LIMITED_UNITS, Limits
from pipeline.cards import MICRO
from pipeline.config.plain_yaml import NUMBER
from pipeline.errors import ConfigError, did_you_mean, masked
from pipeline.ledger.sqlite_file import sqlite_file
from pipeline.untrusted import read_text, text_problem

T = TypeVar("T")

LARGEST = 2**63 - 1
"""Largest integer that fits in a database column and in a seed."""
TRACKING_SCHEMES = frozenset(
    {"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc"}
)
"""Schemes of tracking URIs that MLflow supports without a plugin, apart from plain files."""
LONGEST_NAME = 200
"""Maximum length of a card's name in bytes, percent-encoded, as it is part of file names."""


def whole(key: str, value: Any, minimum: int = 1) -> int:
    """Return an integer from `minimum` to 2**63 - 1. Booleans and floats are rejected."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{key}={value}: expected a whole number of {minimum} or more{_hint(value)}")
    if value > LARGEST:
        raise ConfigError(f"{key}={value}: expected a whole number of at most {LARGEST:,}")
    return value


def _hint(value: Any) -> str:
    """Return what to type instead of text that is a number or a range in other notations."""
    if not isinstance(value, str):
        return ""
    if match := re.fullmatch(r"0+([0-9]{1,18})", value):
        return f" without leading zeros: type {int(match[1])}"
    if match := re.fullmatch(r"([0-9]{1,9})(?::|-|\.\.)([0-9]{1,9})", value):
        first, last = int(match[1]), int(match[2])
        several = range(first, last + 1) if last - first < 10 else (first, "...", last)
        return f"; for a range type {','.join(map(str, several))}" if first < last else ""
    return ", without quotes" if re.fullmatch("0|[1-9][0-9]*", value) else ", in decimal digits"


def limit(key: str, value: Any) -> int | None:
    """Return an integer of 1 or more, or None for no limit."""
    return None if value is None else whole(key, value)


def limits(key: str, values: Mapping[str, Any]) -> Limits:
    """Return the limits under a key in `requests` and `images`."""
    return Limits(*(limit(f"{key}.{unit}", values[unit]) for unit in LIMITED_UNITS))


def dollars(key: str, value: Any) -> int | None:
    """Return an amount of US dollars in micro-dollars, or None for no limit."""
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"(0|[1-9][0-9]{0,9})(\.[0-9]{1,6})?", text):
        raise ConfigError(f"{key}={text[:40]}: expected an amount of dollars as 12.50, with at most six decimals")
    whole, _, decimals = text.partition(".")
    return int(whole) * MICRO + int(decimals.ljust(6, "0"))


def tracking_uri(key: str, value: str) -> str:
    """Return the URI of an MLflow database or server. MLflow no longer writes to plain files."""
    scheme = value.partition(":")[0].partition("+")[0].lower()
    if scheme == "file" or ("://" not in value and scheme not in TRACKING_SCHEMES):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
            return value
        folder = Path(unquote(urlsplit(value).path)).absolute()
        raise ConfigError(
            f"{key}={value}: MLflow no longer keeps runs in a folder: name a database or a server, as in "
            f"{key}=sqlite:///{folder / 'mlflow.db'} or {key}=http://HOST:5000"
        )
    if scheme not in TRACKING_SCHEMES:
        known = TRACKING_SCHEMES | {entry.name for entry in entry_points(group="mlflow.tracking_store")}
        if scheme not in known:
            raise ConfigError(f"{key}={masked(value)}: " + did_you_mean("kind of tracking URI", scheme, known))
    if scheme == "sqlite" and sqlite_file(value) is None:
        raise ConfigError(f"{key}={value}: expected a file, as in {key}=sqlite:////LOCAL/mlflow.db")
    return value


def auto(key: str, value: Any) -> int | str:
    """Return an integer of 1 or more, or 'auto'."""
    return "auto" if value == "auto" else whole(key, value)


def gpu_share(key: str, value: Any) -> float | str:
    """Return a number above 0 and up to 1, or 'auto'."""
    if value == "auto":
        return "auto"
    if not 0 < (share := number(key, value)) <= 1:
        raise ConfigError(f"{key}={value}: expected auto, or a number above 0 and up to 1, as a replica uses one GPU")
    return share


def number(key: str, value: Any) -> float:
    """Return a finite number. Text such as 1e3 or 0.50 is converted."""
    converted = float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value
    if isinstance(converted, bool) or not isinstance(converted, int | float) or not math.isfinite(converted):
        raise ConfigError(f"{key}={value}: expected a finite number in decimal digits")
    return float(converted)


def seconds(key: str, value: Any) -> float:
    """Return a finite number of 0 or more."""
    try:
        n_seconds = number(key, value)
    except ConfigError:
        n_seconds = -1.0
    if n_seconds < 0:
        raise ConfigError(f"{key}={value}: expected a number of seconds, 0 or more")
    return n_seconds


def flag(key: str, value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value}: expected true or false")
    return value


def text(key: str, value: Any) -> str:
    """Return a name or a path of one line. A number is converted to its digits."""
    if value is None or isinstance(value, bool):
        raise ConfigError(f"{key}={value}: expected a name or a path (as a name, write it in quotes)")
    if not isinstance(value, str | int | float) or value == "":
        raise ConfigError(f"{key}={value}: expected a name or a path")
    if problem := text_problem(str(value)):
        raise ConfigError(f"{key}: {ascii(value)[:80]} has {problem}")
    return str(value)


def card_name(key: str, value: Any) -> str:
    """Return the name of a card: printable text of at most 200 bytes as a file name."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ConfigError(f"{key}: {value!r}: expected text without control characters, as in name: pets")
    if len(quote(value, safe="")) > LONGEST_NAME:
        raise ConfigError(f"{key}: {value[:40]!r}... is too long: its file name would exceed {LONGEST_NAME} bytes")
    if value != value.strip() or value == "all":
        raise ConfigError(f"{key}: {value!r}: expected a name without spaces around it, and other than 'all'")
    return value


def lines(key: str, path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 text file, one name each. Empty lines at its end are ignored.

    Raises:
        ConfigError: The file cannot be read, has no name, or has an empty line between others.
    """
    try:
        content = [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path).rstrip())]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error}): expected one name a line") from error
    if "" in content:
        where = f"line {content.index('') + 1} of {path} is empty" if any(content) else f"{path} is empty"
        raise ConfigError(f"{key}: {where}: expected one name a line")
    return tuple(text(f"{key}: {path}", line) for line in content)


def maybe_text(key: str, value: Any) -> str | None:
    """Return a name or a path, or None."""
    return None if value is None else text(key, value)


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return the value if it is one of the allowed ones."""
    if value not in allowed:
        raise ConfigError(f"{key}: " + did_you_mean("choice", str(value), allowed))
    return str(value)


def name_list(key: str, value: Any) -> tuple[str, ...]:
    """Return the names of a list without repetitions, or of one name."""
    return _different(key, [text(key, v) for v in _as_list(value)])


def maybe_names(key: str, value: Any) -> tuple[str, ...]:
    """Return the names as `name_list` does; none for null and for an empty list."""
    return () if value in (None, []) else name_list(key, value)


def flag_or_names(key: str, value: Any) -> bool | tuple[str, ...]:
    """Return true or false, or the names of a list without repetitions."""
    if isinstance(value, list):
        return name_list(key, value)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value}: expected true or false, or a list of names")
    return value


def numbers(key: str, value: Any, minimum: int = 1) -> tuple[int, ...]:
    """Return the integers of a list without repetitions, or of one integer."""
    return _different(key, [whole(key, v, minimum) for v in _as_list(value)])


def shots(key: str, value: Any) -> tuple[tuple[int, ...], bool]:
    """Return numbers of labelled images per class, and whether the draw is imbalanced: then 16 in the mean."""
    if value == "imbalanced":
        return (16,), True
    words = [word for word in _as_list(value) if isinstance(word, str) and word.isalpha()]
    if words:
        raise ConfigError(f"{key}={words[0]}: expected a whole number of 1 or more, or {key}=imbalanced alone")
    return numbers(key, value), False


def limit_list(key: str, value: Any) -> tuple[int | None, ...]:
    """Return the limits of a list without repetitions, or of one value; null is no limit."""
    return _different(key, [limit(key, v) for v in _as_list(value)])


def allotments(budget: Mapping[str, Any], key: str = "budget") -> tuple[Limits, ...]:
    """Return the allotments under a key: every combination where requests or images is a list."""
    lists = (limit_list(f"{key}.{unit}", budget[unit]) for unit in LIMITED_UNITS)
    return tuple(Limits(*both) for both in product(*lists))


def further_allotments(key: str, value: Any, budget: Mapping[str, Any]) -> tuple[Limits, ...]:
    """Return the further allotments of a method: requests, or requests and images; a missing unit is as in `budget`."""
    own = value if isinstance(value, dict) else {"requests": value}
    for unit in own:
        one_of(key, unit, LIMITED_UNITS)
    return allotments({unit: budget[unit] for unit in LIMITED_UNITS} | own, key)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _different(key: str, values: list[T]) -> tuple[T, ...]:
    if not values:
        raise ConfigError(f"{key}=[]: expected at least one")
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{key}: {value!r} is listed twice")
    return tuple(values)
