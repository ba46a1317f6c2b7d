"""The algorithms. Each module in this folder that registers a method with `@method` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from methods.base import REGISTRY, MethodInfo

_NOT_METHODS = {"base", "finite", "optim", "refiner", "state", "testing", "toy"}


def all_methods() -> dict[str, MethodInfo]:
    """Every registered method by name, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        if module.name not in _NOT_METHODS:
            importlib.import_module(f"methods.{module.name}")
    return dict(sorted(REGISTRY.items()))
