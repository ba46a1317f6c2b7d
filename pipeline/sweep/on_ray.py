"""Run funded trials on Ray: start it, the ledger's actor and the replicas, and wait for the trials."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import ray
from ray import tune

from pipeline import console
from pipeline.blackbox.ray_actors import ActorWallet
from pipeline.blackbox.ray_replicas import Replicas, feature_store, ledger_name, loads, start
from pipeline.config.compose import Config
from pipeline.console import Echo
from pipeline.errors import ConfigError
from pipeline.ledger.ledger import Ledger
from pipeline.remote.opening import RemoteFactory
from pipeline.results.mirroring import MirrorRows
from pipeline.results.store import ResultStore
from pipeline.sweep.event_log import EventLog
from pipeline.sweep.images_left import ImagesLeft
from pipeline.sweep.money import costs_money
from pipeline.sweep.progress import Progress
from pipeline.sweep.ray_session import lost, ray_session
from pipeline.sweep.run_state import LOADING
from pipeline.sweep.status import Heartbeat
from pipeline.sweep.tune_trials import TuneCallback, run_trials
from pipeline.trials.plan import TrialSpec


def run_on_ray(
    config: Config,
    funded: Sequence[TrialSpec],
    storage_id: str,
    store: ResultStore,
    ledger: Ledger,
    echo: Echo,
    mirror: MirrorRows,
    log: EventLog,
) -> dict[str, str]:
    """Start Ray, the ledger actor and the replicas, and run the trials; return what `run_trials` returns."""
    starts: dict[int, float] = {}
    progress = Progress(funded, ledger, storage_id, starts)

    def trial_ended(spec: TrialSpec) -> None:
        rows = store.rows_of(spec.trial_id)
        progress.ended(spec, rows)
        if rows:
            log.ended(rows)
            mirror(rows)

    def changed(line: str) -> None:
        console.log(line)
        log.replicas(line)

    with progress, ray_session(config.address, echo):
        progress.stage = LOADING
        replicas, ledger_actor = _start(config, storage_id, echo)
        heart = Heartbeat(config.storage, funded, starts, lambda: loads(replicas.loaded))
        callback = TuneCallback(funded, starts, log, trial_ended)
        progress.beat = heart.beat
        progress.start_trials(ImagesLeft(funded, cache(lambda codec: feature_store(replicas.loaded[0], codec))))
        changes = config.address is not None and config.model.http is None
        try:
            with replicas.adapting(changed) if changes else contextlib.nullcontext():
                failed = run_trials(config, funded, storage_id, replicas.loaded, ledger_actor, callback)
        except (ray.exceptions.RayError, tune.TuneError, RuntimeError) as error:
            raise lost(error) from error
        finally:
            progress.stop()  # else it could write the file again that is removed now
        heart.clear()
        return failed


def _start(config: Config, storage_id: str, echo: Echo) -> tuple[Replicas, Any]:
    """Start the replicas and the ledger actor, outside the placement groups of trials, so that they outlive them.

    Raises:
        ConfigError: the cluster has no CPU core, or they do not start.
    """
    if config.replica_gpus == "auto" and not ray.cluster_resources().get("CPU"):
        raise ConfigError(f"no node at address={config.address} has a CPU core, which trials need: start one first")
    http, replicas = config.model.http, config.replicas
    remote: dict[str, Any] = {}
    if http is not None:  # one replica, so that one limiter serves all trials
        name = ledger_name(storage_id)
        wallet = ActorWallet(name, storage_id) if costs_money(config) else None
        factory = RemoteFactory(config.records, config.storage, config.offline, wallet)
        replicas, remote = 1, {"make": factory, "remote": http.rate.at_once, "name": name}
    options: dict[str, Any] = {"replica_gpus": config.replica_gpus, **remote}
    return start(
        config.model, config.features, config.threads, replicas, config.ledger_url, storage_id, echo, **options
    )
