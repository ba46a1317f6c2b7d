"""Files that Farebox writes: replaced atomically, and sealed with a checksum that is verified before they are parsed.

A sealed file contains the mark `farebox-sha256:` followed by 64 hexadecimal digits: the SHA-256 of the whole file with
those digits read as zeros. The first mark counts; what looks like one after it is content. An Arrow file stores the
mark in its schema metadata and stays readable by any Arrow reader, JSON stores it under its first key, and other
formats store it in their first line.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import uuid
from pathlib import Path

import pyarrow as pa

from pipeline.errors import DamagedFile, StorageError

SEAL_KEY = "checksum"
"""Name under which metadata and JSON store the mark."""
_MARK = b"farebox-sha256:"
_ZEROS = b"0" * 64
_SEAL = re.compile(re.escape(_MARK) + rb"([0-9a-f]{64})")
UNSEALED = (_MARK + _ZEROS).decode()
"""What a file's content holds in the place of the checksum before `seal` fills it in."""


def seal(data: bytes) -> bytes:
    """Fill in the checksum of a file's content, which holds `UNSEALED` before any other mark.

    Raises:
        ValueError: the first mark is not `UNSEALED`, or there is none.
    """
    mark = _SEAL.search(data)
    if mark is None or mark[1] != _ZEROS:
        raise ValueError(f"expected {UNSEALED!r} in the content, found {mark and mark[0]!r}")
    return data[: mark.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[mark.end(1) :]


def sealed_arrow(table: pa.Table) -> bytes:
    """Return a table as a sealed Arrow file, which any Arrow reader can open."""
    table = table.replace_schema_metadata({SEAL_KEY: UNSEALED})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return seal(bytes(sink.getvalue()))


def check_seal(path: Path, data: bytes | memoryview) -> None:
    """Verify the checksum of a file's content; `path` is used in the message only.

    Raises:
        DamagedFile: the content has no checksum, or does not match it.
    """
    view = memoryview(data)
    mark = _SEAL.search(view)
    if mark is None:
        raise DamagedFile(path, "it has no checksum")
    digest = hashlib.sha256(view[: mark.start(1)])
    digest.update(_ZEROS)
    digest.update(view[mark.end(1) :])
    if digest.hexdigest().encode() != bytes(mark[1]):
        raise DamagedFile(path, "its content does not match its checksum")


def read_sealed(path: Path) -> bytes:
    """Read a whole sealed file.

    Raises:
        OSError: the file cannot be read.
        DamagedFile: it is not a regular file, or its content does not match its checksum.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise DamagedFile(path, "it is not a regular file")  # reading from a pipe would wait for ever
    data = path.read_bytes()
    check_seal(path, data)
    return data


def write_atomic(path: Path, data: bytes, spare: Path | None = None) -> None:
    """Replace a file so that a crash leaves the old content or the new one, never a part.

    `spare`: the path that keeps the old content.

    Raises:
        StorageError: the file cannot be written; nothing was changed.
    """
    try:
        _write_atomic(path, data, spare)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): make room, or make it writable, and type the same "
            "command again; it goes on from what is there"
        ) from error


def _write_atomic(path: Path, data: bytes, spare: Path | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if spare is not None:
            with contextlib.suppress(FileNotFoundError):
                path.replace(spare)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself, against a power cut
    finally:
        os.close(folder)
