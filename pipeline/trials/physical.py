"""Upper bounds of what trials send to a remote endpoint: HTTP calls, images, texts, bytes, tokens, money, time.

An image is sent once, since answers are recorded; a model that gives scores only is sent each image once for each
prompt set. The bounds follow from predicted bills and cards. They leave out calls that are repeated after an error, and
count what other sweeps have recorded as if it were not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from methods.base import Access, Bill
from pipeline.blackbox.client import BLOCK_BYTES
from pipeline.cards import MICRO, DatasetCard, HttpCard, Rate
from pipeline.config.compose import Config
from pipeline.remote.adapters import adapter_of
from pipeline.remote.asking import PROBE_EVERY
from pipeline.remote.http_client import TEXT_TOKENS
from pipeline.remote.probe import WORDS
from pipeline.trials.cells import Cell
from pipeline.trials.plan import shape_of
from pipeline.trials.protocol import TEST_BATCH, eval_cards

TEXT_BYTES = 256
"""Bytes of a text whose card states no `max_text`. It counts in `bytes` only."""
ENVELOPE_BYTES = 512
"""Most bytes of a call's body beside its images and texts, and of an image file beside its pixels."""


@dataclass(frozen=True)
class Sent:
    """What is sent at most."""

    calls: int = 0
    images: int = 0
    texts: int = 0
    tokens: int = 0
    bytes: int = 0
    micro_usd: int = 0
    """By the card's price table; 0 without one."""

    def __add__(self, other: Sent) -> Sent:
        return Sent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def hours(self, rate: Rate) -> float | None:
        """Return the time at the rate limits of a card; None without limits."""
        limits = (
            (self.calls, rate.requests_per_minute),
            (self.images, rate.images_per_minute),
            (self.tokens, rate.tokens_per_minute),
        )
        minutes = [amount / limit for amount, limit in limits if limit is not None]
        return max(minutes) / 60 if minutes else None


def total_sent(parts: Iterable[Sent]) -> Sent:
    """Return the sum."""
    return sum(parts, Sent())


class SendPlan:
    """Bounds for the trials of a sweep, in the order of its plan; nothing is sent by a run without network.

    For a model that gives features, an image is counted for the first trial that may send it: test images once, those
    of a few-shot draw once for all methods. Calls and texts are counted for every trial.

    Args:
        config: its model is of kind http.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.others = {} if config.protocol == "base_to_new" else eval_cards(config)
        self._counted: dict[tuple[Any, ...], int] = {}

    def trial(self, cell: Cell, bill: Bill) -> Sent:
        """Return what the next trial sends at most, with its predictions and its curve.

        Args:
            cell: the trial.
            bill: its predicted bill of adapt and validate.
        """
        config = self.config
        if config.offline:
            return Sent()
        makes, uses_views = Access.PIXELS in cell.choice.info.access, cell.choice.info.uses_views
        shape, counter = shape_of(config, cell.dataset, cell.shots, 1), _Counter(config, makes)
        if makes or (config.views == "fresh" and uses_views):  # images, or views, of its own in every step
            counter.add(bill, bill.images, bill.images)
        else:
            views = 0 if config.views == "fresh" else int(config.views)
            known = shape.n_train * (views + 1) + shape.n_val  # of the draw, with all views
            own = min(bill.images, known if uses_views else shape.n_train + shape.n_val)
            counter.add(bill, own, self._first(("draw", cell.dataset.name, cell.shots, cell.seed), own, known))
        for card in (cell.dataset, *(other for _, other in self.others.get(cell.dataset.name, ()))):
            n = card.test or card.val
            counter.predictions(card, n, 0 if makes else self._first(("test", card.name), n, n), 1 + config.curve)
        return counter.sent()

    def probes(self, calls: int) -> Sent:
        """Return what is sent to identify the model, before the first call and every `PROBE_EVERY` calls."""
        if self.config.offline:
            return Sent()
        counter = _Counter(self.config)
        for _ in range(1 + calls // PROBE_EVERY):
            counter.add(Bill(requests=3, images=4, prompts=len(WORDS)), 4, 4)
        if not counter.features:  # which have calls to spare
            counter.calls += 1  # the introduction
        return counter.sent()

    def _first(self, key: tuple[Any, ...], n: int, known: int) -> int:
        """Return how many of n images, some of `known` ones, are not counted for earlier trials at most."""
        before = self._counted.get(key, 0)
        self._counted[key] = min(known, before + n)
        return self._counted[key] - before


class _Counter:
    """Adds up what is sent for the calls of a trial; `makes`: whether its method makes images of its own."""

    def __init__(self, config: Config, makes: bool = False) -> None:
        assert config.model.http is not None
        self.http: HttpCard = config.model.http
        self.makes = makes
        adapter = adapter_of(config.model)
        self.features, self.whole = Access.FEATURES in config.model.access, adapter.whole_texts
        side = self.http.image.size
        self.image_bytes = (3 * side * side + side) * 4 // 3 + 2 * ENVELOPE_BYTES  # noise cannot be compressed
        fit = max(1, self.http.batch.bytes // self.image_bytes)
        fit = fit if fit >= self.http.batch.images else max(1, fit // 2)  # too large a call is halved
        self.most = min(self.http.batch.images, adapter.most_images or self.http.batch.images, fit)
        self.calls = self.images = self.texts = 0

    def add(self, bill: Bill, distinct: int, first: int) -> None:
        """Count calls with this bill. They use `distinct` images, of which `first` were not counted before."""
        sent_bytes = 3 * self.http.image.size**2 * bill.images if self.makes else 0
        blocks = bill.requests + 4 * bill.outputs // BLOCK_BYTES + sent_bytes // BLOCK_BYTES
        if self.features:
            self.images += first
            self.calls += first // self.most + min(blocks, distinct)
            self.texts += bill.prompts
            self.calls += min(bill.requests, bill.prompts)
            self.calls += 0 if self.whole else bill.prompts // self.http.batch.texts
            return
        calls = min(bill.images, bill.images // self.most + blocks)
        self.calls += calls
        self.images += bill.images
        self.texts += calls * -(-bill.prompts // max(1, bill.requests))

    def predictions(self, card: DatasetCard, n: int, first: int, times: int) -> None:
        """Count `times` predictions of n test images, of which `first` were not counted before."""
        sets = max(1, len(card.templates))
        batches = -(-n // TEST_BATCH)
        if self.features:
            passes = times if self.makes else 1  # images that a method makes are new in each prediction
            self.add(
                Bill(requests=passes * batches, images=passes * n), passes * n, passes * n if self.makes else first
            )
            self.add(Bill(requests=times * sets, prompts=times * sets * card.classes), 0, 0)
            return
        requests = times * sets * batches
        self.add(Bill(requests=requests, images=times * sets * n, prompts=requests * card.classes), n, first)

    def sent(self) -> Sent:
        """Return the sums, with their size and price."""
        http, price = self.http, self.http.price
        text = TEXT_BYTES if http.max_text is None else http.max_text
        tokens = self.texts * (text + TEXT_TOKENS) + self.images * (price.tokens_per_image if price else 0)
        size = self.images * self.image_bytes + self.texts * (text + TEXT_TOKENS) + self.calls * ENVELOPE_BYTES
        cost = price.micro_usd(self.calls, self.images, tokens) if price else 0
        if price and (price.usd_per_1k_tokens or not _whole(price.usd_per_request, price.usd_per_image)):
            cost += self.calls  # the price of each call is rounded up
        return Sent(self.calls, self.images, self.texts, tokens, size, cost)


def _whole(*prices: float) -> bool:
    """Return whether prices are whole numbers of micro-dollars."""
    return all(abs(price * MICRO - round(price * MICRO)) < 1e-6 for price in prices)
