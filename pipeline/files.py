"""Files that Farebox writes: replaced atomically, and sealed with a checksum that is verified before they are parsed.

A sealed file contains, one or more times, the mark `farebox-sha256:` followed by 64 hexadecimal digits: the SHA-256 of
the whole file with those digits read as zeros. The mark may be anywhere, so an Arrow file stores it in its schema
metadata and stays readable by any Arrow reader, JSON stores it under a key, and other formats store it in a first line.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Sequence
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
    """Fill in the checksum of a file's content, which holds `UNSEALED` at least once.

    Marks with other digits are content, for example those of another sealed file that is quoted.

    Raises:
        ValueError: the content does not hold `UNSEALED`.
    """
    if _MARK + _ZEROS not in data:
        marks = sorted({match[1] for match in _SEAL.finditer(data)})
        raise ValueError(f"expected {UNSEALED!r} in the content, found marks {marks}")
    return data.replace(_MARK + _ZEROS, _MARK + hashlib.sha256(data).hexdigest().encode())


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
    marks = [(match.start(1), match.end(1), bytes(match[1])) for match in _SEAL.finditer(view)]
    stated = {digits for _, _, digits in marks}
    if not any(_unsealed_digest(view, marks, digits) == digits for digits in stated):
        raise DamagedFile(path, "its content does not match its checksum" if stated else "it has no checksum")


def _unsealed_digest(view: memoryview, marks: Sequence[tuple[int, int, bytes]], digits: bytes) -> bytes:
    """SHA-256 of the content with zeros in every mark that holds `digits`."""
    digest, start = hashlib.sha256(), 0
    for first, last, stated in marks:
        if stated == digits:
            digest.update(view[start:first])
            digest.update(_ZEROS)
            start = last
    digest.update(view[start:])
    return digest.hexdigest().encode()


def read_sealed(path: Path) -> bytes:
    """Read a whole sealed file.

    Raises:
        OSError: the file cannot be read.
        DamagedFile: its content does not match its checksum.
    """
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
