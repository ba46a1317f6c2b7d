"""The ledger's rows inside a transaction: read (and locked) as values, changed in Python, written back."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import bindparam, select

from methods.base import Bill
from pipeline.blackbox.bill import (
    LIMITED,
    PAID,
    UNITS,
    AccountRecord,
    Charge,
    ChargeRecord,
    Limits,
    Phase,
    TrialRecord,
    total,
)
from pipeline.blackbox.ledger_schema import ACCOUNT, BUCKETS, CHARGE, MEMBER, REFUND, TRIAL
from pipeline.errors import BudgetExceeded

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
    def of(cls, row: Mapping[Any, Any]) -> TrialRow:
        """From a row of the table."""
        buckets = {name: Bill(*(row[f"{name}_{unit}"] for unit in UNITS)) for name in BUCKETS}
        return cls(row["no"], row["storage"], row["trial"], row["open"], _limits(row), buckets)

    @property
    def paid(self) -> Bill:
        """What the allotment has paid."""
        return total(self.buckets[phase.value] for phase in PAID)

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
    def of(cls, row: Mapping[Any, Any]) -> AccountRow:
        """From a row of the table."""
        spent = Bill(*(row[f"spent_{unit}"] for unit in UNITS))
        return cls(row["name"], _limits(row), Bill(row["held_requests"], row["held_images"]), spent)

    def refusal(self, asked: Bill) -> BudgetExceeded | None:
        """Why so much more cannot be committed."""
        return _refusal(self.name, self.limits, self.held + self.spent, asked)


def limit_columns(limits: Limits) -> dict[str, int | None]:
    """The limits as columns of an account or a trial."""
    return {f"limit_{unit}": getattr(limits, unit) for unit in LIMITED}


def _limits(row: Mapping[Any, Any]) -> Limits:
    return Limits(row["limit_requests"], row["limit_images"])


def _refusal(account: str, limits: Limits, spent: Bill, asked: Bill) -> BudgetExceeded | None:
    unit = limits.passed(spent, asked)
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
_CHARGES = select(
    CHARGE.c.trial_no, CHARGE.c.call, CHARGE.c.digest, CHARGE.c.diverged, *(CHARGE.c[unit] for unit in UNITS)
).where(CHARGE.c.trial_no.in_(bindparam("nos", expanding=True)), CHARGE.c.call.in_(bindparam("calls", expanding=True)))


def lock_trials(db: sa.Connection, keys: Collection[Key], insert_new: sa.Insert | None = None) -> dict[Key, TrialRow]:
    """The trials with these keys; with `insert_new`, missing ones are made first: settled, with nothing allotted."""
    found: dict[Key, TrialRow] = {}
    if insert_new is not None:
        found = lock_trials(db, keys)
        keys = [key for key in keys if key not in found]
        blank = {"open": False, **limit_columns(Limits(0, 0))}
        if keys:
            db.execute(insert_new, [{"storage": storage, "trial": trial, **blank} for storage, trial in sorted(keys)])
    wanted = {"storages": list({storage for storage, _ in keys}), "trials": list({trial for _, trial in keys})}
    for row in db.execute(_TRIALS, wanted).mappings() if keys else ():
        if (key := (row["storage"], row["trial"])) in keys:
            found[key] = TrialRow.of(row)
    return found


def find_trial(db: sa.Connection, storage: str, trial: str) -> TrialRow | None:
    """One trial, for reading only."""
    row = db.execute(select(TRIAL).where(TRIAL.c.storage == storage, TRIAL.c.trial == trial)).mappings().one_or_none()
    return None if row is None else TrialRow.of(row)


def lock_accounts(db: sa.Connection, names: Collection[str]) -> dict[str, AccountRow]:
    """The accounts with these names."""
    if not names:
        return {}
    query = select(ACCOUNT).where(ACCOUNT.c.name.in_(sorted(names))).order_by(ACCOUNT.c.name).with_for_update()
    return {row["name"]: AccountRow.of(row) for row in db.execute(query).mappings()}


def members(db: sa.Connection, nos: Iterable[int]) -> dict[int, set[str]]:
    """The accounts of each trial."""
    found: dict[int, set[str]] = defaultdict(set)
    for some in _chunks(sorted(nos)):
        for no, name in db.execute(select(MEMBER.c.trial_no, MEMBER.c.account).where(MEMBER.c.trial_no.in_(some))):
            found[no].add(name)
    return found


def find_charges(db: sa.Connection, calls: Collection[tuple[int, int]]) -> dict[ChargeKey, tuple[Bill, bool]]:
    """(bill, diverged) of every charge with one of these (trial number, call number)."""
    found = {}
    for some in _chunks(sorted(calls)):
        wanted = {"nos": list({no for no, _ in some}), "calls": list({call for _, call in some})}
        for no, call, digest, diverged, *counts in db.execute(_CHARGES, wanted):
            if (no, call) in calls:
                found[no, call, digest] = (Bill(*counts), diverged)
    return found


def charge_columns(no: int, charge: Charge, diverged: bool) -> dict[str, Any]:
    """A new row of the charge table."""
    return {
        "trial_no": no,
        "call": charge.call,
        "digest": charge.digest,
        "phase": charge.phase.value,
        "diverged": diverged,
        **{unit: getattr(charge.bill, unit) for unit in UNITS},
        "at": time.time(),
    }


_TOTALS: dict[str, Any] = {f"{name}_{unit}": bindparam(f"{name}_{unit}") for name in BUCKETS for unit in UNITS}
_SAVE_TRIAL = sa.update(TRIAL).where(TRIAL.c.no == bindparam("key")).values(_TOTALS)
_HELD: dict[str, Any] = {f"held_{unit}": bindparam(f"held_{unit}") for unit in LIMITED}
_SPENT: dict[str, Any] = {f"spent_{unit}": bindparam(f"spent_{unit}") for unit in UNITS}
_SAVE_ACCOUNT = sa.update(ACCOUNT).where(ACCOUNT.c.name == bindparam("key")).values(_HELD | _SPENT)


def save_trials(db: sa.Connection, rows: Iterable[TrialRow]) -> None:
    """Write the totals back. The rows are locked since they were read, so that nobody's change is overwritten."""
    values = [
        {"key": row.no} | {f"{name}_{u}": getattr(bill, u) for name, bill in row.buckets.items() for u in UNITS}
        for row in rows
    ]
    if values:
        db.execute(_SAVE_TRIAL, values)


def save_accounts(db: sa.Connection, rows: Iterable[AccountRow]) -> None:
    """Write what is held and spent back; locked like the trials."""
    values = [
        {"key": row.name}
        | {f"held_{unit}": getattr(row.held, unit) for unit in LIMITED}
        | {f"spent_{unit}": getattr(row.spent, unit) for unit in UNITS}
        for row in rows
    ]
    if values:
        db.execute(_SAVE_ACCOUNT, values)


def list_accounts(db: sa.Connection) -> list[AccountRecord]:
    """See Ledger.accounts."""
    sums = [
        sa.func.coalesce(sa.func.sum(sum(TRIAL.c[f"{name}_{unit}"] for name in ("adapt", "validate", "replay"))), 0)
        for unit in UNITS
    ]
    joined = ACCOUNT.outerjoin(MEMBER).outerjoin(TRIAL)
    charged = {
        name: (trials, Bill(*(int(s) for s in counts)))
        for name, trials, *counts in db.execute(
            select(ACCOUNT.c.name, sa.func.count(TRIAL.c.no), *sums).select_from(joined).group_by(ACCOUNT.c.name)
        )
    }
    records = []
    for row in db.execute(select(ACCOUNT).order_by(ACCOUNT.c.name)).mappings():
        a = AccountRow.of(row)
        trials, bill = charged[a.name]
        records.append(AccountRecord(a.name, a.limits, a.held, a.spent, bill, trials))
    return records


def list_trials(db: sa.Connection, storage: str | None) -> list[TrialRecord]:
    """See Ledger.trials."""
    query = select(TRIAL).order_by(TRIAL.c.no)
    if storage is not None:
        query = query.where(TRIAL.c.storage == storage)
    rows = [TrialRow.of(row) for row in db.execute(query).mappings()]
    names = members(db, [row.no for row in rows])
    return [
        TrialRecord(r.storage, r.trial, r.open, r.allotment, r.bills, tuple(sorted(names.get(r.no, ())))) for r in rows
    ]


def list_charges(db: sa.Connection, storage: str, trial: str) -> list[ChargeRecord]:
    """See Ledger.charges."""
    records = []
    for table, refunded in ((CHARGE, False), (REFUND, True)):
        query = select(table).join(TRIAL, TRIAL.c.no == table.c.trial_no)
        for row in db.execute(query.where(TRIAL.c.storage == storage, TRIAL.c.trial == trial)).mappings():
            bill = Bill(*(row[unit] for unit in UNITS))
            charge = Charge(storage, trial, row["call"], row["digest"], Phase(row["phase"]), bill)
            records.append(ChargeRecord(charge, row["diverged"], row["at"], refunded))
    return sorted(records, key=lambda record: (record.charge.call, record.at))


def _chunks(items: list[T]) -> Iterable[list[T]]:
    return (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
