"""Who answers: Ray replicas that share one ledger actor. Without Ray: local.py.

The actors are thin: all that they do is in `Endpoint` and `Ledger`. A replica charges and computes at the same time and
answers when the charge is committed; a refused request's result is dropped. Errors travel as values, so that no Ray
exception reaches a method.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from pipeline.blackbox.endpoint import Answer, Endpoint, ModelInfo, Request
from pipeline.blackbox.ledger import Ledger
from pipeline.config import ModelCard
from pipeline.errors import BudgetExceeded, EndpointBusy, EndpointLost, FareboxError, LedgerError

NAMESPACE = "farebox"
RETRY_S = 120.0
"""How long a caller waits for a lost replica or ledger to come back before the trial fails."""
ANSWER_S = 3600.0
"""How long a caller waits for a replica that is alive: far above any honest answer, so that nothing hangs for ever."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class LedgerActor:
    """The one ledger of a run. Every call is idempotent, so Ray may repeat it after a restart."""

    def __init__(self, url: str) -> None:
        self.ledger = Ledger(url)

    def do(self, verb: str, *args: Any) -> Any:
        """Call a Ledger method; an error of ours is returned as a value."""
        try:
            return getattr(self.ledger, verb)(*args)
        except FareboxError as error:
            return error


class RemoteLedger:
    """The ledger's verbs through its actor, with our errors raised again."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, verb: str) -> Any:
        def call(*args: Any) -> Any:
            try:
                result = ray.get(self.actor.do.remote(verb, *args), timeout=RETRY_S)
            except RayError as error:
                raise LedgerError(f"the ledger did not answer {verb}: {_line(error)}") from error
            if isinstance(result, FareboxError):
                raise result
            return result

        return call


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=256)
class Replica:
    """One endpoint on one device. `threads` is fixed, so that the count of replicas cannot change a bit."""

    async def __init__(  # type: ignore[misc]  # Ray runs it in the actor's own loop
        self, card: ModelCard, features: str, threads: int, ledger_name: str
    ) -> None:
        # OpenMP's thread count belongs to a thread: the one that computes sets its own.
        self.worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.loaded: Endpoint | FareboxError  # an error is told by `info`: raised here, Ray would wrap it in its own
        try:
            self.loaded = await self._run(Endpoint, card, Path(features))
        except FareboxError as error:
            self.loaded = error
        # By name: a handle among the arguments could not be had again when Ray restarts this actor.
        self.ledger = ray.get_actor(ledger_name, namespace=NAMESPACE)
        self.waiting = 0

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint, or the error of ours that kept it from loading."""
        if isinstance(self.loaded, FareboxError):
            raise self.loaded
        return self.loaded

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *args)

    async def info(self) -> ModelInfo | FareboxError:
        """The model's constants, or why it could not be loaded."""
        return self.loaded if isinstance(self.loaded, FareboxError) else self.loaded.info

    async def load(self) -> int:
        """Requests taken and not answered."""
        return self.waiting

    async def embed_text(self, text: str) -> np.ndarray | FareboxError:
        """[L, E]"""
        try:
            return await self._run(self.endpoint.embed_text, text)
        except FareboxError as error:
            return error

    async def ask(self, request: Request) -> Answer | FareboxError:
        """Charge and compute at the same time; the answer leaves when the charge is committed."""
        self.waiting += 1
        try:
            self.endpoint.check(request)
            paying = self.ledger.do.remote("charge", [request.charge])
            answer = await self._compute(request)
            paid = await paying
            if isinstance(paid, FareboxError):
                return paid
            if isinstance(paid[0], BudgetExceeded):
                return paid[0]
            if isinstance(answer, FareboxError):
                if paid[0].status != "replayed":  # definitely not computed: the one case in which money goes back
                    await self.ledger.do.remote("refund", [request.charge.id])
                return answer
            return replace(answer, status=paid[0].status)
        except FareboxError as error:
            return error
        except RayError as error:
            return LedgerError(f"the ledger did not answer: {_line(error)}")
        finally:
            self.waiting -= 1

    async def _compute(self, request: Request) -> Answer | FareboxError:
        try:
            return await self._run(self.endpoint.compute, request)
        except FareboxError as error:
            return error


class RayPool:
    """Routes a trial's requests to the least busy replica, and to another, under the same id, when one dies."""

    def __init__(self, replicas: Sequence[Any]) -> None:
        self.replicas = list(replicas)
        info = self._get(lambda replica: replica.info.remote())
        if isinstance(info, FareboxError):
            raise info
        self.info: ModelInfo = info

    def ask(self, request: Request) -> Answer:
        """The answer; a replica that dies costs time and nothing else."""
        answer = self._get(lambda replica: replica.ask.remote(request))
        if isinstance(answer, FareboxError):
            raise answer
        assert isinstance(answer, Answer)
        return answer

    def embed_text(self, text: str) -> np.ndarray:
        """[L, E]"""
        answer = self._get(lambda replica: replica.embed_text.remote(text))
        if isinstance(answer, FareboxError):
            raise answer
        return np.asarray(answer)

    def _get(self, send: Any) -> Any:
        deadline = time.monotonic() + RETRY_S
        while True:
            replica = self._least_busy()
            try:
                return ray.get(send(replica), timeout=ANSWER_S)
            except GetTimeoutError as error:
                raise EndpointBusy(f"a replica took a request and did not answer within {ANSWER_S:.0f} s") from error
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise EndpointLost(f"no replica answered within {RETRY_S:.0f} s: {_line(error)}") from error
                time.sleep(0.2)
            except RayError as error:
                raise EndpointLost(f"a replica failed: {_line(error)}") from error

    def _least_busy(self) -> Any:
        if len(self.replicas) == 1:
            return self.replicas[0]
        loads = {replica: replica.load.remote() for replica in self.replicas}
        ready, _ = ray.wait(list(loads.values()), num_returns=len(loads), timeout=1.0)
        best, least = self.replicas[0], float("inf")
        for replica, reference in loads.items():
            if reference in ready:
                try:
                    load = ray.get(reference)
                except RayError:
                    continue  # it is restarting: its load is unknown, another is chosen
                if load < least:
                    best, least = replica, load
        return best


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
