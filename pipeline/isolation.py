"""Keep trials apart in one process: global random state, global settings of torch and numpy, state outside a method."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.base import Method

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _flag(owner: Any, name: str) -> Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


_SETTINGS: tuple[Setting, ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_deterministic_algorithms_warn_only_enabled, lambda warn: _warn_only(warn)),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(_flag(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    _flag(torch.backends.mkldnn, "enabled"),
    (np.geterr, lambda state: np.seterr(**state)),
)
"""What a trial may not leave changed: how each is read and set."""


def _warn_only(warn: bool) -> None:
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=warn)


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Restore the global settings of torch and numpy after a block."""
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, write), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                write(value)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the global random state of `random`, numpy and torch after a block."""
    cuda = _cuda()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if cuda else None
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def _cuda() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seed_globals(*parts: int | str) -> None:
    """Seed the global generators of `random`, numpy and torch with a digest of these parts."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also looks for other devices: 100 times slower
    if _cuda():
        torch.cuda.manual_seed_all(seed)


def outside_state(method: type[Method]) -> dict[str, bytes]:
    """Digest of each variable outside a method's object in which a method could keep state.

    These are the attributes of its classes, the global variables of their modules, and the defaults and attributes of
    their functions. Modules, classes and other functions are left out.
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
                    found[f"{owner}.{name}"] = _content(value)
    return found


_WITHOUT_STATE = (type, ModuleType, BuiltinFunctionType, staticmethod, classmethod, property)


def _function_state(function: FunctionType | None) -> Iterator[tuple[str, bytes]]:
    """The defaults and attributes of a function, and of those that decorators wrapped."""
    while function is not None:
        for part in ("__defaults__", "__kwdefaults__"):
            yield f"{part} of {function.__code__.co_name}", _content(getattr(function, part))
        for name, value in vars(function).items():
            if name != "__wrapped__":
                yield name, _content(value)
        function = vars(function).get("__wrapped__")


class _ContentPickler(pickle.Pickler):
    """Write tensors and generators by value: their own pickles contain memory addresses."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return bytes, (obj.detach().cpu().contiguous().numpy().tobytes(),)
        if isinstance(obj, torch.Generator):
            return bytes, (obj.get_state().numpy().tobytes(),)
        return NotImplemented


def _content(value: Any) -> bytes:
    """A digest that is equal when the content is; of what cannot be pickled, its identity."""
    buffer = io.BytesIO()
    try:
        _ContentPickler(buffer).dump(value)
    except Exception:  # a pickle may fail in any way
        return id(value).to_bytes(8, "big")
    return hashlib.sha256(buffer.getvalue()).digest()
