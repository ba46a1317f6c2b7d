"""Identity of a storage: an id, which is part of every charge, and the path of the folder.

A folder with the id of another existing folder is a copy and gets an id of its own: two storages with one id would
close each other's trials in a shared ledger. A folder whose recorded path does not exist was moved and keeps its id.

The file `storage_id` contains one JSON object twice, on two lines with an empty line between them. Each line has a
checksum, so one damaged byte does not lose the id.
"""

from __future__ import annotations

import socket
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.errors import ConfigError, DamagedFile
from pipeline.files import parse_sealed_json, sealed_json, write_atomic

FILE = "storage_id"


@dataclass(frozen=True)
class StorageId:
    """Content of the file `storage_id`."""

    id: str
    path: str
    """Absolute path of the folder, without symbolic links."""
    host: str
    inode: int
    """Inode of the folder, equal on all machines that mount it."""
    copied_from: tuple[str, ...] = ()
    """Ids of the storages that this one is a copy of, the latest first."""


def host_name() -> str:
    """Return the name of this machine, as ledgers and storages record it."""
    return socket.gethostname()


def new_id(folder: Path, copied_from: tuple[str, ...] = ()) -> StorageId:
    """Return a new identity for a folder."""
    return _at(folder, StorageId(uuid.uuid4().hex[:12], "", "", 0, copied_from))


def moved_here(folder: Path, identity: StorageId) -> StorageId:
    """Return the identity with the present path of the folder."""
    return _at(folder, identity)


def read_id(folder: Path) -> StorageId:
    """Read the identity of a storage.

    Raises:
        ConfigError: the folder is not a storage.
        DamagedFile: both lines of the file are damaged.
    """
    path = folder / FILE
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"no sweep at {folder}: name one with storage=DIR") from error
    except OSError as error:
        raise DamagedFile(path, f"it cannot be read ({error.strerror})") from error
    for line in lines:
        try:
            record = parse_sealed_json(path, line)
            return StorageId(**record | {"copied_from": tuple(record["copied_from"])})
        except (DamagedFile, KeyError, TypeError):
            continue
    raise DamagedFile(path, "no line of it matches its checksum; restore it from a backup, or use another storage=DIR")


def write_id(folder: Path, identity: StorageId) -> None:
    """Write the identity of a storage."""
    line = sealed_json(asdict(identity))
    write_atomic(folder / FILE, line + b"\n\n" + line + b"\n")


def is_copy(folder: Path, identity: StorageId, path: str, host: str) -> bool:
    """Return whether `folder` is a copy of a storage at `path` on `host` that has the same id.

    A path on another machine cannot be read: there, the folder is the same one if its inode is that of the identity
    (both machines mount it), and counts as a copy otherwise.
    """
    if host != host_name():
        return identity.inode != folder.stat().st_ino
    other = Path(path)
    try:
        if other.samefile(folder):
            return False
        return read_id(other).id == identity.id
    except (FileNotFoundError, NotADirectoryError, ConfigError):
        return False
    except (OSError, DamagedFile):  # it exists and cannot be read
        return True


def _at(folder: Path, identity: StorageId) -> StorageId:
    real = folder.resolve()
    return replace(identity, path=str(real), host=host_name(), inode=real.stat().st_ino)
