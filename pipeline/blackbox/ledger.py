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

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from methods.base import Bill
from pipeline.blackbox import ledger_audit, ledger_rows
from pipeline.blackbox.bill import (
    LIMITED,
    PAID,
    UNITS,
    AccountRecord,
    Charge,
    ChargeRecord,
    Limits,
    Phase,
    Receipt,
    TrialRecord,
    parse_id,
)
from pipeline.blackbox.ledger_rows import AccountRow, Key, TrialRow
from pipeline.blackbox.ledger_schema import ACCOUNT, CHARGE, MEMBER, REFUND, TRIAL, Store, bucket
from pipeline.errors import BudgetExceeded, ConfigError, LedgerError

__all__ = ["AccountRecord", "Charge", "ChargeRecord", "Ledger", "Limits", "Phase", "Receipt", "TrialRecord"]


class Ledger:
    """The ledger at an SQLAlchemy URL: a SQLite file (the default) or a PostgreSQL database."""

    def __init__(self, url: str) -> None:
        self._store = Store(url)

    def close(self) -> None:
        """Let go of the database; a later call opens it again."""
        self._store.close()

    def open_account(self, name: str, limits: Limits) -> None:
        """Create an account, or change its limits.

        Raises LedgerError, changing nothing, when more is committed already than the new limits allow, or when a limit
        is set on a unit in which an open trial has none.
        """
        with self._store.write() as db:
            db.execute(self._store.insert_new(ACCOUNT), {"name": name, **ledger_rows.limit_columns(limits)})
            account = ledger_rows.lock_accounts(db, [name])[name]
            committed = account.held + account.spent
            if unit := limits.passed(committed, Bill()):
                raise LedgerError(
                    f"account {name!r} cannot be limited to {getattr(limits, unit):,} {unit}: "
                    f"{getattr(committed, unit):,} are charged or reserved already"
                )
            for unit in LIMITED:
                if getattr(limits, unit) is None or getattr(account.limits, unit) is not None:
                    continue
                endless = (MEMBER.c.account == name, TRIAL.c.open, TRIAL.c[f"limit_{unit}"].is_(None))
                joined = TRIAL.join(MEMBER)
                if n := db.execute(select(sa.func.count()).select_from(joined).where(*endless)).scalar_one():
                    raise LedgerError(
                        f"account {name!r} cannot be limited in {unit}: {n} open trials on it have no such limit; "
                        "finish or settle them first"
                    )
            db.execute(sa.update(ACCOUNT).where(ACCOUNT.c.name == name).values(**ledger_rows.limit_columns(limits)))

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
            if allotment.passed(entry.paid, Bill()):
                raise LedgerError(f"trial {trial} has spent {entry.paid}, more than {allotment} allows")
            opened = ledger_rows.lock_accounts(db, joined | new)
            for name in dict.fromkeys([*accounts, *sorted(joined)]):
                if name not in opened:
                    raise LedgerError(f"no account named {name!r} in the ledger {self._store.name}")
                account = opened[name]
                for unit in LIMITED:
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
                db.execute(sa.insert(MEMBER), [{"trial_no": entry.no, "account": name} for name in sorted(new)])
            changed = {"open": True, **ledger_rows.limit_columns(allotment)}
            db.execute(sa.update(TRIAL).where(TRIAL.c.no == entry.no).values(**changed))

    def settle(self, storage: str, trial: str) -> Bill:
        """Close a trial and give back what it did not spend; returns what it spent (adapt + validate).

        Raises LedgerError for a trial that the ledger has never seen.
        """
        with self._store.write() as db:
            entry = ledger_rows.lock_trials(db, {(storage, trial)}).get((storage, trial))
            if entry is None:
                raise LedgerError(f"no trial {trial} of {storage} in the ledger {self._store.name}")
            if entry.open:
                names = ledger_rows.members(db, [entry.no]).get(entry.no, set())
                accounts = ledger_rows.lock_accounts(db, names).values()
                for account in accounts:
                    account.held += entry.allotment.bill * -1
                    account.spent += entry.paid
                ledger_rows.save_accounts(db, accounts)
                db.execute(sa.update(TRIAL).where(TRIAL.c.no == entry.no).values(open=False))
            return entry.paid

    def charge(self, charges: Sequence[Charge]) -> list[Receipt | BudgetExceeded]:
        """Charge the calls of one forward in one transaction; each is accepted or refused on its own, in order.

        When this returns, every receipt is durable. When it raises (LedgerError), nothing may be answered; the same
        charges may be made again. A trial that never reserved has an allotment of nothing.
        """
        if not charges:
            return []
        with self._store.write() as db:
            batch = _Batch(db, self._trials(db, {(c.storage, c.trial) for c in charges}), charges)
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
            joined = ledger_rows.members(db, {entry.no for entry in trials.values()})
            accounts = ledger_rows.lock_accounts(db, {name for names in joined.values() for name in names})
            for storage, trial, call, digest in parsed:
                entry = trials.get((storage, trial))
                if entry is None:
                    continue
                key = (CHARGE.c.trial_no == entry.no, CHARGE.c.call == call, CHARGE.c.digest == digest)
                row = db.execute(select(CHARGE).where(*key)).mappings().one_or_none()
                if row is None:
                    continue
                back = Bill(*(row[unit] for unit in UNITS)) * -1
                place = bucket(Phase(row["phase"]), row["diverged"])
                entry.buckets[place] += back
                if place == "replay" or (place in PAID and not entry.open):
                    for name in joined.get(entry.no, ()):
                        accounts[name].spent += back
                db.execute(sa.insert(REFUND), {**row, "refunded_at": time.time()})
                db.execute(sa.delete(CHARGE).where(*key))
            ledger_rows.save_trials(db, trials.values())
            ledger_rows.save_accounts(db, accounts.values())

    def trial_bill(self, storage: str, trial: str) -> dict[Phase, Bill]:
        """What a trial was charged, by phase; all zero for a trial never seen."""
        with self._store.read() as db:
            entry = ledger_rows.find_trial(db, storage, trial)
        return entry.bills if entry is not None else {phase: Bill() for phase in Phase}

    def accounts(self) -> list[AccountRecord]:
        """Every account, by name."""
        with self._store.read() as db:
            return ledger_rows.list_accounts(db)

    def trials(self, storage: str | None = None) -> list[TrialRecord]:
        """Every trial (of one storage) in the order in which they were first seen."""
        with self._store.read() as db:
            return ledger_rows.list_trials(db, storage)

    def charges(self, storage: str, trial: str) -> list[ChargeRecord]:
        """A trial's charges by call number, refunded ones among them."""
        with self._store.read() as db:
            return ledger_rows.list_charges(db, storage, trial)

    def verify(self, rows: Iterable[Mapping[str, Any]] | None = None, storage: str | None = None) -> list[str]:
        """Every way in which the books do not add up, a line each; empty when all is well.

        Charges must add up to the trials' totals and these to the accounts', within every limit and allotment. With
        `rows`, the results of a sweep (of `storage`; needed where a ledger is shared), their bills must be the trials'.
        """
        self._store.check()
        with self._store.read() as db:
            return ledger_audit.problems(db, rows, storage)

    def _trials(self, db: sa.Connection, keys: set[Key]) -> dict[Key, TrialRow]:
        return ledger_rows.lock_trials(db, keys, self._store.insert_new(TRIAL))


def _commit(account: AccountRow, held: Bill, spent: Bill) -> None:
    if refusal := account.refusal(held + spent):
        raise refusal
    account.held += held
    account.spent += spent


class _Batch:
    """One transaction's charges: decided in order against the locked rows, then written together."""

    def __init__(self, db: sa.Connection, trials: dict[Key, TrialRow], charges: Sequence[Charge]) -> None:
        self.db, self.trials = db, trials
        self.charged = ledger_rows.find_charges(db, {(trials[c.storage, c.trial].no, c.call) for c in charges})
        self.paid_calls = {(no, call) for (no, call, _), (_, diverged) in self.charged.items() if not diverged}
        self.new: list[dict[str, Any]] = []
        self.payers: dict[int, list[AccountRow]] | None = None

    def decide(self, c: Charge) -> Receipt | BudgetExceeded:
        entry = self.trials[c.storage, c.trial]
        if (known := self.charged.get((entry.no, c.call, c.digest))) is not None:
            if known[0] != c.bill:
                raise LedgerError(f"charge {c.id} was made for {known[0]}, and is now asked for {c.bill}")
            return Receipt(c.id, "replayed")
        diverged = (entry.no, c.call) in self.paid_calls
        place = bucket(c.phase, diverged)
        refusal = None
        if place == "replay":
            refusal = self._charge_accounts(entry, c.bill)
        elif place in PAID:
            refusal = entry.refusal(c.bill)
        if refusal is not None:
            return refusal
        entry.buckets[place] += c.bill
        self.charged[entry.no, c.call, c.digest] = (c.bill, diverged)
        self.paid_calls.add((entry.no, c.call))
        self.new.append(ledger_rows.charge_columns(entry.no, c, diverged))
        return Receipt(c.id, "diverged" if diverged else "charged")

    def _charge_accounts(self, entry: TrialRow, bill: Bill) -> BudgetExceeded | None:
        """A replay is paid by every account of the trial, or by none."""
        if self.payers is None:  # most batches have no replay, and need not lock the accounts
            joined = ledger_rows.members(self.db, {t.no for t in self.trials.values()})
            accounts = ledger_rows.lock_accounts(self.db, {name for names in joined.values() for name in names})
            self.payers = {no: [accounts[name] for name in sorted(names)] for no, names in joined.items()}
        payers = self.payers.get(entry.no, [])
        refusal = next((r for account in payers if (r := account.refusal(bill))), None)
        if refusal is None:
            for account in payers:
                account.spent += bill
        return refusal

    def save(self) -> None:
        if not self.new:
            return
        self.db.execute(sa.insert(CHARGE), self.new)
        changed = {row["trial_no"] for row in self.new}
        ledger_rows.save_trials(self.db, [entry for entry in self.trials.values() if entry.no in changed])
        if self.payers is not None:
            ledger_rows.save_accounts(self.db, {a.name: a for payers in self.payers.values() for a in payers}.values())
