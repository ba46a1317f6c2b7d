"""Ray actors for the benchmarks: a ledger, replicas, clients, and an endpoint that sleeps.

Clients are threads of this process, each with a pool of its own, as a trial has one. They request text features, so
that only the call boundary and the text tower are timed. A sleeping endpoint leaves the processor free, as a GPU would;
it does not measure one.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import ray
import torch

from methods.base import Bill, SoftPrompts
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.ray_actors import LedgerActor, RemoteLedger, Replica
from pipeline.blackbox.ray_pool import RayPool
from pipeline.blackbox.replica_queue import ReplicaQueue
from pipeline.blackbox.request import ModelInfo, Request, Response, prompt_counts
from pipeline.budget import Limits, Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card
from pipeline.ledger.records import Charge, Receipt
from pipeline.sweep.ray_session import ray_session

log = logging.getLogger(__name__)
STORAGE = "bench"
POPULATION = 8
NAMES = ("airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock")


class SleepEndpoint(Endpoint):
    """An endpoint that sleeps for a fixed time per population and computes nothing."""

    def __init__(self, seconds: float, card: ModelCard, features: Path) -> None:
        super().__init__(card, features)
        self.seconds = seconds

    def compute(self, request: Request) -> Response:
        """Return zeros [P, C, D] after P / POPULATION * `seconds`."""
        assert request.prompts is not None
        p, c = prompt_counts(request.prompts)
        sleep(self.seconds * p / POPULATION)
        return Response(np.zeros((p, c, self.model.feature_dim), np.float32))


@ray.remote(num_cpus=0, max_concurrency=100)
class UnmeteredReplica:
    """A replica that charges no ledger: the baseline of the meter's overhead."""

    async def __init__(self, card: ModelCard, features: str, make: Callable[..., Endpoint]) -> None:  # type: ignore[misc]
        self.queue = ReplicaQueue(_charge_nothing, _refund_nothing, 1)
        await self.queue.start(make, card, Path(features))

    async def info(self) -> ModelInfo:
        """Return the model's constants."""
        return self.queue.endpoint.info

    async def load(self) -> int:
        """Return the number of pending requests."""
        return self.queue.pending

    async def send(self, request: Request) -> Any:
        """Compute a request."""
        return await self.queue.send(request)


@ray.remote(num_cpus=0)
class Client:
    """A pool in a process of its own, as a trial has one."""

    def __init__(self, replicas: Sequence[Any]) -> None:
        self.pool = RayPool(replicas)

    def pid(self) -> int:
        """Return the id of the process."""
        return os.getpid()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with the pool as its first argument."""
        return function(self.pool, *args)


def get(reference: Any) -> Any:
    """Return the result of a call to an actor."""
    return ray.get(reference)


async def _charge_nothing(charges: Sequence[Charge]) -> list[Receipt]:
    return [Receipt(charge.id, "charged") for charge in charges]


async def _refund_nothing(ids: list[str]) -> None:
    """Do nothing: nothing was charged."""


class Cluster:
    """A ledger actor and replicas, with their files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"ledger-{uuid.uuid4().hex[:8]}"
        ledger = LedgerActor.options(name=self.name).remote(f"sqlite:///{folder / 'ledger.db'}")  # type: ignore[attr-defined]
        self.ledger = RemoteLedger(ledger)
        self.ledger.open_account("all", Limits())
        self.calls = itertools.count()
        self.trials: set[str] = set()

    def replicas(self, n: int, make: Callable[..., Endpoint], card: ModelCard | None = None) -> list[Any]:
        """Start n replicas and wait until they have loaded their model."""
        args = (card or model_card("fake"), str(self.folder / "features"), 1, self.name, make)
        # a hundredth of a GPU where there is one, so that all replicas of a benchmark share it
        options = Replica.options(num_gpus=0.01 if ray.cluster_resources().get("GPU") else 0)  # type: ignore[attr-defined]
        return self._loaded([options.remote(*args) for _ in range(n)])

    def unmetered(self, make: Callable[..., Endpoint]) -> list[Any]:
        """Start one replica that charges nothing, and wait until it has loaded its model."""
        replica = UnmeteredReplica.remote(model_card("fake"), str(self.folder / "features"), make)  # type: ignore[attr-defined]
        return self._loaded([replica])

    def charges(self, trials: int) -> list[Charge]:
        """Return a new charge for each of some trials."""
        names = [f"t{i}" for i in range(trials)]
        for name in names:
            if name not in self.trials:
                self.ledger.reserve(STORAGE, name, ["all"], Limits())
                self.trials.add(name)
        call = next(self.calls)
        return [Charge(STORAGE, name, call, "digest", Phase.ADAPT, Bill(8, 0, 80, 800)) for name in names]

    def workload(self, pools: Sequence[RayPool], each: int) -> Callable[[], None]:
        """Return a function in which each pool, in a thread of its own, sends `each` new requests one by one."""

        def run() -> None:
            width = pools[0].info.token_dim
            rounds = [self.charges(len(pools)) for _ in range(each)]
            requests = [[Request("text_features", None, population(width), c) for c in charges] for charges in rounds]
            with ThreadPoolExecutor(len(pools)) as threads:
                list(threads.map(_send_all, pools, zip(*requests, strict=True)))

        return run

    def _loaded(self, replicas: list[Any]) -> list[Any]:
        ray.get([replica.info.remote() for replica in replicas])
        return replicas


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start Ray on this machine, and stop it on exit."""
    with ray_session(None, log.warning, num_cpus=2), tempfile.TemporaryDirectory() as folder:
        yield Cluster(Path(folder))


def sleeping(seconds: float) -> Callable[..., Endpoint]:
    """Return a function that makes a SleepEndpoint."""
    return partial(SleepEndpoint, seconds)


def population(width: int, p: int = POPULATION) -> SoftPrompts:
    """Return P random prompt sets of ten classes with four context tokens."""
    return SoftPrompts(0.02 * torch.randn(p, 4, width), NAMES)


def _send_all(pool: RayPool, requests: Sequence[Request]) -> None:
    for request in requests:
        pool.send(request)
