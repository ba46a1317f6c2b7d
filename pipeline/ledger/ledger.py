"""Who may ask how much, and who asked what: reservations and charges, durable and safe against any crash.

An account (a sweep's ceiling, a named global budget) has limits. A trial reserves its whole allotment on all of its
accounts before it starts, pays its adapt and validate calls from it, and gives back the rest when it is settled:

    committed = allotments of open trials + what settled trials spent + replays   <=   limit, at every moment

Every decision is taken inside one SQL transaction on the stored state, never from memory, so that any number of
processes may open one ledger, each may die between any two statements, and every call may be made again:

  charge    once for each id storage/trial/call/digest. The same id again: 'replayed', free. A call number paid before
            with another digest: 'diverged', billed to `replay`. The accounts' free room pays for it, unless it was
            asked in curve or evaluate: those are not limited, whether they diverge or not.
  reserve   again while open, with the same allotment: nothing. Of a settled trial: it opens anew with the same books.
            Its earlier charges still stand (their replays are free) and count against the allotment, so that only
            allotment - spent is taken from the accounts, and no total doubles. A rerun by other code is not this: all
            of its calls would diverge, so it wants a trial name of its own.
  accounts  of a trial only grow: one named later takes over the whole of the trial's bill, as if named at the start.
  settle    again: nothing. A settled trial pays for no new adapt or validate call; curve and evaluate are recorded.
  refund    again: nothing. The charge moves to the refund table; the call may then be charged anew.

Rows are locked trials first, by number, then accounts, by name: two transactions cannot wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from methods.base import Bill
from pipeline.budget import BUDGETED_PHASES, LIMITED_UNITS, Limits, Phase
from pipeline.errors import BudgetExceeded, ConfigError, LedgerError
from pipeline.ledger import audit as ledger_audit
from pipeline.ledger import lists as ledger_lists
from pipeline.ledger import rows as ledger_rows
from pipeline.ledger.batch import Batch
from pipeline.ledger.checksum import RESTORE
from pipeline.ledger.records import (
    AccountRecord,
    Charge,
    ChargeRecord,
    Receipt,
    Reservation,
    StorageRecord,
    TrialRecord,
    parse_id,
)
from pipeline.ledger.rows import AccountRow, Key, TrialRow
from pipeline.ledger.schema import ACCOUNT, CHARGE, MEMBER, REFUND, STORAGE, TRIAL, Database, bucket

__all__ = ["AccountRecord", "Charge", "ChargeRecord", "Ledger", "Limits", "Phase", "Receipt", "TrialRecord"]


class Ledger:
    """The ledger at an SQLAlchemy URL: a SQLite file (the default) or a PostgreSQL database."""

    def __init__(self, url: str) -> None:
        self._store = Database(url)

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self._store.name

    @property
    def in_memory(self) -> bool:
        """Whether the ledger is lost when this process ends."""
        return self._store.in_memory

    def close(self) -> None:
        """Let go of the database; a later call opens it again."""
        self._store.close()

    def open_account(self, name: str, limits: Limits) -> Limits:
        """Create an account with these limits, unless there is one of that name; return the limits that it has."""
        with self._store.write() as db:
            values = ledger_rows.sealed(ACCOUNT, AccountRow(name, limits, Bill(), Bill()).values)
            db.execute(self._store.insert_new(ACCOUNT), values)
            return ledger_rows.lock_accounts(db, [name])[name].limits

    def limits(self, name: str) -> Limits | None:
        """Limits of an account; None when there is no such account."""
        with self._store.read() as db:
            account = ledger_lists.find_account(db, name)
        return None if account is None else account.limits

    def set_limits(self, name: str, limits: Limits) -> None:
        """Change the limits of an account.

        Raises LedgerError, changing nothing, for an unknown account, when more is committed already than the new limits
        allow, or when a limit is set on a unit in which an open trial has none.
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
                endless = (MEMBER.c.account == name, TRIAL.c.open, TRIAL.c[f"limit_{unit}"].is_(None))
                joined = TRIAL.join(MEMBER)
                if n := db.execute(select(sa.func.count()).select_from(joined).where(*endless)).scalar_one():
                    raise LedgerError(
                        f"account {name!r} cannot be limited in {unit}: {n} open trials on it have no such limit; "
                        "finish or settle them first"
                    )
            account.limits = limits
            ledger_rows.save_accounts(db, [account])

    def reserve(self, storage: str, trial: str, accounts: Sequence[str], allotment: Limits) -> None:
        """Open a trial: take its whole allotment from every account, or from none.

        Raises BudgetExceeded when an account cannot pay, ConfigError for an endless allotment on a limited account,
        LedgerError for an unknown account or an allotment that contradicts the trial's books.
        """
        with self._store.write() as db:
            entry = self._trials(db, {(storage, trial)})[storage, trial]
            joined = ledger_rows.members(db, [entry.no]).get(entry.no, set())
            new = set(accounts) - joined
            if entry.open and entry.allotment != allotment:
                raise LedgerError(f"trial {trial} is open with {entry.allotment}, and is now asked for {allotment}")
            if entry.open and not new:
                return
            if allotment.exceeded_unit(entry.paid, Bill()):
                raise LedgerError(f"trial {trial} has spent {entry.paid}, more than {allotment} allows")
            opened = ledger_rows.lock_accounts(db, joined | new)
            for name in dict.fromkeys([*accounts, *sorted(joined)]):
                if name not in opened:
                    raise LedgerError(f"no account named {name!r} in the ledger {self._store.name}")
                account = opened[name]
                for unit in LIMITED_UNITS:
                    if getattr(allotment, unit) is None and getattr(account.limits, unit) is not None:
                        raise ConfigError(
                            f"account {name!r} is limited to {getattr(account.limits, unit):,} {unit}, and trial "
                            f"{trial} has no limit of its own: set budget.{unit}"
                        )
                if name in new:
                    _commit(account, held=allotment.bill, spent=entry.buckets["replay"])
                elif not entry.open:
                    _commit(account, held=allotment.bill, spent=entry.paid * -1)
            ledger_rows.save_accounts(db, opened.values())
            if new:
                db.execute(sa.insert(MEMBER), [ledger_rows.member_columns(entry.no, name) for name in sorted(new)])
            entry.open, entry.allotment = True, allotment
            ledger_rows.save_trials(db, [entry])

    def release(self, storage: str, trial: str) -> Bill:
        """Close a trial and give back what it did not spend; returns what it spent (adapt + validate).

        Raises LedgerError for a trial that the ledger has never seen.
        """
        with self._store.write() as db:
            entry = ledger_rows.lock_trials(db, {(storage, trial)}).get((storage, trial))
            if entry is None:
                raise LedgerError(f"no trial {trial} of {storage} in the ledger {self._store.name}")
            if entry.open:
                _settle(db, entry)
            return entry.paid

    def charge(self, charges: Sequence[Charge]) -> list[Receipt | BudgetExceeded]:
        """Charge the calls of one forward in one transaction; each is accepted or refused on its own, in order.

        When this returns, every receipt is durable. When it raises (LedgerError), nothing may be answered; the same
        charges may be made again. A trial that never reserved has an allotment of nothing.
        """
        if not charges:
            return []
        with self._store.write() as db:
            batch = Batch(db, self._trials(db, {(c.storage, c.trial) for c in charges}), charges)
            answers = [batch.decide(c) for c in charges]
            batch.save()
        return answers

    def refund(self, ids: Sequence[str]) -> None:
        """Take back charges of calls that were definitely not computed; they move to the refund table.

        Ids that are not charged (never, or refunded already) are left alone.
        """
        parsed = [parse_id(charge_id) for charge_id in dict.fromkeys(ids)]
        with self._store.write() as db:
            trials = ledger_rows.lock_trials(db, {(storage, trial) for storage, trial, _, _ in parsed})
            payers = ledger_rows.lock_payers(db, trials.values())
            for storage, trial, call, digest in parsed:
                entry = trials.get((storage, trial))
                if entry is None:
                    continue
                key = (CHARGE.c.trial_no == entry.no, CHARGE.c.call == call, CHARGE.c.digest == digest)
                row = db.execute(select(CHARGE).where(*key)).one_or_none()
                if row is None:
                    continue
                _, _, _, phase, diverged, bill, _ = ledger_rows.parse_charge(row)
                place = bucket(phase, diverged)
                entry.buckets[place] += bill * -1
                if place == "replay" or (place in BUDGETED_PHASES and not entry.open):
                    for account in payers.get(entry.no, ()):
                        account.spent += bill * -1
                db.execute(sa.insert(REFUND), ledger_rows.refund_columns(row))
                db.execute(sa.delete(CHARGE).where(*key))
            ledger_rows.save_trials(db, trials.values())
            ledger_rows.save_payers(db, payers)

    def trial_bill(self, storage: str, trial: str) -> dict[Phase, Bill]:
        """What a trial was charged, by phase; all zero for a trial never seen."""
        with self._store.read() as db:
            entry = ledger_rows.find_trial(db, storage, trial)
        return entry.bills if entry is not None else {phase: Bill() for phase in Phase}

    def accounts(self) -> list[AccountRecord]:
        """Every account, by name. Raises LedgerError when a record is damaged or an account does not add up."""
        with self._store.read() as db:
            return ledger_lists.list_accounts(db)

    def trials(self, storage: str | None = None) -> list[TrialRecord]:
        """Every trial (of one storage) in the order in which they were first seen."""
        with self._store.read() as db:
            return ledger_lists.list_trials(db, storage)

    def charges(self, storage: str, trial: str) -> list[ChargeRecord]:
        """A trial's charges by call number, refunded ones among them."""
        with self._store.read() as db:
            return ledger_lists.list_charges(db, storage, trial)

    def reservations(self) -> list[Reservation]:
        """What open trials reserve, one record for each storage."""
        with self._store.read() as db:
            return ledger_lists.list_reservations(db)

    def storage(self, storage: str) -> StorageRecord | None:
        """Where a storage was when its last run registered it; None for one that was never registered."""
        with self._store.read() as db:
            return ledger_lists.find_storage(db, storage)

    def register(self, storage: str, path: str, host: str) -> None:
        """Record where a storage is and that a run of it begins now."""
        with self._store.write() as db:
            ledger_rows.save_storage(db, self._store.insert_new(STORAGE), storage, path, host)

    def rename_storage(self, old: str, new: str, accounts: Mapping[str, str]) -> None:
        """Give the trials of a storage, and these accounts, other names. Does nothing where there are none."""
        with self._store.write() as db:
            ledger_rows.rename_trials(db, old, new)
            for before, after in accounts.items():
                ledger_rows.rename_account(db, before, after)

    def check(self, storage: str) -> None:
        """Verify all records of trials and accounts, and the charges of a storage, before new charges are made.

        Raises LedgerError, of one line, when something is damaged or does not add up.
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
        """Return one line for each thing that is wrong; an empty list when nothing is.

        Every record must match its checksum. Charges must add up to the trials' totals and these to the accounts',
        within every limit and allotment. The bills in `rows`, the results of a sweep, must be those of its trials.

        Args:
            rows: results of a sweep, with the trial's name in the ledger as `trial_id`.
            storage: the storage of these results; needed where storages share a ledger.
            copied_from: the storages that it was copied from, the latest first. A trial that the storage did not run
                itself is compared with theirs.
            whole: verify the charges of all storages. False: those of `storage` and `copied_from` alone.

        Raises:
            LedgerError: the file cannot be read, or its structure is damaged.
        """
        self._store.check()
        with self._store.read() as db:
            return ledger_audit.problems(db, rows, [storage, *copied_from] if storage else [], whole)

    def _trials(self, db: sa.Connection, keys: set[Key]) -> dict[Key, TrialRow]:
        return ledger_rows.lock_trials(db, keys, self._store.insert_new(TRIAL))


def _commit(account: AccountRow, held: Bill, spent: Bill) -> None:
    if refusal := account.refusal(held + spent):
        raise refusal
    account.held += held
    account.spent += spent


def _settle(db: sa.Connection, entry: TrialRow) -> None:
    """Close an open trial: its accounts keep what it paid, and no longer hold its allotment."""
    accounts = ledger_rows.lock_payers(db, [entry]).get(entry.no, [])
    for account in accounts:
        account.held += entry.allotment.bill * -1
        account.spent += entry.paid
    ledger_rows.save_accounts(db, accounts)
    entry.open = False
    ledger_rows.save_trials(db, [entry])
