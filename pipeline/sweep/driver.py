"""Run a sweep: select the trials without a result, reserve their predicted bills, and run them on Ray.

There is no resume mode. Rows on disk tell which trials are done, checkpoints tell how far the others are, and the
ledger tells what was paid. So the same command continues after a crash, a SIGKILL, or an added seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from pipeline.blackbox.ray_pool import loads, start
from pipeline.budget import total
from pipeline.config.compose import Config
from pipeline.console import Echo
from pipeline.errors import ConfigError
from pipeline.ledger.ledger import Ledger
from pipeline.remote.opening import RemoteFactory, refuse_unconfirmed
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.sweep import reservations
from pipeline.sweep.event_log import EventLog
from pipeline.sweep.preflight import refuse_network_sqlite
from pipeline.sweep.progress import Progress
from pipeline.sweep.ray_session import lost, ray_session
from pipeline.sweep.run_ledger import open_ledger, sweep_account
from pipeline.sweep.run_state import LOADING
from pipeline.sweep.status import Heartbeat
from pipeline.sweep.storage import alone, check_writable
from pipeline.sweep.storage_id import StorageId
from pipeline.sweep.tune_trials import TuneCallback, run_trials
from pipeline.trials.estimate import refuse_missing
from pipeline.trials.plan import SweepPlan, TrialSpec, announcements, make_plan, refuse_unpayable
from pipeline.trials.rows import failed_row, spec_columns

Mirror = Callable[[Sequence[ResultRow]], None]
"""Receives the rows of each trial when it has ended. It must return quickly: Ray Tune waits for it."""


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


def run(config: Config, echo: Echo, mirror: Mirror) -> Outcome:
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
    refuse_unconfirmed(config)
    with alone(config.storage):
        store = ResultStore(config.storage)
        todo = _select(plan, store, echo)
        ledger, storage = open_ledger(config, echo)
        with contextlib.closing(ledger):
            ran = _reserve_and_run(plan, todo, store, ledger, storage, echo, mirror)
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
    elif not config.partial:
        refuse_unpayable(config, total(t.predicted for t in todo))
    return todo


def _reserve_and_run(
    plan: SweepPlan,
    todo: Sequence[TrialSpec],
    store: ResultStore,
    ledger: Ledger,
    storage: StorageId,
    echo: Echo,
    mirror: Mirror,
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
    if not funded:
        return 0
    log = EventLog(config.storage, {t.trial_id: t.name for t in funded})
    with log.run(len(funded), kept):
        try:
            failed = _run_on_ray(config, funded, storage.id, store, ledger, echo, mirror, log)
        except ConfigError:  # Ray or the endpoint did not start, so no trial can charge anything
            reservations.release(ledger, storage.id, funded)
            raise
        reservations.close_trials(ledger, storage.id, funded, store, failed)
        for trial_id in failed:
            log.ended(store.rows_of(trial_id))
    return len(funded)


def _run_on_ray(
    config: Config,
    funded: Sequence[TrialSpec],
    storage_id: str,
    store: ResultStore,
    ledger: Ledger,
    echo: Echo,
    mirror: Mirror,
    log: EventLog,
) -> dict[str, str]:
    """Start Ray, the ledger actor and the replicas, and run the trials; return what `run_trials` returns."""
    progress = Progress([t.predicted.requests for t in funded], ledger, sweep_account(storage_id))

    def trial_ended(spec: TrialSpec) -> None:
        rows = store.rows_of(spec.trial_id)
        progress.ended(spec.predicted.requests, rows)
        if rows:
            log.ended(rows)
            mirror(rows)

    with progress, ray_session(config.address, echo):
        progress.stage = LOADING
        replicas, ledger_actor = _start(config, storage_id, echo)
        heart = Heartbeat(config.storage, [(t.trial_id, t.name) for t in funded], lambda: loads(replicas))
        callback = TuneCallback(funded, heart.running, log, trial_ended)
        progress.beat = heart.beat
        progress.start_trials()
        try:
            failed = run_trials(config, funded, storage_id, replicas, ledger_actor, callback)
        except (ray.exceptions.RayError, tune.TuneError, RuntimeError) as error:
            raise lost(error) from error
        finally:
            progress.stop()  # else it could write the file again that is removed now
        heart.clear()
        return failed


def _start(config: Config, storage_id: str, echo: Echo) -> tuple[list[Any], Any]:
    """Start the replicas and the ledger actor, outside the placement groups of trials, so that they outlive them.

    Raises:
        ConfigError: the cluster has no CPU core, or they do not start.
    """
    if not ray.cluster_resources().get("CPU"):
        raise ConfigError(f"no node at address={config.address} has a CPU core, which trials need: start one first")
    http, replicas = config.model.http, config.replicas
    remote: dict[str, Any] = {}
    if http is not None:  # one replica, so that one limiter serves all trials
        factory = RemoteFactory(config.records, config.storage, config.offline)
        replicas, remote = 1, {"make": factory, "workers": http.rate.at_once}
    return start(config.model, config.features, config.threads, replicas, config.ledger_url, storage_id, echo, **remote)
