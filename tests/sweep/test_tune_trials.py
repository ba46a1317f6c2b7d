"""What the driver does when Ray Tune reports that a trial started, lost its worker, or ended. No Ray is started."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.sweep.event_log import EventLog
from pipeline.sweep.tune_trials import FATAL, StopOnFatal, TuneCallback


def trial(index: int, **result: Any) -> Any:
    """A trial as Tune passes it to a callback."""
    return SimpleNamespace(config={"index": index}, last_result=result)


@pytest.fixture
def specs() -> list[Any]:
    return [SimpleNamespace(trial_id=name) for name in ("a", "b", "c")]


def test_each_trial_is_reported_when_its_worker_ended_it(specs: list[Any], tmp_path: Path) -> None:
    ended: list[Any] = []
    starts: dict[int, float] = {}
    callback = TuneCallback(specs, starts, EventLog(tmp_path, dict.fromkeys("abc", "name")), ended.append)
    for index in range(3):
        callback.on_trial_start(0, [], trial(index))
    assert starts.keys() == {0, 1, 2}
    callback.on_trial_recover(0, [], trial(0))
    callback.on_trial_complete(0, [], trial(0, done=True))
    callback.on_trial_error(0, [], trial(1))
    assert starts.keys() == {2} and ended == [specs[0]]
    callback.on_trial_complete(0, [], trial(2, done=True, **{FATAL: StorageError("disk full")}))
    assert not starts and ended == [specs[0]]
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["event"], e["trial"]) for e in events] == [
        *(("trial started", name) for name in "abc"),
        ("worker lost", "a"),
    ]


def test_an_error_that_ends_the_run_stops_all_trials() -> None:
    stop = StopOnFatal()
    assert not stop("t", {"done": True}) and not stop.stop_all()
    assert not stop("t", {"done": True, FATAL: StorageError("disk full")}) and stop.stop_all()


def test_the_callback_pickles_whatever_it_holds(tmp_path: Path) -> None:
    lock = threading.Lock()  # as a ledger has one
    callback = TuneCallback([], {}, EventLog(tmp_path, {}), lambda spec: lock.release())
    assert type(pickle.loads(pickle.dumps(callback))).__name__ == "Callback"
