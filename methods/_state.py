"""The state of a method as bytes to compare: its own contents, and variables outside it that could hold state."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.base import Method


class _ContentPickler(pickle.Pickler):
    """Writes tensors and generators by value: torch's own pickles hold memory addresses, which change between calls."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return bytes, (obj.detach().cpu().contiguous().numpy().tobytes(),)
        if isinstance(obj, torch.Generator):
            return bytes, (obj.get_state().numpy().tobytes(),)
        return NotImplemented


def contents(value: Any) -> bytes:
    """Return a method, or another value, as bytes that are equal if the contents are."""
    buffer = io.BytesIO()
    _ContentPickler(buffer).dump(value)
    return buffer.getvalue()


def global_state() -> tuple[bytes, ...]:
    """Return the random states and settings that all trials of a process share."""
    settings = torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), settings, deterministic
    return tuple(contents(state) for state in states)


def outside_state(method: type[Method]) -> dict[str, bytes]:
    """Return a digest of each variable outside a method's object that could hold its state.

    These are the attributes of its classes, the global variables of their modules, and the defaults and attributes of
    their functions. Modules, classes, and functions of other modules are left out.
    """
    found: dict[str, bytes] = {}
    for cls in method.__mro__:
        if cls in (Method, object):
            continue
        module = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
        for owner, variables in ((cls.__module__, module), (cls.__qualname__, vars(cls))):
            for name, value in list(variables.items()):
                if name.startswith("__") and name.endswith("__"):
                    continue
                if isinstance(value, FunctionType):
                    if value.__module__ == cls.__module__:  # else imported from elsewhere
                        found |= {f"{owner}.{name}.{part}": state for part, state in _function_state(value)}
                elif not isinstance(value, _WITHOUT_STATE):
                    found[f"{owner}.{name}"] = _digest(value)
    return found


_WITHOUT_STATE = (type, ModuleType, BuiltinFunctionType, staticmethod, classmethod, property)


def _function_state(function: FunctionType | None) -> Iterator[tuple[str, bytes]]:
    """The defaults and attributes of a function, and of those that decorators wrapped."""
    while function is not None:
        for part in ("__defaults__", "__kwdefaults__"):
            yield f"{part} of {function.__code__.co_name}", _digest(getattr(function, part))
        for name, value in vars(function).items():
            if name != "__wrapped__":
                yield name, _digest(value)
        function = vars(function).get("__wrapped__")


def _digest(value: Any) -> bytes:
    """Equal when the contents are; of what cannot be pickled, its identity."""
    try:
        return hashlib.sha256(contents(value)).digest()
    except Exception:  # a pickle may fail in any way
        return id(value).to_bytes(8, "big")
