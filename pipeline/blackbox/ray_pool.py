"""Who answers: Ray replicas that share one ledger actor. Without Ray: local.py.

The actors are thin: all that they do is in `Server` (serving.py) and `Ledger`. Errors travel as values, so that no Ray
exception reaches a method.
"""

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
from ray.exceptions import GetTimeoutError, NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.blackbox.endpoint import Endpoint, ModelInfo, Request, Response
from pipeline.blackbox.replica_queue import Server
from pipeline.budget import Charge, Receipt
from pipeline.cards import ModelCard
from pipeline.errors import BudgetExceeded, ConfigError, EndpointBusy, EndpointLost, FareboxError, LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.source_code import ImportedCode, check_code, driver_code

Say = Callable[[str], None]
NAMESPACE = "farebox"
"""Ray's namespace of the actors."""
LEDGER_TIMEOUT_S = 120.0
"""How long a caller waits for a lost ledger to come back before the trial fails."""
FAILOVER_TIMEOUT_S = 600.0
"""The same for a replica: an autoscaler takes minutes to replace its node."""
RESPONSE_TIMEOUT_S = 3600.0
"""How long a caller waits for a replica that is alive: far above any honest answer, so that nothing hangs for ever."""
START_S = 600.0
"""How long replicas may take to load their model, and others to give back what the run needs."""
WAIT_LOG_INTERVAL_S = 10.0
"""Seconds between two lines about waiting."""
UNKNOWN = math.inf
"""The load of a replica that has not told it."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class LedgerActor:
    """The one ledger of a run. Every call is idempotent, so Ray may repeat it after a restart."""

    def __init__(self, url: str, code: ImportedCode | None = None) -> None:
        self.ledger, self.code = Ledger(url), code

    def do(self, verb: str, *args: Any) -> Any:
        """Call a Ledger method; an error of ours is returned as a value."""
        try:
            self._check_code()
            return getattr(self.ledger, verb)(*args)
        except FareboxError as error:
            return error

    def _check_code(self) -> None:
        """Verify the code before the first call. It is done here since Ray would wrap an error of the constructor."""
        if self.code is not None:
            check_code(self.code)
            self.code = None


class RemoteLedger:
    """The ledger's verbs through its actor, with our errors raised again."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, verb: str) -> Any:
        def call(*args: Any) -> Any:
            try:
                result = ray.get(self.actor.do.remote(verb, *args), timeout=LEDGER_TIMEOUT_S)
            except RayError as error:
                raise LedgerError(f"the ledger did not answer {verb}: {_line(error)}") from error
            if isinstance(result, FareboxError):
                raise result
            return result

        return call


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class Replica:
    """One endpoint on one device. `threads` is fixed, so that the count of replicas cannot change a bit."""

    async def __init__(  # type: ignore[misc]  # Ray runs it in the actor's own loop
        self,
        card: ModelCard,
        features: str,
        threads: int,
        ledger_name: str,
        make: Callable[..., Endpoint] = Endpoint,
        code: ImportedCode | None = None,
    ) -> None:
        self.server = Server(self._charge, self._refund, threads)
        await self.server.load(_checked(make, code), card, Path(features))
        # By name: a handle among the arguments could not be had again when Ray restarts this actor.
        self.ledger = ray.get_actor(ledger_name, namespace=NAMESPACE)

    async def info(self) -> ModelInfo | FareboxError:
        """The model's constants, or why it could not be loaded."""
        loaded = self.server.loaded
        return loaded if isinstance(loaded, FareboxError) else loaded.info

    async def load(self) -> int:
        """Requests taken and not answered."""
        return self.server.taken

    async def embed_text(self, text: str) -> np.ndarray | FareboxError:
        """[L, E]"""
        return await self.server.embed_text(text)

    async def send(self, request: Request) -> Response | FareboxError:
        """Charge and compute at the same time; the answer leaves when the charge is committed."""
        return await self.server.send(request)

    async def _charge(self, charges: list[Charge]) -> list[Receipt | BudgetExceeded]:
        return await self._ledger("charge", charges)

    async def _refund(self, ids: list[str]) -> None:
        await self._ledger("refund", ids)

    async def _ledger(self, verb: str, argument: Any) -> Any:
        try:
            result = await self.ledger.do.remote(verb, argument)
        except RayError as error:
            raise LedgerError(f"the ledger did not answer: {_line(error)}") from error
        if isinstance(result, FareboxError):
            raise result
        return result


def _checked(make: Callable[..., Endpoint], code: ImportedCode | None) -> Callable[..., Endpoint]:
    """Verify that this process imports this code, then load."""

    def load(*args: Any) -> Endpoint:
        if code is not None:
            check_code(code)
        return make(*args)

    return load


def start(
    model: ModelCard, features: Path, threads: int, wanted: int | str, ledger_url: str, storage_id: str, say: Say
) -> tuple[list[Any], Any]:
    """The replicas, loaded, and the ledger's actor. ConfigError, of one line, when they do not start."""
    count, gpus = replica_resources(wanted, ray.cluster_resources(), threads)
    wait_for_room({"CPU": 1.0, "GPU": count * gpus}, say)
    home = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"ledger-{storage_id}-{uuid.uuid4().hex[:8]}"  # a killed driver's actor may still be there for a moment
    code = driver_code()
    ledger = LedgerActor.options(name=name, scheduling_strategy=home).remote(ledger_url, code)  # type: ignore[attr-defined]
    replica = Replica.options(num_gpus=gpus, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
    replicas = [replica.remote(model, str(features), threads, name, code=code) for _ in range(count)]
    try:
        for info in ray.get([r.info.remote() for r in replicas], timeout=START_S):
            if isinstance(info, FareboxError):
                raise ConfigError(f"the endpoint did not start: {info}") from info
    except GetTimeoutError as error:
        raise ConfigError(f"the endpoint did not start within {START_S:.0f} s") from error
    except RayError as error:  # the last line of Ray's account is the cause
        raise ConfigError(f"the endpoint did not start: {str(error).strip().splitlines()[-1]}") from error
    return replicas, ledger


def wait_for_room(needed: Mapping[str, float], say: Say, patience_s: float = START_S) -> None:
    """Wait while others on the cluster hold what the run needs; ConfigError when nothing is given back in time.

    Without it Ray would queue the actors, and Tune its trials, for ever and in silence.
    """
    until, next_line = time.monotonic() + patience_s, 0.0
    while lacking := _lacking(needed):
        words = " and ".join(f"{n:g} {kind}" for kind, n in lacking.items())
        have = ", ".join(f"{kind} {ray.cluster_resources().get(kind, 0):g}" for kind in needed)
        if time.monotonic() > until:
            raise ConfigError(
                f"waited {patience_s:.0f} s for {words} that others hold (the cluster has {have}): end their work, add "
                "a node, or ask for fewer replicas=N"
            )
        if time.monotonic() > next_line:
            next_line = time.monotonic() + WAIT_LOG_INTERVAL_S
            say(f"waiting for {words}, which others on this cluster hold (it has {have})")
        time.sleep(0.5)


def _lacking(needed: Mapping[str, float]) -> dict[str, float]:
    free = ray.available_resources()
    return {kind: n for kind, n in needed.items() if free.get(kind, 0) + 1e-3 < n}


def replica_resources(wanted: int | str, resources: Mapping[str, float], threads: int) -> tuple[int, float]:
    """(count, GPUs of each): one replica for each GPU that Ray has, else one for each `threads` cores."""
    gpus = int(resources.get("GPU", 0))
    count = (gpus or max(1, int(resources["CPU"]) // threads)) if wanted == "auto" else wanted
    return int(count), gpu_share(gpus, int(count))


def gpu_share(gpus: int, replicas: int) -> float:
    """The part of a GPU that each replica gets, so that all find a place: a fraction never spans two GPUs."""
    if not gpus:
        return 0
    together = -(-replicas // gpus)
    return 1 if together == 1 else int(10_000 / together) / 10_000  # Ray counts in ten-thousandths


class RayPool:
    """A trial's way to the replicas: to one that is not busy, and to another, under the same id, when one dies.

    It stays with a replica that has nobody else to serve: that one holds the trial's images and prompts, and no other
    needs to be asked for its load. Else two others, drawn at random, are asked, and a less busy one is taken. Blocks of
    one call go to one replica, which computes the prompts once.
    """

    def __init__(self, replicas: Sequence[Any]) -> None:
        self.replicas = list(replicas)
        self.random = random.Random()  # of its own: no result depends on who answers
        self.home, self.load = self.random.choice(self.replicas), UNKNOWN
        self.call = ""
        info = self._get(lambda replica: replica.info.remote())
        if isinstance(info, FareboxError):
            raise info
        self.info: ModelInfo = info

    def send(self, request: Request) -> Response:
        """The answer; a replica that dies, or is busy, costs time and nothing else."""
        if request.charge.id != self.call:
            self._rebalance()
            self.call = request.charge.id
        until, pause = time.monotonic() + RESPONSE_TIMEOUT_S, 0.05
        while isinstance(answer := self._get(lambda replica: replica.send.remote(request)), EndpointBusy):
            if time.monotonic() > until:
                break
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            self._failover()
        if isinstance(answer, FareboxError):
            raise answer
        assert isinstance(answer, Response)
        self.load = answer.load
        return answer

    def embed_text(self, text: str) -> np.ndarray:
        """[L, E]"""
        answer = self._get(lambda replica: replica.embed_text.remote(text))
        if isinstance(answer, FareboxError):
            raise answer
        return np.asarray(answer)

    def _get(self, send: Any) -> Any:
        deadline = time.monotonic() + FAILOVER_TIMEOUT_S
        while True:
            try:
                return ray.get(send(self.home), timeout=RESPONSE_TIMEOUT_S)
            except GetTimeoutError as error:
                raise EndpointBusy(
                    f"a replica took a request and did not answer within {RESPONSE_TIMEOUT_S:.0f} s"
                ) from error
            except (RayActorError, OutOfMemoryError, NodeDiedError) as error:
                if time.monotonic() > deadline:
                    raise EndpointLost(
                        f"no replica answered within {FAILOVER_TIMEOUT_S:.0f} s: {_line(error)}"
                    ) from error
                time.sleep(0.2)
                self._failover()
            except RayError as error:
                raise EndpointLost(f"a replica failed: {_line(error)}") from error

    def _failover(self) -> None:
        """Leave a replica that is dead or busy for the least busy of two others; a single one is tried again."""
        self.load = UNKNOWN
        self._rebalance()

    def _rebalance(self) -> None:
        """Move to a replica with fewer requests than this one, as far as two others tell."""
        others = [replica for replica in self.replicas if replica is not self.home]
        if not self.load or not others:
            return
        loads = {replica.load.remote(): replica for replica in self.random.sample(others, min(2, len(others)))}
        ready, _ = ray.wait(list(loads), num_returns=len(loads), timeout=1.0)
        for reference in ready:
            with contextlib.suppress(RayError):  # it is restarting: its load is unknown
                if (load := ray.get(reference)) < self.load:
                    self.home, self.load = loads[reference], load


def loads(replicas: Sequence[Any]) -> list[int | None]:
    """Requests under way on each replica; None for one that does not say within a second (it may be starting again)."""
    asked = [replica.load.remote() for replica in replicas]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=1.0)
    found: list[int | None] = []
    for reference in asked:
        try:
            found.append(ray.get(reference) if reference in ready else None)
        except RayError:
            found.append(None)
    return found


def _line(error: RayError) -> str:
    """What Ray says went wrong, without its tracebacks: for an error in a task, the last line; else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]
