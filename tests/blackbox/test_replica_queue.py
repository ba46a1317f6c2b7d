"""A replica's queue, without Ray: one charge call for all that wait, responses only when paid, nothing that grows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods.base import Bill, TextPrompts
from pipeline.blackbox import replica_queue
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.ray_resources import gpu_share
from pipeline.blackbox.replica_queue import MAX_BUFFERED, ReplicaQueue
from pipeline.blackbox.request import Request, Response
from pipeline.budget import Phase
from pipeline.cards import ModelCard
from pipeline.errors import BudgetExceeded, EndpointLost, EndpointRefused, LedgerError, QueueFull
from pipeline.ledger.records import Charge, Receipt


class Device(Endpoint):
    """Counts what it computes; refuses the prompt `bad`."""

    def __init__(self, card: ModelCard, folder: Path) -> None:
        super().__init__(card, folder)
        self.computed: list[int] = []
        self.enough = threading.Event()
        self.together = threading.Barrier(3)

    def compute(self, request: Request) -> Response:
        assert isinstance(request.prompts, TextPrompts)
        if request.prompts.texts == (("bad",),):
            raise EndpointRefused("bad")
        if request.prompts.texts == (("lost",),):
            raise EndpointLost("lost")
        if request.prompts.texts == (("together",),):
            self.together.wait(20)
        self.computed.append(request.charge.call)
        if len(self.computed) == MAX_BUFFERED:
            self.enough.set()
        return Response(np.zeros(1, np.float32))


class FakeLedger:
    """A ledger that responses when it is let, and remembers what it was sent."""

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


def request(call: int, text: str = "a") -> Request:
    return Request("text_features", None, TextPrompts(((text,),)), Charge("s", "t", call, "d", Phase.ADAPT, Bill(1)))


Scenario = Callable[[ReplicaQueue, FakeLedger, Device], Awaitable[Any]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    def run(scenario: Scenario, remote: int = 0) -> Any:
        async def whole() -> Any:
            ledger = FakeLedger()
            queue = ReplicaQueue(ledger.charge, ledger.refund, 1, remote)
            await queue.start(Device, ModelCard(name="fake", kind="fake"), tmp_path)
            device = queue.endpoint
            assert isinstance(device, Device)
            return await asyncio.wait_for(scenario(queue, ledger, device), 30)

        return asyncio.run(whole())

    return run


def test_requests_that_come_together_are_charged_in_one_call(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        responses = await asyncio.gather(*(queue.send(request(i)) for i in range(8)))
        assert ledger.sent == [list(range(8))]
        assert device.computed == list(range(8))
        assert [a.status for a in responses if isinstance(a, Response)] == ["charged"] * 8
        assert sorted(a.load for a in responses if isinstance(a, Response)) == list(range(8))

    run(scenario)


def test_a_queue_is_idle_since_its_last_request_ended(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        await asyncio.sleep(0.2)
        started = queue.idle_s
        ledger.open.clear()
        task = asyncio.create_task(queue.send(request(1)))
        await asyncio.sleep(0.1)
        assert started >= 0.2 and queue.idle_s == 0
        ledger.open.set()
        await task
        assert queue.idle_s < 0.2

    run(scenario)


def test_a_remote_endpoint_computes_several_requests_at_once_each_after_its_charge(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        ledger.refused = {7}
        ledger.open.clear()
        tasks = [asyncio.create_task(queue.send(request(i, "together"))) for i in (1, 2, 3)]
        refused = asyncio.create_task(queue.send(request(7)))
        await asyncio.sleep(0.1)
        assert device.computed == [] and not device.together.n_waiting
        ledger.open.set()
        assert all(isinstance(response, Response) for response in await asyncio.gather(*tasks))
        assert isinstance(await refused, BudgetExceeded) and sorted(device.computed) == [1, 2, 3]

    run(scenario, remote=3)


def test_the_charge_of_a_call_with_an_unknown_outcome_stays(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        lost, bad = await asyncio.gather(queue.send(request(1, "lost")), queue.send(request(2, "bad")))
        assert isinstance(lost, EndpointLost) and isinstance(bad, EndpointRefused)
        assert ledger.refunded == ["s/t/2/d"]

    run(scenario)


def test_an_unpaid_answer_does_not_leave_and_few_are_computed_ahead(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        ledger.open.clear()
        tasks = [asyncio.create_task(queue.send(request(i))) for i in range(5)]
        await asyncio.get_running_loop().run_in_executor(None, device.enough.wait, 20)
        await asyncio.sleep(0.1)
        assert device.computed == list(range(MAX_BUFFERED))
        assert not any(task.done() for task in tasks)
        ledger.open.set()
        assert all(isinstance(response, Response) for response in await asyncio.gather(*tasks))
        assert device.computed == list(range(5))

    run(scenario)


def test_what_is_refused_while_it_waits_is_not_computed(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        ledger.refused = {4}
        async with queue.slots, queue.slots:  # others are being answered
            task = asyncio.create_task(queue.send(request(4)))
            while not ledger.sent:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert isinstance(await task, BudgetExceeded)
        assert device.computed == []

    run(scenario)


def test_one_wrong_charge_fails_alone(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        ledger.wrong = {1}
        responses = await asyncio.gather(*(queue.send(request(i)) for i in range(3)))
        assert [type(a) for a in responses] == [Response, LedgerError, Response]
        assert ledger.sent == [[0, 1, 2], [0], [1], [2]]

    run(scenario)


def test_money_goes_back_for_what_was_not_computed_only(run: Callable[..., Any]) -> None:
    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        bad, good = await asyncio.gather(queue.send(request(0, "bad")), queue.send(request(1)))
        assert isinstance(bad, EndpointRefused) and isinstance(good, Response)
        assert ledger.refunded == [request(0).charge.id]

    run(scenario)


def test_a_full_replica_says_so_and_charges_nothing(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_queue, "MAX_QUEUED", 3)

    async def scenario(queue: ReplicaQueue, ledger: FakeLedger, device: Device) -> None:
        responses = await asyncio.gather(*(queue.send(request(i)) for i in range(5)))
        assert [type(a) for a in responses] == [Response] * 3 + [QueueFull] * 2
        assert ledger.sent == [[0, 1, 2]]
        assert isinstance(await queue.send(request(5)), Response)

    run(scenario)


@pytest.mark.parametrize(("gpus", "replicas", "each"), [(0, 2, 0), (2, 1, 1), (2, 2, 1), (2, 3, 0.5), (1, 3, 0.3333)])
def test_every_replica_finds_its_part_of_one_gpu(gpus: int, replicas: int, each: float) -> None:
    share = gpu_share(gpus, replicas)
    assert share == each
    if gpus:
        assert gpus * int(1 / share) >= replicas
