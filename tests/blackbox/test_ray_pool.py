"""To which replica a trial's calls go, with replicas that are played: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from methods.base import Access, SoftPrompts
from pipeline.blackbox import client, ray_pool
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.ray_pool import RayPool
from pipeline.blackbox.ray_resources import replica_resources
from pipeline.blackbox.request import Request, Response
from pipeline.budget import Limits, Phase
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.errors import EndpointLost, QueueFull
from pipeline.ledger.ledger import Ledger

PLENTY = Limits(1_000, 100_000)


class Played:
    """A replica's handle: `remote` gives what `ray.get` then calls. It pays and computes as a replica does."""

    def __init__(self, alone: LocalPool, load: int = 0) -> None:
        self.alone, self.waiting = alone, load
        self.asked: list[Request] = []
        self.looked_at = 0
        self.refuses, self.dead = 0, False
        self.info = self._remote(lambda: alone.info)
        self.load = self._remote(self._load)
        self.send = self._remote(self._ask)

    def _remote(self, call: Callable[..., Any]) -> Any:
        def alive(*args: Any) -> Any:
            if self.dead:
                raise ActorDiedError
            return call(*args)

        return SimpleNamespace(remote=lambda *args: lambda: alive(*args))

    def _load(self) -> int:
        self.looked_at += 1
        return self.waiting

    def _ask(self, request: Request) -> Response | QueueFull:
        if self.refuses:
            self.refuses -= 1
            return QueueFull("busy")
        self.asked.append(request)
        answer = self.alone.send(request)
        return Response(answer.values, status=answer.status, load=self.waiting)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's two verbs, for handles that are played."""

    def wait(references: Sequence[Any], timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        return list(references), []

    monkeypatch.setattr(ray_pool, "ray", SimpleNamespace(get=lambda reference, timeout=None: reference(), wait=wait))
    monkeypatch.setattr(ray_pool.time, "sleep", lambda seconds: None)


@pytest.fixture
def alone(tmp_path: Path, fake: Endpoint) -> Iterator[LocalPool]:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.open_account("ceiling", Limits())
    ledger.reserve("s", "t", ["ceiling"], PLENTY)
    yield LocalPool(fake, ledger)
    assert ledger.verify() == []
    ledger.close()


@pytest.fixture
def images(icons: Source) -> Images:
    return Images.plain(icons, "test", icons.rows_of("test")[:12], "crop")


def at(pool: RayPool, replica: Played) -> None:
    """Where the pool is before it is asked, and that this one was busy when last heard of."""
    pool.current, pool.load = replica, replica.waiting


def box(pool: RayPool) -> MeteredBox:
    return MeteredBox(pool, "s", "t", Access.SOFT | Access.FEATURES | Access.SCORES, PLENTY)


def context(fake: Endpoint) -> SoftPrompts:
    return SoftPrompts(torch.zeros(2, 1, fake.info.token_dim), ("a", "b", "c"))


def test_a_pool_stays_where_nobody_else_is_served_and_looks_at_no_other(
    played: None, alone: LocalPool, fake: Endpoint
) -> None:
    replicas = [Played(alone) for _ in range(4)]
    pool = RayPool(replicas)
    at(pool, replicas[2])
    for _ in range(3):
        box(pool).text_features(context(fake))
    assert [len(r.asked) for r in replicas] == [0, 0, 3, 0]
    assert sum(r.looked_at for r in replicas) == 0


def test_a_pool_goes_to_the_less_busy_of_two_others_and_to_no_busier(
    played: None, alone: LocalPool, fake: Endpoint
) -> None:
    replicas = [Played(alone, load) for load in (5, 9, 3)]
    pool = RayPool(replicas)
    at(pool, replicas[0])
    calls = box(pool)
    calls.text_features(context(fake))
    assert pool.current is replicas[2] and [r.looked_at for r in replicas] == [0, 1, 1]
    replicas[0].waiting = 4
    calls.text_features(context(fake))
    assert pool.current is replicas[2], "both others are busier"
    replicas[1].waiting = 0
    calls.text_features(context(fake))
    assert [len(r.asked) for r in replicas] == [0, 1, 2]


def test_of_many_others_two_are_looked_at(played: None, alone: LocalPool, fake: Endpoint) -> None:
    replicas = [Played(alone, 5) for _ in range(9)]
    pool = RayPool(replicas)
    at(pool, replicas[0])
    box(pool).text_features(context(fake))
    assert sum(r.looked_at for r in replicas) == 2


def test_a_busy_replica_is_left_and_the_call_is_paid_once(played: None, alone: LocalPool, fake: Endpoint) -> None:
    busy, free = Played(alone), Played(alone)
    pool = RayPool([busy, free])
    at(pool, busy)
    busy.refuses = 1
    meter = box(pool)
    meter.text_features(context(fake))
    assert not busy.asked and len(free.asked) == 1
    assert alone.ledger.trial_bill("s", "t")[Phase.ADAPT] == meter.meter.bills[Phase.ADAPT]
    assert len(alone.ledger.charges("s", "t")) == 1


def test_a_single_busy_replica_is_asked_again_until_it_takes_the_call(
    played: None, alone: LocalPool, fake: Endpoint
) -> None:
    only = Played(alone)
    pool = RayPool([only])
    only.refuses = 20
    box(pool).text_features(context(fake))
    assert len(only.asked) == 1


def test_a_replica_that_stays_busy_is_given_up(
    played: None, alone: LocalPool, fake: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "RESPONSE_TIMEOUT_S", 0.0)
    only = Played(alone)
    pool = RayPool([only])
    only.refuses = 10**9
    with pytest.raises(QueueFull):
        box(pool).text_features(context(fake))
    assert alone.ledger.charges("s", "t") == []


def test_a_replica_that_dies_after_the_charge_is_left_and_the_call_is_paid_once(
    played: None, alone: LocalPool, fake: Endpoint
) -> None:
    first, other = Played(alone), Played(alone)
    pool = RayPool([first, other])
    at(pool, first)

    def pays_and_dies(request: Request) -> Response:
        first.dead = True
        alone.send(request)
        raise ActorDiedError

    first.send = SimpleNamespace(remote=lambda request: lambda: pays_and_dies(request))
    meter = box(pool)
    meter.text_features(context(fake))
    assert len(other.asked) == 1
    assert alone.ledger.trial_bill("s", "t") == meter.meter.bills, "and nothing under replay"


def test_replicas_that_are_all_gone_end_the_call(
    played: None, alone: LocalPool, fake: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = [Played(alone), Played(alone)]
    pool = RayPool(replicas)
    for replica in replicas:
        replica.dead = True
    monkeypatch.setattr(ray_pool, "FAILOVER_TIMEOUT_S", 0.0)
    with pytest.raises(EndpointLost, match="no replica responded"):
        box(pool).text_features(context(fake))


def test_the_blocks_of_one_call_go_to_one_replica_and_the_next_call_looks_around(
    played: None, alone: LocalPool, fake: Endpoint, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BLOCK_BYTES", 4 * 2 * 3 * 4)  # four rows of 2 prompt sets and 3 classes
    replicas = [Played(alone, 5), Played(alone, 7)]
    pool = RayPool(replicas)
    at(pool, replicas[0])
    calls = box(pool)
    blocks = calls.score_blocks(images, context(fake))
    next(blocks)
    replicas[1].waiting = 0
    assert len(list(blocks)) == 2
    assert [len(r.asked) for r in replicas] == [3, 0]
    calls.scores(images, context(fake))
    assert [len(r.asked) for r in replicas] == [3, 3]


def directory(replicas: list[Played]) -> Any:
    """An actor that returns the list as it is when it is asked."""
    return SimpleNamespace(replicas=SimpleNamespace(remote=lambda: lambda: tuple(replicas)))


def test_a_running_trial_uses_a_replica_that_was_added(played: None, alone: LocalPool, fake: Endpoint) -> None:
    first, added = Played(alone, 5), Played(alone)
    listed = [first]
    pool = RayPool([first], directory(listed))
    at(pool, first)
    calls = box(pool)
    calls.text_features(context(fake))
    listed.append(added)
    pool._next_refresh = 0.0
    calls.text_features(context(fake))
    calls.text_features(context(fake))
    assert [len(first.asked), len(added.asked)] == [1, 2]


def test_a_trial_leaves_a_replica_that_was_ended_for_one_that_it_did_not_know(
    played: None, alone: LocalPool, fake: Endpoint
) -> None:
    ended, started_later = Played(alone), Played(alone)
    pool = RayPool([ended], directory([started_later]))
    ended.dead = True
    meter = box(pool)
    meter.text_features(context(fake))
    assert pool.replicas == [started_later] and len(started_later.asked) == 1
    assert alone.ledger.trial_bill("s", "t") == meter.meter.bills, "paid once"


def test_a_replica_that_is_no_longer_listed_is_left_for_a_busier_one(
    played: None, alone: LocalPool, fake: Endpoint
) -> None:
    unlisted, other = Played(alone, 3), Played(alone, 5)
    pool = RayPool([unlisted, other], directory([other]))
    at(pool, unlisted)
    box(pool).text_features(context(fake))
    assert [len(unlisted.asked), len(other.asked)] == [0, 1]


@pytest.mark.parametrize("listing", [lambda: (), lambda: played_error()])
def test_a_list_that_was_lost_changes_nothing(played: None, alone: LocalPool, fake: Endpoint, listing: Any) -> None:
    replicas = [Played(alone, 5), Played(alone)]
    pool = RayPool(replicas, SimpleNamespace(replicas=SimpleNamespace(remote=lambda: listing)))
    at(pool, replicas[0])
    box(pool).text_features(context(fake))
    assert pool.replicas == replicas and len(replicas[1].asked) == 1


def played_error() -> None:
    raise ActorDiedError


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "each", "count", "share"),
    [
        ("auto", 8, 0, "auto", 4, 0),  # two threads each
        ("auto", 1, 0, "auto", 1, 0),
        ("auto", 8, 3, "auto", 3, 1),
        (2, 8, 1, "auto", 2, 0.5),
        (2, 8, 4, "auto", 2, 1),
        (5, 8, 0, "auto", 5, 0),
        ("auto", 0, 0, 1.0, 1, 1),
        ("auto", 8, 3, 1.0, 3, 1),
        ("auto", 8, 2, 0.3, 6, 0.3),
        (4, 0, 0, 0.5, 4, 0.5),
    ],
)
def test_replicas_take_the_gpus_that_there_are_else_the_cores(
    wanted: Any, cpus: int, gpus: int, each: Any, count: int, share: float
) -> None:
    assert replica_resources(wanted, {"CPU": cpus, "GPU": gpus}, threads=2, replica_gpus=each) == (count, share)
