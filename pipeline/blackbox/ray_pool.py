"""A trial's pool of Ray replicas: balance requests over them, and leave those that are lost or busy."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, OutOfMemoryError, RayActorError, RayError

from pipeline.blackbox.ray_actors import ray_error_line
from pipeline.blackbox.request import ModelInfo, Request, Response
from pipeline.errors import EndpointBusy, EndpointLost, QueueFull, unwrap

FAILOVER_TIMEOUT_S = 600.0
"""How long a caller waits for a live replica before the trial fails: an autoscaler takes minutes to replace a node."""
RESPONSE_TIMEOUT_S = 3600.0
"""How long a caller waits for the response of a live replica: far longer than any call takes."""
REMOTE_TIMEOUT_S = 7 * 86_400.0
"""The same for a remote model: its rate may allow a few images a minute. The client itself gives up on a server."""
REFRESH_S = 2.0
"""Seconds between two requests for the list of replicas."""
UNKNOWN = math.inf
"""Load of a replica that did not report it."""


class RayPool:
    """A trial's client of the replicas, with load balancing and failover.

    Load is balanced by the power of two choices: before a call, the pool probes two random replicas and switches to the
    less loaded. While its replica serves no one else it stays there without a probe, since that replica has cached the
    trial's images and prompts. All blocks of a call go to one replica, which then encodes the prompts once.

    Args:
        replicas: those that there are at first.
        directory: an actor whose method `replicas` returns those that there are now; None: they do not change.
    """

    def __init__(self, replicas: Sequence[Any], directory: Any = None) -> None:
        self.replicas, self.directory = list(replicas), directory
        self._listing: Any = None
        self._next_refresh = 0.0
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
        if not self.load:
            return
        self._refresh()
        others = [replica for replica in self.replicas if replica != self.current]
        if not others:
            return
        loads = {replica.load.remote(): replica for replica in self.random.sample(others, min(2, len(others)))}
        ready, _ = ray.wait(list(loads), num_returns=len(loads), timeout=1.0)
        for reference in ready:
            with contextlib.suppress(RayError):  # the replica is restarting: its load is unknown
                if (load := ray.get(reference)) < self.load:
                    self.current, self.load = loads[reference], load

    def _refresh(self) -> None:
        """Take the present list of replicas, once the directory has returned it; never wait for it."""
        if self.directory is None:
            return
        if self._listing is None and time.monotonic() >= self._next_refresh:
            self._listing = self.directory.replicas.remote()
            self._next_refresh = time.monotonic() + REFRESH_S
        if self._listing is not None and ray.wait([self._listing], timeout=0)[0]:
            with contextlib.suppress(RayError):  # the directory is restarting: the list stays
                self.replicas = list(ray.get(self._listing)) or self.replicas
            self._listing = None
            if self.current not in self.replicas:
                self.load = UNKNOWN
