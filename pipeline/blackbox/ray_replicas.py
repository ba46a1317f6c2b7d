"""The replicas of a run, as its driver sees them: start them, add some as nodes join, and end idle ones."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.blackbox.local_pool import EndpointLike
from pipeline.blackbox.ray_actors import LedgerActor, Replica
from pipeline.blackbox.ray_resources import (
    START_TIMEOUT_S,
    WAIT_LOG_INTERVAL_S,
    replica_resources,
    wait_for_resources,
)
from pipeline.cards import ModelCard
from pipeline.console import Echo
from pipeline.errors import ConfigError, FareboxError, first_line, unwrap
from pipeline.source_code import driver_code

AUTOSCALER_TIMEOUT_S = 3600.0
"""How long the first replica may take in a run that asks the autoscaler for GPUs: a provider may be out of them."""
ADAPT_INTERVAL_S = 2.0
"""Seconds between two looks at the nodes and at what the replicas do."""
IDLE_S = 300.0
"""Seconds without a request after which a replica is ended while others serve: longer than most methods compute between
two requests, so that few replicas are ended which are needed again, and as long as an autoscaler keeps an idle node."""
SPREAD = "SPREAD"
"""Ray's strategy that spreads actors over the nodes."""


class Replicas:
    """The replicas of a run. Their number follows the cluster if `adapt` is called from time to time.

    Args:
        make: starts an actor with a scheduling strategy.
        ledger: the ledger's actor, from which the trials learn which replicas there are.
        count: their number, or "auto" (see `replica_resources`).
        gpus: GPUs of each.
        threads: CPU threads of each.
        asks: whether to start replicas for which no GPU is free. They wait, and Ray's autoscaler sees that they do.
        echo: prints a line.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        ledger: Any,
        count: int | str,
        gpus: float,
        threads: int,
        asks: bool,
        echo: Echo,
    ) -> None:
        self.make, self.ledger, self.count, self.gpus, self.threads = make, ledger, count, gpus, threads
        self.asks, self.echo = asks, echo
        self.loaded: tuple[Any, ...] = ()
        """Replicas that have loaded their model; one whose node died is among them until Ray restarts it."""
        self._loading: dict[Any, Any] = {}  # replicas by the reference of their `info`
        self._target, self._nodes = self._room()
        self._missing, self._failed = 0, 0

    def start(self, n: int) -> None:
        """Start n replicas and wait until all have loaded their model; if there must be GPUs first, until one has.

        Raises:
            ConfigError: they do not start. The message has one line.
        """
        self._target = n
        self._start([SPREAD] * n)
        try:
            if self.asks:
                self._wait_for_one(n)
                return
            for info in ray.get(list(self._loading), timeout=START_TIMEOUT_S):
                unwrap(info)
        except GetTimeoutError as error:
            raise ConfigError(f"the endpoint did not start within {START_TIMEOUT_S:.0f} s") from error
        except FareboxError as error:
            raise ConfigError(f"the endpoint did not start: {error}") from error
        except RayError as error:  # the last line of Ray's message is the cause
            raise ConfigError(f"the endpoint did not start: {str(error).strip().splitlines()[-1]}") from error
        self.loaded, self._loading = tuple(self._loading.values()), {}

    @contextlib.contextmanager
    def adapting(self, log: Echo) -> Iterator[None]:
        """In the block, a thread calls `adapt` every few seconds."""
        stop = threading.Event()

        def loop() -> None:
            while not stop.wait(ADAPT_INTERVAL_S):
                with contextlib.suppress(RayError):  # Ray's control service restarts
                    self.adapt(log)

        thread = threading.Thread(target=loop, name="replicas", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def adapt(self, log: Echo) -> None:
        """Take in replicas that have loaded, end idle ones, add some where there is room, and publish the list."""
        for error in self._take_loaded(0):
            log(f"a replica did not start, and the run continues with {len(self.loaded)}: {first_line(error)}")
        if idle := self._end_idle():
            log(f"replicas ended after {IDLE_S:g} s without a request: {idle}; {len(self.loaded)} are left")
        if added := self._add():
            log(f"replicas that start on nodes of the cluster: {added}; {len(self.loaded)} are running")
        self.ledger.set_replicas.remote(self.loaded)

    def _start(self, strategies: Sequence[Any]) -> None:
        actors = [self.make(strategy) for strategy in strategies]
        self._loading |= {actor.info.remote(): actor for actor in actors}

    def _wait_for_one(self, n: int) -> None:
        deadline, wait_s = time.monotonic() + AUTOSCALER_TIMEOUT_S, 0.0
        while not self.loaded:
            for error in self._take_loaded(wait_s):
                raise error
            present = ray.cluster_resources().get("GPU", 0)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"waited {AUTOSCALER_TIMEOUT_S:.0f} s for a replica with {self.gpus:g} GPU (the cluster has "
                    f"{present:g}): add a node, or see `ray status` for what the autoscaler can start"
                )
            if not self.loaded and (wait_s or present < self.gpus):
                self.echo(
                    f"waiting for the first replica: {n} need {self.gpus:g} GPU each, and the cluster has {present:g} "
                    "(its autoscaler, if there is one, is asked for the others)"
                )
            wait_s = WAIT_LOG_INTERVAL_S

    def _take_loaded(self, wait_s: float) -> list[Exception]:
        """Take in the replicas that have loaded within so many seconds; return the errors of those that cannot."""
        errors: list[Exception] = []
        if not self._loading:
            return errors
        ready, _ = ray.wait(list(self._loading), num_returns=1 if wait_s else len(self._loading), timeout=wait_s)
        for reference in ready:
            replica = self._loading.pop(reference)
            try:
                unwrap(ray.get(reference))
                self.loaded = (*self.loaded, replica)
            except ActorUnavailableError:  # its node died: Ray restarts it
                self._loading[replica.info.remote()] = replica
            except (FareboxError, RayError) as error:
                self._failed += 1
                errors.append(error)
                ray.kill(replica)
        return errors

    def _end_idle(self) -> int:
        """End replicas without a request for `IDLE_S` while another serves; return how many.

        If all have several requests, one that was ended before may come back.
        """
        answers = zip(self.loaded, _results([replica.activity.remote() for replica in self.loaded]), strict=True)
        activity = {replica: answer for replica, answer in answers if answer is not None}
        if not activity:
            return 0
        if all(pending > 1 for pending, _ in activity.values()):
            self._missing = max(self._missing, 1)
        if all(idle_s >= IDLE_S for _, idle_s in activity.values()):
            return 0
        idle = [replica for replica, (_, idle_s) in activity.items() if idle_s >= IDLE_S]
        self.loaded = tuple(replica for replica in self.loaded if replica not in idle)
        for replica in idle:
            ray.kill(replica)
        return len(idle)

    def _add(self) -> int:
        """Start replicas for what joined since the last call, as far as there is room; return how many."""
        target, nodes = self._room()
        joined = sorted(nodes - self._nodes)
        self._missing += max(0, target - self._target)
        room = target - len(self.loaded) - len(self._loading) - self._failed
        self._missing = max(0, min(self._missing, room))
        self._target, self._nodes = target, nodes
        n = self._missing
        if self.gpus and not self.asks:  # else one would wait for a GPU of another job, and the autoscaler start a node
            n = 0 if self._loading else min(n, int(ray.available_resources().get("GPU", 0) / self.gpus + 1e-3))
        if not n:
            return 0
        self._missing -= n
        here = [NodeAffinitySchedulingStrategy(node, soft=True) for node in joined] if not self.gpus else []
        self._start([here[i % len(here)] if here else SPREAD for i in range(n)])
        return n

    def _room(self) -> tuple[int, set[str]]:
        """Return the number of replicas that the nodes have room for, and the ids of these nodes.

        A run that started without GPUs leaves out nodes with GPUs, on which it would compute other bits.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if not self.gpus:
            nodes = [node for node in nodes if not node["Resources"].get("GPU")]
        resources = {kind: sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
        target, _ = replica_resources(self.count, resources, self.threads, self.gpus or "auto")
        return target, {node["NodeID"] for node in nodes}


def start(
    model: ModelCard,
    features: Path,
    threads: int,
    replicas: int | str,
    ledger_url: str,
    storage_id: str,
    echo: Echo,
    replica_gpus: float | str = "auto",
    make: Callable[..., EndpointLike] = Endpoint,
    remote: int = 0,
    name: str | None = None,
) -> tuple[Replicas, Any]:
    """Start the replicas and the ledger's actor; return both.

    `replicas` and `replica_gpus` are their number and the GPUs of each, or "auto" (see `replica_resources`). `make`
    makes the endpoint of each; `remote` is the number of requests that a remote endpoint answers at the same time, 0
    for a local one. `name` is that of the ledger's actor (`ledger_name`).

    Raises:
        ConfigError: they do not start. The message has one line.
    """
    count, gpus = replica_resources(replicas, ray.cluster_resources(), threads, replica_gpus)
    gpus = 0 if remote else gpus
    asks = replica_gpus != "auto"
    if not asks:
        wait_for_resources({"CPU": 1.0, "GPU": count * gpus}, echo)
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = name or ledger_name(storage_id)
    code = driver_code()
    ledger = LedgerActor.options(name=name, scheduling_strategy=driver_node).remote(ledger_url, code)  # type: ignore[attr-defined]

    def make_replica(strategy: Any) -> Any:
        replica = Replica.options(num_gpus=gpus, scheduling_strategy=strategy)  # type: ignore[attr-defined]
        return replica.remote(model, str(features), threads, name, make, code, remote)

    started = Replicas(make_replica, ledger, replicas, gpus, threads, asks, echo)
    started.start(count)
    if asks:
        wait_for_resources({"CPU": 1.0}, echo)
    return started, ledger


def ledger_name(storage_id: str) -> str:
    """Return a new name for the ledger's actor of a run: a killed driver's actor may still exist."""
    return f"ledger-{storage_id}-{uuid.uuid4().hex[:8]}"


def loads(replicas: Sequence[Any]) -> list[int | None]:
    """Return the number of pending requests of each replica; None where it does not report it within one second."""
    return _results([replica.load.remote() for replica in replicas])


def _results(references: Sequence[Any]) -> list[Any]:
    """Return the results of one call to each replica; None where it does not respond within one second."""
    ready, _ = ray.wait(list(references), num_returns=len(references), timeout=1.0) if references else ([], [])
    results: list[Any] = []
    for reference in references:
        try:
            results.append(ray.get(reference) if reference in ready else None)
        except RayError:
            results.append(None)
    return results


def feature_store(replica: Any, codec: str) -> FeatureStore | None:
    """Open the store of a replica for images that are sent in this way; None if it has none on this machine."""
    model, feature_dim, folder = ray.get(replica.feature_store.remote(codec)) or ("", 0, Path())
    return FeatureStore(folder, model, feature_dim) if model and folder.is_dir() else None
