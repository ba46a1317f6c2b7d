"""A cluster of several nodes, simulated on one machine: replicas spread, a node dies, another joins and is used.

Ray is configured to notice a lost node after a second; by default it takes some 16 s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.results.store import ResultStore
from tests.faults.points import SLOW, Faults
from tests.support.command import Running, below, charges, here, ledger_record
from tests.support.lab import Lab, outcome

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

QUICK = {"health_check_period_ms": 300, "health_check_timeout_ms": 300, "health_check_failure_threshold": 3}
HEAD = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "_system_config": QUICK}
TRIAL = "ray::ResourceTrainable"
"""Title of a worker of trials."""
METHODS = "methods=[craft]"
WORDS = ("shots=[2]", "seeds=[1,2,3]", "views=3", "budget.requests=600", "method.craft.popsize=6")


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    """A slow endpoint, while that is on: the sweep lasts until the nodes have come and gone."""
    return Faults(tmp_path / "marks", tmp_path / "sweep").add(SLOW | {"seconds": 0.6})


@pytest.fixture
def cluster(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without a core; the test adds nodes with a core and a simulated GPU each. All have the faults."""
    for name, value in faults.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # one by Ray's count, none by torch's
    made = Cluster(initialize_head=True, head_node_args=HEAD)
    yield made
    made.shutdown()


def on(node: Any, title: str) -> list[int]:
    """Processes of a node with such a title."""
    return below({process.process.pid for of_kind in node.all_processes.values() for process in of_kind}, title)


def test_rows_are_those_of_an_undisturbed_run_after_a_node_died_and_another_joined(
    cluster: Cluster, faults: Faults, lab: Lab, tmp_path: Path
) -> None:
    storage = tmp_path / "sweep"
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    words = ("run", "sweep=smoke", "model=fake", f"datasets=[{lab.card}]", METHODS, *WORDS)
    faults.on("slow")
    run = Running(*words, f"storage={storage}", f"address={cluster.address}", "checkpoint_s=0.3")
    run.wait_for(lambda: charges(storage) > 20, "20 charges")
    assert [len(on(node, "ray::Replica")) for node in nodes] == [1, 1], "one on each GPU"
    assert not on(cluster.head_node, "ray::Replica")
    run.wait_for(lambda: any(on(node, TRIAL) for node in nodes), "a trial beside a replica")
    dying = next(node for node in nodes if on(node, TRIAL))

    cluster.remove_node(dying, allow_graceful=False)
    died, paid = time.monotonic(), charges(storage)
    run.wait_for(lambda: charges(storage) > paid + 10, "charges after the node's death")
    went_on = time.monotonic() - died

    joined, began = cluster.add_node(num_cpus=1, num_gpus=1), time.monotonic()
    run.wait_for(lambda: on(joined, "ray::Replica"), "the lost replica on the new node")
    back = time.monotonic() - began
    run.wait_for(lambda: on(joined, TRIAL), "a trial on the new node")
    used = time.monotonic() - began
    faults.on(None)
    code, out, err = run.end()
    assert code == 0, f"{out}\n{err}"
    assert "Traceback" not in out + err
    print(f"went on {went_on:.1f} s after the kill; replica back {back:.1f} s, a trial {used:.1f} s after the join")

    specs = lab.plan(METHODS, *WORDS).trials
    wanted = {row.trial_id: outcome(row) for spec in specs for row in lab.run(spec)}
    found = {spec.trial_id: outcome(row) for spec in specs for row in ResultStore(storage).rows_of(spec.trial_id)}
    assert found == wanted
    here("ledger", f"storage={storage}")
    assert ledger_record(storage)["phases"]["replay"]["requests"] == 0
    assert ledger_record(storage)["open_trials"] == 0
