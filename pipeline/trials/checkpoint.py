"""Checkpoints of trials: one file, replaced atomically, and its predecessor. Both are verified before unpickling."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedFile
from pipeline.files import UNSEALED, read_sealed, seal, write_atomic

FOLDER = "checkpoints"
"""Folder of the checkpoints in a storage."""
SUFFIX, SPARE_SUFFIX = ".ckpt", ".before.ckpt"

log = logging.getLogger(__name__)


class Checkpoint:
    """The checkpoint of one trial.

    A file is one line with its checksum and the trial's ledger key, then a pickle. The checksum detects damage; it does
    not prove who wrote the file. Unpickling runs code, so whoever can write to the storage can run code as its user.
    Links are not followed, and a checkpoint of another trial is not used.

    Args:
        storage: folder of the sweep.
        trial: the trial's ledger key, `TrialSpec.account`.
    """

    def __init__(self, storage: Path, trial: str) -> None:
        self.trial = trial
        self.path = storage / FOLDER / f"{trial}{SUFFIX}"
        self.before = storage / FOLDER / f"{trial}{SPARE_SUFFIX}"

    def save(self, state: Any) -> None:
        """Write the state. The file that it replaces is kept as the spare."""
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
            except Exception as error:  # intact, but written by other code
                log.warning("checkpoint %s cannot be read (%s): the trial starts again", path, error)
        return None

    def clear(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)


def stored_checkpoints(storage: Path) -> list[Checkpoint]:
    """Return the checkpoints in a storage, sorted by trial."""
    names = {path.name for path in (storage / FOLDER).glob(f"*{SUFFIX}")}
    trials = {name.removesuffix(SPARE_SUFFIX).removesuffix(SUFFIX) for name in names}
    return [Checkpoint(storage, trial) for trial in sorted(trials)]
