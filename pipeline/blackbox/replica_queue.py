"""The request queue of a replica, without Ray.

Charges are batched, computation is serial, and a response is released once its charge has committed. Charging and
computing overlap: while one request is computed, those behind it are charged. All charges that arrive during one call
to the ledger are sent in the next. The queue is bounded: a full one rejects requests with QueueFull, and only a few
responses are computed ahead of their charges. A remote endpoint, whose answers cost money, has several worker threads,
and a request reaches it after its charge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.blackbox.local_pool import EndpointLike
from pipeline.blackbox.request import Request, Response
from pipeline.errors import BudgetExceeded, EndpointLost, FareboxError, QueueFull, unwrap
from pipeline.ledger.records import Charge, Receipt

MAX_QUEUED = 64
"""Maximum number of requests in the queue."""
MAX_BUFFERED = 2
"""Maximum number of responses in memory for one worker: one computed, one waiting for its charge. A block of
scores or of image features takes at most 64 MiB; prompt features are one block of at most `endpoint.TEXT_BYTES`."""

ChargeResult = Receipt | FareboxError
"""A receipt, or why the charge was refused (BudgetExceeded) or failed."""
ChargeFunction = Callable[[list[Charge]], Awaitable[Sequence[Receipt | BudgetExceeded]]]
"""The ledger's `charge`; raises a FareboxError when the ledger does not answer."""


class ReplicaQueue:
    """The queue in front of one endpoint. It is made and called in a running event loop.

    Args:
        charge, refund: see `Ledger`.
        threads: torch threads of each computation.
        remote: requests that a remote endpoint answers at the same time, each after its charge; 0: it is a local one.
    """

    def __init__(
        self,
        charge: ChargeFunction,
        refund: Callable[[list[str]], Awaitable[Any]],
        threads: int,
        remote: int = 0,
    ) -> None:
        self.charge, self.refund, self.remote = charge, refund, remote
        workers = max(1, remote)
        # OpenMP keeps a thread count for each thread: those that compute set their own.
        self.worker = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
        self.loaded: EndpointLike | FareboxError
        """The endpoint, or why it could not be made."""
        self.pending = 0
        """Number of accepted requests without a response."""
        self._idle_since = time.monotonic()
        self.slots = asyncio.Semaphore(MAX_BUFFERED + workers - 1)
        self.uncharged: list[tuple[Charge, asyncio.Future[ChargeResult]]] = []
        self.charging: asyncio.Task[None] | None = None

    async def start(self, make: Callable[..., EndpointLike], *args: Any) -> None:
        """Make the endpoint. An error is stored in `loaded`, since Ray would wrap one that is raised here."""
        try:
            self.loaded = await self._run(make, *args)
        except FareboxError as error:
            self.loaded = error
        self._idle_since = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last request ended, or since the start; 0 while there is one."""
        return 0.0 if self.pending else time.monotonic() - self._idle_since

    @property
    def endpoint(self) -> EndpointLike:
        """The endpoint. Raises the error with which it failed to start."""
        return unwrap(self.loaded)

    async def embed_text(self, text: str) -> np.ndarray | FareboxError:
        """Return the token embeddings [L, E] of a text; free."""
        try:
            return await self._run(self.endpoint.embed_text, text)
        except FareboxError as error:
            return error

    async def send(self, request: Request) -> Response | FareboxError:
        """Check, charge and compute a request. Returns the response once its charge has committed, or an error."""
        if self.pending >= MAX_QUEUED:
            return QueueFull(f"the queue of a replica is full ({self.pending} requests)")
        self.pending += 1
        try:
            self.endpoint.check(request)
            response = await self._respond(request)
        except FareboxError as error:
            return error
        finally:
            self.pending -= 1
            self._idle_since = time.monotonic()
        return replace(response, load=self.pending)

    async def _respond(self, request: Request) -> Response:
        charged = self._charge(request.charge)
        async with self.slots:
            if charged.done() or self.remote:
                unwrap(await charged)  # refused while the request was queued: it is not computed
            try:
                response: Response = await self._run(self.endpoint.compute, request)
            except EndpointLost:  # a remote endpoint may have computed it: the charge stays
                unwrap(await charged)
                raise
            except FareboxError:
                if unwrap(await charged).status != "replayed":  # the call was not computed: it is refunded
                    await self.refund([request.charge.id])
                raise
            return replace(response, status=unwrap(await charged).status)

    def _charge(self, charge: Charge) -> asyncio.Future[ChargeResult]:
        """Queue a charge; the future gives its result."""
        loop = asyncio.get_running_loop()
        charged: asyncio.Future[ChargeResult] = loop.create_future()
        self.uncharged.append((charge, charged))
        if self.charging is None:
            self.charging = loop.create_task(self._charge_all())
        return charged

    async def _charge_all(self) -> None:
        """Charge until the queue is empty: one call to the ledger at a time, for all that arrived during the last."""
        while self.uncharged:
            batch, self.uncharged = self.uncharged, []
            results = await self._charge_batch([charge for charge, _ in batch])
            for (_, charged), result in zip(batch, results, strict=True):
                charged.set_result(result)
        self.charging = None

    async def _charge_batch(self, charges: list[Charge]) -> Sequence[ChargeResult]:
        try:
            return await self.charge(charges)
        except FareboxError as error:
            if len(charges) == 1:
                return [error]
            return [(await self._charge_batch([charge]))[0] for charge in charges]  # an invalid one fails alone

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *args)
