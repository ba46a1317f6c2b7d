"""Budget reservations: select pending trials, reserve their predicted bills, release what they did not spend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.budget import LIMITED_UNITS, Limits, row_columns
from pipeline.config.compose import GlobalBudget
from pipeline.console import Echo
from pipeline.errors import BudgetExceeded, ConfigError, FareboxError, LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.results.row import FINISHED, STATUSES, ResultRow
from pipeline.results.runs import add_run
from pipeline.results.store import ResultStore
from pipeline.sweep.money import fund
from pipeline.sweep.run_ledger import SWEEP_PREFIX, audit, check_name, sweep_account
from pipeline.sweep.storage_id import StorageId
from pipeline.trials.checkpoint import stored_checkpoints
from pipeline.trials.plan import SweepPlan, TrialSpec, refuse_nameless
from pipeline.trials.rows import failed_row, spec_columns

TOGETHER = 500
"""Trials that one transaction of the ledger reserves or releases."""


def pending(plan: SweepPlan, store: ResultStore) -> tuple[list[TrialSpec], dict[str, str]]:
    """Select the trials to run.

    A trial with a damaged file is selected too; `store.damaged` has the file.

    Returns:
        The trials without a finished result (with `on_code_change=rerun`, also those with a stale one), and, by trial
        id of each stale result, what changed since: the method's name or "pipeline".
    """
    done, stale = store.finished({t.trial_id for t in plan.trials}), dict[str, str]()
    for spec in plan.trials:
        method_digest, code_digest = done.get(spec.trial_id, (spec.method_digest, spec.code_digest))
        if method_digest != spec.method_digest:
            stale[spec.trial_id] = spec.choice.name
        elif code_digest != spec.code_digest:
            stale[spec.trial_id] = "pipeline"
    rerun = stale if plan.config.on_code_change == "rerun" else {}
    return [t for t in plan.trials if t.trial_id not in done or t.trial_id in rerun], stale


def stale_line(stale: Mapping[str, str], rerun: bool) -> str:
    """Describe the stale results of a sweep in one line: how many, which code changed, and what is done with them."""
    changed = ", ".join(sorted(set(stale.values()) - {"pipeline"}))
    parts = [f"method {changed}"] if changed else []
    parts += ["the pipeline"] if "pipeline" in stale.values() else []
    doing = "run again" if rerun else "kept as they are (on_code_change=keep)"
    return f"{len(stale)} finished trials are stale, the code changed since ({' and '.join(parts)}): {doing}"


def begin(
    ledger: Ledger, plan: SweepPlan, todo: Sequence[TrialSpec], storage_id: str, echo: Echo
) -> tuple[list[TrialSpec], dict[str, str]]:
    """Release what a killed run left reserved, reserve the bills of these trials, and record the run in plan.json.

    Returns and raises: as `reserve`.
    """
    config = plan.config
    release_left_over(ledger, storage_id, todo)
    payable, unpayable = fund(ledger, plan, todo, storage_id)
    try:
        funded, unfunded = reserve(ledger, plan, payable, storage_id)
    except FareboxError:
        ledger.money.release(storage_id)
        raise
    add_run(config.storage, [t.trial_id for t in plan.trials], config.on_code_change == "keep", echo, config.label)
    return funded, unpayable | unfunded


def reserve(
    ledger: Ledger, plan: SweepPlan, todo: Sequence[TrialSpec], storage_id: str
) -> tuple[list[TrialSpec], dict[str, str]]:
    """Reserve the predicted bill of every trial, in plan order.

    Returns:
        The funded trials, and the reason for each unfunded one by trial id.

    Raises:
        BudgetExceeded: a ceiling cannot pay and budget.partial is false. All reservations made here are released.
        ConfigError: the limits of an account contradict those of the sweep.
    """
    config = plan.config
    refuse_nameless(config)
    accounts = [sweep_account(storage_id)]
    _open_sweep(ledger, accounts[0], config.sweep_budget)
    if config.global_budget.name:
        _join(ledger, config.global_budget.name, config.global_budget)
        accounts.append(config.global_budget.name)
    funded: list[TrialSpec] = []
    unfunded: dict[str, str] = {}
    for some in _together(todo):
        try:
            ledger.reserve_all(storage_id, {spec.account: spec.reserved for spec in some}, accounts)
            funded += some
            continue
        except FareboxError as error:
            if not (config.partial and isinstance(error, BudgetExceeded)):
                release(ledger, storage_id, funded)
                raise
        for spec in some:
            try:
                ledger.reserve(storage_id, spec.account, accounts, spec.reserved)
                funded.append(spec)
            except BudgetExceeded as error:
                unfunded[spec.trial_id] = str(error)
    return funded, unfunded


def _together(trials: Sequence[TrialSpec]) -> Iterator[list[TrialSpec]]:
    """Return the trials in parts for one transaction of the ledger each."""
    return (list(trials[i : i + TOGETHER]) for i in range(0, len(trials), TOGETHER))


def _open_sweep(ledger: Ledger, name: str, limits: Limits) -> None:
    """Open the account of the sweep's ceiling and give it these limits."""
    try:
        if ledger.open_account(name, limits) != limits:
            ledger.set_limits(name, limits)
    except LedgerError as error:
        raise ConfigError(f"{error}; raise the ceiling (budget.sweep.*)") from error


def _join(ledger: Ledger, name: str, budget: GlobalBudget) -> None:
    """Join a named global budget, or create it. The limits of an existing one are never changed here."""
    check_name(name)
    stated = budget.limits
    if stated == Limits():
        if budget.usd is not None:
            ledger.open_account(name, stated)
        if ledger.limits(name) is None:
            known = ", ".join(a.name for a in ledger.accounts() if not a.name.startswith(SWEEP_PREFIX)) or "none"
            raise ConfigError(
                f"no budget named {name!r} in the ledger (known: {known[:100]}): to create it, add "
                "budget.global.requests=N, budget.global.images=N or budget.global.usd=N"
            )
        return
    present = ledger.open_account(name, stated)
    differ = [u for u in LIMITED_UNITS if getattr(stated, u) not in (None, getattr(present, u))]
    if differ:
        arguments = " ".join(f"{unit}={getattr(stated, unit)}" for unit in differ)
        raise ConfigError(
            f"budget {name!r} is limited to {present.text or 'nothing'}, and this sweep states {stated.text}: leave "
            "budget.global.requests and images out to join it, or change it: "
            f"farebox budget set {name} {arguments} url=URL"
        )


def release(ledger: Ledger, storage_id: str, trials: Sequence[TrialSpec]) -> None:
    """Close these trials in the ledger and return what they reserved and did not spend."""
    for some in _together(trials):
        ledger.release_all(storage_id, [spec.account for spec in some])


def release_left_over(ledger: Ledger, storage_id: str, todo: Sequence[TrialSpec]) -> None:
    """Release what a killed run reserved for trials that this run does not include."""
    keys = {spec.account for spec in todo}
    for trial in ledger.trials(storage_id):
        if trial.open and trial.trial not in keys:
            ledger.release(storage_id, trial.trial)


def _recorded(rows: Sequence[ResultRow], spec: TrialSpec) -> bool:
    """Return whether these are all rows of the trial, made by the present code; predictions are not looked at."""
    return bool(rows) and rows[0].status in FINISHED and _same_code(rows[0], spec)


def finished(store: ResultStore, spec: TrialSpec) -> bool:
    """Return whether the trial has all its rows, made by the present code, and its prediction files are intact."""
    rows = store.rows_of(spec.trial_id)
    return _recorded(rows, spec) and all(
        store.intact(row.trial_id, row.test_set, row.predictions_digest) for row in rows
    )


def _same_code(row: ResultRow, spec: TrialSpec) -> bool:
    return (row.method_digest, row.code_digest) == (spec.method_digest, spec.code_digest)


def close_trials(
    ledger: Ledger,
    storage_id: str,
    funded: Sequence[TrialSpec],
    store: ResultStore,
    lost: Mapping[str, str] | None = None,
) -> None:
    """Write a failed row, with its bill, for each trial without a result, and release all reservations.

    lost: by trial id, the last error of each trial that lost all of its workers.
    """
    rows_of = store.trials()
    for spec in funded:
        rows = rows_of.get(spec.trial_id, [])
        if not _recorded(rows, spec):
            rows = [row for row in rows if _same_code(row, spec)]
            reason = (lost or {}).get(spec.trial_id, "no more is known")
            message = (
                f"its worker died again and again ({reason:.120}): the process was ended, crashed or ran out of "
                "memory; run the same command to try again"
            )
            bill: dict[str, Any] = row_columns(ledger.trial_bill(storage_id, spec.account))
            store.write([replace((rows or [failed_row(spec, message, spec_columns(spec))])[0], **bill)])
    release(ledger, storage_id, funded)


def remove_checkpoints(store: ResultStore, trials: Sequence[TrialSpec]) -> None:
    """Remove the checkpoints of finished trials, including those that other code wrote.

    A worker may die after it has written its rows and before it has removed its checkpoint.
    """
    specs = {spec.trial_id: spec for spec in trials}
    for checkpoint in stored_checkpoints(store.storage):
        spec = specs.get(checkpoint.trial.partition(".")[0])
        if spec is not None and finished(store, spec):
            checkpoint.clear()


def problems(plan: SweepPlan, store: ResultStore, ledger: Ledger, storage: StorageId) -> tuple[str, ...]:
    """Return one line for each trial of the plan without a complete result, and for each problem in the ledger."""
    table = store.read()
    rows = {r["trial_id"]: r for r in table.select(["trial_id", "status", "error"]).to_pylist()}
    try:
        lines = [f"ledger: {line}" for line in audit(ledger, table, storage, whole=False)]
    except LedgerError as error:
        lines = [str(error)]
    for spec in plan.trials:
        row = rows.get(spec.trial_id, {"status": "failed", "error": "no row was written"})
        if row["status"] != "done":
            lines.append(f"{STATUSES[row['status']]}: {spec.name}: {row['error']}")
    return tuple(lines)
