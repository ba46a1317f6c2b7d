"""The folder of a sweep: check that it can be written, lock it for one run, and open the results in it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.config.compose import Config
from pipeline.console import short_path
from pipeline.errors import ConfigError
from pipeline.results.store import ResultStore
from pipeline.sweep.storage_id import FILE

PARTS = ("", "results/", "predictions/*/", "checkpoints/", "errors/", "leaderboard/")
"""Folders in which files are written, as patterns below the storage."""

log = logging.getLogger(__name__)


def check_writable(key: str, folder: Path) -> None:
    """Create the folder that a configuration key names.

    Raises:
        ConfigError: files cannot be written in it.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{key}={folder} cannot be written ({error.strerror}): choose another with {key}=DIR"
        ) from error


def open_store(config: Config) -> ResultStore:
    """Open the result store of an existing sweep. Raises ConfigError if there is none."""
    if not (config.storage / FILE).exists():
        raise ConfigError(
            f"no sweep at {short_path(config.storage)}: choose one with storage=DIR, or run one: "
            f"farebox run sweep={config.sweep}"
        )
    return ResultStore(config.storage)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock the storage, since two drivers would run the same trials. The system frees the lock when the process ends.

    Raises:
        ConfigError: another run holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            if not _lock(file):
                time.sleep(0.2)  # `farebox status` holds it for a moment
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another `farebox run` is running in storage={folder}: wait for it, or choose another with storage=DIR"
            ) from error
        except OSError:
            log.warning("%s has no file locks: do not run two sweeps in it at once", folder)
        _clear_half_written(folder)  # of a killed run
        yield
        _clear_half_written(folder)  # of killed workers


def _clear_half_written(folder: Path) -> None:
    for part in PARTS:
        for path in folder.glob(f"{part}.*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()


def held(folder: Path) -> bool:
    """Return whether a run holds the storage; False if the file system has no locks."""
    try:
        with (folder / ".lock").open() as file:
            return not _lock(file)
    except OSError:
        return False


def _lock(file: IO[str]) -> bool:
    """Try to lock the file; return False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
