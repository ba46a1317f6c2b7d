"""Read untrusted files and text: regular files only, limited sizes, no control characters."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, one_line

MAX_JSON = 2**30
"""Maximum size of a JSON file; ImageNet's split as JSON has about a tenth."""
MAX_NAMES = 2**26
"""Maximum size of a text file of names."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""First bytes of a Git LFS pointer, which replaces a file until `git lfs pull`."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, bidirectional controls, and lone surrogates."""


def text_problem(text: str, allowed: str = "") -> str:
    """Describe the first forbidden character of a text; an empty string if there is none.

    Args:
        text: The text to check.
        allowed: Control characters that are allowed, as newlines in a note.
    """
    if text.isascii() and text.isprintable():
        return ""
    for match in _CONTROL.finditer(text):
        if match[0] not in allowed:
            where = f"at position {match.start() + 1}"
            if "\udc80" <= match[0] <= "\udcff":  # how Python represents an undecodable byte of a file name
                return f"the byte 0x{ord(match[0]) - 0xDC00:02X} {where}, which is not UTF-8"
            kind = "lone surrogate" if "\ud800" <= match[0] <= "\udfff" else "control character"
            return f"the {kind} U+{ord(match[0]):04X} {where}"
    return ""


def check_texts(where: str, texts: Any) -> None:
    """Raise DataError for the first of these texts (class names, paths) with a forbidden character."""
    for text in texts:
        if problem := text_problem(text):
            raise DataError(f"{where}: {ascii(text)[:80]} has {problem}: rename it")


def read_regular(path: str | Path, limit: int) -> bytes:
    """Read a whole file. A FIFO, device, socket or folder is not read, so the call does not block.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is larger than `limit` bytes.
    """
    try:
        check_regular(os.stat(path), str(path))  # noqa: PTH116
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # a NUL byte in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    with open(descriptor, "rb") as file:  # noqa: PTH123
        opened = os.fstat(descriptor)  # the file may have been replaced in the meantime
        check_regular(opened, str(path))
        if (size := opened.st_size) > limit:
            raise OSError(errno.EFBIG, f"larger than {limit // 2**20 or 1} MiB ({size:,} bytes)", str(path))
        return file.read(limit)


def check_regular(status: os.stat_result, path: str) -> None:
    """Raise OSError if the status is not that of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON.

    Raises:
        DataError: Not UTF-8, not JSON, nested too deep, or an object with a duplicate key.
    """
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise DataError(f"{where} is not valid JSON: nested too deep") from error
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {one_line(error)[:160]}") from error


def read_text(path: Path, limit: int = MAX_NAMES) -> str:
    """Read a UTF-8 text file, without its byte-order mark.

    Raises:
        OSError: As in `read_regular`.
        ValueError: The content is not UTF-8 text, or is a Git LFS pointer.
    """
    data = read_regular(path, limit)
    if data.startswith(_UTF_16) or b"\0" in data:
        raise ValueError("it is UTF-16 or binary: save it as UTF-8")
    if data.startswith(LFS_POINTER):
        raise ValueError("it is a Git LFS pointer: type git lfs pull")
    return data.decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file.

    Raises:
        DataError: It cannot be read, is not text, or as in `parse_json`.
    """
    try:
        text = read_text(path, MAX_JSON)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    return parse_json(text, str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return unique
