"""A pool of Ray replicas: start them with the ledger's actor, balance requests over them, and replace lost ones."""

from __future__ import annotations

import contextlib
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.blackbox.local_pool import EndpointLike
from pipeline.blackbox.ray_actors import LedgerActor, Replica, ray_error_line
from pipeline.blackbox.request import ModelInfo, Request, Response
from pipeline.cards import ModelCard
from pipeline.console import Echo
from pipeline.errors import ConfigError, EndpointBusy, EndpointLost, FareboxError, QueueFull, unwrap
from pipeline.source_code import driver_code

FAILOVER_TIMEOUT_S = 600.0
"""How long a caller waits for a live replica before the trial fails: an autoscaler takes minutes to replace a node."""
RESPONSE_TIMEOUT_S = 3600.0
"""How long a caller waits for the response of a live replica: far longer than any call takes."""
REMOTE_TIMEOUT_S = 7 * 86_400.0
"""The same for a remote model: its rate may allow a few images a minute. The client itself gives up on a server."""
START_TIMEOUT_S = 600.0
"""How long replicas may take to load their model, and the cluster to free the resources that they need."""
WAIT_LOG_INTERVAL_S = 10.0
"""Seconds between two lines about waiting."""
UNKNOWN = math.inf
"""Load of a replica that did not report it."""


def start(
    model: ModelCard,
    features: Path,
    threads: int,
    replicas: int | str,
    ledger_url: str,
    storage_id: str,
    echo: Echo,
    make: Callable[..., EndpointLike] = Endpoint,
    remote: int = 0,
    name: str | None = None,
) -> tuple[list[Any], Any]:
    """Start the replicas and the ledger's actor; return both once every replica has loaded its model.

    `replicas` is their number, or "auto" (see `replica_resources`). `make` makes the endpoint of each; `remote` is the
    number of requests that a remote endpoint answers at the same time, 0 for a local one. `name` is that of the
    ledger's actor (`ledger_name`).

    Raises:
        ConfigError: they do not start. The message has one line.
    """
    count, gpus = replica_resources(replicas, ray.cluster_resources(), threads)
    gpus = 0 if remote else gpus
    wait_for_resources({"CPU": 1.0, "GPU": count * gpus}, echo)
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = name or ledger_name(storage_id)
    code = driver_code()
    ledger = LedgerActor.options(name=name, scheduling_strategy=driver_node).remote(ledger_url, code)  # type: ignore[attr-defined]
    replica = Replica.options(num_gpus=gpus, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
    actors = [replica.remote(model, str(features), threads, name, make, code, remote) for _ in range(count)]
    try:
        for info in ray.get([actor.info.remote() for actor in actors], timeout=START_TIMEOUT_S):
            unwrap(info)
    except GetTimeoutError as error:
        raise ConfigError(f"the endpoint did not start within {START_TIMEOUT_S:.0f} s") from error
    except FareboxError as error:
        raise ConfigError(f"the endpoint did not start: {error}") from error
    except RayError as error:  # the last line of Ray's message is the cause
        raise ConfigError(f"the endpoint did not start: {str(error).strip().splitlines()[-1]}") from error
    return actors, ledger


def ledger_name(storage_id: str) -> str:
    """Return a new name for the ledger's actor of a run: a killed driver's actor may still exist."""
    return f"ledger-{storage_id}-{uuid.uuid4().hex[:8]}"


def wait_for_resources(needed: Mapping[str, float], echo: Echo, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the cluster has the free resources that the run needs.

    Without it, Ray would queue the actors, and Tune its trials, forever and without a message.

    Raises:
        ConfigError: they are not free within `timeout_s` seconds.
    """
    deadline, next_line = time.monotonic() + timeout_s, 0.0
    while missing := _missing_resources(needed):
        resources = " and ".join(f"{n:g} {kind}" for kind, n in missing.items())
        present = ", ".join(f"{kind} {ray.cluster_resources().get(kind, 0):g}" for kind in needed)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"waited {timeout_s:.0f} s for {resources} in use by other jobs (the cluster has {present}): end those "
                "jobs, add a node, or set fewer replicas=N"
            )
        if time.monotonic() > next_line:
            next_line = time.monotonic() + WAIT_LOG_INTERVAL_S
            echo(f"waiting for {resources} in use by other jobs of this cluster (it has {present})")
        time.sleep(0.5)


def _missing_resources(needed: Mapping[str, float]) -> dict[str, float]:
    free = ray.available_resources()
    return {kind: n for kind, n in needed.items() if free.get(kind, 0) + 1e-3 < n}


def replica_resources(replicas: int | str, resources: Mapping[str, float], threads: int) -> tuple[int, float]:
    """Return the number of replicas and the GPUs of each. "auto": one for each GPU, or for each `threads` cores."""
    gpus = int(resources.get("GPU", 0))
    count = (gpus or max(1, int(resources["CPU"]) // threads)) if replicas == "auto" else replicas
    return int(count), gpu_share(gpus, int(count))


def gpu_share(gpus: int, replicas: int) -> float:
    """Return the fraction of a GPU for each replica, such that all can be placed: a fraction cannot span two GPUs."""
    if not gpus:
        return 0
    per_gpu = -(-replicas // gpus)
    return 1 if per_gpu == 1 else int(10_000 / per_gpu) / 10_000  # Ray counts in units of 1/10,000


class RayPool:
    """A trial's client of the replicas, with load balancing and failover.

    Load is balanced by the power of two choices: before a call, the pool probes two random replicas and switches to the
    less loaded. While its replica serves no one else it stays there without a probe, since that replica has cached the
    trial's images and prompts. All blocks of a call go to one replica, which then encodes the prompts once.
    """

    def __init__(self, replicas: Sequence[Any]) -> None:
        self.replicas = list(replicas)
        self.random = random.Random()  # unseeded: results do not depend on which replica computes them
        self.current, self.load = self.random.choice(self.replicas), UNKNOWN
        self.call = ""
        self.remote = False
        self.info: ModelInfo = unwrap(self._get(lambda replica: replica.info.remote()))
        self.remote = self.info.remote

    def send(self, request: Request) -> Response:
        """Send a request and return its response. Sends it again, under the same id, when a replica dies or is busy.

        Raises:
            EndpointBusy: no replica, or no remote endpoint, responded in time.
            EndpointLost: no replica was alive for `FAILOVER_TIMEOUT_S`, or Ray reports another failure.
            FareboxError: an error of the endpoint or the ledger, such as BudgetExceeded.
        """
        if request.charge.id != self.call:
            self._rebalance()
            self.call = request.charge.id
        deadline, pause = time.monotonic() + self._timeout_s, 0.05
        while isinstance(result := self._get(lambda replica: replica.send.remote(request)), QueueFull):
            if time.monotonic() > deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            self._failover()
        response: Response = unwrap(result)
        self.load = response.load
        return response

    def embed_text(self, text: str) -> np.ndarray:
        """Return the token embeddings [L, E] of a text; free."""
        return np.asarray(unwrap(self._get(lambda replica: replica.embed_text.remote(text))))

    @property
    def _timeout_s(self) -> float:
        return REMOTE_TIMEOUT_S if self.remote else RESPONSE_TIMEOUT_S

    def _get(self, call: Callable[[Any], Any]) -> Any:
        """Call the current replica and return its result, or its error as a value; retry on another if it dies."""
        deadline = time.monotonic() + FAILOVER_TIMEOUT_S
        while True:
            try:
                return ray.get(call(self.current), timeout=self._timeout_s)
            except GetTimeoutError as error:
                raise EndpointBusy(
                    f"a replica accepted a request and did not respond within {self._timeout_s:.0f} s"
                ) from error
            except (RayActorError, OutOfMemoryError, NodeDiedError) as error:
                if time.monotonic() > deadline:
                    raise EndpointLost(
                        f"no replica responded within {FAILOVER_TIMEOUT_S:.0f} s: {ray_error_line(error)}"
                    ) from error
                time.sleep(0.2)
                self._failover()
            except RayError as error:
                raise EndpointLost(f"a replica failed: {ray_error_line(error)}") from error

    def _failover(self) -> None:
        """Switch from a dead or busy replica to the less loaded of two random others, if there are any."""
        self.load = UNKNOWN
        self._rebalance()

    def _rebalance(self) -> None:
        """Probe two random replicas and switch to the less loaded, if its load is below the current one's."""
        others = [replica for replica in self.replicas if replica is not self.current]
        if not self.load or not others:
            return
        loads = {replica.load.remote(): replica for replica in self.random.sample(others, min(2, len(others)))}
        ready, _ = ray.wait(list(loads), num_returns=len(loads), timeout=1.0)
        for reference in ready:
            with contextlib.suppress(RayError):  # the replica is restarting: its load is unknown
                if (load := ray.get(reference)) < self.load:
                    self.current, self.load = loads[reference], load


def loads(replicas: Sequence[Any]) -> list[int | None]:
    """Return the number of pending requests of each replica; None where it does not report it within one second."""
    references = [replica.load.remote() for replica in replicas]
    ready, _ = ray.wait(references, num_returns=len(references), timeout=1.0)
    counts: list[int | None] = []
    for reference in references:
        try:
            counts.append(ray.get(reference) if reference in ready else None)
        except RayError:
            counts.append(None)
    return counts


def feature_store(replica: Any, codec: str) -> FeatureStore | None:
    """Open the store of a replica for images that are sent in this way; None if it has none on this machine."""
    model, feature_dim, folder = ray.get(replica.feature_store.remote(codec)) or ("", 0, Path())
    return FeatureStore(folder, model, feature_dim) if model and folder.is_dir() else None
