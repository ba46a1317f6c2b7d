"""The algorithms. Every module of this folder whose name has no leading underscore may register methods."""

from __future__ import annotations

import importlib
import pkgutil

from methods.base import REGISTRY, MethodInfo

_NOT_METHODS = {"base", "testing"}


def all_methods() -> dict[str, MethodInfo]:
    """Return every registered method by name, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_") and module.name not in _NOT_METHODS:
            importlib.import_module(f"methods.{module.name}")
    return dict(sorted(REGISTRY.items()))
