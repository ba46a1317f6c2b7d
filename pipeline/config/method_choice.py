"""Resolve a method's name to a registered method and its hyperparameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from methods import all_methods
from methods.base import Method, MethodInfo
from pipeline.config import typed_values
from pipeline.config.files import file_of, load
from pipeline.config.plugins import Rebuild, portable
from pipeline.config.renamed import unknown_method, unknown_setting
from pipeline.config.tuning import Tuning, tuning_of
from pipeline.errors import ConfigError, did_you_mean, first_line

METHOD_KEYS = {"method": str, "config": dict, "per_dataset": dict, "tune": dict}
"""Keys of a conf/method file and the types of their values."""


@dataclass(frozen=True)
class MethodChoice:
    """A registered method with its resolved hyperparameters."""

    name: str
    info: MethodInfo
    config: tuple[tuple[str, Any], ...]
    tuning: Tuning | None = None
    """How the method tunes its settings; None for methods that do not."""

    def build(self, settings: Mapping[str, Any] | None = None) -> Method:
        """Return a new instance of the method, with these settings in place of its own."""
        return self.info.cls(self.info.cls.Config(**(dict(self.config) | dict(settings or {}))))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        rebuild = portable(self.info)
        if rebuild is None:
            return super().__reduce_ex__(protocol)
        return _rebuilt, (self.name, rebuild, self.config, self.tuning)


def _rebuilt(name: str, rebuild: Rebuild, config: tuple[tuple[str, Any], ...], tuning: Tuning | None) -> MethodChoice:
    function, arguments = rebuild
    return MethodChoice(name, function(*arguments), config, tuning)


def method_choice(
    name: str, dataset: str, hparams: str, overrides: Mapping[str, Any], variant: Mapping[str, Any] | None = None
) -> MethodChoice:
    """Resolve a method's hyperparameters, and how it tunes them.

    Later sources override earlier ones: the defaults of the class, `config` of the method's file, with
    hparams="paper" the entry of `per_dataset` for this data set, and `overrides`.

    Args:
        name: A file in conf/method, a registered name, or a variant.
        dataset: Name of the data set that is fitted.
        hparams: "default" or "paper".
        overrides: Values of method.NAME.KEY; those of method.NAME.tune.KEY override the file's `tune`.
        variant: What replaces the method's file when the sweep itself defines `name`.

    Raises:
        ConfigError: An unknown method or key, or a value of the wrong type.
    """
    file = check_method_file(str(file_of("method", name)), load("method", name)) if variant is None else variant
    registered = all_methods()
    base = file.get("method", name)
    if base not in registered:
        raise ConfigError(unknown_method(base, registered))
    info, overrides = registered[base], dict(overrides)
    tune = overrides.pop("tune", None)
    values = dict(file.get("config") or {})
    if hparams == "paper":
        values |= (file.get("per_dataset") or {}).get(dataset, {})
    config = _typed(name, info, values | overrides)
    tuning = None
    if "tune" in file:
        where = f"method.{name}.tune"
        if name == base:
            raise ConfigError(f"{where}: a tuned method has a name of its own, such as {name}@tuned")
        tuning = tuning_of(where, file["tune"], tune, config, partial(_typed, name, info))
    elif tune is not None:
        raise ConfigError(f"method.{name}.tune: the file of {name!r} has no tune: name another method, or write one")
    return MethodChoice(name, info, tuple(sorted(config.items())), tuning)


def _typed(name: str, info: MethodInfo, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all hyperparameters of a method, with the types of its `Config`: the class's defaults and these values.

    Raises:
        ConfigError: An unknown key, or a value of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(info.cls.Config)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"method {name!r}: " + unknown_setting(info.name, key, fields))
    try:
        typed = OmegaConf.merge(OmegaConf.structured(info.cls.Config), dict(values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"method {name!r}: {first_line(error)} (setting {error.full_key})") from error
    resolved = cast(dict[str, Any], OmegaConf.to_container(typed))
    for key, value in values.items():
        typed_values.check_unchanged(f"method {name!r}: {key}", value, resolved[key])
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in resolved.items()}
    for key, value in config.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_range(f"method.{name}.{key}", fields[key], number)
    return config


def _check_range(where: str, field: dataclasses.Field[Any], number: int | float) -> None:
    """Raise ConfigError if a number is not finite or not in the range of its setting (`methods._settings`)."""
    if not math.isfinite(number):
        raise ConfigError(f"{where}={number}: expected a finite number")
    limits, kind = field.metadata, "a whole number" if isinstance(number, int) else "a number"
    above, most = limits.get("above"), limits.get("at_most", math.inf)
    least = limits.get("at_least", _lowest(field.default, number))
    if above is not None and number <= above:
        raise ConfigError(f"{where}={number}: expected {kind} above {above}")
    if not least <= number <= most:
        end = f" of {least:g} or more" if most == math.inf else f" from {least:g} to {most:g}"
        raise ConfigError(f"{where}={number}: expected {kind}{end}")


def _lowest(default: Any, number: int | float) -> float:
    """Return 1 for an integer, 0 for a float, or a lower default."""
    usual = 1 if isinstance(number, int) else 0
    defaults = [n for n in (default if isinstance(default, tuple) else (default,)) if isinstance(n, int | float)]
    return min([usual, *defaults])


def check_method_file(where: str, file: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check the content of a conf/method file or of a variant, and return it.

    Raises:
        ConfigError: An unknown key, or a value of the wrong type.
    """
    for key, value in file.items():
        if key not in METHOD_KEYS:
            raise ConfigError(f"{where}: " + did_you_mean("key", key, METHOD_KEYS))
        empty = value is None and key != "method"  # `config:` with nothing under it
        if not empty and not isinstance(value, METHOD_KEYS[key]):
            expected = "a method's name" if key == "method" else "SETTING=VALUE under it"
            raise ConfigError(f"{where}.{key}={value}: expected {expected}")
    return file
