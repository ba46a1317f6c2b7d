"""A sweep's log: a JSON object a line, whatever ends the run, and never in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.sweep.event_log import EventLog


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_each_run_is_appended_with_the_error_that_ended_it_without_passwords(tmp_path: Path) -> None:
    journal = EventLog(tmp_path, {"t": "craft on digits"})
    with journal.run(2, 1):
        journal.trial("trial started", "t")
    with pytest.raises(StorageError), journal.run(1, 2):
        raise StorageError("postgresql://user:hunter2@host/db: disk full\nmore")
    with pytest.raises(KeyboardInterrupt), journal.run(1, 2):
        raise KeyboardInterrupt
    found = lines(tmp_path)
    assert [line["event"] for line in found] == [
        *("run started", "trial started", "run ended", "run started", "run stopped", "run started", "run stopped")
    ]
    assert (found[0]["trials"], found[0]["kept"]) == (2, 1) and found[0]["version"]
    assert (found[1]["trial"], found[1]["name"]) == ("t", "craft on digits")
    assert found[4]["error"] == "StorageError: postgresql://user:***@host/db: disk full"
    assert found[6]["error"].startswith("KeyboardInterrupt")
    assert all(line["at"].endswith("+00:00") for line in found)


def test_a_log_that_cannot_be_written_does_not_stop_a_run(tmp_path: Path) -> None:
    with EventLog(tmp_path / "gone", {"t": "x"}).run(1, 0):
        pass
    assert not (tmp_path / "gone").exists()
