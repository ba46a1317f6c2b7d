"""Run trials with Ray Tune, one worker process a trial at a time. Results and checkpoints are Farebox's own files."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from ray import cloudpickle, tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import BasicVariantGenerator

from pipeline.blackbox.ray_actors import RemoteLedger
from pipeline.blackbox.ray_pool import RayPool
from pipeline.config.compose import Config
from pipeline.errors import ENDS_A_RUN, CodeMismatch, StorageError
from pipeline.files import write_atomic
from pipeline.results.store import ResultStore
from pipeline.source_code import check_code, driver_code
from pipeline.sweep.event_log import EventLog
from pipeline.sweep.reservations import finished
from pipeline.sweep.storage_id import host_name
from pipeline.trials.plan import TrialSpec
from pipeline.trials.trial import run_recorded

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # Tune's CSV and JSON files are not read
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C raises KeyboardInterrupt in the driver
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")

ATTEMPTS = 4
"""Workers that a trial may lose before it fails."""
SCRATCH = "tune"
"""Folder in the storage for files that only one run needs."""
FATAL = "fatal"
"""Key of a Tune result: the error that ends the sweep."""


class TrialRunner(tune.Trainable):  # type: ignore[misc]
    """Tune's interface to a trial: a single step runs it. Later trials reuse the worker process and its pool."""

    shared: ClassVar[dict[str, Any]]
    """Values that all trials of the sweep use. The driver reads them several times for each trial, so they are small:
    the trials themselves are in the file "specs"."""

    @classmethod
    def sharing(cls, shared: dict[str, Any]) -> type[TrialRunner]:
        """Return a subclass that carries these values.

        Tune's own way puts them into the object store, and Ray ends the driver's process without a message when an
        object there is lost.
        """

        class Sharing(cls):  # type: ignore[misc, valid-type]  # a local class: Ray sends it by value
            pass

        Sharing.shared = shared
        return Sharing

    def setup(self, config: dict[str, Any]) -> None:
        """Verify the worker's code, connect to the replicas and the ledger, read the trials, and take the first one."""
        torch.set_num_threads(1)
        self.index, shared = int(config["index"]), self.shared
        self.unusable: CodeMismatch | StorageError | None = None
        try:
            check_code(shared["code"])
            self.specs = _read_trials(Path(shared["specs"]))
        except (CodeMismatch, StorageError) as error:  # returned by `step`: Tune would start the worker again
            self.unusable = error
            return
        self.pool = RayPool(shared["replicas"], directory=shared["ledger"])
        self.ledger = RemoteLedger(shared["ledger"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.index = int(new_config["index"])
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial until its rows are written and release its reservation; return an error that ends the sweep."""
        if self.unusable is not None:
            return {"done": True, FATAL: self.unusable}
        spec = self.specs[self.index]
        store, storage_id = ResultStore(Path(self.shared["storage"])), self.shared["storage_id"]
        try:
            if not finished(store, spec):  # an earlier worker may have written the rows and died before it returned
                dump = store.storage / SCRATCH / "hung" / f"{spec.trial_id}.txt"
                run_recorded(spec, self.pool, storage_id, store, dump, **self.shared["options"])
            if finished(store, spec):  # else a killed run's worker could release a trial of the new run
                self.ledger.release(storage_id, spec.account)
        except ENDS_A_RUN as error:
            return {"done": True, FATAL: error}
        return {"done": True}


def _read_trials(path: Path) -> list[TrialSpec]:
    try:
        trials: list[TrialSpec] = cloudpickle.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(
            f"a worker on {host_name()} cannot read {path} ({error.strerror or error}): "
            "the storage must be at the same path on all nodes"
        ) from error
    return trials


class StopOnFatal(tune.Stopper):  # type: ignore[misc]
    """Ends all trials when one returned an error that ends the sweep."""

    met = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Look at a trial's result; never stop that trial alone."""
        self.met = self.met or FATAL in result
        return False

    def stop_all(self) -> bool:
        """Return whether all trials are to be ended."""
        return self.met


class TrialsInOrder(FIFOScheduler):  # type: ignore[misc]
    """Starts trials in their order.

    Tune's FIFOScheduler gives the worker of an ended trial to the first pending trial, even while that trial's own
    worker starts, and then ends the latter. With short trials only one worker would ever run.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Choose none: Tune then gives workers to pending trials without one, in order."""


class TuneCallback(tune.Callback):  # type: ignore[misc]
    """Records which trials are running, writes the event log, and reports each trial that ended.

    Args:
        trials: the trials of the run; Tune knows them by their index.
        starts: receives the start time (`time.monotonic`) of each running trial by index.
        log: event log of the storage.
        on_end: called with each trial whose worker ended it. Not called for trials that lost all of their workers, or
            that end the sweep.
    """

    def __init__(
        self, trials: Sequence[TrialSpec], starts: dict[int, float], log: EventLog, on_end: Callable[[TrialSpec], None]
    ) -> None:
        self.trials, self.starts, self.log, self.on_end = trials, starts, log, on_end

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle as an empty callback: Tune writes its callbacks to a file, which is never read here."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Record that a trial has a worker."""
        self.starts.setdefault(index := int(trial.config["index"]), time.monotonic())
        self.log.trial("trial started", self.trials[index].trial_id)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Record that a trial lost its worker and gets another."""
        self.log.trial("worker lost", self.trials[int(trial.config["index"])].trial_id)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Report a trial that has its rows."""
        index = int(trial.config["index"])
        if FATAL not in (trial.last_result or {}):
            self.on_end(self.trials[index])
        self.starts.pop(index, None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Record that a trial lost all of its workers."""
        self.starts.pop(int(trial.config["index"]), None)


def run_trials(
    config: Config,
    trials: Sequence[TrialSpec],
    storage_id: str,
    replicas: Sequence[Any],
    ledger_actor: Any,
    callback: TuneCallback,
) -> dict[str, str]:
    """Run the trials to their end.

    Returns:
        The last error, by trial id, of each trial that lost all of its workers.

    Raises:
        CodeMismatch, LedgerError, StorageError: see `pipeline.errors.ENDS_A_RUN`.
    """
    scratch = config.storage / SCRATCH
    specs = scratch / f"trials-{uuid.uuid4().hex}.pkl"  # not the name of a killed run: its workers may still start
    shared = {
        "specs": str(specs),
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
    # Nodes may join a cluster: with "auto", Ray's free cores decide how many trials run at a time.
    growing = config.address is not None and config.concurrency == "auto"
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
    # A list of points, since Tune copies the whole list of a grid search for each of its values.
    points = BasicVariantGenerator([{"index": i} for i in range(len(trials))], 0 if growing else slots)
    try:
        write_atomic(specs, cloudpickle.dumps(list(trials)))
        tuner = tune.Tuner(
            tune.with_resources(TrialRunner.sharing(shared), {"cpu": min(1.0, cores / slots)}),
            param_space={"index": tune.randint(0, len(trials))},
            tune_config=tune.TuneConfig(
                num_samples=len(trials), search_alg=points, reuse_actors=True, scheduler=TrialsInOrder()
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[callback],
                stop=StopOnFatal(),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # `run_trial` writes checkpoints
                failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
            ),
        )
        with _no_stdout():
            results = list(tuner.fit())
    except ray.exceptions.RayError:  # some are also an OSError
        raise
    except OSError as error:
        raise StorageError(
            f"{scratch} cannot be written ({error.strerror or error}): make room, then run the same command"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for result in results:
        if FATAL in (result.metrics or {}):
            raise result.metrics[FATAL]
    return {trials[r.config["index"]].trial_id: str(r.error).strip().splitlines()[-1] for r in results if r.error}


@contextlib.contextmanager
def _no_stdout() -> Iterator[None]:
    """Suppress the tables that Tune prints on standard output at every verbosity."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
