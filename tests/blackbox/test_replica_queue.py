"""A replica's queue, without Ray: one charge call for all that wait, answers only when paid, nothing that grows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods.base import Bill, TextPrompts
from pipeline.blackbox import replica_queue as serving
from pipeline.blackbox.endpoint import Endpoint, Request, Response
from pipeline.blackbox.ray_pool import gpu_share
from pipeline.blackbox.replica_queue import MAX_BUFFERED, Server
from pipeline.budget import Charge, Phase, Receipt
from pipeline.cards import ModelCard
from pipeline.errors import BudgetExceeded, EndpointBusy, EndpointRefused, LedgerError


class Device(Endpoint):
    """Counts what it computes; refuses the prompt `bad`."""

    def __init__(self, card: ModelCard, folder: Path) -> None:
        super().__init__(card, folder)
        self.computed: list[int] = []
        self.enough = threading.Event()

    def compute(self, request: Request) -> Response:
        assert isinstance(request.prompts, TextPrompts)
        if request.prompts.texts == (("bad",),):
            raise EndpointRefused("bad")
        self.computed.append(request.charge.call)
        if len(self.computed) == MAX_BUFFERED:
            self.enough.set()
        return Response(np.zeros(1, np.float32))


class Books:
    """A ledger that answers when it is let, and remembers what it was sent."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.refunded: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.refused: set[int] = set()
        self.wrong: set[int] = set()

    async def charge(self, charges: list[Charge]) -> Sequence[Receipt | BudgetExceeded]:
        self.sent.append([c.call for c in charges])
        await self.open.wait()
        if self.wrong & {c.call for c in charges}:
            raise LedgerError("wrong")
        return [
            BudgetExceeded("a", "requests", 1, 1, 1) if c.call in self.refused else Receipt(c.id, "charged")
            for c in charges
        ]

    async def refund(self, ids: list[str]) -> None:
        self.refunded += ids


def asked(call: int, text: str = "a") -> Request:
    return Request("text_features", None, TextPrompts(((text,),)), Charge("s", "t", call, "d", Phase.ADAPT, Bill(1)))


Play = Callable[[Server, Books, Device], Awaitable[Any]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Play], Any]:
    def run(scene: Play) -> Any:
        async def whole() -> Any:
            books = Books()
            server = Server(books.charge, books.refund, 1)
            await server.load(Device, ModelCard(name="fake", kind="fake"), tmp_path)
            device = server.endpoint
            assert isinstance(device, Device)
            return await asyncio.wait_for(scene(server, books, device), 30)

        return asyncio.run(whole())

    return run


def test_requests_that_come_together_are_charged_in_one_call(play: Callable[[Play], Any]) -> None:
    async def scene(server: Server, books: Books, device: Device) -> None:
        answers = await asyncio.gather(*(server.send(asked(i)) for i in range(8)))
        assert books.sent == [list(range(8))]
        assert device.computed == list(range(8))
        assert [a.status for a in answers if isinstance(a, Response)] == ["charged"] * 8
        assert sorted(a.load for a in answers if isinstance(a, Response)) == list(range(8))

    play(scene)


def test_an_unpaid_answer_does_not_leave_and_few_are_computed_ahead(play: Callable[[Play], Any]) -> None:
    async def scene(server: Server, books: Books, device: Device) -> None:
        books.open.clear()
        tasks = [asyncio.create_task(server.send(asked(i))) for i in range(5)]
        await asyncio.get_running_loop().run_in_executor(None, device.enough.wait, 20)
        await asyncio.sleep(0.1)
        assert device.computed == list(range(MAX_BUFFERED))
        assert not any(task.done() for task in tasks)
        books.open.set()
        assert all(isinstance(answer, Response) for answer in await asyncio.gather(*tasks))
        assert device.computed == list(range(5))

    play(scene)


def test_what_is_refused_while_it_waits_is_not_computed(play: Callable[[Play], Any]) -> None:
    async def scene(server: Server, books: Books, device: Device) -> None:
        books.refused = {4}
        async with server.held, server.held:  # others are being answered
            task = asyncio.create_task(server.send(asked(4)))
            while not books.sent:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert isinstance(await task, BudgetExceeded)
        assert device.computed == []

    play(scene)


def test_one_wrong_charge_fails_alone(play: Callable[[Play], Any]) -> None:
    async def scene(server: Server, books: Books, device: Device) -> None:
        books.wrong = {1}
        answers = await asyncio.gather(*(server.send(asked(i)) for i in range(3)))
        assert [type(a) for a in answers] == [Response, LedgerError, Response]
        assert books.sent == [[0, 1, 2], [0], [1], [2]]

    play(scene)


def test_money_goes_back_for_what_was_not_computed_only(play: Callable[[Play], Any]) -> None:
    async def scene(server: Server, books: Books, device: Device) -> None:
        bad, good = await asyncio.gather(server.send(asked(0, "bad")), server.send(asked(1)))
        assert isinstance(bad, EndpointRefused) and isinstance(good, Response)
        assert books.refunded == [asked(0).charge.id]

    play(scene)


def test_a_full_replica_says_so_and_charges_nothing(
    play: Callable[[Play], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_QUEUED", 3)

    async def scene(server: Server, books: Books, device: Device) -> None:
        answers = await asyncio.gather(*(server.send(asked(i)) for i in range(5)))
        assert [type(a) for a in answers] == [Response] * 3 + [EndpointBusy] * 2
        assert books.sent == [[0, 1, 2]]
        assert isinstance(await server.send(asked(5)), Response)

    play(scene)


@pytest.mark.parametrize(("gpus", "replicas", "each"), [(0, 2, 0), (2, 1, 1), (2, 2, 1), (2, 3, 0.5), (1, 3, 0.3333)])
def test_every_replica_finds_its_part_of_one_gpu(gpus: int, replicas: int, each: float) -> None:
    share = gpu_share(gpus, replicas)
    assert share == each
    if gpus:
        assert gpus * int(1 / share) >= replicas
