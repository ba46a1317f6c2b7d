"""Checksums of the ledger's records: each record stores a digest of its other values, verified before it is used.

The digest is the last column of every table. It covers the values as Python objects, types included, so that a number
that reads back as text is as wrong as another number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table

from pipeline.errors import masked

CHECKSUM = "checksum"
"""Name of the column."""
UNSEALED = 0
"""Checksum of a record between its insertion and the read of the number that the database gave it."""
RESTORE = "restore a backup of the ledger, or use another (storage=DIR, budget.global.url=URL); rows stay readable"
"""What the user can do about a damaged ledger."""


class DamagedRecord(Exception):
    """A record does not match its checksum, or is absent; the store raises it again as a LedgerError with its name."""


_blake2b, _bytes = hashlib.blake2b, int.from_bytes


def checksum(table: Table, values: Sequence[Any]) -> int:
    """Digest of a record's values, in the order of the columns, as a signed integer of 64 bits."""
    text = ascii(tuple(values)).encode()  # ascii, not repr: what repr escapes depends on Python's version
    return _bytes(_blake2b(text, digest_size=8, person=table.name.encode()).digest(), "big", signed=True)


def intact(table: Table, record: Sequence[Any]) -> bool:
    """Whether a record, as read with all of its columns, matches its checksum."""
    return bool(checksum(table, record[:-1]) == record[-1])


def verified(table: Table, record: Any) -> Any:
    """Return the record. Raises DamagedRecord when it does not match its checksum."""
    if checksum(table, record[:-1]) != record[-1]:
        raise DamagedRecord(f"record {label(table, record)}")
    return record


def label(table: Table, record: Sequence[Any]) -> str:
    """Name a record by its table and key, for messages; the key itself may be what is damaged."""
    columns = list(table.columns)[-len(record) :]  # the records of the refund table come without their number
    keys = [(c.name, value) for c, value in zip(columns, record, strict=True) if c.name in _KEYS]
    return masked(f"{table.name} " + " ".join(f"{name}={str(value)[:60]}" for name, value in keys))


_KEYS = {"name", "no", "storage", "trial", "trial_no", "call", "digest", "account"}
