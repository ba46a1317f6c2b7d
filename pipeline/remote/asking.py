"""Answer from the records, and ask a remote endpoint for what is missing: in batches, several at once, each item once.

It is used in one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np

from methods.base import Access
from pipeline.cards import ModelCard
from pipeline.errors import EndpointBusy, EndpointLost, EndpointRefused, EndpointStopped, StorageError
from pipeline.remote import probe
from pipeline.remote.adapter import Adapter, Call
from pipeline.remote.call_log import PROBES
from pipeline.remote.http_client import HttpClient, Payer, TooLarge
from pipeline.remote.pictures import encoded
from pipeline.remote.records import Answers, Records

T = TypeVar("T")

PROBE_EVERY = 1_000
"""Calls after which the endpoint is identified again."""


@dataclass(frozen=True)
class Items:
    """Images or texts of a request."""

    keys: list[str]
    """Under which their answers are recorded; equal keys have equal answers."""
    call_of: Callable[[Sequence[int]], Awaitable[Call]]
    """Makes the call for some of them, by their indices."""
    most: int
    """How many are asked for in a call."""
    name: Callable[[int], str]
    """Describes one for messages."""
    unit: str
    """images or texts."""
    whole: bool = False
    """Whether they cannot be asked for in parts."""


class Asker:
    """Answers items of requests by their keys.

    Args:
        card: the model's card.
        adapter, client: of the endpoint.
        records: its recorded answers.
        offline: answer from the records only.
    """

    def __init__(self, card: ModelCard, adapter: Adapter, client: HttpClient, records: Records, offline: bool) -> None:
        assert card.http is not None
        self.card, self.grant = card.http, card.access
        self.adapter, self.client, self.records, self.offline = adapter, client, records, offline
        self.connections = asyncio.Semaphore(self.card.rate.at_once)
        self.identifying = asyncio.Lock()
        self.identified_at: int | None = None
        """Calls that had been sent when the endpoint was identified last; None: it was not yet."""

    async def rows(self, answers: Answers, items: Items, payer: Payer) -> tuple[np.ndarray, int]:
        """Return the answers to items as rows, and how many were asked for.

        Args:
            answers: where they are recorded.
            items: what is asked for.
            payer: for what calls are sent.

        Raises:
            FareboxError: see `HttpClient.send`. Answers that were received are recorded all the same.
            StorageError: what was recorded cannot be read; it is not asked for again.
        """
        keys, asked = items.keys, set[str]()
        while True:
            rows, missing = answers.read(keys)
            if not missing:
                return rows, len(asked)
            first = {keys[i]: i for i in reversed(missing)}
            if unread := asked & first.keys():
                raise StorageError(f"{len(unread)} recorded answers cannot be read again from {self.records.folder}")
            if self.offline:
                raise EndpointRefused(
                    f"offline: answers to {len(first)} of {len(set(keys))} {items.unit} are not recorded, the first "
                    f"is {items.name(missing[0])}: run with offline=false to ask {self.card.host}"
                )
            others = [answers.in_flight[key] for key in first if key in answers.in_flight]
            new = sorted(i for key, i in first.items() if key not in answers.in_flight)
            tasks = []
            for part in _parts(new, items.most):
                task = asyncio.create_task(self._ask(answers, items, part, payer))
                answers.in_flight |= {keys[i]: task for i in part}
                tasks.append(task)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            asked |= {keys[i] for i in new}
            if errors := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
                raise _gravest(errors)
            await asyncio.gather(*others, return_exceptions=True)  # of other requests: if they fail, ask for them here

    async def _ask(self, answers: Answers, items: Items, part: Sequence[int], payer: Payer) -> None:
        try:
            async with self.connections:
                await self._identify()
                await self._record(answers, items, part, payer, halve=not items.whole)
        finally:
            for i in part:
                answers.in_flight.pop(items.keys[i], None)

    async def _record(self, answers: Answers, items: Items, part: Sequence[int], payer: Payer, halve: bool) -> None:
        """Ask for a part of the items and record the answers; in two halves if the server finds it too large."""
        try:
            rows = await self.client.send(await items.call_of(part), payer)
        except TooLarge as error:
            if not halve or len(part) < 2:
                raise TooLarge(f"{error}; the first is {items.name(part[0])}") from None
            middle = len(part) // 2
            for half in (part[:middle], part[middle:]):
                await self._record(answers, items, half, payer, halve=not error.sent)
            return
        except EndpointRefused as error:
            raise EndpointRefused(f"{error}; the first is {items.name(part[0])}") from None
        answers.add([items.keys[i] for i in part], rows)

    async def _identify(self) -> None:
        """Verify which model answers, before the first call and every `PROBE_EVERY` calls.

        Raises:
            EndpointStopped: it is not the one that the card states, or that gave the recorded answers; or it did not
                answer or refused the first calls of the run, so that each trial would ask for nothing.
        """
        async with self.identifying:
            due = self.identified_at is None or self.client.sent - self.identified_at >= PROBE_EVERY
            if not due:
                return
            try:
                if self.identified_at is None and (introduction := self.adapter.introduction()):
                    await self.client.send(introduction, Payer(PROBES))
                self._compare(probe.fingerprint(await self._probe()))
            except EndpointStopped as error:
                self.client.stopped = error
                raise
            except (EndpointBusy, EndpointLost, EndpointRefused) as error:
                if self.identified_at is None:
                    self.client.stopped = EndpointStopped(str(error))
                    raise self.client.stopped from error
                raise
            self.identified_at = self.client.sent

    async def _probe(self) -> np.ndarray:
        """Return the cosines or probabilities [4, 4] of the probes."""
        images = [encoded(picture, self.card.image.format) for picture in probe.pictures(self.card.image.size)]
        most, payer = self.card.batch.images, Payer(PROBES)
        parts = _parts(images, min(most, self.adapter.most_images or most))
        if Access.FEATURES in self.grant:
            features = [await self.client.send(self.adapter.image_features(part), payer) for part in parts]
            words = _parts(probe.WORDS, len(probe.WORDS) if self.adapter.whole_texts else self.card.batch.texts)
            texts = [await self.client.send(self.adapter.text_features([part]), payer) for part in words]
            return np.concatenate(features) @ np.concatenate(texts).T
        scores = [await self.client.send(self.adapter.scores(part, probe.WORDS), payer) for part in parts]
        return _softmax(np.concatenate(scores))

    def _compare(self, found: str) -> None:
        stated, recorded = self.card.identity.probe, self.records.identity()
        expected = stated or (recorded["fingerprint"] if recorded else "")
        if expected and not probe.same_model(found, expected):
            since = recorded["created"][:10] if recorded else ""
            whose = "identity.probe of its card" if stated else f"the answers recorded since {since}"
            raise EndpointStopped(
                f"{self.card.host}: another model: its answers to the probes differ by "
                f"{probe.difference(found, expected):.3f} from {whose}; it is {found}"
            )
        if recorded is None:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            self.records.write_identity({"fingerprint": found, "created": created})


def _parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Return items in parts of at most so many."""
    return [items[start : start + most] for start in range(0, len(items), most)]


def _softmax(scores_BC: np.ndarray) -> np.ndarray:
    values_BC = np.exp(scores_BC - scores_BC.max(axis=1, keepdims=True))
    return values_BC / values_BC.sum(axis=1, keepdims=True)


def _gravest(errors: Sequence[BaseException]) -> BaseException:
    """Return the error that decides what happens to the charge and to the run."""
    for kind in (StorageError, EndpointStopped, EndpointLost):
        if found := [error for error in errors if isinstance(error, kind)]:
            return found[0]
    return errors[0]
