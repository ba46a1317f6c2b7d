"""Files that ship with the package and that a number depends on: verified against the digests that ship beside them."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.data.source import file_sha256
from pipeline.errors import DataError

DIGESTS = "digests.json"
"""In each folder of package data: SHA-256 by file name."""


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
    """What to type to restore a file of the package."""
    return f"pip install --force-reinstall farebox, or in a clone git checkout {path}"
