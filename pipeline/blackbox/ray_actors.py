"""Ray actors of a run: the ledger and the replicas of the endpoint.

The actors are thin wrappers of `Ledger` and `ReplicaQueue`. They return Farebox's errors as values, since Ray would
wrap a raised one; `unwrap` raises them again in the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from methods.base import Bill
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.blackbox.local_pool import EndpointLike
from pipeline.blackbox.replica_queue import ReplicaQueue
from pipeline.blackbox.request import ModelInfo, Request, Response
from pipeline.budget import Limits
from pipeline.cards import ModelCard
from pipeline.errors import BudgetExceeded, FareboxError, LedgerError, unwrap
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.money import refused_as_stop
from pipeline.ledger.records import Charge, Receipt
from pipeline.source_code import ImportedCode, check_code

T = TypeVar("T")
NAMESPACE = "farebox"
"""Ray's namespace of the actors."""
LEDGER_TIMEOUT_S = 120.0
"""How long a caller waits for a lost ledger to restart before the trial fails."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class LedgerActor:
    """The ledger of a run. Every call is idempotent, so Ray may repeat it after a restart.

    Since every trial has its handle, it also tells them which replicas there are. The driver repeats the list.
    """

    def __init__(self, url: str, code: ImportedCode | None = None) -> None:
        self.ledger, self.code = Ledger(url), code
        self.loaded: Sequence[Any] = ()

    def set_replicas(self, replicas: Sequence[Any]) -> None:
        """Take the replicas that have loaded their model."""
        self.loaded = replicas

    def replicas(self) -> Sequence[Any]:
        """Return the replicas that have loaded their model; none until the driver has told them."""
        return self.loaded

    def open_account(self, name: str, limits: Limits) -> Limits | FareboxError:
        """See Ledger.open_account."""
        return self._call(lambda: self.ledger.open_account(name, limits))

    def reserve(self, storage: str, trial: str, accounts: Sequence[str], allotment: Limits) -> FareboxError | None:
        """See Ledger.reserve."""
        return self._call(lambda: self.ledger.reserve(storage, trial, accounts, allotment))

    def release(self, storage: str, trial: str) -> Bill | FareboxError:
        """See Ledger.release."""
        return self._call(lambda: self.ledger.release(storage, trial))

    def charge(self, charges: Sequence[Charge]) -> list[Receipt | BudgetExceeded] | FareboxError:
        """See Ledger.charge."""
        return self._call(lambda: self.ledger.charge(charges))

    def refund(self, ids: Sequence[str]) -> FareboxError | None:
        """See Ledger.refund."""
        return self._call(lambda: self.ledger.refund(ids))

    def pay(self, storage: str, trial: str, call_id: str, upper: int) -> FareboxError | None:
        """See Money.pay."""
        return self._call(lambda: self.ledger.money.pay(storage, trial, call_id, upper))

    def settle(self, storage: str, call_id: str, price: int) -> FareboxError | None:
        """See Money.settle."""
        return self._call(lambda: self.ledger.money.settle(storage, call_id, price))

    def verify(self) -> list[str] | FareboxError:
        """See Ledger.verify."""
        return self._call(self.ledger.verify)

    def _call(self, function: Callable[[], T]) -> T | FareboxError:
        """Call the function; return an error as a value."""
        try:
            if self.code is not None:  # not in the constructor, whose errors Ray would wrap
                check_code(self.code)
                self.code = None
            return function()
        except FareboxError as error:
            return error


class RemoteLedger:
    """A client of the ledger's actor. Its methods are those of `Ledger`.

    Every method raises LedgerError when the actor is lost, or does not answer within `LEDGER_TIMEOUT_S`.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def open_account(self, name: str, limits: Limits) -> Limits:
        """See Ledger.open_account."""
        return self._get("open_account", self.actor.open_account.remote(name, limits))

    def reserve(self, storage: str, trial: str, accounts: Sequence[str], allotment: Limits) -> None:
        """See Ledger.reserve."""
        self._get("reserve", self.actor.reserve.remote(storage, trial, accounts, allotment))

    def release(self, storage: str, trial: str) -> Bill:
        """See Ledger.release."""
        return self._get("release", self.actor.release.remote(storage, trial))

    def charge(self, charges: Sequence[Charge]) -> list[Receipt | BudgetExceeded]:
        """See Ledger.charge."""
        return self._get("charge", self.actor.charge.remote(charges))

    def verify(self) -> list[str]:
        """See Ledger.verify."""
        return self._get("verify", self.actor.verify.remote())

    def _get(self, name: str, reference: Any) -> Any:
        try:
            return unwrap(ray.get(reference, timeout=LEDGER_TIMEOUT_S))
        except RayError as error:
            raise LedgerError(f"the ledger did not answer {name}: {ray_error_line(error)}") from error


@dataclass(frozen=True)
class ActorWallet:
    """The money of a storage in the ledger of a run (a `remote.wallet.Wallet`), for the process of a replica."""

    ledger_name: str
    """Name of the ledger's actor."""
    storage: str

    async def pay(self, charge: Charge | None, call_id: str, micro_usd: int) -> None:
        """See Wallet.pay."""
        trial = charge.trial if charge else ""
        with refused_as_stop():
            await _ledger_result(self._ledger.pay.remote(self.storage, trial, call_id, micro_usd))

    async def settle(self, call_id: str, micro_usd: int) -> None:
        """See Wallet.settle."""
        await _ledger_result(self._ledger.settle.remote(self.storage, call_id, micro_usd))

    @cached_property
    def _ledger(self) -> Any:
        return ray.get_actor(self.ledger_name, namespace=NAMESPACE)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class Replica:
    """One endpoint on one device. `threads` is fixed, so that results do not depend on the number of replicas."""

    async def __init__(  # type: ignore[misc]  # Ray runs it in the actor's event loop
        self,
        card: ModelCard,
        features: str,
        threads: int,
        ledger_name: str,
        make: Callable[..., EndpointLike] = Endpoint,
        code: ImportedCode | None = None,
        remote: int = 0,
    ) -> None:
        self.queue = ReplicaQueue(self._charge, self._refund, threads, remote)
        await self.queue.start(checked(make, code), card, Path(features))
        # By name: Ray could not pass a handle among the arguments again when it restarts this actor.
        self.ledger = ray.get_actor(ledger_name, namespace=NAMESPACE)

    async def info(self) -> ModelInfo | FareboxError:
        """Return the model's constants, or why the model was not loaded."""
        loaded = self.queue.loaded
        return loaded if isinstance(loaded, FareboxError) else loaded.info

    async def load(self) -> int:
        """Return the number of accepted requests without a response."""
        return self.queue.pending

    async def activity(self) -> tuple[int, float]:
        """Return the number of accepted requests without a response, and the seconds without any request."""
        return self.queue.pending, self.queue.idle_s

    async def feature_store(self, codec: str) -> tuple[str, int, Path] | None:
        """Return the model, feature width and folder of the store of images sent in this way; None without one."""
        endpoint = self.queue.loaded
        store = endpoint.store(codec) if isinstance(endpoint, Endpoint) else None
        if not isinstance(store, FeatureStore):
            return None
        model = (store.folder / "model.txt").read_text().removesuffix("\n")
        return model, store.feature_dim, store.folder.parent

    async def embed_text(self, text: str) -> np.ndarray | FareboxError:
        """Return the token embeddings [L, E] of a text."""
        return await self.queue.embed_text(text)

    async def send(self, request: Request) -> Response | FareboxError:
        """See ReplicaQueue.send."""
        return await self.queue.send(request)

    async def _charge(self, charges: list[Charge]) -> list[Receipt | BudgetExceeded]:
        return await _ledger_result(self.ledger.charge.remote(charges))

    async def _refund(self, ids: list[str]) -> None:
        await _ledger_result(self.ledger.refund.remote(ids))


async def _ledger_result(reference: Awaitable[Any]) -> Any:
    try:
        return unwrap(await reference)
    except RayError as error:
        raise LedgerError(f"the ledger did not answer: {ray_error_line(error)}") from error


def checked(make: Callable[..., EndpointLike], code: ImportedCode | None) -> Callable[..., EndpointLike]:
    """Return a function that makes an endpoint, and first raises CodeMismatch unless this process imports `code`."""

    def make_checked(*args: Any) -> EndpointLike:
        if code is not None:
            check_code(code)
        return make(*args)

    return make_checked


def ray_error_line(error: RayError) -> str:
    """Return the line of Ray's message that states the cause: the last one for an error in a task, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]
