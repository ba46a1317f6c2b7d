"""What a replica does with its requests, without Ray: paid together, computed one after the other, answered when paid.

Charging and computing run beside each other: while a request is computed, the charges of those behind it are committed.
What has come in while one charge call was under way is charged by the next, in one call for all. Nothing grows with the
number of callers but a short queue: so many requests are taken and the next is told that the replica is busy; so many
answers are held at once, and nothing further is computed before one of them has been paid and sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.blackbox.endpoint import Endpoint, Request, Response
from pipeline.budget import Charge, Receipt
from pipeline.errors import BudgetExceeded, EndpointBusy, FareboxError

MAX_QUEUED = 64
"""Requests that a replica takes before it is busy."""
MAX_BUFFERED = 2
"""Answers in its memory: one that is computed, and one that waits for its charge. A block of scores or of image
features has 64 MiB at most; prompt features come whole, up to `endpoint.TEXT_BYTES`."""

Paid = Receipt | BudgetExceeded | FareboxError
Charging = Callable[[list[Charge]], Awaitable[Sequence[Receipt | BudgetExceeded]]]
"""The ledger's `charge`; raises an error of ours when it did not answer."""


class Server:
    """The queue before one endpoint. It is made, and called, in a running event loop."""

    def __init__(self, charge: Charging, refund: Callable[[list[str]], Awaitable[Any]], threads: int) -> None:
        self.charge, self.refund = charge, refund
        # OpenMP's thread count belongs to a thread: the one that computes sets its own.
        self.worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.loaded: Endpoint | FareboxError
        self.taken = 0
        self.held = asyncio.Semaphore(MAX_BUFFERED)
        self.unpaid: list[tuple[Charge, asyncio.Future[Paid]]] = []
        self.paying: asyncio.Task[None] | None = None

    async def load(self, make: Callable[..., Endpoint], *args: Any) -> None:
        """Load the endpoint. An error of ours is kept for those who ask: raised here, Ray would wrap it in its own."""
        try:
            self.loaded = await self._run(make, *args)
        except FareboxError as error:
            self.loaded = error

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint, or the error of ours that kept it from loading."""
        if isinstance(self.loaded, FareboxError):
            raise self.loaded
        return self.loaded

    async def embed_text(self, text: str) -> np.ndarray | FareboxError:
        """[L, E]"""
        try:
            return await self._run(self.endpoint.embed_text, text)
        except FareboxError as error:
            return error

    async def send(self, request: Request) -> Response | FareboxError:
        """The paid answer, with the number of requests that are left here; an error of ours as a value."""
        if self.taken >= MAX_QUEUED:
            return EndpointBusy(f"a replica has {self.taken} requests to answer")
        self.taken += 1
        try:
            self.endpoint.check(request)
            answer = await self._answer(request)
        except FareboxError as error:
            return error
        finally:
            self.taken -= 1
        return replace(answer, load=self.taken)

    async def _answer(self, request: Request) -> Response:
        paying = self._pay(request.charge)
        async with self.held:
            if paying.done():
                _receipt(paying.result())  # refused while it waited for its turn: nothing is computed
            try:
                answer = await self._run(self.endpoint.compute, request)
            except FareboxError as error:
                if _receipt(await paying).status != "replayed":  # definitely not computed: the one case of a refund
                    await self.refund([request.charge.id])
                raise error
            return replace(answer, status=_receipt(await paying).status)

    def _pay(self, charge: Charge) -> asyncio.Future[Paid]:
        """The charge's outcome, when it is committed or refused."""
        loop = asyncio.get_running_loop()
        paid: asyncio.Future[Paid] = loop.create_future()
        self.unpaid.append((charge, paid))
        if self.paying is None:
            self.paying = loop.create_task(self._pay_all())
        return paid

    async def _pay_all(self) -> None:
        """One charge call at a time, with all that came in during the one before."""
        while self.unpaid:
            batch, self.unpaid = self.unpaid, []
            for (_, paid), outcome in zip(batch, await self._outcomes([charge for charge, _ in batch]), strict=True):
                paid.set_result(outcome)
        self.paying = None

    async def _outcomes(self, charges: list[Charge]) -> Sequence[Paid]:
        try:
            return await self.charge(charges)
        except FareboxError as error:
            if len(charges) == 1:
                return [error]
            return [(await self._outcomes([charge]))[0] for charge in charges]  # one that is wrong fails alone

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *args)


def _receipt(paid: Paid) -> Receipt:
    if isinstance(paid, FareboxError):
        raise paid
    return paid
