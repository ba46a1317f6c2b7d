"""The ledger: reservations and charges of trials in an SQL database, safe against crashes and concurrent processes.

An account (a sweep's ceiling, or a named global budget) has limits. A trial reserves its whole allotment on each of its
accounts before it starts, pays for its adapt and validate calls from it, and releases the rest when it is closed:

    committed = allotments of open trials + spending of closed trials + replays   <=   limit, at every moment

Every decision is made inside one SQL transaction on the stored state. So any number of processes may use one ledger,
any of them may die between two statements, and every call is idempotent:

  charge    One id, storage/trial/call/digest, is paid once: again, it is 'replayed' and free. A call number that was
            paid with another digest is 'diverged' and billed to `replay`, which is paid from what the accounts have
            free. Calls of curve and evaluate have no limit, diverged or not.
  reserve   Does nothing for an open trial with the same allotment. A closed trial is opened again with its charges,
            which still count against the allotment: only allotment - spent is reserved. (The trial's name includes a
            digest of the code, so a rerun after a code change is another trial and is billed separately.)
  accounts  A trial's accounts are only added: a new one takes the trial's whole bill, as if it had been there before.
  release   Does nothing for a closed trial. A closed trial cannot pay for new calls of adapt and validate.
  refund    Does nothing for a refunded charge. The charge moves to the refund table; its call may be charged again.

Rows are locked trials first, by number, then accounts, by name, so that transactions cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from methods.base import Bill
from pipeline.budget import LIMITED_UNITS, Limits, Phase
from pipeline.errors import BudgetExceeded, LedgerError
from pipeline.ledger import audit as ledger_audit
from pipeline.ledger import lists as ledger_lists
from pipeline.ledger import money_rows, storages
from pipeline.ledger import rows as ledger_rows
from pipeline.ledger.batch import Batch, open_trial, refund_charges, settle
from pipeline.ledger.checksum import RESTORE
from pipeline.ledger.money import Money
from pipeline.ledger.records import (
    AccountRecord,
    Charge,
    ChargeRecord,
    Receipt,
    Reservation,
    StorageRecord,
    TrialRecord,
)
from pipeline.ledger.rows import AccountRow, Key, TrialRow
from pipeline.ledger.schema import ACCOUNT, MEMBER, STORAGE, TRIAL, Database


class Ledger:
    """The ledger at an SQLAlchemy URL: a SQLite file (the default) or a PostgreSQL database."""

    def __init__(self, url: str) -> None:
        self._store = Database(url)
        self.money = Money(self._store)
        """What is paid to remote endpoints."""

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self._store.name

    @property
    def in_memory(self) -> bool:
        """Whether the ledger is lost when this process ends."""
        return self._store.in_memory

    def close(self) -> None:
        """Close the connections; a later call opens them again."""
        self._store.close()

    def open_account(self, name: str, limits: Limits) -> Limits:
        """Create an account unless it exists; return the limits that it has."""
        with self._store.write() as db:
            values = ledger_rows.sealed(ACCOUNT, AccountRow(name, limits, Bill(), Bill()).values)
            db.execute(self._store.insert_new(ACCOUNT), values)
            return ledger_rows.lock_accounts(db, [name])[name].limits

    def limits(self, name: str) -> Limits | None:
        """Return the limits of an account; None when it does not exist."""
        with self._store.read() as db:
            account = ledger_lists.find_account(db, name)
        return None if account is None else account.limits

    def set_limits(self, name: str, limits: Limits) -> None:
        """Change the limits of an account.

        Raises:
            LedgerError: the account does not exist, more is committed than the new limits allow, or an open trial has
                no limit in a unit that would become limited. Nothing is changed.
        """
        with self._store.write() as db:
            account = ledger_rows.lock_accounts(db, [name]).get(name)
            if account is None:
                raise LedgerError(f"no account named {name!r} in the ledger {self._store.name}")
            committed = account.held + account.spent
            if unit := limits.exceeded_unit(committed, Bill()):
                raise LedgerError(
                    f"account {name!r} cannot be limited to {getattr(limits, unit):,} {unit}: "
                    f"{getattr(committed, unit):,} are charged or reserved already"
                )
            for unit in LIMITED_UNITS:
                if getattr(limits, unit) is None or getattr(account.limits, unit) is not None:
                    continue
                unlimited = (MEMBER.c.account == name, TRIAL.c.open, TRIAL.c[f"limit_{unit}"].is_(None))
                joined = TRIAL.join(MEMBER)
                if n := db.execute(select(sa.func.count()).select_from(joined).where(*unlimited)).scalar_one():
                    raise LedgerError(
                        f"account {name!r} cannot be limited in {unit}: {n} open trials on it have no such limit; "
                        "finish or release them first"
                    )
            account.limits = limits
            ledger_rows.save_accounts(db, [account])

    def reserve(self, storage: str, trial: str, accounts: Sequence[str], allotment: Limits) -> None:
        """Open a trial and reserve its whole allotment on every account, or on none. Raises: as `reserve_all`."""
        self.reserve_all(storage, {trial: allotment}, accounts)

    def reserve_all(self, storage: str, allotments: Mapping[str, Limits], accounts: Sequence[str]) -> None:
        """Open trials in one transaction: reserve the allotment of each on every account, or open none of them.

        Args:
            storage: the storage of the trials.
            allotments: by trial.
            accounts: names of the accounts.

        Raises:
            BudgetExceeded: an account cannot pay for a trial.
            ConfigError: an allotment has no limit in a unit in which an account has one.
            LedgerError: an account does not exist, or a trial is open with another allotment, or has spent more.
        """
        with self._store.write() as db:
            entries = self._trials(db, {(storage, trial) for trial in allotments})
            joined = ledger_rows.members(db, [entry.no for entry in entries.values()])
            names = {*accounts, *(name for some in joined.values() for name in some)}
            opened = ledger_rows.lock_accounts(db, names)
            for name in sorted(names - opened.keys()):
                raise LedgerError(f"no account named {name!r} in the ledger {self._store.name}")
            added = list[dict[str, Any]]()
            for trial, allotment in allotments.items():
                entry = entries[storage, trial]
                new = open_trial(entry, allotment, accounts, joined.get(entry.no, set()), opened)
                added += [ledger_rows.member_columns(entry.no, name) for name in sorted(new)]
            ledger_rows.save_accounts(db, opened.values())
            if added:
                db.execute(sa.insert(MEMBER), added)
            ledger_rows.save_trials(db, entries.values())

    def release(self, storage: str, trial: str) -> Bill:
        """Close a trial and release what it did not spend; return what it spent (adapt + validate).

        Raises:
            LedgerError: the trial does not exist.
        """
        return self.release_all(storage, [trial])[trial]

    def release_all(self, storage: str, trials: Sequence[str]) -> dict[str, Bill]:
        """Close trials in one transaction, each as `release` does; return what each spent."""
        with self._store.write() as db:
            entries = ledger_rows.lock_trials(db, {(storage, trial) for trial in trials})
            for trial in trials:
                if (storage, trial) not in entries:
                    raise LedgerError(f"no trial {trial} of {storage} in the ledger {self._store.name}")
            settle(db, [entry for entry in entries.values() if entry.open])
            return {trial: entries[storage, trial].paid for trial in trials}

    def charge(self, charges: Sequence[Charge]) -> list[Receipt | BudgetExceeded]:
        """Charge calls in one transaction; return a receipt or a refusal for each, decided in order.

        Receipts are committed when this returns. A trial that was never reserved has an allotment of 0.

        Raises:
            LedgerError: nothing is charged, so no response may be released. The same charges may be made again.
        """
        if not charges:
            return []
        with self._store.write() as db:
            batch = Batch(db, self._trials(db, {(c.storage, c.trial) for c in charges}), charges)
            results = [batch.decide(c) for c in charges]
            batch.save()
        return results

    def refund(self, ids: Sequence[str]) -> None:
        """Refund calls that were not computed: their charges move to the refund table.

        Ids without a charge (never made, or refunded already) are ignored.
        """
        with self._store.write() as db:
            refund_charges(db, ids)

    def trial_bill(self, storage: str, trial: str) -> dict[Phase, Bill]:
        """Return a trial's bill by phase; zero in all phases for an unknown trial."""
        with self._store.read() as db:
            entry = ledger_rows.find_trial(db, storage, trial)
        return entry.bills if entry is not None else {phase: Bill() for phase in Phase}

    def accounts(self) -> list[AccountRecord]:
        """Return all accounts by name. Raises LedgerError when a record is damaged or a total is wrong."""
        with self._store.read() as db:
            return ledger_lists.list_accounts(db)

    def trials(self, storage: str | None = None) -> list[TrialRecord]:
        """Return all trials, or those of one storage, in the order of their first use."""
        with self._store.read() as db:
            return ledger_lists.list_trials(db, storage)

    def charges(self, storage: str, trial: str) -> list[ChargeRecord]:
        """Return a trial's charges by call number, refunded ones included."""
        with self._store.read() as db:
            return ledger_lists.list_charges(db, storage, trial)

    def reservations(self) -> list[Reservation]:
        """Return what open trials reserve, one record for each storage."""
        with self._store.read() as db:
            return ledger_lists.list_reservations(db)

    def storage(self, storage: str) -> StorageRecord | None:
        """Return where a storage was when its latest run registered it; None if none did."""
        with self._store.read() as db:
            return ledger_lists.find_storage(db, storage)

    def register(self, storage: str, path: str, host: str) -> None:
        """Record where a storage is, and that a run of it starts now."""
        with self._store.write() as db:
            storages.save_storage(db, self._store.insert_new(STORAGE), storage, path, host)

    def rename_storage(self, old: str, new: str, accounts: Mapping[str, str]) -> None:
        """Rename the storage of its trials, and accounts (old name to new). Names that do not exist are ignored."""
        with self._store.write() as db:
            storages.rename_trials(db, old, new)
            for before, after in accounts.items():
                storages.rename_account(db, before, after)
            money_rows.rename(db, old, new, accounts)

    def check(self, storage: str) -> None:
        """Verify the records of all trials and accounts, and the charges of one storage.

        Raises:
            LedgerError: a record is damaged or a total is wrong. The message has one line.
        """
        if lines := self.verify(storage=storage, whole=False):
            more = f" and {len(lines) - 1:,} more" if len(lines) > 1 else ""
            line = lines[0].removeprefix("damaged ")
            raise LedgerError(f"the ledger {self._store.name} is damaged: {line}{more}; {RESTORE}")

    def verify(
        self,
        rows: Iterable[Mapping[str, Any]] | None = None,
        storage: str | None = None,
        copied_from: Sequence[str] = (),
        whole: bool = True,
    ) -> list[str]:
        """Return one line for each problem; an empty list when there is none.

        Every record must match its checksum, charges must add up to the trials' totals, these to the accounts' totals,
        and no limit or allotment may be exceeded; the same holds for money. The bills in `rows`, results of a sweep,
        must be those of its trials.

        Args:
            rows: results of a sweep, with the trial's name in the ledger as `trial_id`.
            storage: the storage of these results; needed where storages share a ledger.
            copied_from: the storages that it was copied from, latest first. Rows of a trial that this storage did not
                run are compared with theirs.
            whole: verify the charges of all storages; False for those of `storage` and `copied_from` only.

        Raises:
            LedgerError: the file cannot be read, or its structure is damaged.
        """
        self._store.check()
        with self._store.read() as db:
            return ledger_audit.problems(db, rows, [storage, *copied_from] if storage else [], whole)

    def _trials(self, db: sa.Connection, keys: set[Key]) -> dict[Key, TrialRow]:
        return ledger_rows.lock_trials(db, keys, self._store.insert_new(TRIAL))
