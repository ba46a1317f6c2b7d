"""The rate at which a run sends: one limiter for all of its trials."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from pipeline.cards import Rate


class Pace:
    """Units per minute, evenly spread: after n units the next ones wait until n units' time has passed."""

    def __init__(self, per_minute: int | None) -> None:
        self.each_s = 0.0 if per_minute is None else 60 / per_minute
        self.free_at = 0.0

    def book(self, units: int, now: float) -> None:
        """Use units from now on."""
        self.free_at = max(now, self.free_at) + units * self.each_s

    def give_back(self, units: int) -> None:
        """Return units that were booked and not used."""
        self.free_at -= units * self.each_s


class Limiter:
    """Makes calls wait for their turn, first come first served. It is used in one event loop.

    Args:
        rate: the limits of the card.
        clock, sleep: replaced by tests.
    """

    def __init__(
        self,
        rate: Rate,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.requests, self.images = Pace(rate.requests_per_minute), Pace(rate.images_per_minute)
        self.tokens = Pace(rate.tokens_per_minute)
        self.clock, self.sleep = clock, sleep
        self.paused_until = 0.0
        self.turn = asyncio.Lock()

    async def take(self, images: int, tokens: int) -> float:
        """Wait until a call with these images and tokens may be sent; return the seconds waited."""
        began = self.clock()
        async with self.turn:
            while (wait_s := self._ready_at() - self.clock()) > 0:  # a pause may begin while it sleeps
                await self.sleep(wait_s)
            now = self.clock()
            for pace, units in ((self.requests, 1), (self.images, images), (self.tokens, tokens)):
                pace.book(units, now)
        return self.clock() - began

    def pause(self, seconds: float) -> None:
        """Send nothing for so many seconds: the server asked for it."""
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    def used(self, booked_tokens: int, tokens: int) -> None:
        """Correct a booking by the tokens that the server reports."""
        self.tokens.give_back(booked_tokens - tokens)

    def _ready_at(self) -> float:
        return max(self.paused_until, self.requests.free_at, self.images.free_at, self.tokens.free_at)
