"""Verify the ledger: checksums of all records, and totals against the sums of the charges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select

from methods.base import Bill
from pipeline.budget import LIMITED_UNITS, UNITS, Phase, row_columns, total
from pipeline.ledger import money_rows
from pipeline.ledger.checksum import intact, label
from pipeline.ledger.rows import AccountRow, TrialRow, all_trials
from pipeline.ledger.schema import ACCOUNT, BUCKETS, CHARGE, MEMBER, REFUND, STORAGE, TRIAL, bucket

SUMMED = tuple(f"{Phase.EVALUATE.value}_{unit}" for unit in UNITS)
"""Columns with the bill of one test set, added up over a trial's rows. Other columns are equal in all its rows."""
UNFINISHED = ("failed", "unfunded")
"""Statuses of rows whose trial may be continued and charged more."""
CHUNK = 10_000
"""Number of charges in memory at a time."""


def problems(
    db: sa.Connection, results: Iterable[Mapping[str, Any]] | None, storages: Sequence[str], whole: bool
) -> list[str]:
    """Return one line for each problem; see Ledger.verify.

    Args:
        db: a connection in a transaction.
        results: rows of a sweep.
        storages: the storage of these rows, then those that it was copied from; empty for all storages.
        whole: verify the charges of all storages, not only of these.
    """
    scope = None if whole else storages
    lines: list[str] = []
    sums = _sums(db, scope, lines)
    lines += [*_damaged(db), *money_rows.problems(db)]
    if lines:
        return lines  # sums over the intact records would only repeat it
    trials = all_trials(db)
    lines = [*_charges(db, trials, sums, scope), *_trials(trials.values()), *_accounts(db, trials)]
    if results is not None:
        lines += _results(trials.values(), results, storages)
    return lines


def _damaged(db: sa.Connection) -> Iterator[str]:
    """Yield a line for each damaged record, except charges."""
    for table in (ACCOUNT, TRIAL, MEMBER, STORAGE, REFUND):
        for row in db.execute(select(table)):
            record = row[1:] if table is REFUND else row  # a refund's number is assigned by the database
            if not intact(table, record):
                yield f"damaged record {label(table, row)}"


def _sums(
    db: sa.Connection, storages: Sequence[str] | None, lines: list[str]
) -> dict[tuple[int, str, bool], list[int]]:
    """Return sums of the charges by (trial number, phase, diverged); append a line for each damaged charge."""
    sums: dict[tuple[int, str, bool], list[int]] = defaultdict(lambda: [0] * len(UNITS))
    query = select(CHARGE).where(*_of(storages)).execution_options(yield_per=CHUNK)
    for row in db.execute(query):
        if not intact(CHARGE, row):
            lines.append(f"damaged record {label(CHARGE, row)}")
            continue
        no, _, _, phase, diverged, requests, images, prompts, outputs, _, _ = row
        entry = sums[no, phase, diverged]
        entry[0] += requests
        entry[1] += images
        entry[2] += prompts
        entry[3] += outputs
    return sums


def _of(storages: Sequence[str] | None) -> list[sa.ColumnElement[bool]]:
    """Return the condition for charges of these storages; None for all."""
    if storages is None:
        return []
    return [CHARGE.c.trial_no.in_(select(TRIAL.c.no).where(TRIAL.c.storage.in_(list(storages))))]


def _charges(
    db: sa.Connection,
    trials: Mapping[int, TrialRow],
    sums: Mapping[tuple[int, str, bool], Sequence[int]],
    scope: Sequence[str] | None,
) -> Iterator[str]:
    buckets: dict[int, dict[str, Bill]] = defaultdict(dict)
    for (no, phase, diverged), counts in sums.items():
        if no not in trials:
            yield f"charges of a trial number {no} that does not exist"
        elif phase not in [p.value for p in Phase]:
            yield f"{_name(trials[no])}: charges in an unknown phase {phase!r}"
        else:
            name = bucket(Phase(phase), diverged)
            buckets[no][name] = buckets[no].get(name, Bill()) + Bill(*counts)
    for no, trial in trials.items():
        if scope is None or trial.storage in scope:
            for name in BUCKETS:
                charged = buckets[no].get(name, Bill())
                yield from _differ(f"{_name(trial)}: {name}", trial.buckets[name], charged, "its charges")
    paid = (CHARGE.c.diverged.is_(False), *_of(scope))
    calls = select(CHARGE.c.trial_no, CHARGE.c.call).where(*paid).group_by(CHARGE.c.trial_no, CHARGE.c.call)
    for no, call in db.execute(calls.having(func.count() > 1)):
        yield f"{_name(trials.get(no))}: call {call} was paid more than once"
    negative = (sa.or_(*(CHARGE.c[unit] < 0 for unit in UNITS)), *_of(scope))
    for no, call in db.execute(select(CHARGE.c.trial_no, CHARGE.c.call).where(*negative)):
        yield f"{_name(trials.get(no))}: call {call} has a negative bill"


def _trials(trials: Iterable[TrialRow]) -> Iterator[str]:
    for trial in trials:
        if unit := trial.allotment.exceeded_unit(trial.paid, Bill()):
            spent, limit = getattr(trial.paid, unit), getattr(trial.allotment, unit)
            yield f"{_name(trial)}: {spent:,} {unit} are spent of an allotment of {limit:,}"


def _accounts(db: sa.Connection, trials: Mapping[int, TrialRow]) -> Iterator[str]:
    accounts = {row[0]: AccountRow.of(row) for row in db.execute(select(ACCOUNT).order_by(ACCOUNT.c.name))}
    on: dict[str, list[TrialRow]] = defaultdict(list)
    for no, name, _ in db.execute(select(MEMBER)):
        if no not in trials:
            yield f"account {name!r} is charged for a trial number {no} that does not exist"
        elif name not in accounts:
            yield f"{_name(trials[no])} is charged to an account {name!r} that does not exist"
        else:
            on[name].append(trials[no])
    for name, account in accounts.items():
        yield from account_differences(account, on[name])
        committed = account.held + account.spent
        for unit in LIMITED_UNITS:
            limit = getattr(account.limits, unit)
            if limit is not None and getattr(committed, unit) > limit:
                yield f"account {name!r}: {getattr(committed, unit):,} {unit} are charged or reserved of {limit:,}"


def account_differences(account: AccountRow, trials: Sequence[TrialRow]) -> Iterator[str]:
    """Yield a line for each total of an account that differs from the sum over its trials."""
    held = total(trial.allotment.bill for trial in trials if trial.open)
    spent = total(trial.paid for trial in trials if not trial.open) + total(t.buckets["replay"] for t in trials)
    name = f"account {account.name!r}"
    yield from _differ(f"{name}: reserved", account.held, held, "its open trials' allotments", LIMITED_UNITS)
    yield from _differ(f"{name}: spent", account.spent, spent, "its trials' bills")


def _results(
    trials: Iterable[TrialRow], results: Iterable[Mapping[str, Any]], storages: Sequence[str]
) -> Iterator[str]:
    by_name: dict[str, list[TrialRow]] = defaultdict(list)
    for trial in trials:
        if not storages or trial.storage in storages:
            by_name[trial.trial].append(trial)
    rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in results:
        rows[str(row["trial_id"])].append(row)
    for name, mine in rows.items():
        candidates = sorted(by_name[name], key=lambda t: storages.index(t.storage) if storages else 0)
        if not storages and len(candidates) > 1:
            yield f"trial {name}: {len(candidates)} storages have it; name the storage of these rows"
            continue
        bills = candidates[0].bills if candidates else {}
        copied = bool(candidates and storages) and candidates[0].storage != storages[0]
        for column, count in row_columns(bills).items():
            stated = [int(row[column]) for row in mine if row.get(column) is not None]
            for value in [sum(stated)] if stated and column in SUMMED else sorted(set(stated)):
                if copied and mine[0].get("status") in UNFINISHED and value <= count:
                    continue  # the original storage has continued the trial
                if value != count:
                    yield f"trial {name}: its row says {value:,} {column}, the ledger {count:,}"


def _differ(name: str, stored: Bill, computed: Bill, source: str, units: Iterable[str] = UNITS) -> Iterator[str]:
    for unit in units:
        if getattr(stored, unit) != getattr(computed, unit):
            yield f"{name} {unit}: {getattr(stored, unit):,} stored, {getattr(computed, unit):,} by {source}"


def _name(trial: TrialRow | None) -> str:
    return "a trial that does not exist" if trial is None else f"trial {trial.storage}/{trial.trial}"
