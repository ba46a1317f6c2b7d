"""Identity of a storage: an id that is part of every charge, and the place where the folder was when it got the id.

A folder that holds the id of another existing folder is a copy, and gets an id of its own: two storages with one id
would settle each other's trials in a shared ledger. A folder whose recorded place is gone was moved, and keeps its id.

The file `storage_id` holds one JSON object twice, a line each, with a checksum in each line and an empty line between
them, so that one damaged byte does not lose the id.
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
    """What the file `storage_id` holds."""

    id: str
    path: str
    """Absolute path of the folder, without symbolic links."""
    host: str
    inode: int
    """Of the folder: equal on two machines that share it."""
    copied_from: tuple[str, ...] = ()
    """Ids of the storages that this one was copied from, the latest first."""


def host_name() -> str:
    """Name of this machine, as ledgers and storages record it."""
    return socket.gethostname()


def new_id(folder: Path, copied_from: tuple[str, ...] = ()) -> StorageId:
    """Make an identity for a folder."""
    return _at(folder, StorageId(uuid.uuid4().hex[:12], "", "", 0, copied_from))


def moved_here(folder: Path, identity: StorageId) -> StorageId:
    """The same identity with the present place of the folder."""
    return _at(folder, identity)


def read_id(folder: Path) -> StorageId:
    """Read the identity of a storage.

    Raises:
        ConfigError: the folder is not a storage.
        DamagedFile: the file is damaged beyond its spare line.
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
    """Whether another storage with this id is at `path` on `host`, so that `folder` is a copy of it.

    A path on another machine cannot be looked at: the folder is the same one when its inode is that of the identity (a
    file system that both machines mount), and is taken for a copy when it is not.
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
    except (OSError, DamagedFile):  # it is there and cannot be read
        return True


def _at(folder: Path, identity: StorageId) -> StorageId:
    real = folder.resolve()
    return replace(identity, path=str(real), host=host_name(), inode=real.stat().st_ino)
