"""Faults at named points without code in the package: Python loads this module if its folder is on the path.

Every process of a command (the driver, Ray's workers) finds it by PYTHONPATH. FAREBOX_FAULTS is a JSON list; each
fault names a function of the package, or the target of a rename, and at which call in one process it happens:

    {"name": "...", "module": "pipeline.trials.trial", "function": "run_trial", "moment": "before" or "after", "nth": 3}
    {"name": "...", "rename": "/results/", "nth": 1}              just before a file is put in its place (a pattern)
    {"name": "...", "fsync": "/checkpoints/"}                     no space left, while FOLDER/on.NAME is there
    {"name": "...", "module": "...", "function": "...", "pragma": "..."}   likewise: set on the connection that it takes
    {"name": "...", "module": "...", "function": "...", "seconds": 0.1}    likewise: each call first sleeps
    {"name": "...", "module": "...", "function": "...", "returns": 0}   likewise: it is not called, and returns this
    {"module": "...", "constant": "IDLE_S", "value": 5}           a constant of the module, in every process

The first two end their process with SIGKILL, once in all processes that share FAREBOX_FAULTS_FOLDER: a file named after
the fault is left there, by which a test knows that it happened. "paid": true waits until the ledger at "ledger" holds
the charge of the request among the function's arguments.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

FAULTS: list[dict[str, Any]] = json.loads(os.environ.get("FAREBOX_FAULTS", "[]"))
FOLDER = os.environ.get("FAREBOX_FAULTS_FOLDER", "")


def strike(fault: dict[str, Any], arguments: tuple[Any, ...] = ()) -> None:
    """End this process, if no other was ended by this fault."""
    mark = f"{FOLDER}/{fault['name']}"
    if fault.get("paid"):
        wait_until_paid(fault["ledger"], arguments)
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_paid(ledger: str, arguments: tuple[Any, ...]) -> None:
    charge = next(a.charge for a in arguments if hasattr(a, "charge"))
    ask = (
        "select count(*) from ledger_charge c join ledger_trial t on c.trial_no = t.no "
        "where t.storage = ? and t.trial = ? and c.call = ? and c.digest = ?"
    )
    until = time.monotonic() + 80 * float(os.environ.get("FAREBOX_TEST_PATIENCE", "1"))
    while time.monotonic() < until:
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10) as db:
            if db.execute(ask, (charge.storage, charge.trial, charge.call, charge.digest)).fetchone()[0]:
                return
        time.sleep(0.005)


def on(fault: dict[str, Any]) -> bool:
    return Path(FOLDER, f"on.{fault['name']}").exists()


def wrap(module: Any, fault: dict[str, Any]) -> None:
    if "constant" in fault:
        setattr(module, fault["constant"], fault["value"])
        return
    *path, name = fault["function"].split(".")
    owner = module
    for part in path:
        owner = getattr(owner, part)
    inner, count = getattr(owner, name), itertools.count(1)

    def outer(*args: Any, **kwargs: Any) -> Any:
        due = next(count) == fault.get("nth")
        if due and fault["moment"] == "before":
            strike(fault, args)
        if "returns" in fault and on(fault):
            return fault["returns"]
        if "seconds" in fault and on(fault):
            time.sleep(fault["seconds"])
        result = inner(*args, **kwargs)
        if "pragma" in fault and on(fault):
            args[0].execute(f"PRAGMA {fault['pragma']}")
        if due and fault["moment"] == "after":
            strike(fault, args)
        return result

    setattr(owner, name, outer)


class Finder(MetaPathFinder):
    """Wraps functions as soon as their module has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        mine = [f for f in FAULTS if f.get("module") == name]
        spec = PathFinder.find_spec(name, path, target) if mine else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def loaded(module: Any) -> None:
            load(module)
            for fault in mine:
                wrap(module, fault)

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


def watch_renames(faults: list[dict[str, Any]]) -> None:
    counts: list[tuple[dict[str, Any], Iterator[int]]] = [(f, itertools.count(1)) for f in faults]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            for fault, count in counts:
                if re.search(fault["rename"], str(arguments[1])) and next(count) == fault["nth"]:
                    strike(fault)

    sys.addaudithook(hook)


def fill_disk(faults: list[dict[str, Any]]) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        for fault in faults:
            if re.search(fault["fsync"], path) and on(fault):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    os.fsync = fsync


if FAULTS:
    sys.meta_path.insert(0, Finder())
    if renames := [f for f in FAULTS if "rename" in f]:
        watch_renames(renames)
    if syncs := [f for f in FAULTS if "fsync" in f]:
        fill_disk(syncs)
