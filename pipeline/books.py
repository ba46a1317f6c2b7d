"""A run's books: which cells are to run, what is set aside for them before they start, what goes back at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.blackbox.bill import row_columns
from pipeline.blackbox.ledger import Ledger
from pipeline.checkpoint import Checkpoint
from pipeline.errors import BudgetExceeded, ConfigError, FareboxError, LedgerError
from pipeline.plan import Plan, TrialSpec
from pipeline.results import FINISHED, Store
from pipeline.trial import failed_row, spec_columns


def sweep_account(storage_id: str) -> str:
    """The sweep's ceiling in the ledger."""
    return f"sweep:{storage_id}"


def pending(plan: Plan, store: Store) -> tuple[list[TrialSpec], list[TrialSpec]]:
    """(cells to run, cells made by other code among them)."""
    done = store.finished()
    stale = [t for t in plan.trials if done.get(t.trial_id, t.method_digest) != t.method_digest]
    rerun = {t.trial_id for t in stale} if plan.config.stale == "rerun" else set()
    return [t for t in plan.trials if t.trial_id not in done or t.trial_id in rerun], stale


def reserve(
    ledger: Ledger, plan: Plan, todo: Sequence[TrialSpec], storage_id: str
) -> tuple[list[TrialSpec], dict[str, str]]:
    """Set every trial's predicted bill aside, in plan order; (funded trials, reason by unfunded trial id).

    Raises BudgetExceeded, having given back what it took, when a ceiling cannot pay and partial runs are not asked for.
    """
    config = plan.config
    accounts = {sweep_account(storage_id): config.sweep_budget}
    if config.global_budget.name:
        accounts[config.global_budget.name] = config.global_budget.limits
    for name, limits in accounts.items():
        try:
            ledger.open_account(name, limits)
        except LedgerError as error:
            raise ConfigError(f"{error}; raise the ceiling (budget.sweep.*, budget.global.*)") from error
    funded: list[TrialSpec] = []
    unfunded: dict[str, str] = {}
    for spec in todo:
        try:
            ledger.reserve(storage_id, spec.account, list(accounts), spec.reserved)
            funded.append(spec)
        except FareboxError as error:
            if config.partial and isinstance(error, BudgetExceeded):
                unfunded[spec.trial_id] = str(error)
                continue
            for earlier in funded:
                ledger.settle(storage_id, earlier.account)
            raise
    return funded, unfunded


def finished(store: Store, spec: TrialSpec) -> bool:
    """Whether the trial has its whole result, made by the present code."""
    rows = store.rows_of(spec.trial_id)
    return bool(rows) and rows[0].status in FINISHED and rows[0].method_digest == spec.method_digest


def settle_left_over(ledger: Ledger, storage_id: str, todo: Sequence[TrialSpec]) -> None:
    """Give back what a killed run reserved for trials that are not to run now."""
    wanted = {spec.account for spec in todo}
    for trial in ledger.trials(storage_id):
        if trial.open and trial.trial not in wanted:
            ledger.settle(storage_id, trial.trial)


def close_books(
    ledger: Ledger, storage_id: str, funded: Sequence[TrialSpec], store: Store, lost: Mapping[str, str] | None = None
) -> None:
    """Every trial gets its row and gives back its rest, whatever became of its worker; a failed row states the bill.

    `lost` says by trial id what ended the last worker of a trial that lost all of its workers.
    """
    for spec in funded:
        if not finished(store, spec):
            rows = [r for r in store.rows_of(spec.trial_id) if r.method_digest == spec.method_digest]
            why = (lost or {}).get(spec.trial_id, "no more is known")
            gone = (
                f"its worker died again and again ({why:.120}): the process was ended, crashed or ran out of memory; "
                "run the same command to try again"
            )
            bill: dict[str, Any] = row_columns(ledger.trial_bill(storage_id, spec.account))
            store.write([replace((rows or [failed_row(spec, gone, spec_columns(spec))])[0], **bill)])
        ledger.settle(storage_id, spec.account)


def tidy(store: Store, trials: Sequence[TrialSpec]) -> None:
    """Remove the checkpoints of finished cells: a worker may die when its rows are written and they are still there."""
    found = list((store.storage / "checkpoints").glob("*.ckpt"))
    for spec in trials:
        if any(path.name.startswith(f"{spec.account}.") for path in found) and finished(store, spec):
            Checkpoint(store.storage / "checkpoints", spec.account).clear()


def problems(plan: Plan, store: Store) -> tuple[str, ...]:
    """A line for each trial of the plan without a whole result."""
    rows = {r["trial_id"]: r for r in store.read().select(["trial_id", "status", "error"]).to_pylist()}
    lines = []
    for spec in plan.trials:
        row = rows.get(spec.trial_id, {"status": "failed", "error": "no row was written"})
        if row["status"] != "done":
            lines.append(f"{row['status']}: {spec.name}: {row['error']}")
    return tuple(lines)
