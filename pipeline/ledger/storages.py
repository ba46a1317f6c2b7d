"""Register where storages are, and rename them."""

from __future__ import annotations

import time
from dataclasses import replace

import sqlalchemy as sa
from sqlalchemy import select

from pipeline.ledger.checksum import verified
from pipeline.ledger.rows import TrialRow, lock_accounts, member_columns, sealed
from pipeline.ledger.schema import ACCOUNT, MEMBER, STORAGE, TRIAL


def save_storage(db: sa.Connection, insert_new: sa.Insert, storage: str, path: str, host: str) -> None:
    """Insert or update where a storage is, with the present time."""
    record = sealed(STORAGE, (storage, path, host, time.time()))
    db.execute(insert_new, record)
    db.execute(sa.update(STORAGE).where(STORAGE.c.storage == storage).values(**record))


def rename_trials(db: sa.Connection, old: str, new: str) -> None:
    """Change the storage of all trials of `old`."""
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
