"""Rows of the ledger's tables of money inside a transaction: read, locked, written, verified (see money.py)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import select

from pipeline.errors import dollars
from pipeline.ledger.checksum import DamagedRecord, intact, label, verified
from pipeline.ledger.records import PaymentRecord, PurseRecord
from pipeline.ledger.rows import sealed
from pipeline.ledger.schema import PART, PAYMENT, PURSE


@dataclass
class Part:
    """A row of the part table: what one storage reserved and paid from a purse."""

    storage: str
    purse: str
    reserved: int = 0
    settled: int = 0
    unsettled: int = 0

    @property
    def values(self) -> tuple[str, str, int, int, int]:
        """The record's values in the order of the columns, without the checksum."""
        return self.storage, self.purse, self.reserved, self.settled, self.unsettled

    @property
    def spent(self) -> int:
        """Prices of the calls whose price is known, and upper bounds of the others."""
        return self.settled + self.unsettled

    @property
    def committed(self) -> int:
        """What the storage takes from the purse."""
        return max(self.reserved, self.spent)


def lock(db: sa.Connection, names: Iterable[str]) -> dict[str, int | None]:
    """Lock purses; return their limits. Raises DamagedRecord when one is missing."""
    wanted = sorted(names)
    rows = db.execute(select(PURSE).where(PURSE.c.name.in_(wanted)).order_by(PURSE.c.name).with_for_update())
    limits = {row[0]: verified(PURSE, row)[1] for row in rows}
    for name in wanted:
        if name not in limits:
            raise DamagedRecord(f"purse {name!r}, from which storages pay, is missing")
    return limits


def parts_of(db: sa.Connection, names: Iterable[str] | None = None) -> dict[str, list[Part]]:
    """Return the parts of purses, of all without names."""
    condition = () if names is None else (PART.c.purse.in_(sorted(names)),)
    parts: dict[str, list[Part]] = defaultdict(list)
    for row in db.execute(select(PART).where(*condition)):
        part = Part(*verified(PART, row)[:-1])
        parts[part.purse].append(part)
    return parts


def save(db: sa.Connection, parts: Iterable[Part]) -> None:
    """Write parts back. Their purses were locked when they were read."""
    for part in parts:
        key = (PART.c.storage == part.storage, PART.c.purse == part.purse)
        db.execute(sa.update(PART).where(*key).values(**sealed(PART, part.values)))


def payments_of(db: sa.Connection, storage: str) -> Iterator[PaymentRecord]:
    """Yield the payments of a storage."""
    for row in db.execute(select(PAYMENT).where(PAYMENT.c.storage == storage)):
        yield PaymentRecord(*verified(PAYMENT, row)[1:-1])


def find(db: sa.Connection, storage: str, call_id: str) -> PaymentRecord | None:
    """Return the payment of a call, or None."""
    key = (PAYMENT.c.storage == storage, PAYMENT.c.call_id == call_id)
    row = db.execute(select(PAYMENT).where(*key)).one_or_none()
    return None if row is None else PaymentRecord(*verified(PAYMENT, row)[1:-1])


def sums(payments: Iterable[PaymentRecord]) -> tuple[int, int]:
    """Return the sums of prices, and of the upper bounds of payments without a price."""
    settled = unsettled = 0
    for payment in payments:
        settled += payment.price or 0
        unsettled += payment.upper if payment.price is None else 0
    return settled, unsettled


def records(db: sa.Connection) -> list[PurseRecord]:
    """Return all purses by name."""
    parts = parts_of(db)
    return [
        PurseRecord(
            name,
            limit,
            sum(part.settled for part in parts[name]),
            sum(part.unsettled for part in parts[name]),
            sum(part.committed - part.spent for part in parts[name]),
        )
        for name, limit, _ in (verified(PURSE, row) for row in db.execute(select(PURSE).order_by(PURSE.c.name)))
    ]


def problems(db: sa.Connection) -> Iterator[str]:
    """Yield a line for each damaged record of money, or else for each sum that is wrong; see Ledger.verify."""
    damaged = False
    for table in (PURSE, PART, PAYMENT):
        for row in db.execute(select(table)):
            if not intact(table, row):
                damaged = True
                yield f"damaged record {label(table, row)}"
    if not damaged:
        yield from _wrong_sums(db)


def _wrong_sums(db: sa.Connection) -> Iterator[str]:
    purses = {purse.name: purse for purse in records(db)}
    paid: dict[str, tuple[int, int]] = {}
    for name, parts in parts_of(db).items():
        if name not in purses:
            yield f"purse {name!r}, from which storages pay, is missing"
            continue
        for part in parts:
            if part.storage not in paid:
                paid[part.storage] = sums(payments_of(db, part.storage))
            if (part.settled, part.unsettled) != paid[part.storage]:
                yield (
                    f"account {name!r}: {dollars(part.settled)} and {dollars(part.unsettled)} unsettled are stored for "
                    f"storage {part.storage}, {' and '.join(map(dollars, paid[part.storage]))} by its payments"
                )
        limit, committed = purses[name].limit, sum(part.committed for part in parts)
        if limit is not None and committed > limit:
            yield f"account {name!r}: {dollars(committed)} are spent or reserved of {dollars(limit)}"
    for storage in db.execute(select(PAYMENT.c.storage).distinct()).scalars():
        if storage not in paid:
            yield f"payments of storage {storage}, which has no purse"


def rename(db: sa.Connection, old: str, new: str, purses: Mapping[str, str]) -> None:
    """Change a storage's id, and names of purses (old name to new); see Ledger.rename_storage."""
    for row in db.execute(select(PAYMENT).where(PAYMENT.c.storage == old)).all():
        _, *values, _ = verified(PAYMENT, row)
        key = (PAYMENT.c.storage == old, PAYMENT.c.call_id == row.call_id)
        db.execute(sa.update(PAYMENT).where(*key).values(**sealed(PAYMENT, (new, *values))))
    for row in db.execute(select(PART)).all():
        storage, purse, *values, _ = verified(PART, row)
        key = (PART.c.storage == storage, PART.c.purse == purse)
        now = (new if storage == old else storage, purses.get(purse, purse), *values)
        db.execute(sa.update(PART).where(*key).values(**sealed(PART, now)))
    for before, after in purses.items():
        for row in db.execute(select(PURSE).where(PURSE.c.name == before)).all():
            renamed = sealed(PURSE, (after, verified(PURSE, row)[1]))
            db.execute(sa.update(PURSE).where(PURSE.c.name == before).values(**renamed))
