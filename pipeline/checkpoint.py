"""A trial's checkpoints: one file, replaced atomically, the one before it kept; checked before it is unpickled."""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic

log = logging.getLogger(__name__)


class Checkpoint:
    """The state of one trial under `folder`, the sweep's own.

    The digest in a file finds damage; it does not prove who wrote it. A checkpoint is a pickle, which runs code when it
    is loaded: whoever may write to the storage may run code as its user. A link to elsewhere is not followed.
    """

    def __init__(self, folder: Path, trial: str) -> None:
        self.path = folder / f"{trial}.ckpt"
        self.before = folder / f"{trial}.before.ckpt"

    def save(self, state: Any) -> None:
        """Write the state; the last one becomes the spare."""
        data = pickle.dumps(state)
        write_atomic(self.path, hashlib.sha256(data).digest() + data, spare=self.before)

    def load(self) -> Any | None:
        """The newest state that is whole, or None."""
        for path in (self.path, self.before):
            if path.is_symlink():
                log.warning("checkpoint %s is a link: not followed", path)
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("checkpoint %s cannot be read (%s)", path, error)
                continue
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                try:
                    return pickle.loads(data[32:])
                except Exception as error:  # whole, but of an older Farebox
                    log.warning("checkpoint %s cannot be read (%s): the trial starts again", path, error)
                    continue
            log.warning("checkpoint %s is damaged: removed; an older one is used, or the trial starts again", path)
            path.unlink(missing_ok=True)  # else it would take the place of the whole one at the next save
        return None

    def clear(self) -> None:
        """Remove both files: the trial's rows are written."""
        self.path.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)
