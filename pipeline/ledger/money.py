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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace

import sqlalchemy as sa
from sqlalchemy import select

from pipeline.budget import LARGEST
from pipeline.errors import USD, BudgetExceeded, EndpointStopped, LedgerError, dollars
from pipeline.ledger import money_rows
from pipeline.ledger.money_rows import Part
from pipeline.ledger.records import PaymentRecord, PurseRecord
from pipeline.ledger.rows import sealed
from pipeline.ledger.schema import PART, PAYMENT, PURSE, Database


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
            present = money_rows.lock(db, [name])[name]
            settled, unsettled = money_rows.sums(money_rows.payments_of(db, storage))
            part = Part(storage, name, 0, settled, unsettled)
            db.execute(self._store.insert_new(PART), sealed(PART, part.values))
            return present

    def limit(self, name: str) -> int | None:
        """Return the limit of a purse; None without a limit, and for one that does not exist."""
        with self._store.read() as db:
            return next((purse.limit for purse in money_rows.records(db) if purse.name == name), None)

    def set_limit(self, name: str, limit: int | None) -> None:
        """Change the limit of a purse, which is created if it does not exist.

        Raises:
            LedgerError: more is committed. Nothing is changed.
        """
        with self._store.write() as db:
            db.execute(self._store.insert_new(PURSE), sealed(PURSE, (name, limit)))
            money_rows.lock(db, [name])
            committed = sum(part.committed for part in money_rows.parts_of(db, [name])[name])
            if limit is not None and committed > limit:
                raise LedgerError(
                    f"account {name!r} cannot be limited to {dollars(limit)}: {dollars(committed)} are spent or "
                    "reserved already"
                )
            db.execute(sa.update(PURSE).where(PURSE.c.name == name).values(**sealed(PURSE, (name, limit))))

    def release(self, storage: str) -> None:
        """Release what a storage has reserved. Does nothing for a storage without money."""
        with self._store.write() as db:
            if db.execute(select(PART.c.purse).where(PART.c.storage == storage)).first() is None:
                return
            _, parts = self._locked(db, storage)
            for mine, _ in parts:
                mine.reserved = 0
            money_rows.save(db, (mine for mine, _ in parts))

    def reserve(self, storage: str, amount: int) -> None:
        """Reserve an amount beyond what a storage has spent, on each of its purses or on none.

        An earlier reservation of the storage is replaced.

        Raises:
            BudgetExceeded: a purse cannot pay for it.
        """
        with self._store.write() as db:
            limits, parts = self._locked(db, storage)
            for mine, others in parts:
                mine.reserved = mine.spent + amount
                _check(mine, others, limits[mine.purse], amount)
            money_rows.save(db, (mine for mine, _ in parts))

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
            if (known := money_rows.find(db, storage, call_id)) is not None:
                if known.upper != upper:
                    raise LedgerError(f"call {call_id} was paid with {known.upper}, and is repeated with {upper}")
                return
            for mine, others in parts:
                mine.unsettled += upper
                _check(mine, others, limits[mine.purse], upper)
            values = (storage, call_id, trial, upper, None, time.time(), None)
            db.execute(sa.insert(PAYMENT), sealed(PAYMENT, values))
            money_rows.save(db, (mine for mine, _ in parts))

    def settle(self, storage: str, call_id: str, price: int) -> None:
        """Replace the upper bound of a call by its price. Settling it again at the same price does nothing.

        Raises:
            LedgerError: the call was not paid, was settled at another price, or costs more than its upper bound.
        """
        with self._store.write() as db:
            _, parts = self._locked(db, storage)
            payment = money_rows.find(db, storage, call_id)
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
            columns = sealed(PAYMENT, (storage, *astuple(settled)))
            key = (PAYMENT.c.storage == storage, PAYMENT.c.call_id == call_id)
            db.execute(sa.update(PAYMENT).where(*key).values(**columns))
            money_rows.save(db, (mine for mine, _ in parts))

    def purses(self) -> list[PurseRecord]:
        """Return all purses by name."""
        with self._store.read() as db:
            return money_rows.records(db)

    def payments(self, storage: str) -> list[PaymentRecord]:
        """Return the payments of a storage in the order of their times."""
        with self._store.read() as db:
            return sorted(money_rows.payments_of(db, storage), key=lambda payment: payment.at)

    def _locked(self, db: sa.Connection, storage: str) -> tuple[dict[str, int | None], list[tuple[Part, int]]]:
        """Lock the purses of a storage; return limits by name, and (its part, committed by others) of each purse."""
        mine = (PART.c.storage == storage,)
        names = [row[0] for row in db.execute(select(PART.c.purse).where(*mine))]
        if not names:
            raise LedgerError(f"storage {storage} has no money in the ledger {self._store.name}")
        limits, found = money_rows.lock(db, names), list[tuple[Part, int]]()
        for parts in money_rows.parts_of(db, names).values():
            others = sum(part.committed for part in parts if part.storage != storage)
            found += [(part, others) for part in parts if part.storage == storage]
        return limits, found


@contextmanager
def refused_as_stop() -> Iterator[None]:
    """Raise a refused payment as EndpointStopped: no trial can pay, so the run ends."""
    try:
        yield
    except BudgetExceeded as error:
        raise EndpointStopped(f"{error}; raise the limit and run the same command, which continues") from error


def _check(part: Part, others: int, limit: int | None, asked: int) -> None:
    """Raise BudgetExceeded if the changed part exceeds the limit of its purse."""
    if limit is not None and others + part.committed > limit:
        raise BudgetExceeded(part.purse, USD, asked, others + part.committed - asked, limit)
