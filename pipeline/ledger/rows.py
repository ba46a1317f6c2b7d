"""Rows of the ledger's tables inside a transaction: read and locked, changed as Python values, written back.

Every row is verified against its checksum when it is read, and gets a new checksum when it is written.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import bindparam, select

from methods.base import Bill
from pipeline.budget import BUDGETED_PHASES, UNITS, Limits, Phase, total
from pipeline.errors import BudgetExceeded
from pipeline.ledger.checksum import CHECKSUM, UNSEALED, DamagedRecord, checksum, verified
from pipeline.ledger.records import Charge
from pipeline.ledger.schema import ACCOUNT, BUCKETS, CHARGE, MEMBER, REFUND, TRIAL, metadata

T = TypeVar("T")
Key = tuple[str, str]
"""storage, trial"""
ChargeKey = tuple[int, int, str]
"""trial number, call number, digest"""
_bill = lru_cache(1024)(Bill)  # most bills of a trial are 0, and those of its seeds are equal
CHUNK = 32
"""Number of (trial, call) pairs looked up by one statement (see _CHARGES)."""


@dataclass
class TrialRow:
    """A row of the trial table."""

    no: int
    storage: str
    trial: str
    open: bool
    allotment: Limits
    buckets: dict[str, Bill]

    @classmethod
    def of(cls, record: Sequence[Any]) -> TrialRow:
        """Parse a record. Raises DamagedRecord when it does not match its checksum."""
        return cls._parse(verified(TRIAL, record))

    @classmethod
    def new(cls, record: Sequence[Any]) -> TrialRow:
        """Parse a record that may have been inserted in this transaction, and then has no checksum yet."""
        return cls._parse(record) if record[-1] == UNSEALED else cls.of(record)

    @classmethod
    def _parse(cls, record: Sequence[Any]) -> TrialRow:
        no, storage, trial, is_open, requests, images, *counts = record[:-1]
        starts = range(0, len(counts), len(UNITS))
        buckets = {name: _bill(*counts[i : i + len(UNITS)]) for name, i in zip(BUCKETS, starts, strict=True)}
        return cls(no, storage, trial, is_open, Limits(requests, images), buckets)

    @property
    def values(self) -> tuple[Any, ...]:
        """The record's values in the order of the columns, without the checksum."""
        key, limits = (self.no, self.storage, self.trial), (self.allotment.requests, self.allotment.images)
        values: list[Any] = [*key, self.open, *limits]
        for name in BUCKETS:
            values += _counts(self.buckets[name])
        return tuple(values)

    @property
    def paid(self) -> Bill:
        """Bill of adapt and validate, which the allotment pays for."""
        return total(self.buckets[phase.value] for phase in BUDGETED_PHASES)

    @property
    def bills(self) -> dict[Phase, Bill]:
        """Bill by phase, with both kinds of replay added up."""
        bills = {phase: self.buckets[phase.value] for phase in Phase}
        bills[Phase.REPLAY] += self.buckets["replay_unlimited"]
        return bills

    def refusal(self, bill: Bill) -> BudgetExceeded | None:
        """Return why the allotment cannot pay a bill, or None; a closed trial has nothing left."""
        spent = self.paid
        limits = self.allotment if self.open else Limits(spent.requests, spent.images)
        return _refusal(f"trial {self.trial}", limits, spent, bill)


@dataclass
class AccountRow:
    """A row of the account table: what is held for its open trials, and what is spent."""

    name: str
    limits: Limits
    held: Bill
    spent: Bill

    @classmethod
    def of(cls, record: Sequence[Any]) -> AccountRow:
        """Parse a record. Raises DamagedRecord when it does not match its checksum."""
        name, requests, images, held_requests, held_images, *spent = verified(ACCOUNT, record)[:-1]
        return cls(name, Limits(requests, images), Bill(held_requests, held_images), Bill(*spent))

    @property
    def values(self) -> tuple[Any, ...]:
        """The record's values in the order of the columns, without the checksum."""
        limits, held = (self.limits.requests, self.limits.images), (self.held.requests, self.held.images)
        return (self.name, *limits, *held, *_counts(self.spent))

    def refusal(self, bill: Bill) -> BudgetExceeded | None:
        """Return why a bill cannot be committed, or None."""
        return _refusal(self.name, self.limits, self.held + self.spent, bill)


def _counts(bill: Bill) -> tuple[int, int, int, int]:
    return bill.requests, bill.images, bill.prompts, bill.outputs


def sealed(table: sa.Table, values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the values by column, with their checksum."""
    return dict(zip(_NAMES[table.name], (*values, checksum(table, values)), strict=True))


def _refusal(account: str, limits: Limits, spent: Bill, bill: Bill) -> BudgetExceeded | None:
    unit = limits.exceeded_unit(spent, bill)
    if unit is None:
        return None
    return BudgetExceeded(account, unit, getattr(bill, unit), getattr(spent, unit), getattr(limits, unit))


# Pairs are selected by (a in ...) and (b in ...), and rows of other pairs are dropped afterwards: SQLite scans the
# whole table for (a, b) in ((1, 2), ...).
_TRIALS = (
    select(TRIAL)
    .where(TRIAL.c.storage.in_(bindparam("storages", expanding=True)))
    .where(TRIAL.c.trial.in_(bindparam("trials", expanding=True)))
    .order_by(TRIAL.c.no)
    .with_for_update()
)
_CHARGES = select(CHARGE).where(
    CHARGE.c.trial_no.in_(bindparam("nos", expanding=True)), CHARGE.c.call.in_(bindparam("calls", expanding=True))
)


def lock_trials(db: sa.Connection, keys: Collection[Key], insert_new: sa.Insert | None = None) -> dict[Key, TrialRow]:
    """Lock and return trials. With `insert_new`, missing ones are inserted as closed, with an allotment of 0."""
    trials = {(row[1], row[2]): TrialRow.of(row) for row in _select_trials(db, keys)}
    missing = sorted(key for key in keys if key not in trials)
    if insert_new is None or not missing:
        return trials
    blank = {"open": False, "limit_requests": 0, "limit_images": 0, CHECKSUM: UNSEALED}
    db.execute(insert_new, [{"storage": storage, "trial": trial, **blank} for storage, trial in missing])
    inserted = {(row[1], row[2]): row for row in _select_trials(db, missing)}
    new = {key: TrialRow.new(row) for key, row in inserted.items()}
    save_trials(db, [new[key] for key, row in inserted.items() if row[-1] == UNSEALED])
    return trials | new


def _select_trials(db: sa.Connection, keys: Collection[Key]) -> list[Sequence[Any]]:
    if not keys:
        return []
    parameters = {"storages": list({storage for storage, _ in keys}), "trials": list({trial for _, trial in keys})}
    return [row for row in db.execute(_TRIALS, parameters) if (row[1], row[2]) in keys]


def all_trials(db: sa.Connection) -> dict[int, TrialRow]:
    """Return all trials by number, in the order of their first use, without locks."""
    return {row[0]: TrialRow.of(row) for row in db.execute(select(TRIAL).order_by(TRIAL.c.no))}


def find_trial(db: sa.Connection, storage: str, trial: str) -> TrialRow | None:
    """Return a trial, or None, without a lock."""
    row = db.execute(select(TRIAL).where(TRIAL.c.storage == storage, TRIAL.c.trial == trial)).one_or_none()
    return None if row is None else TrialRow.of(row)


def lock_accounts(db: sa.Connection, names: Collection[str]) -> dict[str, AccountRow]:
    """Lock and return the accounts with these names."""
    if not names:
        return {}
    query = select(ACCOUNT).where(ACCOUNT.c.name.in_(sorted(names))).order_by(ACCOUNT.c.name).with_for_update()
    return {row[0]: AccountRow.of(row) for row in db.execute(query)}


def lock_payers(db: sa.Connection, trials: Iterable[TrialRow]) -> dict[int, list[AccountRow]]:
    """Lock and return the accounts of each trial, by trial number. Raises DamagedRecord when one is missing."""
    joined = members(db, {trial.no for trial in trials})
    accounts = lock_accounts(db, {name for names in joined.values() for name in names})
    for names in joined.values():
        for name in names - accounts.keys():
            raise DamagedRecord(f"account {name!r}, to which trials are charged, is missing")
    return {no: [accounts[name] for name in sorted(names)] for no, names in joined.items()}


def members(db: sa.Connection, nos: Iterable[int]) -> dict[int, set[str]]:
    """Return the names of the accounts of each trial, by trial number."""
    names: dict[int, set[str]] = defaultdict(set)
    for some in _chunks(sorted(nos)):
        for row in db.execute(select(MEMBER).where(MEMBER.c.trial_no.in_(some))):
            no, name, _ = verified(MEMBER, row)
            names[no].add(name)
    return names


def member_columns(no: int, account: str) -> dict[str, Any]:
    """Return a record that makes a trial a member of an account (the trial is paid from it)."""
    return sealed(MEMBER, (no, account))


def find_charges(db: sa.Connection, calls: Collection[tuple[int, int]]) -> dict[ChargeKey, tuple[Bill, bool]]:
    """Return (bill, diverged) of each charge with one of these (trial number, call number)."""
    charges = {}
    for some in _chunks(sorted(calls)):
        parameters = {"nos": list({no for no, _ in some}), "calls": list({call for _, call in some})}
        for row in db.execute(_CHARGES, parameters):
            if (row[0], row[1]) in calls:
                no, call, digest, _, diverged, *counts, _, _ = verified(CHARGE, row)
                charges[no, call, digest] = (Bill(*counts), diverged)
    return charges


def charge_columns(no: int, charge: Charge, diverged: bool) -> dict[str, Any]:
    """Return a new record of the charge table."""
    values = (no, charge.call, charge.digest, charge.phase.value, diverged, *_counts(charge.bill), time.time())
    return sealed(CHARGE, values)


def refund_columns(charge: Sequence[Any]) -> dict[str, Any]:
    """Return the record of the refund table for a verified record of the charge table."""
    values = (*charge[:-1], time.time())
    return dict(zip(_NAMES[REFUND.name][1:], (*values, checksum(REFUND, values)), strict=True))


def parse_charge(record: Sequence[Any]) -> tuple[int, int, str, Phase, bool, Bill, float]:
    """Parse a record into (trial number, call, digest, phase, diverged, bill, time). Raises DamagedRecord."""
    no, call, digest, phase, diverged, *counts, at, _ = verified(CHARGE, record)
    return no, call, digest, Phase(phase), diverged, Bill(*counts), at


_NAMES = {table.name: [c.name for c in table.columns] for table in metadata.sorted_tables}
_SAVE_TRIAL = (
    sa.update(TRIAL)
    .where(TRIAL.c.no == bindparam("key"))
    .values({name: bindparam(name) for name in _NAMES[TRIAL.name] if name not in ("no", "storage", "trial")})
)
_SAVE_ACCOUNT = (
    sa.update(ACCOUNT)
    .where(ACCOUNT.c.name == bindparam("key"))
    .values({name: bindparam(name) for name in _NAMES[ACCOUNT.name] if name != "name"})
)


def save_trials(db: sa.Connection, rows: Iterable[TrialRow]) -> None:
    """Write trials back. They were locked when they were read, so no other change is overwritten."""
    records = [sealed(TRIAL, row.values) for row in rows]
    for record in records:
        record["key"] = record.pop("no")
        del record["storage"], record["trial"]  # part of an index, and never changed here
    if records:
        db.execute(_SAVE_TRIAL, records)


def save_accounts(db: sa.Connection, rows: Iterable[AccountRow]) -> None:
    """Write accounts back, which were locked when they were read."""
    records = [sealed(ACCOUNT, row.values) for row in rows]
    for record in records:
        record["key"] = record.pop("name")
    if records:
        db.execute(_SAVE_ACCOUNT, records)


def save_payers(db: sa.Connection, payers: Mapping[int, Sequence[AccountRow]]) -> None:
    """Write back the accounts that `lock_payers` returned."""
    save_accounts(db, {account.name: account for some in payers.values() for account in some}.values())


def _chunks(items: list[T]) -> Iterable[list[T]]:
    return (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
