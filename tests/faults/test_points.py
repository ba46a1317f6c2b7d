"""The real command, killed at named points and on a full disk: each time the same rows, leaderboard and ledger.

points.py lists the points. MLflow cannot be reached during the killed runs, which changes nothing either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.long import facts, leftovers
from tests.faults.points import FULL, Faults
from tests.faults.soak import soak
from tests.support.command import farebox, here

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.slow]

AWAY = "mlflow=http://127.0.0.1:9"
STRUCK = {
    **{"replica.before_charge": 3, "replica.after_charge": 6, "replica.after_compute": 9},
    **{"ledger.before_commit": 8, "ledger.after_commit": 12, "trial.at_a_call": 9, "trial.between_renames": 1},
    **{"trial.row_written": 1, "trial.after_row": 1, "driver.reserving": 1, "driver.closing": 1},
}
"""Points of the default suite, and the how-manieth passing is struck. The long mode draws from all."""


def test_the_result_is_the_same_after_a_kill_at_each_point(
    words: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    faults = Faults(tmp_path / "marks", storage)
    for point, nth in STRUCK.items():
        faults.at(point, nth)
    for _ in range(2 * len(STRUCK)):
        done = farebox(
            *("run", *words, AWAY, f"storage={storage}", f"features={tmp_path / 'features'}"),
            env=faults.environment,
            expect=None,
        )
        assert "Traceback" not in done.stdout + done.stderr
        if done.returncode == 0:
            break
        assert done.returncode == -9 or "its worker died again and again" in done.stderr, done.stderr
    assert faults.happened == {f"{point}.{nth}" for point, nth in STRUCK.items()}
    assert facts(storage) == undisturbed
    assert leftovers(storage) == []
    assert "not mirrored to MLflow" in done.stdout and "try again with: farebox sync" in done.stdout
    assert "2 trials are in MLflow" in here("sync", f"storage={storage}")


def test_a_full_disk_ends_the_run_in_one_line_and_it_continues_with_room(
    words: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    faults = Faults(tmp_path / "marks", storage)
    for name, fault in FULL.items():
        faults.add({"name": name, **fault})
    command = ("run", *words, f"storage={storage}", f"features={tmp_path / 'features'}")
    for place, says in {
        "checkpoint": f"{storage}/checkpoints/",
        "ledger": "database or disk is full: make room",
        "row": f"{storage}/results/",
    }.items():
        faults.on(place)
        done = farebox(*command, env=faults.environment, expect=3)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("farebox: ")]
        assert says in line and "make room" in line, line
        assert "Traceback" not in done.stdout + done.stderr
    faults.on()
    farebox(*command, env=faults.environment)
    assert facts(storage) == undisturbed
    assert leftovers(storage) == []


def test_the_ledger_is_consistent_after_load_kills_and_clock_steps() -> None:
    found = soak(20_000, seed=3)
    assert found["problems"] == []
    assert found["charges"] >= 20_000
