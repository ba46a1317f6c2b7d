"""torch, `Tensor` and torch.nn.functional as `F`, imported when a method first computes with them.

Listing methods, checking their settings and planning their bills need no torch, whose import takes longer than all the
rest of these commands.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:

    class _Module:
        """A module that is imported when one of its names is used."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._name), name)

    torch, F, Tensor = _Module("torch"), _Module("torch.nn.functional"), Any  # Tensor occurs in annotations only

__all__ = ["F", "Tensor", "no_grad", "torch"]

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function as `torch.no_grad()` does."""

    @wraps(function)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradients
