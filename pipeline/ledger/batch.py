"""Charges, refunds and openings of one transaction: decide each, then write the totals of trials and accounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from methods.base import Bill
from pipeline.budget import BUDGETED_PHASES, LIMITED_UNITS, Limits
from pipeline.errors import BudgetExceeded, ConfigError, LedgerError
from pipeline.ledger import rows as ledger_rows
from pipeline.ledger.records import Charge, Receipt, parse_id
from pipeline.ledger.rows import AccountRow, Key, TrialRow
from pipeline.ledger.schema import CHARGE, REFUND, bucket


class Batch:
    """Charges that are decided in order against locked rows, and then written together."""

    def __init__(self, db: sa.Connection, trials: dict[Key, TrialRow], charges: Sequence[Charge]) -> None:
        self.db, self.trials = db, trials
        self.charged = ledger_rows.find_charges(db, {(trials[c.storage, c.trial].no, c.call) for c in charges})
        self.paid_calls = {(no, call) for (no, call, _), (_, diverged) in self.charged.items() if not diverged}
        self.new: list[dict[str, Any]] = []
        self.payers: dict[int, list[AccountRow]] | None = None

    def decide(self, c: Charge) -> Receipt | BudgetExceeded:
        """Accept or refuse one charge."""
        entry = self.trials[c.storage, c.trial]
        if (known := self.charged.get((entry.no, c.call, c.digest))) is not None:
            if known[0] != c.bill:
                raise LedgerError(f"charge {c.id} was made with {known[0]}, and is repeated with {c.bill}")
            return Receipt(c.id, "replayed")
        diverged = (entry.no, c.call) in self.paid_calls
        place = bucket(c.phase, diverged)
        refusal = None
        if place == "replay":
            refusal = self._charge_accounts(entry, c.bill)
        elif place in BUDGETED_PHASES:
            refusal = entry.refusal(c.bill)
        if refusal is not None:
            return refusal
        entry.buckets[place] += c.bill
        self.charged[entry.no, c.call, c.digest] = (c.bill, diverged)
        self.paid_calls.add((entry.no, c.call))
        self.new.append(ledger_rows.charge_columns(entry.no, c, diverged))
        return Receipt(c.id, "diverged" if diverged else "charged")

    def _charge_accounts(self, entry: TrialRow, bill: Bill) -> BudgetExceeded | None:
        """Charge a replay to every account of the trial, or to none."""
        if self.payers is None:  # accounts are locked for replays only, which are rare
            self.payers = ledger_rows.lock_payers(self.db, self.trials.values())
        payers = self.payers.get(entry.no, [])
        refusal = next((r for account in payers if (r := account.refusal(bill))), None)
        if refusal is None:
            for account in payers:
                account.spent += bill
        return refusal

    def save(self) -> None:
        """Write the accepted charges and the totals that they changed."""
        if not self.new:
            return
        self.db.execute(sa.insert(CHARGE), self.new)
        changed = {row["trial_no"] for row in self.new}
        ledger_rows.save_trials(self.db, [entry for entry in self.trials.values() if entry.no in changed])
        if self.payers is not None:
            ledger_rows.save_payers(self.db, self.payers)


def refund_charges(db: sa.Connection, ids: Sequence[str]) -> None:
    """See Ledger.refund."""
    parsed = [parse_id(charge_id) for charge_id in dict.fromkeys(ids)]
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


def open_trial(
    entry: TrialRow,
    allotment: Limits,
    accounts: Sequence[str],
    joined: set[str],
    opened: Mapping[str, AccountRow],
) -> set[str]:
    """Open a trial in its row and reserve its allotment in those of its accounts; see Ledger.reserve_all.

    Args:
        entry: the trial.
        allotment: what it reserves on each account.
        accounts: names of the accounts that are to pay for it.
        joined: names of those that do already.
        opened: the rows of both.

    Returns:
        The accounts that it joins.
    """
    new, trial = set(accounts) - joined, entry.trial
    if entry.open and entry.allotment != allotment:
        raise LedgerError(f"trial {trial} is open with {entry.allotment}, and cannot be reserved with {allotment}")
    if entry.open and not new:
        return new
    if allotment.exceeded_unit(entry.paid, Bill()):
        raise LedgerError(f"trial {trial} has spent {entry.paid}, more than {allotment} allows")
    for name in dict.fromkeys([*accounts, *sorted(joined)]):
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
    entry.open, entry.allotment = True, allotment
    return new


def _commit(account: AccountRow, held: Bill, spent: Bill) -> None:
    if refusal := account.refusal(held + spent):
        raise refusal
    account.held += held
    account.spent += spent


def settle(db: sa.Connection, entries: Sequence[TrialRow]) -> None:
    """Close open trials: in their accounts, replace their held allotments by what they spent."""
    payers = ledger_rows.lock_payers(db, entries)
    for entry in entries:
        for account in payers.get(entry.no, []):
            account.held += entry.allotment.bill * -1
            account.spent += entry.paid
        entry.open = False
    ledger_rows.save_payers(db, payers)
    ledger_rows.save_trials(db, entries)
