"""Does the ledger add up? Every total is worked out again from the single charges and compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select

from methods.base import Bill
from pipeline.blackbox.bill import LIMITED, UNITS, Phase, row_columns, total
from pipeline.blackbox.ledger_rows import AccountRow, TrialRow, members
from pipeline.blackbox.ledger_schema import ACCOUNT, BUCKETS, CHARGE, TRIAL, bucket

SUMMED = tuple(f"{Phase.EVALUATE.value}_{unit}" for unit in UNITS)
"""Columns of one test set's row: a trial's rows add up to its bill. The other columns stand in each of its rows."""


def problems(db: sa.Connection, results: Iterable[Mapping[str, Any]] | None, storage: str | None) -> list[str]:
    """One line for each thing that does not add up."""
    trials = {row["no"]: TrialRow.of(row) for row in db.execute(select(TRIAL).order_by(TRIAL.c.no)).mappings()}
    found = [*_charges(db, trials), *_trials(trials.values()), *_accounts(db, trials)]
    if results is not None:
        found += _results(trials.values(), results, storage)
    return found


def _charges(db: sa.Connection, trials: Mapping[int, TrialRow]) -> Iterator[str]:
    sums: dict[int, dict[str, Bill]] = defaultdict(dict)
    by = (CHARGE.c.trial_no, CHARGE.c.phase, CHARGE.c.diverged)
    for no, phase, diverged, *counts in db.execute(
        select(*by, *(func.sum(CHARGE.c[unit]) for unit in UNITS)).group_by(*by)
    ):
        if no not in trials:
            yield f"charges of a trial number {no} that does not exist"
        elif phase not in [p.value for p in Phase]:
            yield f"{_name(trials[no])}: charges in an unknown phase {phase!r}"
        else:
            place = bucket(Phase(phase), diverged)
            sums[no][place] = sums[no].get(place, Bill()) + Bill(*(int(n) for n in counts))
    for no, trial in trials.items():
        for name in BUCKETS:
            charged = sums[no].get(name, Bill())
            yield from _differ(f"{_name(trial)}: {name}", trial.buckets[name], charged, "its charges")
    paid = CHARGE.c.diverged.is_(False)
    calls = select(CHARGE.c.trial_no, CHARGE.c.call).where(paid).group_by(CHARGE.c.trial_no, CHARGE.c.call)
    for no, call in db.execute(calls.having(func.count() > 1)):
        yield f"{_name(trials.get(no))}: call {call} was paid more than once"
    negative = sa.or_(*(CHARGE.c[unit] < 0 for unit in UNITS))
    for no, call in db.execute(select(CHARGE.c.trial_no, CHARGE.c.call).where(negative)):
        yield f"{_name(trials.get(no))}: call {call} has a negative bill"


def _trials(trials: Iterable[TrialRow]) -> Iterator[str]:
    for trial in trials:
        if unit := trial.allotment.passed(trial.paid, Bill()):
            spent, limit = getattr(trial.paid, unit), getattr(trial.allotment, unit)
            yield f"{_name(trial)}: {spent:,} {unit} were spent of an allotment of {limit:,}"


def _accounts(db: sa.Connection, trials: Mapping[int, TrialRow]) -> Iterator[str]:
    on: dict[str, list[TrialRow]] = defaultdict(list)
    for no, names in members(db, trials).items():
        for name in names:
            on[name].append(trials[no])
    for row in db.execute(select(ACCOUNT).order_by(ACCOUNT.c.name)).mappings():
        account = AccountRow.of(row)
        mine = on[account.name]
        held = total(trial.allotment.bill for trial in mine if trial.open)
        spent = total(trial.paid for trial in mine if not trial.open) + total(t.buckets["replay"] for t in mine)
        label = f"account {account.name!r}"
        yield from _differ(f"{label}: reserved", account.held, held, "its open trials' allotments", LIMITED)
        yield from _differ(f"{label}: spent", account.spent, spent, "its trials' bills")
        committed = account.held + account.spent
        for unit in LIMITED:
            limit = getattr(account.limits, unit)
            if limit is not None and getattr(committed, unit) > limit:
                yield f"{label}: {getattr(committed, unit):,} {unit} are charged or reserved of {limit:,}"


def _results(trials: Iterable[TrialRow], results: Iterable[Mapping[str, Any]], storage: str | None) -> Iterator[str]:
    books: dict[str, list[TrialRow]] = defaultdict(list)
    for trial in trials:
        if storage is None or trial.storage == storage:
            books[trial.trial].append(trial)
    rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in results:
        rows[str(row["trial_id"])].append(row)
    for name, mine in rows.items():
        if len(books[name]) > 1:
            yield f"trial {name}: {len(books[name])} storages have it; say whose rows these are"
            continue
        charged = row_columns(books[name][0].bills if books[name] else {})
        for column, count in charged.items():
            stated = [int(row[column]) for row in mine if row.get(column) is not None]
            for value in [sum(stated)] if stated and column in SUMMED else sorted(set(stated)):
                if value != count:
                    yield f"trial {name}: its row says {value:,} {column}, the ledger {count:,}"


def _differ(what: str, stated: Bill, worked_out: Bill, source: str, units: Iterable[str] = UNITS) -> Iterator[str]:
    for unit in units:
        if getattr(stated, unit) != getattr(worked_out, unit):
            yield f"{what} {unit}: {getattr(stated, unit):,} stated, {getattr(worked_out, unit):,} by {source}"


def _name(trial: TrialRow | None) -> str:
    return "a trial that does not exist" if trial is None else f"trial {trial.storage}/{trial.trial}"
