"""A sweep: drop the cells that are done, reserve what the rest may spend, and let Ray Tune run them.

There is no resume mode. The rows on disk say what is done, checkpoints say how far the others are, and the ledger says
what was paid, so the same command continues after a crash, a kill -9, or an added seed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from ray import tune

from pipeline.blackbox.ray_pool import RayPool, RemoteLedger, Say, loads, start
from pipeline.budget import total
from pipeline.config.compose import Config
from pipeline.errors import CodeMismatch, ConfigError, LedgerError, StorageError
from pipeline.ledger.ledger import Ledger
from pipeline.results.runs import add_run
from pipeline.results.store import ResultRow, ResultStore
from pipeline.source_code import check_code, driver_code
from pipeline.sweep import reservations as books
from pipeline.sweep.event_log import EventLog
from pipeline.sweep.preflight import refuse_network_sqlite
from pipeline.sweep.progress import Mirroring, Progress, ResultWatcher
from pipeline.sweep.ray_session import lost, ray_session
from pipeline.sweep.status import Heartbeat
from pipeline.sweep.storage import alone, check_writable
from pipeline.trials.estimate import refuse_absent
from pipeline.trials.plan import SweepPlan, TrialSpec, announcements, make_plan, refuse_unpayable
from pipeline.trials.trial import failed_row, run_recorded, spec_columns

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the rows are ours; Tune's csv and json are not read
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the run, and is not taken for its end
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")

ATTEMPTS = 4
"""Workers that a trial may lose before it is given up."""
SCRATCH = "tune"
"""Folder in `storage` for what one run alone needs."""
STOPS = "stops"
"""In a trial's result: the error that ends the whole sweep."""


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    plan: SweepPlan
    ran: int
    kept: int
    problems: tuple[str, ...]
    """One line for each trial that failed, was truncated or unfunded, and for each problem in the ledger."""


class TrialRunner(tune.Trainable):  # type: ignore[misc]
    """Tune's view of a trial: one step that runs it. The worker, its imports and its pool are reused by the next."""

    shared: ClassVar[dict[str, Any]]
    """What all trials share."""

    @classmethod
    def sharing(cls, shared: dict[str, Any]) -> type[TrialRunner]:
        """Return the class with these values as a part of it.

        Tune's own way puts them into the object store, and the process of a driver that has an object there is ended by
        Ray, without a word, as soon as the object is lost.
        """

        class Sharing(cls):  # type: ignore[misc, valid-type]  # a local class: Ray sends it by value
            pass

        Sharing.shared = shared
        return Sharing

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        torch.set_num_threads(1)
        self.index, shared = int(config["index"]), self.shared
        self.refusal: CodeMismatch | None = None
        try:
            check_code(shared["code"])
        except CodeMismatch as error:  # told by the first step: Tune would start a worker that fails here again
            self.refusal = error
            return
        self.pool = RayPool(shared["replicas"])
        self.ledger = RemoteLedger(shared["ledger"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.index = int(new_config["index"])
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial to its rows, and give back what it did not spend; or say why the whole sweep must stop."""
        if self.refusal is not None:
            return {"done": True, STOPS: self.refusal}
        spec: TrialSpec = self.shared["specs"][self.index]
        store, storage = ResultStore(Path(self.shared["storage"])), self.shared["storage_id"]
        try:
            if not books.finished(store, spec):  # else an earlier worker wrote the rows and died before it could say so
                dump = store.storage / SCRATCH / "hung" / f"{spec.trial_id}.txt"
                run_recorded(spec, self.pool, storage, store, dump, **self.shared["options"])
            if books.finished(store, spec):  # a killed run's worker must not settle a new run's trial
                self.ledger.settle(storage, spec.account)
        except (CodeMismatch, LedgerError, StorageError) as error:
            return {"done": True, STOPS: error}
        return {"done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: checkpoints are ours, by trial id."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see save_checkpoint."""


class _Stop(tune.Stopper):  # type: ignore[misc]
    """Ends the sweep when a trial met what no other can go on without: no ledger, no room on the disk."""

    met = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Look at a trial's result."""
        self.met = self.met or STOPS in result
        return False

    def stop_all(self) -> bool:
        """Whether all trials are ended."""
        return self.met


class TuneCallback(tune.Callback):  # type: ignore[misc]
    """Keeps which trials are under way, by their index, and tells the journal of workers."""

    def __init__(self, running: set[int], journal: EventLog, ids: Sequence[str]) -> None:
        self.running, self.journal, self.ids = running, journal, ids

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """It has a worker."""
        self.running.add(int(trial.config["index"]))
        self.journal.trial("trial started", self.ids[int(trial.config["index"])])

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Its worker died, and it gets another."""
        self.journal.trial("worker lost", self.ids[int(trial.config["index"])])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """It has its rows."""
        self.running.discard(int(trial.config["index"]))

    on_trial_error = on_trial_complete


def run(config: Config, say: Say, mirror: Mirroring) -> Outcome:
    """Run what is not done yet. `say` prints a line; `mirror` is given each finished trial's rows."""
    refuse_network_sqlite({"budget.global.url": config.ledger_url, "mlflow": config.mlflow})
    refuse_absent(config)
    plan = make_plan(config, fetch=True)
    check_writable("storage", config.storage)
    check_writable("features", config.features)
    with alone(config.storage):
        return _run(plan, say, mirror)


def _run(plan: SweepPlan, say: Say, mirror: Mirroring) -> Outcome:
    config, store = plan.config, ResultStore(plan.config.storage)
    todo, stale = books.pending(plan, store)
    kept = len(plan.trials) - len(todo)
    for line in (*announcements(plan), *store.recomputed({t.trial_id for t in todo})):
        say(line)
    if stale:
        say(books.stale_line(stale, config.on_code_change == "rerun"))
    if not todo:
        say(f"nothing to run: all {kept} trials of this sweep are done")
    elif not config.partial:
        refuse_unpayable(config, total(t.predicted for t in todo))
    ledger, storage = books.open_ledger(config, say)
    with contextlib.closing(ledger):
        books.settle_left_over(ledger, storage.id, todo)
        funded, unfunded = books.reserve(ledger, plan, todo, storage.id)
        add_run(config.storage, [t.trial_id for t in plan.trials], config.on_code_change == "keep", say)
        if not todo:
            books.tidy(store, plan.trials)
            return Outcome(plan, 0, kept, books.problems(plan, store, ledger, storage))
        for spec in todo:
            if spec.trial_id in unfunded:
                store.write([failed_row(spec, unfunded[spec.trial_id], spec_columns(spec), status="unfunded")])
        asked = total(t.predicted for t in funded)
        say(f"{len(funded)} trials to run, {kept} done before; {asked.requests:,} requests predicted")
        if funded:
            journal = EventLog(config.storage, {t.trial_id: t.name for t in funded})
            with journal.run(len(funded), kept):
                try:
                    with _ray(config, storage.id, say) as (replicas, ledger_actor):
                        dead = _tune(config, funded, replicas, ledger_actor, storage.id, ledger, store, mirror, journal)
                except ConfigError:  # Ray or the endpoint did not start: no trial did, so nothing can be asked any more
                    for spec in funded:
                        ledger.settle(storage.id, spec.account)
                    raise
                books.close_books(ledger, storage.id, funded, store, dead)
                for rows in map(store.rows_of, dead):
                    journal.ended(rows)
        books.tidy(store, plan.trials)
        return Outcome(plan, len(funded), kept, books.problems(plan, store, ledger, storage))


@contextlib.contextmanager
def _ray(config: Config, storage_id: str, say: Say) -> Iterator[tuple[list[Any], Any]]:
    """Ray, the ledger actor and the replicas, for as long as the sweep runs. They live outside the trials' groups."""
    with ray_session(config.address, say):
        replicas, ledger = _start(config, storage_id, say)
        try:
            yield replicas, ledger
        except (ray.exceptions.RayError, tune.TuneError, RuntimeError) as error:
            raise lost(error) from error


def _start(config: Config, storage_id: str, say: Say) -> tuple[list[Any], Any]:
    """The replicas and the ledger actor. Raises an error of the user's (exit 2) when they do not start."""
    if not ray.cluster_resources().get("CPU"):
        raise ConfigError(f"no node at address={config.address} has a CPU core, which trials need: start one first")
    return start(config.model, config.features, config.threads, config.replicas, config.ledger_url, storage_id, say)


def _tune(
    config: Config,
    funded: Sequence[TrialSpec],
    replicas: Sequence[Any],
    ledger_actor: Any,
    storage_id: str,
    ledger: Ledger,
    store: ResultStore,
    mirror: Mirroring,
    journal: EventLog,
) -> dict[str, str]:
    """Run the trials; what ended the last worker of those that lost all of theirs. Raises what stops the sweep."""
    shared = {
        "specs": list(funded),
        "replicas": list(replicas),
        "ledger": ledger_actor,
        "code": driver_code(),
        "storage": str(config.storage),
        "storage_id": storage_id,
        "options": {
            "checkpoint_s": config.checkpoint_s,
            "threads": config.threads,
            "timeout_s": config.trial_timeout_s,
        },
    }
    cores = int(ray.cluster_resources()["CPU"])
    slots = cores if config.concurrency == "auto" else int(config.concurrency)
    # On a cluster cores may join: then what Ray has decides how many trials run, and no number of ours.
    growing = config.address is not None and config.concurrency == "auto"

    def told(rows: Sequence[ResultRow]) -> None:
        journal.ended(rows)
        mirror(rows)

    ids = [t.trial_id for t in funded]
    watch = ResultWatcher(ids, store, ledger, books.sweep_account(storage_id), told)
    heart = Heartbeat(config.storage, [(t.trial_id, t.name) for t in funded], lambda: loads(replicas))
    scratch = config.storage / SCRATCH  # Tune's own state, which nobody reads: cells and checkpoints are ours
    shutil.rmtree(scratch, ignore_errors=True)  # a killed run's
    predicted = total(t.predicted for t in funded)
    try:
        with Progress(len(funded), predicted.requests, watch.count, heart.beat), _quiet():
            tuner = tune.Tuner(
                tune.with_resources(TrialRunner.sharing(shared), {"cpu": min(1.0, cores / slots)}),
                param_space={"index": tune.grid_search(list(range(len(funded))))},
                tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=None if growing else slots),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=str(scratch),
                    verbose=0,
                    callbacks=[TuneCallback(heart.running, journal, ids)],
                    stop=_Stop(),
                    failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
                ),
            )
            ended = list(tuner.fit())
        heart.clear()
    except ray.exceptions.RayError:  # some are an OSError too
        raise
    except OSError as error:
        raise StorageError(f"{scratch} cannot be written ({error.strerror or error}): make room, then go on") from error
    finally:
        watch.close()
        shutil.rmtree(scratch, ignore_errors=True)
    for result in ended:
        if STOPS in (result.metrics or {}):
            raise result.metrics[STOPS]
    return {funded[r.config["index"]].trial_id: str(r.error).strip().splitlines()[-1] for r in ended if r.error}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune prints its own tables to stdout, whatever its verbosity; ours is the progress line."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
