"""A cluster of several nodes, simulated on one machine: nodes join, one dies, and replicas follow.

Ray is configured to notice a lost node after a second; by default it takes some 16 s. A killed node refuses its checks
at once; one that is slow to respond is not lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.files import read_sealed_json
from pipeline.results.store import ResultStore
from tests.faults.points import SLOW, Faults
from tests.support.command import Running, below, charges, here, ledger_record
from tests.support.lab import Lab, outcome

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

QUICK = {"health_check_period_ms": 300, "health_check_timeout_ms": 10_000, "health_check_failure_threshold": 3}
HEAD = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "_system_config": QUICK}
TRIAL = "ray::ResourceTrainable"
"""Title of a worker of trials."""
METHODS = "methods=[craft]"
WORDS = ("shots=[2]", "seeds=[1,2]", "views=3", "budget.requests=1000", "method.craft.popsize=6")
IDLE_S = 8.0
MODULE = "pipeline.blackbox.ray_replicas"
KEEP = {"name": "keep", "module": MODULE, "function": "Replicas._end_idle", "returns": 0}
"""While it is on, no idle replica is ended: a replica may start long before the trial that will use it."""


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    """A slow endpoint, while that is on: the sweep lasts until the nodes have come and gone."""
    idle = {"module": MODULE, "constant": "IDLE_S", "value": IDLE_S}
    return Faults(tmp_path / "marks", tmp_path / "sweep").add(SLOW | {"seconds": 1.0}).add(KEEP).add(idle)


@pytest.fixture
def cluster(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without a core; the test adds nodes with a core and a simulated GPU each. All have the faults."""
    for name, value in faults.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1,-2")  # two by Ray's count, none by torch's
    made = Cluster(initialize_head=True, head_node_args=HEAD)
    yield made
    made.shutdown()


def on(node: Any, title: str) -> list[int]:
    """Processes of a node with such a title."""
    return below({process.process.pid for of_kind in node.all_processes.values() for process in of_kind}, title)


def open_requests(storage: Path) -> list[int | None]:
    """Open requests at each replica that the trials know, as the driver tells."""
    with contextlib.suppress(FileNotFoundError):
        loads: list[int | None] = read_sealed_json(storage / "status.json")["replicas"]
        return loads
    return []


def test_rows_are_those_of_an_undisturbed_run_while_nodes_join_die_and_replicas_are_released(
    cluster: Cluster, faults: Faults, lab: Lab, tmp_path: Path
) -> None:
    storage, printed = tmp_path / "sweep", tmp_path / "printed"
    words = ("run", "sweep=smoke", "model=fake", f"datasets=[{lab.card}]", METHODS, *WORDS, "replica_gpus=1")
    faults.on("slow", "keep")
    with printed.open("w") as output:
        run = Running(*words, f"storage={storage}", f"address={cluster.address}", "checkpoint_s=0.3", output=output)
    waits = "waiting for the first replica: 1 need 1 GPU each, and the cluster has 0"
    run.wait_for(lambda: waits in printed.read_text(), "the run waits for a node")

    first, began = cluster.add_node(num_cpus=1, num_gpus=1), time.monotonic()
    run.wait_for(lambda: charges(storage) > 3, "charges")
    started = time.monotonic() - began
    assert len(on(first, "ray::Replica")) == 1 and not on(cluster.head_node, "ray::Replica")
    dying, began = cluster.add_node(num_cpus=1, num_gpus=1), time.monotonic()
    run.wait_for(lambda: len(open_requests(storage)) == 2 and all(open_requests(storage)), "both replicas serve")
    served = time.monotonic() - began
    run.wait_for(lambda: on(dying, TRIAL), "a trial beside the new replica")

    cluster.remove_node(dying, allow_graceful=False)
    died, paid = time.monotonic(), charges(storage)
    run.wait_for(lambda: charges(storage) > paid + 3, "charges after the node's death")
    went_on = time.monotonic() - died

    joined, began = cluster.add_node(num_cpus=1, num_gpus=2), time.monotonic()
    run.wait_for(lambda: on(joined, "ray::Replica"), "the lost replica on the new node")
    back = time.monotonic() - began
    run.wait_for(lambda: on(joined, TRIAL), "a trial on the new node")
    used = time.monotonic() - began
    run.wait_for(lambda: len(open_requests(storage)) == 3, "a replica on each GPU")
    run.wait_for(lambda: sum(map(bool, open_requests(storage))) == 2, "both trials ask")
    faults.on("slow")
    began = time.monotonic()
    run.wait_for(lambda: len(open_requests(storage)) == 2, "two trials need two replicas")
    released = time.monotonic() - began
    run.wait_for(lambda: len(on(first, "ray::Replica") + on(joined, "ray::Replica")) == 2, "its process has ended")
    faults.on()
    code, _, _ = run.end()
    text = printed.read_text()
    assert code == 0 and "Traceback" not in text, text
    assert f"replicas ended after {IDLE_S:g} s without a request: 1; 2 are left" in text
    print(f"first charges {started:.1f} s and a second replica in use {served:.1f} s after its node joined; went on")
    print(f"{went_on:.1f} s after the kill; replica back {back:.1f} s, a trial {used:.1f} s after the join;", end=" ")
    print(f"idle one released after {released:.1f} s")

    specs = lab.plan(METHODS, *WORDS).trials
    wanted = {row.trial_id: outcome(row) for spec in specs for row in lab.run(spec)}
    found = {spec.trial_id: outcome(row) for spec in specs for row in ResultStore(storage).rows_of(spec.trial_id)}
    assert found == wanted
    here("ledger", f"storage={storage}")
    assert ledger_record(storage)["phases"]["replay"]["requests"] == 0
    assert ledger_record(storage)["open_trials"] == 0
