"""A process of Ray itself is killed: the run ends with exit code 3 and one line, and the same command goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.long import facts, leftovers
from tests.support.command import Running, charges, farebox, kill, processes
from tests.support.lab import run_here

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.slow]

KILLED = {
    "raylet": ("/raylet/raylet ", "its raylet ended"),
    "gcs": ("/gcs/gcs_server ", "its control service (GCS) ended"),
    "metrics agent": ("ray::DashboardAgent", "its metrics agent ended"),
    "environment agent": ("ray::RuntimeEnvAgent", "ended"),  # the raylet may end before it is noticed
}
"""What is killed: a part of the process's title, and what the line says."""


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for Ray's sessions with a short path: the paths of sockets are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize("victim", KILLED)
def test_the_run_ends_in_one_line_and_the_same_command_continues(
    words: list[str], undisturbed: dict[str, Any], tmp_path: Path, ray_folder: Path, victim: str
) -> None:
    command = ("run", *words, f"storage={tmp_path / 'storage'}", f"features={tmp_path / 'features'}")
    part_of_title, says = KILLED[victim]
    run = Running(*command)
    run.wait_for(lambda: charges(tmp_path / "storage") > 5, "charges")
    table = processes()
    kill(next(pid for pid in run.below() if part_of_title in table.get(pid, (0, ""))[1]))
    code, out, err = run.end()
    assert code == 3, f"{out}\n{err}"
    (line,) = [line for line in err.splitlines() if " trials   " not in line]
    assert line.startswith("farebox: Ray was lost (") and says in line and "the same command continues" in line
    assert len(line) <= 300 and "Traceback" not in out + err
    assert not list(ray_folder.rglob("session_*"))

    if victim == "raylet":
        farebox(*command)
    else:  # how a sweep continues does not depend on what was killed
        run_here(*command[1:])
    assert facts(tmp_path / "storage") == undisturbed
    assert leftovers(tmp_path / "storage") == []
