"""Checksums of the ledger's records. A record is verified before it is used.

The checksum is the last column of every table. It covers the other values with their Python types, so that a number
that is read back as text does not match.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table

from pipeline.errors import masked

CHECKSUM = "checksum"
"""Name of the column."""
LATER = "later"
"""Key of a table's `info`: how many columns before the checksum were added later. While all of them are 0, the checksum
leaves them out, so that records of earlier versions keep theirs."""
UNSEALED = 0
"""Placeholder in a new record until its number, which the database assigns, is known."""
RESTORE = "restore a backup of the ledger, or use another (storage=DIR, budget.global.url=URL); rows stay readable"
"""Advice in messages about a damaged ledger."""


class DamagedRecord(Exception):
    """A record does not match its checksum, or is missing. `Database` raises it as a LedgerError."""


_blake2b, _bytes = hashlib.blake2b, int.from_bytes


def checksum(table: Table, values: Sequence[Any]) -> int:
    """Return the checksum of a record's values, in the order of the columns: a signed integer of 64 bits."""
    later = table.info.get(LATER, 0)
    if later and not any(values[-later:]):
        values = values[:-later]
    text = ascii(tuple(values)).encode()  # ascii, not repr: what repr escapes depends on Python's version
    return _bytes(_blake2b(text, digest_size=8, person=table.name.encode()).digest(), "big", signed=True)


def intact(table: Table, record: Sequence[Any]) -> bool:
    """Return whether a record of all columns matches its checksum."""
    return bool(checksum(table, record[:-1]) == record[-1])


def verified(table: Table, record: Any) -> Any:
    """Return the record. Raises DamagedRecord when it does not match its checksum."""
    if checksum(table, record[:-1]) != record[-1]:
        raise DamagedRecord(f"record {label(table, record)}")
    return record


def label(table: Table, record: Sequence[Any]) -> str:
    """Name a record by its table and key, for messages. The key itself may be damaged."""
    columns = list(table.columns)[-len(record) :]  # records of the refund table come without their number
    keys = [(c.name, value) for c, value in zip(columns, record, strict=True) if c.name in _KEYS]
    return masked(f"{table.name} " + " ".join(f"{name}={str(value)[:60]}" for name, value in keys))


_KEYS = {"name", "no", "storage", "trial", "trial_no", "call", "digest", "account", "purse", "call_id"}
