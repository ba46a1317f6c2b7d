"""What the benches of the serving side stand on: a Ray of their own, replicas, callers, and a device that only waits.

Callers are threads of this process, each with a pool of its own, as a trial has one. They ask for text features, so
that nothing but the call boundary and the text tower is timed. A waiting device leaves the processor free: it stands
for a GPU, and says nothing about one.
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
from pipeline.blackbox.endpoint import Endpoint, ModelInfo, Request, Response, prompt_counts
from pipeline.blackbox.ray_pool import LedgerActor, RayPool, RemoteLedger, Replica
from pipeline.blackbox.replica_queue import Server
from pipeline.budget import Charge, Limits, Phase, Receipt
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card
from pipeline.sweep.ray_session import ray_session

log = logging.getLogger(__name__)
STORAGE = "bench"
POPULATION = 8
NAMES = ("airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock")


class SleepEndpoint(Endpoint):
    """An endpoint whose device takes so many seconds for a population, and computes nothing."""

    def __init__(self, seconds: float, card: ModelCard, features: Path) -> None:
        super().__init__(card, features)
        self.seconds = seconds

    def compute(self, request: Request) -> Response:
        """Zeros [P, C, D], after P / POPULATION times the seconds."""
        assert request.prompts is not None
        p, c = prompt_counts(request.prompts)
        sleep(self.seconds * p / POPULATION)
        return Response(np.zeros((p, c, self.model.feature_dim), np.float32))


@ray.remote(num_cpus=0, max_concurrency=100)
class Unmetered:
    """A replica without a meter: what the meter's share is measured against."""

    async def __init__(self, card: ModelCard, features: str, make: Callable[..., Endpoint]) -> None:  # type: ignore[misc]
        self.server = Server(_for_nothing, _no_refund, 1)
        await self.server.load(make, card, Path(features))

    async def info(self) -> ModelInfo:
        """The model's constants."""
        return self.server.endpoint.info

    async def load(self) -> int:
        """Requests taken and not answered."""
        return self.server.taken

    async def send(self, request: Request) -> Any:
        """The answer."""
        return await self.server.send(request)


@ray.remote(num_cpus=0)
class Caller:
    """A trial's client in a process of its own."""

    def __init__(self, replicas: Sequence[Any]) -> None:
        self.pool = RayPool(replicas)

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with its pool."""
        return function(self.pool, *args)


def get(reference: Any) -> Any:
    """What a call to an actor gave."""
    return ray.get(reference)


async def _for_nothing(charges: Sequence[Charge]) -> list[Receipt]:
    return [Receipt(charge.id, "charged") for charge in charges]


async def _no_refund(ids: list[str]) -> None:
    """Nothing was paid."""


class Cluster:
    """A ledger actor and replicas in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"ledger-{uuid.uuid4().hex[:8]}"
        self.ledger = LedgerActor.options(name=self.name).remote(f"sqlite:///{folder / 'ledger.db'}")  # type: ignore[attr-defined]
        self.books = RemoteLedger(self.ledger)
        self.books.open_account("all", Limits())
        self.calls = itertools.count()
        self.trials: set[str] = set()

    def replicas(self, n: int, make: Callable[..., Endpoint], card: ModelCard | None = None) -> list[Any]:
        """So many replicas, loaded."""
        args = (card or model_card("fake"), str(self.folder / "features"), 1, self.name, make)
        # a hundredth of a GPU where there is one: a bench's replicas all sit on it, and Ray shows it to no others
        options = Replica.options(num_gpus=0.01 if ray.cluster_resources().get("GPU") else 0)  # type: ignore[attr-defined]
        return self._loaded([options.remote(*args) for _ in range(n)])

    def unmetered(self, make: Callable[..., Endpoint]) -> list[Any]:
        """One replica without a meter, loaded."""
        made = Unmetered.remote(model_card("fake"), str(self.folder / "features"), make)  # type: ignore[attr-defined]
        return self._loaded([made])

    def charges(self, trials: int) -> list[Charge]:
        """A new charge of each of so many trials."""
        names = [f"t{i}" for i in range(trials)]
        for name in names:
            if name not in self.trials:
                self.books.reserve(STORAGE, name, ["all"], Limits())
                self.trials.add(name)
        call = next(self.calls)
        return [Charge(STORAGE, name, call, "digest", Phase.ADAPT, Bill(8, 0, 80, 800)) for name in names]

    def asking(self, pools: Sequence[RayPool], each: int) -> Callable[[], None]:
        """A run in which every pool, in a thread of its own, asks `each` new requests one after the other."""

        def run() -> None:
            width = pools[0].info.token_dim
            rounds = [self.charges(len(pools)) for _ in range(each)]
            requests = [[Request("text_features", None, population(width), c) for c in charges] for charges in rounds]
            with ThreadPoolExecutor(len(pools)) as threads:
                list(threads.map(_ask_all, pools, zip(*requests, strict=True)))

        return run

    def _loaded(self, made: list[Any]) -> list[Any]:
        ray.get([replica.info.remote() for replica in made])
        return made


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A Ray on this machine, for as long as the bench runs."""
    with ray_session(None, log.warning, num_cpus=2), tempfile.TemporaryDirectory() as folder:
        yield Cluster(Path(folder))


def waiting(seconds: float) -> Callable[..., Endpoint]:
    """What a replica loads to wait."""
    return partial(SleepEndpoint, seconds)


def population(width: int, p: int = POPULATION) -> SoftPrompts:
    """P new prompt sets of ten classes with four context tokens."""
    return SoftPrompts(0.02 * torch.randn(p, 4, width), NAMES)


def _ask_all(pool: RayPool, requests: Sequence[Request]) -> None:
    for request in requests:
        pool.send(request)
