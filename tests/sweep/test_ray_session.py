"""The parts of a Ray session that need no Ray: its watch, its addresses, its files."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray.exceptions import OutOfMemoryError

from pipeline.source_code import ROOT
from pipeline.sweep import ray_session
from pipeline.sweep.ray_session import DriverPath, lost, refused, remove_session


def test_a_port_counts_as_refused_only_when_nothing_listens() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = server.getsockname()
        assert refused(address)
        server.listen()
        assert not refused(address)
    assert refused(address)
    assert not refused(("no.such.host.invalid", 1)), "a name that cannot be resolved is no proof"


def test_workers_get_the_drivers_folder_and_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    job = DriverPath()
    assert job._py_driver_sys_path == [str(ROOT)] and job._runtime_env_has_working_dir()
    monkeypatch.setattr(ray_session, "ROOT", Path("/usr/lib/python3/site-packages"))
    assert DriverPath()._py_driver_sys_path == [], "it would come before the standard library"


@pytest.mark.parametrize("before", [None, "1"])
def test_the_switch_for_loopback_is_restored(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    name, constant = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with ray_session._loopback():
        assert os.environ[name] == "0" and not ray_constants.ENABLE_RAY_CLUSTER
    assert os.environ.get(name) == before and constant == ray_constants.ENABLE_RAY_CLUSTER


def test_an_error_of_ray_becomes_one_short_line_and_other_errors_are_raised_again() -> None:
    memory = "3 worker(s) were killed due to the node running low on memory.\nMemory on the node ..."
    for error in (OutOfMemoryError(memory), RuntimeError(f"Caught unexpected exception: {memory}")):
        assert "memory ran out" in str(lost(error)) and "the same command continues" in str(lost(error))
    long = str(lost(RuntimeError("Caught unexpected exception: " + "x" * 1000 + "\nsecond line")))
    assert len(long) < 300 and "\n" not in long
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        lost(RuntimeError("a mistake of ours"))


def test_only_the_session_that_ended_is_removed(tmp_path: Path) -> None:
    for name in ("session_1", "session_2"):
        (tmp_path / name / "logs").mkdir(parents=True)
    latest = tmp_path / "session_latest"
    latest.symlink_to(tmp_path / "session_2")
    remove_session(tmp_path / "session_1")
    assert {path.name for path in tmp_path.iterdir()} == {"session_2", "session_latest"}
    remove_session(tmp_path / "session_2")
    assert list(tmp_path.iterdir()) == []
