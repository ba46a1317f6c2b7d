"""Run a sweep: select the trials without a result, reserve their predicted bills, and run them on Ray.

There is no resume mode. Rows on disk tell which trials are done, checkpoints tell how far the others are, and the
ledger tells what was paid. So the same command continues after a crash, a SIGKILL, or an added seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.budget import total
from pipeline.config.compose import Config, check_price
from pipeline.console import Echo
from pipeline.errors import ConfigError
from pipeline.ledger.ledger import Ledger
from pipeline.remote.permission import refuse_unconfirmed
from pipeline.results.mirroring import MirrorRows
from pipeline.results.store import ResultStore
from pipeline.sweep import reservations
from pipeline.sweep.event_log import EventLog
from pipeline.sweep.preflight import check_replicas, refuse_network_sqlite
from pipeline.sweep.purses import money_lines
from pipeline.sweep.run_ledger import open_ledger
from pipeline.sweep.storage import alone, check_writable
from pipeline.sweep.storage_id import StorageId
from pipeline.trials.estimate import refuse_missing
from pipeline.trials.plan import SweepPlan, TrialSpec, announcements, make_plan, refuse_unpayable
from pipeline.trials.rows import failed_row, spec_columns


@dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    plan: SweepPlan
    ran: int
    """Number of trials that were run."""
    kept: int
    """Number of trials whose earlier results were kept."""
    problems: tuple[str, ...]
    """One line for each trial that failed, ran out of budget or was not funded, and for each problem in the ledger."""


def run(config: Config, echo: Echo, mirror: MirrorRows) -> Outcome:
    """Run the trials of a sweep that have no result yet.

    Args:
        config: the composed configuration.
        echo: prints a line.
        mirror: receives the rows of each trial that ends.

    Raises:
        ConfigError, DataError, BudgetExceeded: the sweep cannot run as configured; nothing was spent.
        CodeMismatch, LedgerError, StorageError, EndpointLost: the run ended early; the same command continues it.
    """
    refuse_network_sqlite({"budget.global.url": config.ledger_url, "mlflow": config.mlflow})
    refuse_missing(config)
    plan = make_plan(config, fetch=True)
    check_writable("storage", config.storage)
    check_writable("features", config.features)
    if config.model.http is not None:
        check_writable("records", config.records)
    with alone(config.storage):
        store = ResultStore(config.storage)
        store.write_snapshot()  # a killed run may have left many rows, which are read several times here
        todo = _select(plan, store, echo)
        ledger, storage = open_ledger(config, echo)
        with contextlib.closing(ledger):
            ran = _reserve_and_run(plan, todo, store, ledger, storage, echo, mirror)
            store.write_snapshot()
            reservations.remove_checkpoints(store, plan.trials)
            problems = reservations.problems(plan, store, ledger, storage)
            return Outcome(plan, ran, len(plan.trials) - len(todo), problems)


def _select(plan: SweepPlan, store: ResultStore, echo: Echo) -> list[TrialSpec]:
    """Return the trials to run; print what the user should know about them."""
    config = plan.config
    todo, stale = reservations.pending(plan, store)
    for line in (*announcements(plan), *store.recomputed({t.trial_id for t in todo})):
        echo(line)
    if stale:
        echo(reservations.stale_line(stale, config.on_code_change == "rerun"))
    if not todo:
        echo(f"nothing to run: all {len(plan.trials)} trials of this sweep are done")
        return todo
    check_price(config)
    refuse_unconfirmed(config)
    remote = config.model.name if config.model.http is not None else None
    check_replicas(config.replicas, config.replica_gpus, config.address, remote)
    if not config.partial:
        refuse_unpayable(config, total(t.predicted for t in todo))
    return todo


def _reserve_and_run(
    plan: SweepPlan,
    todo: Sequence[TrialSpec],
    store: ResultStore,
    ledger: Ledger,
    storage: StorageId,
    echo: Echo,
    mirror: MirrorRows,
) -> int:
    """Reserve the bills of these trials and run those that are funded; return how many were run."""
    config, kept = plan.config, len(plan.trials) - len(todo)
    funded, unfunded = reservations.begin(ledger, plan, todo, storage.id, echo)
    for spec in todo:
        if spec.trial_id in unfunded:
            store.write([failed_row(spec, unfunded[spec.trial_id], spec_columns(spec), status="unfunded")])
    if todo:
        predicted = total(t.predicted for t in funded)
        echo(f"{len(funded)} trials to run, {kept} done before; {predicted.requests:,} requests predicted")
    try:
        if funded:
            _run_funded(config, funded, kept, store, ledger, storage, echo, mirror)
    finally:
        ledger.money.release(storage.id)
    for line in money_lines(ledger.money.purses()):
        echo(line)
    return len(funded)


def _run_funded(
    config: Config,
    funded: Sequence[TrialSpec],
    kept: int,
    store: ResultStore,
    ledger: Ledger,
    storage: StorageId,
    echo: Echo,
    mirror: MirrorRows,
) -> None:
    """Run these trials and close them."""
    log = EventLog(config.storage, {t.trial_id: t.name for t in funded})
    with log.run(len(funded), kept):
        try:
            from pipeline.sweep.on_ray import run_on_ray  # imports Ray, which takes a second and starts nothing here

            failed = run_on_ray(config, funded, storage.id, store, ledger, echo, mirror, log)
        except ConfigError:  # Ray or the endpoint did not start, so no trial can charge anything
            reservations.release(ledger, storage.id, funded)
            raise
        reservations.close_trials(ledger, storage.id, funded, store, failed)
        for trial_id in failed:
            log.ended(store.rows_of(trial_id))
