"""How many replicas a run has while nodes come and go, with a cluster that is played: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from pipeline.blackbox import ray_replicas
from pipeline.blackbox.ray_replicas import AUTOSCALER_TIMEOUT_S, IDLE_S, SPREAD, Replicas
from pipeline.errors import CodeMismatch, ConfigError

LOADS: list[Any] = []
"""What `info` of each further replica returns or raises; None while it loads. After the last, they load at once."""


class Actor:
    """A replica's handle: `remote` gives a reference, which is a function that `ray.get` calls."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.info_is = strategy, LOADS.pop(0) if LOADS else "loaded"
        self.pending, self.idle_s, self.lost = 1, 0.0, False
        self.info = SimpleNamespace(remote=lambda: Reference(self, lambda: self.info_is))
        self.activity = SimpleNamespace(remote=lambda: Reference(self, lambda: (self.pending, self.idle_s)))


class Reference:
    def __init__(self, actor: Actor, result: Callable[[], Any]) -> None:
        self.actor, self.result = actor, result

    def get(self) -> Any:
        result = self.result()
        if isinstance(result, RayError):
            raise result
        return result


class Played:
    """A cluster: its nodes, the free GPUs, and what was killed and published."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, float]] = {}
        self.used, self.killed, self.published = 0.0, list[Actor](), list[tuple[Actor, ...]]()
        self.echoed: list[str] = []
        self.now = 0.0

    @property
    def gpus(self) -> float:
        return sum(node.get("GPU", 0) for node in self.nodes.values())

    def wait(self, references: Sequence[Reference], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.now += timeout
        ready = [r for r in references if not r.actor.lost and r.result() is not None]
        return ready, [r for r in references if r not in ready]

    def replicas(self, count: Any = "auto", gpus: float = 1.0, asks: bool = False, n: int = 0) -> Replicas:
        """The replicas of a run that starts with n of them; 0: as many as there is room for."""
        ledger = SimpleNamespace(set_replicas=SimpleNamespace(remote=self.published.append))
        made = Replicas(Actor, ledger, count, gpus, 2, asks, self.echoed.append)
        made.start(n or made._target)
        return made


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()

    def nodes() -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": has} for name, has in played.nodes.items()]

    fake = SimpleNamespace(
        wait=played.wait,
        get=lambda r, timeout=None: [one.get() for one in r] if isinstance(r, list) else r.get(),
        kill=played.killed.append,
        nodes=nodes,
        cluster_resources=lambda: {"GPU": played.gpus},
        available_resources=lambda: {"GPU": played.gpus - played.used},
    )
    monkeypatch.setattr(ray_replicas, "ray", fake)
    monkeypatch.setattr(ray_replicas.time, "monotonic", lambda: played.now)
    monkeypatch.setattr(ray_replicas, "NodeAffinitySchedulingStrategy", lambda node, soft: (node, soft))
    LOADS.clear()
    return played


def test_each_gpu_that_joins_gets_a_replica_which_serves_once_it_has_loaded(cluster: Played) -> None:
    cluster.nodes["a"] = {"CPU": 8, "GPU": 1}
    replicas = cluster.replicas()
    cluster.used = 1
    replicas.adapt(cluster.echoed.append)
    assert [len(r) for r in cluster.published] == [1] and not cluster.echoed, "nothing joined"
    cluster.nodes["b"] = {"CPU": 8, "GPU": 2}
    LOADS.extend([None, None])
    replicas.adapt(cluster.echoed.append)
    replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 1 and len(replicas._loading) == 2
    for actor in replicas._loading.values():
        actor.info_is = "loaded"
    replicas.adapt(cluster.echoed.append)
    assert len(cluster.published[-1]) == 3 and {a.strategy for a in cluster.published[-1]} == {SPREAD}


def test_a_gpu_of_another_job_is_used_once_it_is_free_and_not_waited_for(cluster: Played) -> None:
    cluster.nodes["a"] = {"GPU": 1}
    replicas = cluster.replicas()
    cluster.nodes["b"], cluster.used = {"GPU": 2}, 3
    replicas.adapt(cluster.echoed.append)
    assert not replicas._loading, "a replica that waits would make the autoscaler start a node"
    cluster.used = 2
    replicas.adapt(cluster.echoed.append)
    replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 2


def test_a_lost_replica_takes_the_gpu_of_the_node_that_replaces_its_own(cluster: Played) -> None:
    cluster.nodes = {"a": {"GPU": 1}, "b": {"GPU": 1}}
    replicas = cluster.replicas()
    del cluster.nodes["b"]
    replicas.loaded[1].lost = True
    replicas.adapt(cluster.echoed.append)
    cluster.nodes["c"] = {"GPU": 1}
    replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 2 and not replicas._loading and not cluster.echoed


def test_without_gpus_the_cores_that_join_count_and_their_node_gets_the_replicas(cluster: Played) -> None:
    cluster.nodes["a"] = {"CPU": 5}
    replicas = cluster.replicas(gpus=0)
    assert len(replicas.loaded) == 2
    cluster.nodes |= {"b": {"CPU": 3}, "c": {"CPU": 64, "GPU": 8}}
    replicas.adapt(cluster.echoed.append)
    replicas.adapt(cluster.echoed.append)
    assert [a.strategy for a in replicas.loaded] == [SPREAD, SPREAD, ("b", True), ("b", True)]


def test_a_node_that_comes_back_gets_replicas_in_place_of_those_that_were_ended_meanwhile(cluster: Played) -> None:
    cluster.nodes = {"a": {"CPU": 4}, "b": {"CPU": 4}}
    replicas = cluster.replicas(gpus=0)
    del cluster.nodes["b"]
    replicas.adapt(cluster.echoed.append)
    for actor in replicas.loaded[2:]:
        actor.idle_s = IDLE_S
    replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 2
    cluster.nodes["b"] = {"CPU": 4}
    replicas.adapt(cluster.echoed.append)
    replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 4


def test_an_idle_replica_is_ended_while_another_serves(cluster: Played) -> None:
    cluster.nodes["a"] = {"GPU": 3}
    replicas = cluster.replicas()
    busy, idle, lost = replicas.loaded
    for actor in (busy, idle):
        actor.pending, actor.idle_s = 0, IDLE_S
    lost.lost, lost.idle_s = True, IDLE_S
    replicas.adapt(cluster.echoed.append)
    assert not cluster.killed, "no replica serves"
    busy.idle_s = IDLE_S - 1
    replicas.adapt(cluster.echoed.append)
    assert cluster.killed == [idle] and cluster.published[-1] == (busy, lost)
    cluster.used = 2
    replicas.adapt(cluster.echoed.append)
    assert not replicas._loading, "its GPU is left to others"
    lost.lost = False
    busy.idle_s = lost.idle_s
    replicas.adapt(cluster.echoed.append)
    assert cluster.killed == [idle], "never the last ones"


def test_an_ended_replica_comes_back_when_requests_wait_at_all_others_or_a_gpu_joins(cluster: Played) -> None:
    cluster.nodes = {"a": {"GPU": 1}, "b": {"GPU": 1}, "c": {"GPU": 1}}
    replicas = cluster.replicas()
    busy, *idle = replicas.loaded
    for actor in idle:
        actor.idle_s = IDLE_S
    replicas.adapt(cluster.echoed.append)
    assert replicas.loaded == (busy,)
    cluster.used, busy.pending = 1, 2
    replicas.adapt(cluster.echoed.append)
    busy.pending = 1
    replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 2
    del cluster.nodes["c"]
    replicas.adapt(cluster.echoed.append)
    cluster.nodes["d"], cluster.used = {"GPU": 1}, 2
    replicas.adapt(cluster.echoed.append)
    replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 3


def test_a_replica_that_cannot_start_is_named_once_and_one_whose_node_died_is_waited_for(cluster: Played) -> None:
    cluster.nodes["a"] = {"GPU": 1}
    replicas = cluster.replicas()
    cluster.nodes["b"] = {"GPU": 2}
    LOADS.extend([CodeMismatch("a worker imports other code"), ActorUnavailableError("restarting", None)])
    replicas.adapt(cluster.echoed.append)
    for _ in range(3):
        replicas.adapt(cluster.echoed.append)
    assert len(cluster.killed) == 1 and len(replicas.loaded) == 1 and len(replicas._loading) == 1
    assert len([line for line in cluster.echoed if "other code" in line]) == 1
    next(iter(replicas._loading.values())).info_is = "loaded"
    replicas.adapt(cluster.echoed.append)
    for actor in replicas.loaded:
        actor.pending = 9
    for _ in range(3):
        replicas.adapt(cluster.echoed.append)
    assert len(replicas.loaded) == 2 and not replicas._loading, "the place of the failed one is not tried again"


def test_replicas_that_ask_for_gpus_wait_for_the_first_and_take_in_the_others_later(cluster: Played) -> None:
    LOADS.extend([None, None])
    wait = cluster.wait

    def joining(*args: Any, **kwargs: Any) -> Any:
        if cluster.now >= 20:
            cluster.nodes["a"] = {"GPU": 1}
            references[0].actor.info_is = "loaded"
        references[:] = args[0]
        return wait(*args, **kwargs)

    references: list[Reference] = []
    ray_replicas.ray.wait = joining  # type: ignore[assignment]
    replicas = cluster.replicas(2, 1.0, asks=True)
    assert len(replicas.loaded) == 1 and len(replicas._loading) == 1
    assert cluster.echoed and all("waiting for the first replica: 2 need 1 GPU each" in s for s in cluster.echoed)
    assert len(cluster.echoed) == 3, "at once, then every ten seconds"


def test_the_wait_for_an_autoscaler_ends_with_a_reason(cluster: Played) -> None:
    LOADS.append(None)
    with pytest.raises(ConfigError, match=r"waited 3600 s for a replica with 1 GPU \(the cluster has 0\)"):
        cluster.replicas("auto", 1.0, asks=True)
    assert cluster.now >= AUTOSCALER_TIMEOUT_S


def test_an_error_of_a_first_replica_ends_the_run(cluster: Played) -> None:
    LOADS.append(ActorDiedError())
    with pytest.raises(ConfigError, match="the endpoint did not start"):
        cluster.replicas("auto", 1.0, asks=True)
