"""Lists of the ledger's records, for reading. Each record is verified against its checksum."""

from __future__ import annotations

from collections import Counter, defaultdict

import sqlalchemy as sa
from sqlalchemy import select

from methods.base import Bill
from pipeline.budget import Phase, total
from pipeline.ledger.audit import CHUNK, account_differences
from pipeline.ledger.checksum import DamagedRecord, verified
from pipeline.ledger.records import AccountRecord, Charge, ChargeRecord, Reservation, StorageRecord, TrialRecord
from pipeline.ledger.rows import AccountRow, TrialRow, all_trials, parse_charge
from pipeline.ledger.schema import ACCOUNT, CHARGE, MEMBER, REFUND, STORAGE, TRIAL


def find_account(db: sa.Connection, name: str) -> AccountRow | None:
    """Return an account, or None, without a lock."""
    row = db.execute(select(ACCOUNT).where(ACCOUNT.c.name == name)).one_or_none()
    return None if row is None else AccountRow.of(row)


def list_accounts(db: sa.Connection) -> list[AccountRecord]:
    """See Ledger.accounts."""
    trials, names = all_trials(db), _all_members(db)
    on: dict[str, list[TrialRow]] = defaultdict(list)
    for no in names:
        for name in names[no]:
            if no not in trials:
                raise DamagedRecord(f"trial number {no}, charged to account {name!r}, is missing")
            on[name].append(trials[no])
    records = []
    for account in sorted((AccountRow.of(row) for row in db.execute(select(ACCOUNT))), key=lambda a: a.name):
        mine = on.pop(account.name, [])
        for line in account_differences(account, mine):
            raise DamagedRecord(line)
        charged = total(t.paid + t.buckets["replay"] for t in mine)
        records.append(AccountRecord(account.name, account.limits, account.held, account.spent, charged, len(mine)))
    for name in on:
        raise DamagedRecord(f"account {name!r}, to which trials are charged, is missing")
    return records


def list_trials(db: sa.Connection, storage: str | None) -> list[TrialRecord]:
    """See Ledger.trials."""
    names = _all_members(db)
    return [
        TrialRecord(t.storage, t.trial, t.open, t.allotment, t.bills, tuple(sorted(names.get(t.no, ()))))
        for t in all_trials(db).values()
        if storage is None or t.storage == storage
    ]


# Whole tables are read, not a part by an index: a damaged index leaves out records without a word.
def _all_members(db: sa.Connection) -> dict[int, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for row in db.execute(select(MEMBER)):
        no, name, _ = verified(MEMBER, row)
        names[no].append(name)
    return names


def list_charges(db: sa.Connection, storage: str, trial: str) -> list[ChargeRecord]:
    """See Ledger.charges."""
    records = []
    number = select(TRIAL.c.no).where(TRIAL.c.storage == storage, TRIAL.c.trial == trial).scalar_subquery()
    for row in db.execute(select(CHARGE).where(CHARGE.c.trial_no == number)):
        _, call, digest, phase, diverged, bill, at = parse_charge(row)
        records.append(ChargeRecord(Charge(storage, trial, call, digest, phase, bill), diverged, at, False))
    for row in db.execute(select(REFUND).where(REFUND.c.trial_no == number)):
        _, call, digest, phase, diverged, *counts, at, _, _ = verified(REFUND, row[1:])
        charge = Charge(storage, trial, call, digest, Phase(phase), Bill(*counts))
        records.append(ChargeRecord(charge, diverged, at, True))
    return sorted(records, key=lambda record: (record.charge.call, record.at))


def find_storage(db: sa.Connection, storage: str) -> StorageRecord | None:
    """See Ledger.storage."""
    row = db.execute(select(STORAGE).where(STORAGE.c.storage == storage)).one_or_none()
    return None if row is None else StorageRecord(*verified(STORAGE, row)[:-1])


def list_reservations(db: sa.Connection) -> list[Reservation]:
    """See Ledger.reservations."""
    trials, accounts = [trial for trial in all_trials(db).values() if trial.open], _all_members(db)
    storages, last = {trial.no: trial.storage for trial in trials}, dict[str, float]()
    charges = select(CHARGE).join(TRIAL).where(TRIAL.c.open).execution_options(yield_per=CHUNK)
    for charge in db.execute(charges):
        no, *_, at = parse_charge(charge)
        last[storages[no]] = max(at, last.get(storages[no], at))
    reserved: dict[str, dict[str, Bill]] = defaultdict(lambda: defaultdict(Bill))
    counts = Counter(trial.storage for trial in trials)
    for trial in trials:
        for name in accounts.get(trial.no, ()):
            reserved[trial.storage][name] += trial.allotment.bill
    places = {row[0]: StorageRecord(*verified(STORAGE, row)[:-1]) for row in db.execute(select(STORAGE))}
    return [
        Reservation(storage, places.get(storage), n, dict(reserved[storage]), last.get(storage))
        for storage, n in counts.items()
    ]
