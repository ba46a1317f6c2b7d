"""The ledger's records inside a transaction: read (and locked) as values, changed in Python, written back.

Every record is verified against its checksum when it is read, and gets a new one in the statement that writes it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import bindparam, select

from methods.base import Bill
from pipeline.budget import BUDGETED_PHASES, UNITS, Limits, Phase, total
from pipeline.errors import BudgetExceeded
from pipeline.ledger.checksum import CHECKSUM, UNSEALED, DamagedRecord, checksum, verified
from pipeline.ledger.records import Charge
from pipeline.ledger.schema import ACCOUNT, BUCKETS, CHARGE, MEMBER, REFUND, STORAGE, TRIAL, metadata

T = TypeVar("T")
Key = tuple[str, str]
"""storage, trial"""
ChargeKey = tuple[int, int, str]
"""trial number, call number, digest"""
CHUNK = 32
"""Pairs of trial and call looked up by one statement (see _CHARGES)."""


@dataclass
class TrialRow:
    """A trial with its totals."""

    no: int
    storage: str
    trial: str
    open: bool
    allotment: Limits
    buckets: dict[str, Bill]

    @classmethod
    def of(cls, record: Sequence[Any]) -> TrialRow:
        """Read a whole record of the table. Raises DamagedRecord when it is damaged."""
        return cls._parse(verified(TRIAL, record))

    @classmethod
    def new(cls, record: Sequence[Any]) -> TrialRow:
        """Read a record that may have been inserted in this transaction, and so has no checksum yet."""
        return cls._parse(record) if record[-1] == UNSEALED else cls.of(record)

    @classmethod
    def _parse(cls, record: Sequence[Any]) -> TrialRow:
        no, storage, trial, is_open, requests, images, *counts = record[:-1]
        starts = range(0, len(counts), len(UNITS))
        buckets = {name: Bill(*counts[i : i + len(UNITS)]) for name, i in zip(BUCKETS, starts, strict=True)}
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
        """What the allotment has paid."""
        return total(self.buckets[phase.value] for phase in BUDGETED_PHASES)

    @property
    def bills(self) -> dict[Phase, Bill]:
        """By phase; both kinds of replay are one phase."""
        bills = {phase: self.buckets[phase.value] for phase in Phase}
        bills[Phase.REPLAY] += self.buckets["replay_unlimited"]
        return bills

    def refusal(self, asked: Bill) -> BudgetExceeded | None:
        """Why the allotment cannot pay; a settled trial has nothing left."""
        spent = self.paid
        limits = self.allotment if self.open else Limits(spent.requests, spent.images)
        return _refusal(f"trial {self.trial}", limits, spent, asked)


@dataclass
class AccountRow:
    """An account with what is held for its open trials, and spent."""

    name: str
    limits: Limits
    held: Bill
    spent: Bill

    @classmethod
    def of(cls, record: Sequence[Any]) -> AccountRow:
        """Read a whole record of the table. Raises DamagedRecord when it is damaged."""
        name, requests, images, held_requests, held_images, *spent = verified(ACCOUNT, record)[:-1]
        return cls(name, Limits(requests, images), Bill(held_requests, held_images), Bill(*spent))

    @property
    def values(self) -> tuple[Any, ...]:
        """The record's values in the order of the columns, without the checksum."""
        limits, held = (self.limits.requests, self.limits.images), (self.held.requests, self.held.images)
        return (self.name, *limits, *held, *_counts(self.spent))

    def refusal(self, asked: Bill) -> BudgetExceeded | None:
        """Why so much more cannot be committed."""
        return _refusal(self.name, self.limits, self.held + self.spent, asked)


def _counts(bill: Bill) -> tuple[int, int, int, int]:
    return bill.requests, bill.images, bill.prompts, bill.outputs


def sealed(table: sa.Table, values: tuple[Any, ...]) -> dict[str, Any]:
    """Name the values by the table's columns and add their checksum."""
    return dict(zip(_NAMES[table.name], (*values, checksum(table, values)), strict=True))


def _refusal(account: str, limits: Limits, spent: Bill, asked: Bill) -> BudgetExceeded | None:
    unit = limits.exceeded_unit(spent, asked)
    if unit is None:
        return None
    return BudgetExceeded(account, unit, getattr(asked, unit), getattr(spent, unit), getattr(limits, unit))


# Pairs are looked up as (a in ...) and (b in ...), and the few strangers that fit both are dropped: SQLite reads the
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
    """The trials with these keys; with `insert_new`, missing ones are made first: settled, with nothing allotted."""
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
    wanted = {"storages": list({storage for storage, _ in keys}), "trials": list({trial for _, trial in keys})}
    return [row for row in db.execute(_TRIALS, wanted) if (row[1], row[2]) in keys]


def all_trials(db: sa.Connection) -> dict[int, TrialRow]:
    """Every trial by its number, in the order in which they were first seen; for reading only."""
    return {row[0]: TrialRow.of(row) for row in db.execute(select(TRIAL).order_by(TRIAL.c.no))}


def find_trial(db: sa.Connection, storage: str, trial: str) -> TrialRow | None:
    """One trial, for reading only."""
    row = db.execute(select(TRIAL).where(TRIAL.c.storage == storage, TRIAL.c.trial == trial)).one_or_none()
    return None if row is None else TrialRow.of(row)


def lock_accounts(db: sa.Connection, names: Collection[str]) -> dict[str, AccountRow]:
    """The accounts with these names."""
    if not names:
        return {}
    query = select(ACCOUNT).where(ACCOUNT.c.name.in_(sorted(names))).order_by(ACCOUNT.c.name).with_for_update()
    return {row[0]: AccountRow.of(row) for row in db.execute(query)}


def lock_payers(db: sa.Connection, trials: Iterable[TrialRow]) -> dict[int, list[AccountRow]]:
    """The accounts of each trial, by trial number. Raises DamagedRecord when one of them is absent."""
    joined = members(db, {trial.no for trial in trials})
    accounts = lock_accounts(db, {name for names in joined.values() for name in names})
    for names in joined.values():
        for name in names - accounts.keys():
            raise DamagedRecord(f"account {name!r}, to which trials are charged, is absent")
    return {no: [accounts[name] for name in sorted(names)] for no, names in joined.items()}


def members(db: sa.Connection, nos: Iterable[int]) -> dict[int, set[str]]:
    """The accounts of each trial."""
    names: dict[int, set[str]] = defaultdict(set)
    for some in _chunks(sorted(nos)):
        for row in db.execute(select(MEMBER).where(MEMBER.c.trial_no.in_(some))):
            no, name, _ = verified(MEMBER, row)
            names[no].add(name)
    return names


def member_columns(no: int, account: str) -> dict[str, Any]:
    """A new record of the member table."""
    return sealed(MEMBER, (no, account))


def find_charges(db: sa.Connection, calls: Collection[tuple[int, int]]) -> dict[ChargeKey, tuple[Bill, bool]]:
    """(bill, diverged) of every charge with one of these (trial number, call number)."""
    charges = {}
    for some in _chunks(sorted(calls)):
        wanted = {"nos": list({no for no, _ in some}), "calls": list({call for _, call in some})}
        for row in db.execute(_CHARGES, wanted):
            if (row[0], row[1]) in calls:
                no, call, digest, _, diverged, *counts, _, _ = verified(CHARGE, row)
                charges[no, call, digest] = (Bill(*counts), diverged)
    return charges


def charge_columns(no: int, charge: Charge, diverged: bool) -> dict[str, Any]:
    """A new record of the charge table."""
    values = (no, charge.call, charge.digest, charge.phase.value, diverged, *_counts(charge.bill), time.time())
    return sealed(CHARGE, values)


def refund_columns(charge: Sequence[Any]) -> dict[str, Any]:
    """The record of the refund table for a verified one of the charge table. The database numbers refunds itself."""
    values = (*charge[:-1], time.time())
    return dict(zip(_NAMES[REFUND.name][1:], (*values, checksum(REFUND, values)), strict=True))


def parse_charge(record: Sequence[Any]) -> tuple[int, int, str, Phase, bool, Bill, float]:
    """(trial number, call, digest, phase, diverged, bill, time) of a whole record. DamagedRecord when it is damaged."""
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
    """Write trials back. The rows are locked since they were read, so that nobody's change is overwritten."""
    records = [sealed(TRIAL, row.values) for row in rows]
    for record in records:
        record["key"] = record.pop("no")
        del record["storage"], record["trial"]  # part of an index, and never changed here
    if records:
        db.execute(_SAVE_TRIAL, records)


def save_accounts(db: sa.Connection, rows: Iterable[AccountRow]) -> None:
    """Write accounts back; locked like the trials."""
    records = [sealed(ACCOUNT, row.values) for row in rows]
    for record in records:
        record["key"] = record.pop("name")
    if records:
        db.execute(_SAVE_ACCOUNT, records)


def save_payers(db: sa.Connection, payers: Mapping[int, Sequence[AccountRow]]) -> None:
    """Write back the accounts that `lock_payers` returned, each once."""
    save_accounts(db, {account.name: account for some in payers.values() for account in some}.values())


def save_storage(db: sa.Connection, insert_new: sa.Insert, storage: str, path: str, host: str) -> None:
    """Write where a storage is, as of now."""
    record = sealed(STORAGE, (storage, path, host, time.time()))
    db.execute(insert_new, record)
    db.execute(sa.update(STORAGE).where(STORAGE.c.storage == storage).values(**record))


def rename_trials(db: sa.Connection, old: str, new: str) -> None:
    """Change the storage of all of its trials."""
    for row in db.execute(select(TRIAL).where(TRIAL.c.storage == old).order_by(TRIAL.c.no).with_for_update()).all():
        trial = replace(TrialRow.of(row), storage=new)
        db.execute(sa.update(TRIAL).where(TRIAL.c.no == trial.no).values(**sealed(TRIAL, trial.values)))


def rename_account(db: sa.Connection, old: str, new: str) -> None:
    """Change the name of an account. Does nothing when it does not exist."""
    if (account := lock_accounts(db, [old]).get(old)) is None:
        return
    db.execute(sa.insert(ACCOUNT), sealed(ACCOUNT, replace(account, name=new).values))
    for row in db.execute(select(MEMBER).where(MEMBER.c.account == old)).all():
        no, _, _ = verified(MEMBER, row)
        member = (MEMBER.c.trial_no == no, MEMBER.c.account == old)
        db.execute(sa.update(MEMBER).where(*member).values(**member_columns(no, new)))
    db.execute(sa.delete(ACCOUNT).where(ACCOUNT.c.name == old))


def _chunks(items: list[T]) -> Iterable[list[T]]:
    return (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
