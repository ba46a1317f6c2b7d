"""The algorithms. Every module of this folder whose name has no leading underscore may register methods.

An installed package adds methods by an entry point of the group `farebox.methods`, whose value names the module that
registers them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points

from methods.base import REGISTRY, MethodInfo

GROUP = "farebox.methods"
"""Group of the entry points of installed plug-ins."""
BROKEN: dict[str, str] = {}
"""Modules that cannot be imported, with the reason in one line. Their methods are not available, all others are."""
_NOT_METHODS = {"base", "testing"}


def all_methods() -> dict[str, MethodInfo]:
    """Return every registered method by name, in alphabetical order.

    Modules that cannot be imported are left out and listed in `BROKEN`.
    """
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_") and module.name not in _NOT_METHODS:
            _import(f"methods.{module.name}")
    for name in _plug_ins(tuple(sys.path)):
        _import(name)
    return dict(sorted(REGISTRY.items()))


@cache
def _plug_ins(path: tuple[str, ...]) -> tuple[str, ...]:
    """Return the modules of the plug-ins on this path. Cached, as it reads the metadata of every package."""
    return tuple(sorted({entry.module for entry in entry_points(group=GROUP)}))


def _import(name: str) -> None:
    if name in BROKEN:
        return
    before = dict(REGISTRY)
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        REGISTRY.clear()
        REGISTRY.update(before)
        lines = str(error).strip().splitlines() or [""]
        BROKEN[name] = f"{type(error).__name__}: {lines[0]}"
