"""A trial's checkpoints: one file, replaced atomically, the one before it kept; checked before it is unpickled."""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import Any

from pipeline.results import write_atomic

log = logging.getLogger(__name__)


class Checkpoint:
    """The state of one trial under `folder`. Only files that this sweep wrote are loaded, after a digest check."""

    def __init__(self, folder: Path, trial: str) -> None:
        self.path = folder / f"{trial}.ckpt"
        self.before = folder / f"{trial}.before.ckpt"

    def save(self, state: Any) -> None:
        """Write the state; the last one becomes the spare."""
        data = pickle.dumps(state)
        if self.path.exists():
            self.path.replace(self.before)
        write_atomic(self.path, hashlib.sha256(data).digest() + data)

    def load(self) -> Any | None:
        """The newest state that is whole, or None."""
        for path in (self.path, self.before):
            if not path.exists():
                continue
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                try:
                    return pickle.loads(data[32:])
                except Exception as error:  # whole, but of an older Farebox
                    log.warning("checkpoint %s cannot be read (%s): the trial starts again", path, error)
                    continue
            log.warning("checkpoint %s is damaged: an older one is used, or the trial starts again", path)
        return None

    def clear(self) -> None:
        """Remove both files: the trial's rows are written."""
        self.path.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)
