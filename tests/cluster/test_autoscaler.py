"""A sweep on a cluster that starts without a GPU: Ray's autoscaler, with its fake provider, starts and ends the nodes.

`ray.cluster_utils.AutoscalingCluster` needs a file that Ray's wheel does not contain, and `ray stop`, which ends every
Ray of the user. So the head is started here, with a configuration of our own.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.util import get_node_ip_address

from pipeline.results.store import ResultStore
from tests.faults.points import SLOW, Faults
from tests.support.command import Running, alive, charges, free_port, kill, ledger_record, processes, wait_until
from tests.support.lab import Lab, outcome

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(600)]

HEAD = f"{'f' * 51}00000"
"""The id that the fake provider expects of the head."""
COMMANDS = ("setup", "initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
WORDS = ("shots=[2]", "seeds=[1]", "views=3", "budget.requests=600", "method.craft.popsize=6")


class Autoscaled:
    """A head with a core for the trial, and an autoscaler that may start two nodes with a simulated GPU each."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.address = folder, f"{get_node_ip_address()}:{free_port()}"
        ids = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_CLOUD_INSTANCE_ID": HEAD}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        quick = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = environment | token
        self.config = folder / "autoscaler.yaml"
        self.config.write_text(yaml.safe_dump(self._config()))
        ray = str(Path(sys.executable).with_name("ray"))
        words = ["--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=1", "--num-gpus=0", "--block"]
        words += ["--include-dashboard=false", "--object-store-memory=100000000", f"--temp-dir={folder}/ray"]
        with (folder / "head.log").open("w") as log:
            subprocess.Popen(
                [ray, "start", *words, f"--autoscaling-config={self.config}"],
                env=self.environment | ids | quick,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _config(self) -> dict[str, object]:
        provider = {"type": "fake_multinode", "gcs_address": self.address, "head_node_id": HEAD}
        provider |= dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True)
        types = {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        }
        return {
            **{"cluster_name": "fake", "provider": provider, "max_workers": 2, "available_node_types": types},
            **{"head_node_type": "ray.head.default", "idle_timeout_minutes": 0.05, "upscaling_speed": 1.0},
            **{"auth": {}, "file_mounts": {}, "cluster_synced_files": []},
            **{f"{name}_commands": [] for name in COMMANDS},
        }

    @property
    def nodes(self) -> int:
        """Number of nodes that run, without the head."""
        raylets = [title for _, title in processes().values() if "/raylet --" in title and str(self.folder) in title]
        return len(raylets) - 1

    def end(self) -> None:
        """Kill the head, its autoscaler and its nodes: all processes with this folder in their command."""
        while mine := alive([pid for pid, (_, title) in processes().items() if f"{self.folder}/" in title]):
            for pid in mine:
                with contextlib.suppress(ProcessLookupError):
                    kill(pid)


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    idle = {"module": "pipeline.blackbox.ray_replicas", "constant": "IDLE_S", "value": 5.0}
    return Faults(tmp_path / "marks", tmp_path / "sweep").add(SLOW | {"seconds": 0.6}).add(idle)


@pytest.fixture
def cluster(faults: Faults) -> Iterator[Autoscaled]:
    folder = Path(tempfile.mkdtemp(prefix="as"))  # Ray's sockets need a short path
    made = Autoscaled(folder, faults.environment | {"CUDA_VISIBLE_DEVICES": "-1"})
    try:
        wait_until(lambda: "Ray runtime started" in (folder / "head.log").read_text(), "Ray starts", 60)
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


def test_nodes_are_started_for_the_replicas_of_a_run_and_taken_back_while_it_runs(
    cluster: Autoscaled, faults: Faults, lab: Lab, tmp_path: Path
) -> None:
    storage, printed = tmp_path / "sweep", tmp_path / "printed"
    words = ("run", "sweep=smoke", "model=fake", f"datasets=[{lab.card}]", "methods=[craft]", *WORDS)
    faults.on("slow")
    assert cluster.nodes == 0
    with printed.open("w") as output:
        run = Running(
            *words,
            *(f"storage={storage}", f"address={cluster.address}", "replicas=2", "replica_gpus=1"),
            env=cluster.environment,
            output=output,
        )
    run.wait_for(lambda: cluster.nodes == 2, "a node for each replica")
    run.wait_for(lambda: "replicas ended" in printed.read_text(), "one trial needs one replica")
    paid = charges(storage)
    run.wait_for(lambda: cluster.nodes == 1, "its node is taken back")
    run.wait_for(lambda: charges(storage) > paid, "the trial continues")
    faults.on(None)
    code, _, _ = run.end()
    assert code == 0 and "waiting for the first replica: 2 need 1 GPU each" in printed.read_text(), printed.read_text()
    wait_until(lambda: cluster.nodes == 0, "no node is left", 60)

    (spec,) = lab.plan("methods=[craft]", *WORDS).trials
    rows = ResultStore(storage).rows_of(spec.trial_id)
    assert [outcome(row) for row in rows] == [outcome(row) for row in lab.run(spec)]
    assert ledger_record(storage)["phases"]["replay"]["requests"] == 0
