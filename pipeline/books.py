"""A run's books: which cells are to run, what is set aside for them before they start, what goes back at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.blackbox.bill import row_columns
from pipeline.blackbox.ledger import Ledger
from pipeline.checkpoint import Checkpoint
from pipeline.errors import BudgetExceeded, ConfigError, FareboxError, LedgerError
from pipeline.plan import Plan, TrialSpec
from pipeline.results import FINISHED, LISTED, ResultRow, Store
from pipeline.trial import failed_row, spec_columns


def sweep_account(storage_id: str) -> str:
    """The sweep's ceiling in the ledger."""
    return f"sweep:{storage_id}"


def pending(plan: Plan, store: Store) -> tuple[list[TrialSpec], dict[str, str]]:
    """Select the trials to run.

    A trial with a damaged file is selected too; `store.damaged` has the file.

    Returns:
        The trials without a finished result (with `stale=rerun`, also those with a stale one), and, by trial id of each
        stale result, what changed since: the method's name or "pipeline".
    """
    done, stale = store.finished({t.trial_id for t in plan.trials}), dict[str, str]()
    for spec in plan.trials:
        method_digest, code_digest = done.get(spec.trial_id, (spec.method_digest, spec.code_digest))
        if method_digest != spec.method_digest:
            stale[spec.trial_id] = spec.choice.name
        elif code_digest != spec.code_digest:
            stale[spec.trial_id] = "pipeline"
    rerun = stale if plan.config.stale == "rerun" else {}
    return [t for t in plan.trials if t.trial_id not in done or t.trial_id in rerun], stale


def stale_line(stale: Mapping[str, str], rerun: bool) -> str:
    """Tell how many results other code made, which code changed, and what happens to them."""
    changed = ", ".join(sorted(set(stale.values()) - {"pipeline"}))
    parts = [f"method {changed}"] if changed else []
    parts += ["the pipeline"] if "pipeline" in stale.values() else []
    doing = "run again" if rerun else "kept as they are (stale=keep)"
    return f"{len(stale)} finished trials are stale, the code changed since ({' and '.join(parts)}): {doing}"


def recomputed(store: Store, todo: Sequence[TrialSpec]) -> list[str]:
    """Return one line for each damaged file of a trial to run; LISTED at most, then how many more there are."""
    ids = {spec.trial_id for spec in todo}
    lines = [
        f"{damage.path} is damaged: {damage.reason}; its trial is recomputed, and paid charges are replayed"
        for damage in store.damaged.values()
        if damage.trial_id in ids
    ]
    more = [f"{len(lines) - LISTED:,} more files are damaged: their trials are recomputed, too"]
    return lines[:LISTED] + (more if len(lines) > LISTED else [])


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
    """Whether the trial has its whole result, made by the present code, and its files are intact."""
    rows = store.rows_of(spec.trial_id)
    if not rows or rows[0].status not in FINISHED or not _same_code(rows[0], spec):
        return False
    return all(store.intact(row.trial_id, row.test_set, row.predictions_digest) for row in rows)


def _same_code(row: ResultRow, spec: TrialSpec) -> bool:
    return (row.method_digest, row.code_digest) == (spec.method_digest, spec.code_digest)


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
            rows = [r for r in store.rows_of(spec.trial_id) if _same_code(r, spec)]
            why = (lost or {}).get(spec.trial_id, "no more is known")
            gone = f"its worker died again and again ({why}); the same command goes on"
            bill: dict[str, Any] = row_columns(ledger.trial_bill(storage_id, spec.account))
            store.write([replace((rows or [failed_row(spec, gone, spec_columns(spec))])[0], **bill)])
        ledger.settle(storage_id, spec.account)


def tidy(store: Store, trials: Sequence[TrialSpec]) -> None:
    """Remove the checkpoints of finished trials, those of other code too.

    A worker may die after it has written its rows and before it has removed its checkpoint.
    """
    accounts: dict[str, set[str]] = defaultdict(set)
    for path in (store.storage / "checkpoints").glob("*.ckpt"):
        account = path.name.removesuffix(".ckpt").removesuffix(".before")
        accounts[account.split(".")[0]].add(account)
    for spec in trials:
        if spec.trial_id in accounts and finished(store, spec):
            for account in accounts[spec.trial_id]:
                Checkpoint(store.storage / "checkpoints", account).clear()


def problems(plan: Plan, store: Store) -> tuple[str, ...]:
    """A line for each trial of the plan without a whole result."""
    rows = {r["trial_id"]: r for r in store.scan().table.select(["trial_id", "status", "error"]).to_pylist()}
    lines = []
    for spec in plan.trials:
        row = rows.get(spec.trial_id, {"status": "failed", "error": "no row was written"})
        if row["status"] != "done":
            lines.append(f"{row['status']}: {spec.name}: {row['error']}")
    return tuple(lines)
