"""A trial's checkpoints: one file, replaced atomically, and the one before it. Both are verified before unpickling."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedFile
from pipeline.files import UNSEALED, read_sealed, seal, write_atomic

log = logging.getLogger(__name__)


class Checkpoint:
    """The state of one trial under `folder`, which is the sweep's own.

    A file is one line with its checksum and the trial's name, then a pickle. The checksum finds damage; it does not
    prove who wrote the file. A pickle runs code when it is loaded: whoever may write to the storage may run code as its
    user. Links are not followed, and a checkpoint of another trial is not used.
    """

    def __init__(self, folder: Path, trial: str) -> None:
        self.trial = trial
        self.path = folder / f"{trial}.ckpt"
        self.before = folder / f"{trial}.before.ckpt"

    def save(self, state: Any) -> None:
        """Write the state; the last one becomes the spare."""
        header = f"{UNSEALED} {self.trial}\n".encode()
        write_atomic(self.path, seal(header + pickle.dumps(state)), spare=self.before)

    def load(self) -> Any | None:
        """Return the newest intact state, or None."""
        for path in (self.path, self.before):
            if path.is_symlink():
                log.warning("checkpoint %s is a link: not followed", path)
                continue
            try:
                header, _, data = read_sealed(path).partition(b"\n")
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("checkpoint %s cannot be read (%s)", path, error)
                continue
            except DamagedFile:
                log.warning("checkpoint %s is damaged: removed; an older one is used, or the trial starts again", path)
                path.unlink(missing_ok=True)  # else it would become the spare at the next save
                continue
            if header.partition(b" ")[2] != self.trial.encode():
                log.warning("checkpoint %s is of another trial: removed", path)
                path.unlink(missing_ok=True)
                continue
            try:
                return pickle.loads(data)
            except Exception as error:  # intact, but of an older Farebox
                log.warning("checkpoint %s cannot be read (%s): the trial starts again", path, error)
        return None

    def clear(self) -> None:
        """Remove both files: the trial's rows are written."""
        self.path.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)
