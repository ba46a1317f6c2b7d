"""Budget of a run: open the ledger, reserve the predicted bills of pending trials, release what they did not spend."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.budget import LIMITED_UNITS, Limits, TrialRecord, row_columns
from pipeline.config.compose import Config, GlobalBudget
from pipeline.errors import BudgetExceeded, ConfigError, FareboxError, LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.schema import sqlite_file
from pipeline.results.row import account_name
from pipeline.results.store import FINISHED, ResultRow, ResultStore
from pipeline.sweep.storage_id import FILE, StorageId, is_copy, moved_here, new_id, read_id, write_id
from pipeline.trials.checkpoint import Checkpoint
from pipeline.trials.plan import SweepPlan, TrialSpec, refuse_nameless
from pipeline.trials.trial import failed_row, spec_columns

SWEEP = "sweep:"
"""Accounts whose names begin so are ceilings of single sweeps."""
_ACCOUNT = ["trial_id", "method_digest", "code_digest"]
"""Columns of a row that name its trial's account."""
LONGEST_NAME = 60
"""Characters in the name of a global budget."""


def sweep_account(storage_id: str) -> str:
    """The sweep's ceiling in the ledger."""
    return f"{SWEEP}{storage_id}"


def open_ledger(config: Config, say: Callable[[str], None]) -> tuple[Ledger, StorageId]:
    """Open the ledger of a run and register the storage in it. The caller holds the storage's lock.

    A storage that is a copy of another gets an id of its own. In a ledger inside of the storage, which was copied with
    it, the entries are renamed to the new id. In a shared ledger they stay the original's, so that unfinished trials of
    the copy start anew: their checkpoints are removed.

    Raises:
        ConfigError: the ledger cannot be used, is in memory, or is damaged.
    """
    try:
        ledger = Ledger(config.ledger_url)
        try:
            _refuse_memory(ledger)
            storage = _identify(config, ledger, say)
            if config.global_budget.url is None:
                for earlier in storage.copied_from:
                    ledger.rename_storage(earlier, storage.id, {sweep_account(earlier): sweep_account(storage.id)})
            if config.global_budget.name and config.global_budget.url is None:
                say(
                    f"budget {config.global_budget.name!r} is in this storage's own ledger, which no other sweep uses: "
                    "to share it, name one ledger for all with budget.global.url=URL"
                )
            ledger.check(storage.id)
            ledger.register(storage.id, storage.path, storage.host)
        except BaseException:
            ledger.close()
            raise
    except LedgerError as error:
        raise ConfigError(str(error)) from error
    return ledger, storage


def existing_ledger(config: Config) -> Ledger:
    """Open the ledger of a sweep, for reading. Raises ConfigError when there is none."""
    file = sqlite_file(config.ledger_url)
    if file is not None and not file.is_file():
        raise ConfigError(f"no ledger at {file}: name the one that the sweep used with budget.global.url=URL")
    try:
        ledger = Ledger(config.ledger_url)
    except LedgerError as error:
        if file is None:  # a server that does not answer, or no URL
            raise ConfigError(str(error)) from error
        raise
    _refuse_memory(ledger)
    return ledger


def _refuse_memory(ledger: Ledger) -> None:
    if ledger.in_memory:
        ledger.close()
        raise ConfigError(
            f"budget.global.url={ledger.name} is a ledger in memory: expected sqlite:///PATH or postgresql://..."
        )


def _identify(config: Config, ledger: Ledger, say: Callable[[str], None]) -> StorageId:
    folder, shared = config.storage, config.global_budget.url is not None
    if not (folder / FILE).exists():
        storage = new_id(folder)
        write_id(folder, storage)
        return storage
    old = read_id(folder)
    places = {(old.path, old.host)}
    if shared and (record := ledger.storage(old.id)) is not None:
        places.add((record.path, record.host))
    originals = sorted(place for place in places if is_copy(folder, old, *place))
    if originals:
        path, host = originals[0]
        storage = new_id(folder, (old.id, *old.copied_from))
        checkpoints = sorted((folder / "checkpoints").glob("*.ckpt")) if shared else []
        for checkpoint in checkpoints:  # their calls were paid under the original's id
            checkpoint.unlink()
        n = len({path.name.removesuffix(".ckpt").removesuffix(".before") for path in checkpoints})
        removed = f"; the checkpoints of {n} unfinished trials are removed, which start anew" if n else ""
        say(f"{folder} is a copy of the storage {old.id} at {path} on {host}: its id is now {storage.id}{removed}")
    else:
        storage = moved_here(folder, old)
        if (storage.path, storage.host) != (old.path, old.host):
            say(f"{folder} was moved: it was {old.path} on {old.host}")
    if storage != old:
        write_id(folder, storage)
    return storage


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
    """Tell how many results other code made, which code changed, and what happens to them."""
    changed = ", ".join(sorted(set(stale.values()) - {"pipeline"}))
    parts = [f"method {changed}"] if changed else []
    parts += ["the pipeline"] if "pipeline" in stale.values() else []
    doing = "run again" if rerun else "kept as they are (on_code_change=keep)"
    return f"{len(stale)} finished trials are stale, the code changed since ({' and '.join(parts)}): {doing}"


def reserve(
    ledger: Ledger, plan: SweepPlan, todo: Sequence[TrialSpec], storage_id: str
) -> tuple[list[TrialSpec], dict[str, str]]:
    """Reserve every trial's predicted bill, in plan order; (funded trials, reason by unfunded trial id).

    Raises:
        BudgetExceeded: a ceiling cannot pay, and budget.partial is false. What was reserved is given back.
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
    for spec in todo:
        try:
            ledger.reserve(storage_id, spec.account, accounts, spec.reserved)
            funded.append(spec)
        except FareboxError as error:
            if config.partial and isinstance(error, BudgetExceeded):
                unfunded[spec.trial_id] = str(error)
                continue
            for earlier in funded:
                ledger.settle(storage_id, earlier.account)
            raise
    return funded, unfunded


def _open_sweep(ledger: Ledger, name: str, limits: Limits) -> None:
    """Open the account of the sweep's own ceiling with the limits of this command."""
    try:
        if ledger.open_account(name, limits) != limits:
            ledger.set_limits(name, limits)
    except LedgerError as error:
        raise ConfigError(f"{error}; raise the ceiling (budget.sweep.*)") from error


def check_name(name: str) -> None:
    """Raise ConfigError for a name that a global budget cannot have."""
    if name.startswith(SWEEP):
        raise ConfigError(f"budget name {name[:60]!r}: names that begin with {SWEEP!r} are those of single sweeps")
    if not name.isprintable() or not name.strip() or len(name) > LONGEST_NAME:
        raise ConfigError(f"budget name {name[:60]!r}: expected 1 to {LONGEST_NAME} printable characters")


def _join(ledger: Ledger, name: str, budget: GlobalBudget) -> None:
    """Join a named global budget, or create it. Its present limits never change here."""
    check_name(name)
    stated = budget.limits
    if stated == Limits():
        if ledger.limits(name) is None:
            known = ", ".join(a.name for a in ledger.accounts() if not a.name.startswith(SWEEP)) or "none"
            raise ConfigError(
                f"no budget named {name!r} in the ledger (known: {known[:100]}): to create it, add "
                "budget.global.requests=N or budget.global.images=N"
            )
        return
    present = ledger.open_account(name, stated)
    differ = [u for u in LIMITED_UNITS if getattr(stated, u) not in (None, getattr(present, u))]
    if differ:
        words = " ".join(f"{unit}={getattr(stated, unit)}" for unit in differ)
        raise ConfigError(
            f"budget {name!r} is limited to {present.words or 'nothing'}, and this sweep names {stated.words}: leave "
            f"budget.global.requests and images out to join it, or change it: farebox budget set {name} {words} url=URL"
        )


def recorded(store: ResultStore, spec: TrialSpec) -> bool:
    """Whether the trial has its whole result, made by the present code, whatever became of its predictions."""
    rows = store.rows_of(spec.trial_id)
    return bool(rows) and rows[0].status in FINISHED and _same_code(rows[0], spec)


def finished(store: ResultStore, spec: TrialSpec) -> bool:
    """Whether the trial is recorded and its predictions are intact."""
    return recorded(store, spec) and all(
        store.intact(row.trial_id, row.test_set, row.predictions_digest) for row in store.rows_of(spec.trial_id)
    )


def _same_code(row: ResultRow, spec: TrialSpec) -> bool:
    return (row.method_digest, row.code_digest) == (spec.method_digest, spec.code_digest)


def settle_left_over(ledger: Ledger, storage_id: str, todo: Sequence[TrialSpec]) -> None:
    """Give back what a killed run reserved for trials that are not to run now."""
    wanted = {spec.account for spec in todo}
    for trial in ledger.trials(storage_id):
        if trial.open and trial.trial not in wanted:
            ledger.settle(storage_id, trial.trial)


def close_books(
    ledger: Ledger,
    storage_id: str,
    funded: Sequence[TrialSpec],
    store: ResultStore,
    lost: Mapping[str, str] | None = None,
) -> None:
    """Every trial gets its row and gives back its rest, whatever became of its worker; a failed row states the bill.

    `lost` says by trial id what ended the last worker of a trial that lost all of its workers.
    """
    for spec in funded:
        if not recorded(store, spec):
            rows = [r for r in store.rows_of(spec.trial_id) if _same_code(r, spec)]
            why = (lost or {}).get(spec.trial_id, "no more is known")
            gone = (
                f"its worker died again and again ({why:.120}): the process was ended, crashed or ran out of memory; "
                "run the same command to try again"
            )
            bill: dict[str, Any] = row_columns(ledger.trial_bill(storage_id, spec.account))
            store.write([replace((rows or [failed_row(spec, gone, spec_columns(spec))])[0], **bill)])
        ledger.settle(storage_id, spec.account)


def tidy(store: ResultStore, trials: Sequence[TrialSpec]) -> None:
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


def audit(ledger: Ledger, rows: pa.Table, storage: StorageId, whole: bool = True) -> list[str]:
    """Verify the ledger and compare it with the rows of a storage; one line for each problem.

    `whole=False`: leave out the charges of other storages.
    """
    columns = [*_ACCOUNT, "status", *row_columns({})]
    bills = [r | {"trial_id": _account(r)} for r in rows.select(columns).to_pylist()]
    return ledger.verify(bills, storage.id, storage.copied_from, whole)


def trials_of(ledger: Ledger, rows: pa.Table, storage: StorageId) -> list[TrialRecord]:
    """The trials of a storage, and those of its rows that the storages paid from which it was copied."""
    trials = {t.trial: t for t in ledger.trials(storage.id)}
    named = {_account(r) for r in rows.select(_ACCOUNT).to_pylist()}
    for earlier in storage.copied_from:
        for trial in ledger.trials(earlier):
            if trial.trial in named:
                trials.setdefault(trial.trial, trial)
    return list(trials.values())


def _account(row: Mapping[str, Any]) -> str:
    return account_name(*(row[column] for column in _ACCOUNT))


def problems(plan: SweepPlan, store: ResultStore, ledger: Ledger, storage: StorageId) -> tuple[str, ...]:
    """A line for each trial of the plan without a whole result, and for each thing that is wrong in the ledger."""
    table = store.scan().table
    rows = {r["trial_id"]: r for r in table.select(["trial_id", "status", "error"]).to_pylist()}
    try:
        lines = [f"ledger: {line}" for line in audit(ledger, table, storage, whole=False)]
    except LedgerError as error:
        lines = [str(error)]
    for spec in plan.trials:
        row = rows.get(spec.trial_id, {"status": "failed", "error": "no row was written"})
        if row["status"] != "done":
            lines.append(f"{row['status']}: {spec.name}: {row['error']}")
    return tuple(lines)
