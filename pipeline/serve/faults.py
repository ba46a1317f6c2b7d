"""Faults that the service makes on purpose, for tests of clients.

The faulty requests follow from their number and the seed. A fault that comes every N requests hits one of each N.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from pipeline.serve.wire import ServiceError

OTHER_IDENTITY = "other"
"""Value of `model` with which the answers have another identity."""


@dataclass(frozen=True, kw_only=True)
class FaultOptions:
    """Which faults to make; by default none."""

    every_429: int = 0
    """One of every N requests is answered with 429."""
    down_every: int = 0
    """One of every N requests begins a time in which all are answered with 503."""
    down_s: float = 1.0
    """Length of such a time in seconds."""
    drop_every: int = 0
    """One of every N answers is computed, and the connection is closed in its place."""
    truncate_every: int = 0
    """One of every N answers ends in its middle, with the connection."""
    slow_s: float = 0.0
    """Seconds that every answer waits."""
    model: str = ""
    """other: answers and info have another identity."""
    permute_labels: bool = False
    """The last class comes first in the answers to scores, the last prompt in those to text features."""
    jitter: float = 0.0
    """Standard deviation of noise that is added to the values, new in each answer."""
    retry_after_s: int = 0
    """Seconds in the header Retry-After of these 429. That of a 503 is the time until the service is back."""
    after: int = 0
    """Number of requests before the first fault."""
    seed: int = 1
    """Which of every N requests are faulty, and the noise."""


class Faults:
    """Decides which requests are faulty. `made` counts the faults by kind."""

    def __init__(self, options: FaultOptions) -> None:
        self.options, self.made = options, Counter[str]()
        self._arrived = 0
        self._down_until = 0.0

    @property
    def active(self) -> bool:
        """Whether faults are made, after the first `after` requests."""
        return self._arrived > self.options.after

    def arrive(self) -> int:
        """Count a request, and return its number. Raises ServiceError if it is refused (429, 503).

        Requests that come while the service is down are not counted: they begin no further such time.
        """
        self.refuse_if_down()
        self._arrived += 1
        options = self.options
        if not self.active:
            return self._arrived
        if self._hits("down", options.down_every, self._arrived):
            self._down_until = time.monotonic() + options.down_s
        self.refuse_if_down()
        if self._hits("429", options.every_429, self._arrived):
            raise self._refusal(429, "rate_limited", options.retry_after_s)
        return self._arrived

    def refuse_if_down(self) -> None:
        """Raise ServiceError (503) during a time in which the service is down."""
        if (left_s := self._down_until - time.monotonic()) > 0:
            raise self._refusal(503, "down", math.ceil(left_s))

    def _refusal(self, status: int, code: str, retry_after_s: int) -> ServiceError:
        self.made[code] += 1
        return ServiceError(status, code, "a fault made on purpose (fault.*)", retry_after_s)

    def drops(self, number: int) -> bool:
        """Return whether the connection is closed in place of this answer."""
        return self._cuts("dropped", self.options.drop_every, number)

    def truncates(self, number: int) -> bool:
        """Return whether this answer ends in its middle."""
        return self._cuts("truncated", self.options.truncate_every, number)

    def _cuts(self, kind: str, every: int, number: int) -> bool:
        hit = number > self.options.after and self._hits(kind, every, number)
        if hit:
            self.made[kind] += 1
        return hit

    def _hits(self, kind: str, every: int, number: int) -> bool:
        return bool(every) and (number + zlib.crc32(f"{self.options.seed}/{kind}".encode())) % every == 0

    def identity(self, identity: str) -> str:
        """Return the identity that an answer states."""
        return f"{identity} (other)" if self.active and self.options.model else identity

    def values(self, values: np.ndarray, number: int, labelled_axis: int | None) -> np.ndarray:
        """Return the values of an answer. `labelled_axis`: the axis of its classes or prompts; None if it has none."""
        options = self.options
        if not self.active:
            return values
        if options.permute_labels and labelled_axis is not None:
            values = np.roll(values, 1, axis=labelled_axis)
            self.made["permuted"] += 1
        if options.jitter:
            noise = np.random.default_rng([options.seed, number]).normal(0, options.jitter, values.shape)
            values = (values + noise).astype(np.float32)
            self.made["jittered"] += 1
        return values
