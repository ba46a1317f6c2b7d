"""The key `tune` of a method's file: which settings a tuned method tries, and what share of its allotment pays for it.

docs/tuning.md describes the keys; `pipeline/trials/tuning.py` searches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import values as checks
from pipeline.errors import ConfigError, did_you_mean

SAMPLERS = ("grid", "random", "halving")
DEFAULTS: dict[str, Any] = {"space": {}, "sampler": "random", "trials": None, "share": 0.5}
"""Keys of `tune`."""


@dataclass(frozen=True)
class Tuning:
    """A search space and how it is searched."""

    space: tuple[tuple[str, tuple[Any, ...]], ...]
    """Each setting with its values, at least one."""
    sampler: str
    """grid, random or halving."""
    trials: int
    """Number of settings tried, the method's own ones included."""
    share: float
    """Part of the allotment for the search, above 0 and below 1."""


def tuning_of(
    where: str,
    file: Any,
    overrides: Any,
    own: Mapping[str, Any],
    typed: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Tuning:
    """Check the key `tune` and return it with typed values.

    Args:
        where: Name of the key in messages, such as "method.craft@tuned.tune".
        file: Content of the key in the method's file.
        overrides: What replaces it, key by key and, in the space, setting by setting.
        own: The method's own settings; they are tried first.
        typed: Converts settings to the types of the method's `Config`. Raises ConfigError.

    Raises:
        ConfigError: An unknown key or setting, a value of the wrong type, or a number of trials that the space has not.
    """
    values, space = dict(DEFAULTS), list[tuple[str, tuple[Any, ...]]]()
    for layer in (_mapping(where, file), _mapping(where, overrides)):
        for key in layer:
            if key not in DEFAULTS:
                raise ConfigError(f"{where}: " + did_you_mean("key", key, DEFAULTS))
        changed = _mapping(f"{where}.space", layer.get("space"))
        if changed == layer.get("space") == {} and values["space"]:
            raise ConfigError(f"{where}.space: expected settings; {where}.space.SETTING=null leaves one out")
        space_of = values["space"] | changed
        values |= layer | {"space": {setting: some for setting, some in space_of.items() if some is not None}}
    if not values["space"]:
        raise ConfigError(f"{where}.space: expected at least one setting, as in space: {{lr: [0.001, 0.01]}}")
    for setting, some in values["space"].items():
        if not isinstance(some, list) or not some:
            raise ConfigError(f"{where}.space.{setting}={some}: expected a list of values, as in [0.1, 1.0]")
        choices = tuple(typed({setting: value})[setting] for value in some)
        if len(set(choices)) < len(choices):
            raise ConfigError(f"{where}.space.{setting}={some}: a value is listed twice")
        space.append((setting, choices))
    sampler = checks.one_of(f"{where}.sampler", values["sampler"], SAMPLERS)
    share = checks.number(f"{where}.share", values["share"])
    if not 0 < share < 1:
        raise ConfigError(f"{where}.share={values['share']}: expected a number above 0 and below 1")
    return Tuning(tuple(space), sampler, _trials(where, sampler, values["trials"], space, own), share)


def _mapping(key: str, value: Any) -> dict[str, Any]:
    """Return keys and values; none for null."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value}: expected keys under it, as in {key}.KEY=VALUE")
    return dict(value or {})


def _trials(
    where: str, sampler: str, value: Any, space: Sequence[tuple[str, tuple[Any, ...]]], own: Mapping[str, Any]
) -> int:
    """Return the number of settings tried."""
    listed = all(own[setting] in choices for setting, choices in space)
    size = math.prod(len(choices) for _, choices in space) + (not listed)
    if sampler == "grid":
        if value not in (None, size):
            raise ConfigError(
                f"{where}.trials={value}: sampler grid tries all {size} settings (the method's own ones included): "
                "leave trials out, or set sampler=random"
            )
        return size
    trials = checks.whole(f"{where}.trials", min(8, size) if value is None else value)
    if trials > size:
        raise ConfigError(
            f"{where}.trials={trials}: expected at most {size}, the method's own settings and the space's"
        )
    return trials
