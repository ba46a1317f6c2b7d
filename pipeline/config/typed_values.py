"""Convert values to types: paths, the fields of cards, the hyperparameters of methods."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pipeline.config import values as checks
from pipeline.errors import ConfigError
from pipeline.untrusted import text_problem


def path(key: str, value: Any) -> Path:
    """Return a path; a leading ~ or ~USER is expanded to the user's home folder."""
    typed = checks.text(key, value)
    try:
        return Path(typed).expanduser() if typed.startswith("~") else Path(typed)  # a Path drops the ./ of ./~x
    except RuntimeError as error:
        raise ConfigError(
            f"{key}={typed}: there is no such home folder; for a folder of this name type ./{typed}"
        ) from error


def of_type(key: str, value: Any, hint: Any) -> Any:
    """Convert a value of a card to the type of its field; lists become tuples. Values of other types are unchanged.

    Raises:
        ConfigError: The value has another type.
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
    """Return text that may have several lines."""
    return value if isinstance(value, str) and not text_problem(value, "\n\t") else of_type(key, value, hint)


def check_unchanged(key: str, value: Any, resolved: Any) -> None:
    """Check that a hyperparameter was not changed by its conversion to the type of its field.

    Raises:
        ConfigError: It was changed, as 1_0 to 10 and yes to true; or a number is not finite.
    """
    if isinstance(resolved, list | tuple) and isinstance(value, list | tuple):
        for item, of_item in zip(value, resolved, strict=True):
            check_unchanged(key, item, of_item)
    elif isinstance(value, bool) or isinstance(resolved, bool):
        if value is not resolved:
            expected = "true or false" if isinstance(resolved, bool) else type(resolved).__name__
            raise ConfigError(f"{key}={value}: expected {expected}")
    elif isinstance(resolved, int | float):
        if checks.number(key, value) != resolved:
            raise ConfigError(f"{key}={value}: expected {type(resolved).__name__}")
    elif str(value) != str(resolved):  # OmegaConf treats ??? as a missing value
        raise ConfigError(f"{key}={value}: expected another value")
