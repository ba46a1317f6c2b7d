"""Methods from outside the package: a Python file named in `methods=my/method.py`.

Such a file is loaded under a module name made of its path and content. It travels with the trials as source text, so
that workers on other machines need no copy of it. Installed plug-ins (entry points of the group `farebox.methods`) are
found by `methods.all_methods`.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from methods import BROKEN, all_methods
from methods.base import REGISTRY, MethodInfo
from pipeline.config.typed_values import path as path_of
from pipeline.errors import ConfigError, first_line
from pipeline.untrusted import read_text

Rebuild = tuple[Callable[..., MethodInfo], tuple[Any, ...]]
"""A function and its arguments."""
PREFIX = "farebox_method_file_"
"""Start of the names of modules that are loaded from files."""


def load_method_file(path: Path) -> tuple[str, ...]:
    """Register the methods that a Python file defines; return their names.

    Raises:
        ConfigError: the file cannot be read or imported, or defines no method.
    """
    path = path.absolute()
    all_methods()  # first: a name that is taken is refused here
    try:
        source = read_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"methods: {path} cannot be read ({error}): expected a Python file") from error
    try:
        module = _module(str(path), source)
    except (Exception, SystemExit) as error:
        line = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"methods: {path} cannot be imported ({line[:160]})") from error
    names = tuple(name for name, info in REGISTRY.items() if info.cls.__module__ == module.__name__)
    if not names:
        raise ConfigError(f"methods: {path} registers no method: decorate its class with @method(name=..., ...)")
    return names


def with_methods_of_files(names: Sequence[str]) -> list[str]:
    """Replace each `.py` file in a list of methods by the names of the methods that it registers.

    A file that cannot be imported is kept as it is and recorded in `methods.BROKEN`: a sweep that names it can be read,
    but not planned.
    """
    found: list[str] = []
    for name in names:
        if name.endswith(".py"):
            try:
                found += load_method_file(path_of("methods", name))
                BROKEN.pop(name, None)
            except ConfigError as error:
                BROKEN[name] = str(error).removeprefix("methods: ")
                found.append(name)
        else:
            found.append(name)
    return found


def portable(info: MethodInfo) -> Rebuild | None:
    """Return how another process rebuilds a method of a file; None for a method that is imported by name."""
    name = info.cls.__module__
    if not name.startswith(PREFIX):
        return None
    module = sys.modules[name]
    return _restore, (info.name, str(module.__file__), module.__dict__["__source__"])


def _restore(name: str, path: str, source: str) -> MethodInfo:
    _module(path, source)
    return REGISTRY[name]


def _module(path: str, source: str) -> ModuleType:
    """Import the source of a file once in this process."""
    digest = hashlib.sha256(f"{path}\n{source}".encode()).hexdigest()[:12]
    name = f"{PREFIX}{digest}"
    if name in sys.modules:
        return sys.modules[name]
    for method in [m for m, info in REGISTRY.items() if _file_of(info) == path]:
        del REGISTRY[method]  # of the same file before it was edited
    module = ModuleType(name)
    module.__file__ = path
    module.__dict__["__source__"] = source
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)  # for tracebacks on workers
    sys.modules[name] = module
    before = dict(REGISTRY)
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        REGISTRY.clear()
        REGISTRY.update(before)
        raise
    return module


def _file_of(info: MethodInfo) -> str | None:
    module = sys.modules.get(info.cls.__module__)
    return str(module.__file__) if info.cls.__module__.startswith(PREFIX) and module else None
