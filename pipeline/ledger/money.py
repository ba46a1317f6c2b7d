"""Money in the ledger: payments for the HTTP calls that are sent to a remote endpoint, in micro-dollars.

A purse is the money of an account: of a sweep's ceiling, or of a named global budget. A storage that spends from it has
a part, and reserves on it what its plan needs:

    committed = sum over storages of max(reserved, settled prices + upper bounds of calls without a price)  <=  limit

Before an HTTP call is sent, its upper bound is paid from every purse of the storage, or from none; when it is answered,
the payment is settled at its price. A call that never is (its process died, its answer was lost) stays paid with its
upper bound, since it may have been billed. A call has one id, which is paid once; a repeated call has another id.

Every decision is made inside one SQL transaction on the stored state, as in ledger.py, so any process may die at any
time. Purses are locked first, by name.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy import select

from pipeline.budget import LARGEST
from pipeline.errors import USD, BudgetExceeded, LedgerError, dollars
from pipeline.ledger.checksum import DamagedRecord, intact, label, verified
from pipeline.ledger.records import PaymentRecord, PurseRecord
from pipeline.ledger.rows import sealed
from pipeline.ledger.schema import PART, PAYMENT, PURSE, Database


@dataclass
class _Part:
    """A row of the part table: what one storage reserved and paid from a purse."""

    storage: str
    purse: str
    reserved: int = 0
    settled: int = 0
    unsettled: int = 0

    @property
    def values(self) -> tuple[str, str, int, int, int]:
        return self.storage, self.purse, self.reserved, self.settled, self.unsettled

    @property
    def spent(self) -> int:
        return self.settled + self.unsettled

    @property
    def committed(self) -> int:
        return max(self.reserved, self.spent)


class Money:
    """The purses and payments of a ledger."""

    def __init__(self, store: Database) -> None:
        self._store = store

    def open(self, storage: str, name: str, limit: int | None) -> int | None:
        """Create a purse unless it exists, and let a storage pay from it; return the limit that it has.

        All earlier payments of the storage count as paid from it.
        """
        with self._store.write() as db:
            db.execute(self._store.insert_new(PURSE), sealed(PURSE, (name, limit)))
            present = _lock(db, [name])[name]
            settled, unsettled = _sums(_payments(db, storage))
            part = _Part(storage, name, 0, settled, unsettled)
            db.execute(self._store.insert_new(PART), sealed(PART, part.values))
            return present

    def limit(self, name: str) -> int | None:
        """Return the limit of a purse; None without a limit, and for one that does not exist."""
        with self._store.read() as db:
            return next((purse.limit for purse in _records(db) if purse.name == name), None)

    def set_limit(self, name: str, limit: int | None) -> None:
        """Change the limit of a purse, which is created if it does not exist.

        Raises:
            LedgerError: more is committed. Nothing is changed.
        """
        with self._store.write() as db:
            db.execute(self._store.insert_new(PURSE), sealed(PURSE, (name, limit)))
            _lock(db, [name])
            committed = sum(part.committed for part in _parts(db, [name])[name])
            if limit is not None and committed > limit:
                raise LedgerError(
                    f"account {name!r} cannot be limited to {dollars(limit)}: {dollars(committed)} are spent or "
                    "reserved already"
                )
            db.execute(sa.update(PURSE).where(PURSE.c.name == name).values(**sealed(PURSE, (name, limit))))

    def reserve(self, storage: str, amount: int) -> None:
        """Reserve an amount beyond what a storage has spent, on each of its purses or on none; 0 releases.

        An earlier reservation of the storage is replaced.

        Raises:
            BudgetExceeded: a purse cannot pay for it.
        """
        with self._store.write() as db:
            limits, parts = self._locked(db, storage)
            for mine, others in parts:
                mine.reserved = mine.spent + amount if amount else 0
                _check(mine, others, limits[mine.purse], amount)
            _save(db, (mine for mine, _ in parts))

    def pay(self, storage: str, trial: str, call_id: str, upper: int) -> None:
        """Pay the upper bound of a call's price. A call that was paid before is not paid again.

        Args:
            storage: the storage that pays.
            trial: the trial's name in the ledger; empty for calls of no trial.
            call_id: unique for each call that is sent.
            upper: the upper bound in micro-dollars.

        Raises:
            BudgetExceeded: a purse cannot pay; the call must not be sent.
            LedgerError: the storage has no purse, or the call was paid with another amount.
        """
        if not 0 <= upper <= LARGEST:
            raise LedgerError(f"payment {call_id!r}: {upper} micro-dollars: expected 0 to {LARGEST}")
        with self._store.write() as db:
            limits, parts = self._locked(db, storage)
            if (known := _find(db, storage, call_id)) is not None:
                if known.upper != upper:
                    raise LedgerError(f"call {call_id} was paid with {known.upper}, and is repeated with {upper}")
                return
            for mine, others in parts:
                mine.unsettled += upper
                _check(mine, others, limits[mine.purse], upper)
            values = (storage, call_id, trial, upper, None, time.time(), None)
            db.execute(sa.insert(PAYMENT), sealed(PAYMENT, values))
            _save(db, (mine for mine, _ in parts))

    def settle(self, storage: str, call_id: str, price: int) -> None:
        """Replace the upper bound of a call by its price. Settling it again at the same price does nothing.

        Raises:
            LedgerError: the call was not paid, was settled at another price, or costs more than its upper bound.
        """
        with self._store.write() as db:
            _, parts = self._locked(db, storage)
            payment = _find(db, storage, call_id)
            if payment is None:
                raise LedgerError(f"call {call_id} cannot be settled: it was not paid")
            if payment.price is not None:
                if payment.price != price:
                    raise LedgerError(f"call {call_id} was settled at {payment.price}, and is repeated with {price}")
                return
            if not 0 <= price <= payment.upper:
                raise LedgerError(f"call {call_id} cannot be settled at {price}: expected 0 to {payment.upper}")
            for mine, _ in parts:
                mine.unsettled -= payment.upper
                mine.settled += price
            settled = replace(payment, price=price, settled_at=time.time())
            columns = sealed(PAYMENT, _payment_values(storage, settled))
            key = (PAYMENT.c.storage == storage, PAYMENT.c.call_id == call_id)
            db.execute(sa.update(PAYMENT).where(*key).values(**columns))
            _save(db, (mine for mine, _ in parts))

    def purses(self) -> list[PurseRecord]:
        """Return all purses by name."""
        with self._store.read() as db:
            return _records(db)

    def payments(self, storage: str) -> list[PaymentRecord]:
        """Return the payments of a storage in the order of their times."""
        with self._store.read() as db:
            return sorted(_payments(db, storage), key=lambda payment: payment.at)

    def _locked(self, db: sa.Connection, storage: str) -> tuple[dict[str, int | None], list[tuple[_Part, int]]]:
        """Lock the purses of a storage; return limits by name, and (its part, committed by others) of each purse."""
        mine = (PART.c.storage == storage,)
        names = [row[0] for row in db.execute(select(PART.c.purse).where(*mine))]
        if not names:
            raise LedgerError(f"storage {storage} has no money in the ledger {self._store.name}")
        limits, found = _lock(db, names), list[tuple[_Part, int]]()
        for parts in _parts(db, names).values():
            others = sum(part.committed for part in parts if part.storage != storage)
            found += [(part, others) for part in parts if part.storage == storage]
        return limits, found


def _check(part: _Part, others: int, limit: int | None, asked: int) -> None:
    """Raise BudgetExceeded if the changed part exceeds the limit of its purse."""
    if limit is not None and others + part.committed > limit:
        raise BudgetExceeded(part.purse, USD, asked, others + part.committed - asked, limit)


def _lock(db: sa.Connection, names: Iterable[str]) -> dict[str, int | None]:
    """Lock purses; return their limits. Raises DamagedRecord when one is missing."""
    wanted = sorted(names)
    rows = db.execute(select(PURSE).where(PURSE.c.name.in_(wanted)).order_by(PURSE.c.name).with_for_update())
    limits = {row[0]: verified(PURSE, row)[1] for row in rows}
    for name in wanted:
        if name not in limits:
            raise DamagedRecord(f"purse {name!r}, from which storages pay, is missing")
    return limits


def _parts(db: sa.Connection, names: Iterable[str] | None = None) -> dict[str, list[_Part]]:
    """Return the parts of purses, of all without names."""
    condition = () if names is None else (PART.c.purse.in_(sorted(names)),)
    parts: dict[str, list[_Part]] = defaultdict(list)
    for row in db.execute(select(PART).where(*condition)):
        part = _Part(*verified(PART, row)[:-1])
        parts[part.purse].append(part)
    return parts


def _save(db: sa.Connection, parts: Iterable[_Part]) -> None:
    for part in parts:
        key = (PART.c.storage == part.storage, PART.c.purse == part.purse)
        db.execute(sa.update(PART).where(*key).values(**sealed(PART, part.values)))


def _payments(db: sa.Connection, storage: str) -> Iterator[PaymentRecord]:
    for row in db.execute(select(PAYMENT).where(PAYMENT.c.storage == storage)):
        yield PaymentRecord(*verified(PAYMENT, row)[1:-1])


def _find(db: sa.Connection, storage: str, call_id: str) -> PaymentRecord | None:
    key = (PAYMENT.c.storage == storage, PAYMENT.c.call_id == call_id)
    row = db.execute(select(PAYMENT).where(*key)).one_or_none()
    return None if row is None else PaymentRecord(*verified(PAYMENT, row)[1:-1])


def _payment_values(storage: str, payment: PaymentRecord) -> tuple[object, ...]:
    p = payment
    return storage, p.call_id, p.trial, p.upper, p.price, p.at, p.settled_at


def _sums(payments: Iterable[PaymentRecord]) -> tuple[int, int]:
    """Return the sums of prices, and of the upper bounds of payments without a price."""
    settled = unsettled = 0
    for payment in payments:
        settled += payment.price or 0
        unsettled += payment.upper if payment.price is None else 0
    return settled, unsettled


def _records(db: sa.Connection) -> list[PurseRecord]:
    parts = _parts(db)
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
    purses = {purse.name: purse for purse in _records(db)}
    sums: dict[str, tuple[int, int]] = {}
    for name, parts in _parts(db).items():
        if name not in purses:
            yield f"purse {name!r}, from which storages pay, is missing"
            continue
        for part in parts:
            if part.storage not in sums:
                sums[part.storage] = _sums(_payments(db, part.storage))
            if (part.settled, part.unsettled) != sums[part.storage]:
                yield (
                    f"account {name!r}: {dollars(part.settled)} and {dollars(part.unsettled)} unsettled are stored for "
                    f"storage {part.storage}, {' and '.join(map(dollars, sums[part.storage]))} by its payments"
                )
        limit, committed = purses[name].limit, sum(part.committed for part in parts)
        if limit is not None and committed > limit:
            yield f"account {name!r}: {dollars(committed)} are spent or reserved of {dollars(limit)}"
    for storage in db.execute(select(PAYMENT.c.storage).distinct()).scalars():
        if storage not in sums:
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
