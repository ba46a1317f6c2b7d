"""Conversion of values to the type that is wanted of them: paths, the fields of cards, the settings of methods."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pipeline import checks
from pipeline.errors import ConfigError
from pipeline.untrusted import text_problem


def path(key: str, value: Any) -> Path:
    """A path as it is typed; a leading ~ or ~USER is that user's home folder."""
    found = checks.text(key, value)
    try:
        return Path(found).expanduser() if found.startswith("~") else Path(found)  # a Path forgets the ./ of ./~x
    except RuntimeError as error:
        raise ConfigError(
            f"{key}={found}: there is no such home folder; for a folder of this name type ./{found}"
        ) from error


def of_type(key: str, value: Any, hint: Any) -> Any:
    """Convert a value of a card to the type of its field; lists become tuples. Other types are left alone.

    Raises:
        ConfigError: the value is of another type.
    """
    options = [option for option in get_args(hint) if option is not type(None)]
    if isinstance(hint, UnionType):
        return None if value is None else of_type(key, value, options[0]) if len(options) == 1 else value
    if get_origin(hint) is tuple:
        convert = checks.text if options[0] is str else partial(of_type, hint=options[0])
        items = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(convert(key, item) for item in items)
    if hint is str:
        return "" if value in (None, "") else checks.text(key, value)
    if hint is int:
        return checks.whole(key, value, 0)
    if hint is float:
        return checks.number(key, value)
    return checks.flag(key, value) if hint is bool else value


def prose(key: str, value: Any, hint: Any = str) -> Any:
    """Text that may have several lines."""
    return value if isinstance(value, str) and not text_problem(value, "\n\t") else of_type(key, value, hint)


def same_setting(key: str, value: Any, resolved: Any) -> None:
    """Check that a method's setting was not changed when it was converted to the type of its field.

    Raises:
        ConfigError: it was, as 1_0 to 10 and yes to true; or a number is not finite.
    """
    if isinstance(resolved, list | tuple) and isinstance(value, list | tuple):
        for item, of_item in zip(value, resolved, strict=True):
            same_setting(key, item, of_item)
    elif isinstance(value, bool) or isinstance(resolved, bool):
        if value is not resolved:
            wanted = "true or false" if isinstance(resolved, bool) else type(resolved).__name__
            raise ConfigError(f"{key}={value}: expected {wanted}")
    elif isinstance(resolved, int | float):
        if checks.number(key, value) != resolved:
            raise ConfigError(f"{key}={value}: expected {type(resolved).__name__}")
    elif str(value) != str(resolved):  # OmegaConf takes ??? for a value that is missing
        raise ConfigError(f"{key}={value}: expected another value")
