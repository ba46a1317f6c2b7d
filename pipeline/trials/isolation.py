"""Isolate trials that share a process: restore global random state and settings of torch, numpy and the process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _flag(owner: Any, name: str) -> Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _autocast(device: str) -> Setting:
    return lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)


_INFERENCE: list[torch.inference_mode] = []
"""Modes entered to override one that a method did not leave. They are kept: leaving them would restore that one."""


def _entered(mode: torch.inference_mode) -> torch.inference_mode:
    mode.__enter__()
    return mode


_SETTINGS: tuple[Setting, ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (lambda: torch.empty(0).device, lambda device: _default_device(device)),  # get_default_device is five times slower
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_deterministic_algorithms_warn_only_enabled, lambda warn: _warn_only(warn)),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(_flag(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    _flag(torch.backends.mkldnn, "enabled"),
    *(_autocast(device) for device in ("cpu", "cuda")),
    (torch.is_inference_mode_enabled, lambda mode: _INFERENCE.append(_entered(torch.inference_mode(mode)))),
    (np.geterr, lambda state: np.seterr(**state)),
)
"""Global settings that are restored after each call of a method: how to read and how to set each."""


def _default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # None costs nothing in later calls


def _warn_only(warn: bool) -> None:
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=warn)


class Settings:
    """A snapshot of the global settings of torch and numpy."""

    def __init__(self) -> None:
        self.values = [read() for read, _ in _SETTINGS]

    def restore(self) -> None:
        """Set all settings that differ from the snapshot."""
        for (read, write), value in zip(_SETTINGS, self.values, strict=True):
            if read() != value:
                write(value)


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Restore the state of the process after the block.

    This is the random state of `random`, numpy and torch, the working directory, the environment, the warning filters,
    and torch's treatment of denormals.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if _cuda() else None
    folder, environment = _working_directory(), dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if folder is not None and folder != _working_directory():
            os.chdir(folder)
        if environment != os.environ:
            os.environ.clear()
            os.environ.update(environment)
        torch.set_flush_denormal(False)
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def _working_directory() -> Path | None:
    with contextlib.suppress(FileNotFoundError):  # it was removed
        return Path.cwd()
    return None


def _cuda() -> bool:
    return bool(torch.cuda.is_initialized() and torch.cuda.is_available())  # type: ignore[no-untyped-call]


def seed_globals(*parts: int | str) -> None:
    """Seed the global generators of `random`, numpy and torch with a digest of these parts."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also looks for other devices: 100 times slower
    if _cuda():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads, and restore it on exit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
