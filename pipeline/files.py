"""Write files atomically, seal them with a checksum, verify it before parsing; write JSON without NaN.

A sealed file contains the mark `farebox-sha256:` followed by 64 hexadecimal digits: the SHA-256 of the whole file with
those digits read as zeros. The first mark counts; what looks like one after it is content. An Arrow file stores the
mark in its schema metadata and stays readable by any Arrow reader, JSON stores it under its first key, and other
formats store it in their first line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DamagedFile, DataError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

SEAL_KEY = "checksum"
"""Name under which metadata and JSON store the mark."""
_MARK = b"farebox-sha256:"
_ZEROS = b"0" * 64
_SEAL = re.compile(re.escape(_MARK) + rb"([0-9a-f]{64})")
UNSEALED = (_MARK + _ZEROS).decode()
"""Placeholder in a file's content, which `seal` replaces by the checksum."""
DIGESTS = "digests.json"
"""File in each folder of package data: the SHA-256 of every other file, by name."""


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
    import pyarrow as pa  # most of the time of `farebox --help`, which needs the rest of this module

    table = table.replace_schema_metadata({SEAL_KEY: UNSEALED})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return seal(bytes(sink.getvalue()))


def sealed_json(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Return a record as a sealed JSON file on one line, or indented; NaN and infinity become null."""
    return seal(strict_json({SEAL_KEY: UNSEALED, **record}, indent=indent).encode())


def parse_sealed_json(path: Path, data: bytes) -> dict[str, Any]:
    """Verify and parse the content of a sealed JSON file; `path` is used in messages only.

    Returns:
        The record without its checksum.

    Raises:
        DamagedFile: the content does not match its checksum, or is not a JSON object.
    """
    check_seal(path, data)
    try:
        record = json.loads(data)
        del record[SEAL_KEY]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(path, "it is not a sealed JSON object") from error
    return dict(record)


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


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file; see `parse_sealed_json`.

    Raises:
        OSError: the file cannot be read.
        DamagedFile: it is not a regular file, does not match its checksum, or is not a JSON object.
    """
    return parse_sealed_json(path, read_sealed(path))


def write_atomic(path: Path, data: bytes, spare: Path | None = None) -> None:
    """Replace a file so that a crash leaves the old content or the new one, never a part.

    Args:
        path: The file; its folder is created if needed.
        data: The new content.
        spare: Where the old content is kept.

    Raises:
        StorageError: the file cannot be written; nothing was changed.
    """
    try:
        _write_atomic(path, data, spare)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): make room, or make it writable, and run the "
            "same command again; it continues where it stopped"
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


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int]:
    """Return size, time of change and inode of a file, the key of cached facts about its content."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def verified(path: Path) -> Path:
    """Return the path of a file of package data after verifying its SHA-256.

    Raises:
        DataError: the file, or the list of digests beside it, is missing or damaged.
    """
    listed = path.with_name(DIGESTS)
    try:
        expected = json.loads(listed.read_text(encoding="utf-8"))[path.name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{listed} is damaged: it has no digest of {path.name}: {repair(listed)}") from error
    if not path.is_file():
        raise DataError(f"{path} is missing: {repair(path)}")
    if file_sha256(path) != expected:
        raise DataError(f"{path} is damaged: it does not have the SHA-256 that {DIGESTS} states: {repair(path)}")
    return path


def repair(path: Path) -> str:
    """Return the command that restores a file of the package."""
    return f"pip install --force-reinstall farebox, or in a clone git checkout {path}"


def json_value(value: Any) -> Any:
    """Return a value as JSON can hold it: a float that is NaN or infinite becomes None; containers are copied."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [json_value(item) for item in value]
    return value


def strict_json(value: Any, **options: Any) -> str:
    """Serialize to JSON as RFC 8259 defines it: a float that is NaN or infinite becomes null.

    `options` are those of `json.dumps`.
    """
    return json.dumps(json_value(value), allow_nan=False, **options)
