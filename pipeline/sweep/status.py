"""`farebox status`: the state of a sweep, seen from any terminal and without a connection to its Ray.

The driver writes `storage/status.json` every second; rows and ledger are read directly. A driver is alive while it
holds the lock of the storage, so the file that a killed driver left is not mistaken for a running one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.budget import HttpBill, Limits
from pipeline.errors import DamagedFile, StorageError
from pipeline.files import read_sealed_json, sealed_json, write_atomic
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import AccountRecord, PurseRecord
from pipeline.ledger.sqlite_file import sqlite_file
from pipeline.remote.call_log import sent_line, total_of
from pipeline.results.row import FINISHED
from pipeline.results.runs import read_runs
from pipeline.results.store import ResultStore
from pipeline.sweep.purses import money_lines, money_record
from pipeline.sweep.run_ledger import sweep_account
from pipeline.sweep.run_state import clock
from pipeline.sweep.storage import held
from pipeline.sweep.storage_id import read_id
from pipeline.trials.cells import trial_name

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.trials.plan import TrialSpec

FILE = "status.json"


class Heartbeat:
    """Writes the driver's part of the status: running trials, load of the replicas, time left.

    Its size does not grow with the number of trials; plan.json has the others.

    Args:
        storage: folder of the sweep.
        trials: the trials of the run.
        starts: start time of each running trial by index; the caller updates it.
        loads: returns the number of open requests of each replica, None for one that does not answer.
    """

    def __init__(
        self,
        storage: Path,
        trials: Sequence[TrialSpec],
        starts: Mapping[int, float],
        loads: Callable[[], list[int | None]],
    ) -> None:
        self.path, self.trials, self.starts, self.loads = storage / FILE, trials, starts, loads
        self.began = time.time()

    def beat(self, left_s: float | None) -> None:
        """Write the file. A full disk is ignored here: other files report it."""
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "began": self.began,
            "at": time.time(),
            "running": [(self.trials[i].trial_id, self.trials[i].name) for i in sorted(dict(self.starts))],
            "replicas": self.loads(),
            "left_s": left_s,
        }
        try:
            write_atomic(self.path, sealed_json(record))
        except StorageError:
            return

    def clear(self) -> None:
        """Remove the file: the run has ended, and the rows have its result."""
        self.path.unlink(missing_ok=True)


def status(storage: Path, ledger_url: str) -> dict[str, Any]:
    """Return the status of a storage as one record, the JSON of `farebox status --json`."""
    account = sweep_account(read_id(storage).id)
    alive, beat = held(storage), _last_beat(storage / FILE)
    store = ResultStore(storage)
    table = store.read()
    rows = dict(zip(*(table[name].to_pylist() for name in ("trial_id", "status")), strict=True))
    done = {i for i, status in rows.items() if status in FINISHED}
    running = {i: name for i, name in beat["running"] if i not in done} if alive else {}
    failed = rows.keys() - done - running.keys()
    account_records, purses = _accounts(ledger_url)
    accounts = [
        {"name": a.name, "limits": asdict(a.limits), "spent": asdict(a.spent), "reserved": asdict(a.reserved)}
        | {"charged": asdict(a.charged), "this_sweep": a.name == account}
        for a in account_records
    ]
    return {
        "alive": alive,
        "driver": {k: beat[k] for k in ("pid", "host", "at")},
        "running": list(running.values()),
        "waiting": len(set(read_runs(storage).last) - rows.keys() - running.keys()),
        "done": len(done),
        "failed": _failed(table, failed),
        "damaged": store.damage(),
        "replicas": beat["replicas"] if alive else [],
        "left_s": beat["left_s"] if alive else None,
        "accounts": accounts,
        "http": asdict(total_of(storage)),
        "money": [money_record(purse) for purse in purses],
        "money_lines": money_lines(purses),
    }


def shown(record: dict[str, Any]) -> str:
    """Format the record as text."""
    driver = record["driver"]
    if record["alive"] and not driver["at"]:
        text = ["starting: a run holds this storage, and its trials have not started"]
    elif record["alive"]:
        ago = max(0.0, time.time() - driver["at"])
        text = [f"running: process {driver['pid']} on {driver['host']}, last update {ago:.0f} s ago"]
    elif record["waiting"] or record["failed"] or record["damaged"] or not record["done"]:
        text = ["not running: no run holds this storage; the same `farebox run` command continues"]
    else:
        text = ["finished: every trial of the last run has its rows"]
    text.append(
        f"trials: {len(record['running'])} running, {record['waiting']} waiting, {record['done']} done, "
        f"{len(record['failed'])} failed"
    )
    text += [f"  running: {name}" for name in record["running"]]
    text += [f"  failed: {f['name']}: {f['why']}" for f in record["failed"]]
    if record["replicas"]:
        loads = ", ".join("no answer" if load is None else str(load) for load in record["replicas"])
        text.append(f"replicas: {len(record['replicas'])}; requests under way on each: {loads}")
    for a in record["accounts"]:
        limits = {unit: limit for unit, limit in a["limits"].items() if limit is not None}
        ceiling = " and ".join(f"{limit:,} {unit}" for unit, limit in limits.items()) or "none"
        text.append(
            f"account {a['name']}: {a['charged']['requests']:,} requests and {a['charged']['images']:,} images "
            f"charged, {a['reserved']['requests']:,} and {a['reserved']['images']:,} reserved; ceiling {ceiling}"
        )
    text += sent_line(HttpBill(**record["http"]))
    text += record["money_lines"]
    if record["left_s"] is not None:
        text.append(f"about {clock(record['left_s'])} left")
    return "\n".join(text)


def _failed(table: pa.Table, failed: Set[str]) -> list[dict[str, Any]]:
    """Return id, name and error of these trials."""
    if not failed:
        return []
    columns = ["trial_id", "method", "dataset", "shots", "seed", "budget_requests", "budget_images", "hparams"]
    records = {}
    for r in table.select([*columns, "answers", "error"]).to_pylist():
        allotment = Limits(r["budget_requests"], r["budget_images"])
        task = r["method"], r["dataset"], r["shots"], r["seed"]
        name = trial_name(*task, allotment, r["hparams"], r["answers"])
        records[r["trial_id"]] = {"trial": r["trial_id"], "name": name, "why": r["error"]}
    return [record for trial, record in records.items() if trial in failed]


def _accounts(ledger_url: str) -> tuple[list[AccountRecord], list[PurseRecord]]:
    """Return the accounts of a ledger and their money; none if no run has created it yet."""
    file = sqlite_file(ledger_url)
    if file is not None and not file.is_file():
        return [], []
    with contextlib.closing(Ledger(ledger_url)) as ledger:
        return ledger.accounts(), ledger.money.purses()


def _last_beat(path: Path) -> dict[str, Any]:
    """Read `status.json`; empty values if there is no intact one."""
    nothing: dict[str, Any] = {"pid": None, "host": None, "at": 0.0, "running": [], "replicas": []}
    try:
        return nothing | {"left_s": None} | read_sealed_json(path)
    except (OSError, ValueError, DamagedFile):  # not written yet; a damaged file is replaced within a second
        return nothing | {"left_s": None}
