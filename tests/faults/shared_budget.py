"""Sweeps that share a budget, through the real command line: drivers killed at random, storages copied, moved, deleted.

    python -m tests.faults.shared_budget --rounds 5 --kills 4 --seed 1 --json runs/shared_budget.json

Each round runs two sweeps on one named budget at the same time and kills each driver after a drawn number of requests.
Then one storage is copied, moved or deleted, in turn; the copy runs as well, and what the deleted one reserves is
released. The limit is read all the while. At the end nothing may be reserved, `farebox ledger` must verify each
storage, and each storage must hold the rows of an undisturbed run. Exit code 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods.base import Bill
from pipeline.budget import Limits
from pipeline.errors import FareboxError
from pipeline.ledger.ledger import Ledger
from pipeline.results.store import ResultStore
from pipeline.sweep.run_ledger import sweep_account
from pipeline.sweep.storage_id import FILE, read_id
from tests.faults.long import end_all
from tests.support.command import Running, farebox, here
from tests.support.lab import outcome, small_data
from tests.support.patience import patience

LIMIT = 2000
"""Requests of the budget."""
EVENTS = ("copied", "moved", "deleted")


class Watcher(threading.Thread):
    """Reads the ledger until it is told to stop, and counts readings in which an account is above its limit."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.readings, self.above, self.over = url, 0, 0, threading.Event()

    def run(self) -> None:
        """Read."""
        with contextlib.closing(Ledger(self.url)) as ledger:
            while not self.over.wait(0.05):
                self.readings += 1
                for account in ledger.accounts():
                    exceeded_unit = [
                        account.limits.exceeded_unit(bill, Bill()) for bill in (account.committed, account.charged)
                    ]
                    self.above += exceeded_unit != [None, None]


class Round:
    """One round in a folder of its own."""

    def __init__(self, words: Sequence[str], folder: Path, rng: random.Random, event: str) -> None:
        self.folder, self.rng, self.event = folder, rng, event
        self.url = f"sqlite:///{folder / 'team.db'}"
        self.words = ("run", *words, f"budget.global.url={self.url}", "budget.global.name=team")
        self.storages = [folder / "first", folder / "second"]
        self.counts, self.wrong, self.left = Counter[str](), list[str](), list[int]()

    def start(self, storage: Path) -> Running:
        """Start the command of a storage. The first one states the limit; the others join."""
        stated = (f"budget.global.requests={LIMIT}",) if storage.name == "first" else ()
        with (storage.parent / f"{storage.name}.txt").open("a") as printed:
            self.counts["starts"] += 1
            return Running(*self.words, *stated, f"storage={storage}", output=printed)

    def run(self, kills: int, quiet_s: float) -> None:
        """Kill drivers, let the event happen, then let every storage end undisturbed, and look at what is there."""
        with contextlib.closing(Ledger(self.url)) as ledger:
            ledger.open_account("team", Limits(requests=LIMIT))
        watcher = Watcher(self.url)
        watcher.start()
        for _ in range(kills):
            due = {storage: self.charged(storage) + self.rng.randint(20, 150) for storage in self.storages}
            running = {storage: self.start(storage) for storage in self.storages}
            while running:
                time.sleep(0.05)
                for storage, each in list(running.items()):
                    if each.process.poll() is not None or self.charged(storage) >= due[storage]:
                        self.kill(running.pop(storage))
        self.happen()
        last = [self.start(storage) for storage in self.storages]
        for storage, each in zip(self.storages, last, strict=True):
            if code := each.process.wait(timeout=30 * quiet_s + patience(300)):
                self.wrong.append(f"{storage.name} ended with {code}")
        watcher.over.set()
        watcher.join()
        self.counts["readings"], self.counts["above"] = watcher.readings, watcher.above
        if watcher.above:
            self.wrong.append(f"an account was above its limit in {watcher.above} readings")
        end_all(self.left, 5)

    def kill(self, running: Running) -> None:
        """Kill a driver, if it has not ended."""
        self.left += running.below()
        if running.process.poll() is None:
            running.process.kill()
            self.counts["kills"] += 1
        running.process.wait()

    def happen(self) -> None:
        """Copy, move or delete the first storage."""
        first = self.storages[0]
        self.counts[self.event] += 1
        self.counts["reserved_before"] += self.reserved()
        if self.event == "copied":
            shutil.copytree(first, self.folder / "copy")
            self.storages.append(self.folder / "copy")
        elif self.event == "moved":
            self.storages[0] = first.rename(self.folder / "first_moved")
        else:
            end_all(self.left, 5)
            shutil.rmtree(first)
            released = json.loads(here("budget", "release", f"url={self.url}", "--json"))["released"]
            self.counts["released_trials"] += sum(r["open_trials"] for r in released)
            self.storages.remove(first)

    def charged(self, storage: Path) -> int:
        """Requests that the trials of a storage were charged so far."""
        if not (storage / FILE).exists():
            return 0
        with contextlib.closing(Ledger(self.url)) as ledger:
            name = sweep_account(read_id(storage).id)
            return next((a.charged.requests for a in ledger.accounts() if a.name == name), 0)

    def reserved(self) -> int:
        """Requests that the budget reserves."""
        with contextlib.closing(Ledger(self.url)) as ledger:
            return next(a.reserved.requests for a in ledger.accounts() if a.name == "team")

    def judge(self, quiet: dict[str, Any]) -> None:
        """Compare what is there with an undisturbed run."""
        if left := self.reserved():
            self.wrong.append(f"{left} requests stay reserved")
        ids = [read_id(storage).id for storage in self.storages]
        if len(set(ids)) != len(ids):
            self.wrong.append(f"two storages have one id: {ids}")
        for storage in self.storages:
            done = farebox("ledger", f"storage={storage}", f"budget.global.url={self.url}", expect=None)
            if done.returncode:
                self.wrong.append(f"{storage.name}: farebox ledger ended with {done.returncode}: {done.stderr}")
            if (found := rows_of(storage)) != quiet:
                self.wrong.append(f"{storage.name}: rows differ: {sorted(found)}")
            if len(list((storage / "mlflow").rglob("rows.json"))) < len(quiet):
                self.wrong.append(f"{storage.name}: {len(quiet)} trials are not mirrored in its own folder")


def rows_of(storage: Path) -> dict[str, dict[str, Any]]:
    """What must not depend on who was killed, by method and seed."""
    found = [r for path in (storage / "results").glob("*.arrow") for r in ResultStore(storage).rows_of(path.stem)]
    return {f"{r.method} {r.seed}": outcome(r) for r in found}


def shared(rounds: int, kills: int, seed: int, keep: Path) -> dict[str, Any]:
    """All rounds; a summary."""
    words = (
        *("sweep=smoke", "model=fake", f"datasets=[{small_data(keep)}]", "methods=[zero_shot,craft]", "seeds=[1,2]"),
        *("shots=[2]", "views=3", "method.craft.popsize=6", "budget.requests=250", "checkpoint_s=0.2"),
        *("replicas=1", "concurrency=1", f"features={keep / 'features'}"),
    )
    began = time.monotonic()
    farebox("run", *words, f"storage={keep / 'quiet'}")
    quiet_s, quiet = time.monotonic() - began, rows_of(keep / "quiet")
    print(f"undisturbed: {quiet_s:.0f} s, {len(quiet)} rows", flush=True)
    counts, wrong = Counter[str](), list[str]()
    for number in range(rounds):
        folder = Path(tempfile.mkdtemp(prefix="round", dir=keep))
        one = Round(words, folder, random.Random(f"{seed}/{number}"), EVENTS[number % len(EVENTS)])
        try:
            one.run(kills, quiet_s)
            one.judge(quiet)
        except (AssertionError, OSError, FareboxError, ValueError) as error:
            one.wrong.append(str(error))
        counts += one.counts
        wrong += [f"{folder.name}: {line}" for line in one.wrong]
        print(f"round {number + 1}: {dict(one.counts)} {one.wrong or 'all is well'}", flush=True)
    return {"rounds": rounds, **counts, "above": counts["above"], "quiet_s": round(quiet_s, 1), "wrong": wrong}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kills", type=int, default=3, help="of each of the two drivers, in each round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the summary is written")
    arguments = parser.parse_args(argv)
    keep = Path(tempfile.mkdtemp(prefix="farebox-budget-"))
    os.environ["FAREBOX_CACHE"] = str(keep / "cache")
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="fb")  # short: sockets lie in it
    try:
        found = shared(arguments.rounds, arguments.kills, arguments.seed, keep)
    finally:
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if not found["wrong"]:
        shutil.rmtree(keep, ignore_errors=True)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
