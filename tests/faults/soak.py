"""A soak of the ledger: processes that charge the same calls in any order, are killed, and whose clocks jump.

Every trial's calls are asked by two processes, in batches of any size, again after each death. Each trial's allotment
pays for nine tenths of its calls. While they work, no account may be seen above its limit; at the end each trial must
have paid its allotment exactly, no call twice, and the books must add up.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from methods.base import Bill
from pipeline.budget import Limits, Phase
from pipeline.errors import FareboxError
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import Charge

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.faults.soak"])
WORKERS = 3
TRIALS = 8
ONE = Bill(1, 10, 5, 50)
LIFE_S = 3.0
"""A worker is killed after half to one and a half of this."""


def _work(url: str, first: int, calls: int, seed: int, done: Any) -> None:
    """Charge the calls of two thirds of the trials; `done` holds how far each trial was answered, and survives."""
    rng = random.Random(seed)
    real = time.time
    jump = [0.0]
    time.time = lambda: real() + jump[0]
    ledger = Ledger(url)
    mine = [t for t in range(TRIALS) if t % WORKERS != first]
    while any(done[t] < calls for t in mine):
        jump[0] = rng.choice([0.0, -86400.0 * 400, 86400.0 * 400, -1.0])
        batch: list[tuple[int, int]] = []
        for t in rng.sample(mine, 2):
            batch += [(t, n) for n in range(done[t], min(calls, done[t] + rng.randint(1, 64)))]
        rng.shuffle(batch)
        ledger.charge([Charge("s", f"t{t}", n, f"d{n}", Phase.ADAPT, ONE) for t, n in batch])
        for t, n in batch:
            done[t] = max(done[t], n + 1)


def soak(charges: int, seed: int, folder: Path | None = None) -> dict[str, Any]:
    """Charge about so many calls; what was wrong (nothing, it is hoped), and how fast it went."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        return _soak(f"sqlite:///{made}/ledger.db", charges, seed)


def _soak(url: str, charges: int, seed: int) -> dict[str, Any]:
    calls = -(-charges * 10 // 9 // TRIALS)
    allotment = calls * 9 // 10
    limit = TRIALS * allotment
    ledger, rng, problems = Ledger(url), random.Random(seed), []
    ledger.open_account("ceiling", Limits(requests=limit))
    for t in range(TRIALS):
        ledger.reserve("s", f"t{t}", ["ceiling"], Limits(requests=allotment))
    progress = [PROCESSES.Array("q", TRIALS, lock=False) for _ in range(WORKERS)]
    workers: list[Any] = [None] * WORKERS
    ends, kills, began, starts = [0.0] * WORKERS, 0, time.monotonic(), 0
    while True:
        for i in range(WORKERS):
            worker = workers[i]
            if worker is not None and worker.is_alive() and time.monotonic() > ends[i]:
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
                kills += 1
            if worker is None or not worker.is_alive():
                if worker is not None and worker.exitcode == 0:
                    continue
                if worker is not None and worker.exitcode not in (0, -signal.SIGKILL):
                    problems.append(f"a worker ended with {worker.exitcode}")
                starts += 1
                workers[i] = PROCESSES.Process(target=_work, args=(url, i, calls, seed * 1000 + starts, progress[i]))
                workers[i].start()
                ends[i] = time.monotonic() + LIFE_S * rng.uniform(0.5, 1.5)
        (account,) = ledger.accounts()
        if account.committed.requests > limit or account.charged.requests > limit:
            problems.append(f"{account.committed} stands on an account of {limit}")
        if problems or all(w.exitcode == 0 for w in workers):
            break
        time.sleep(0.05)
    seconds = time.monotonic() - began
    for worker in workers:
        worker.kill()
        worker.join()
    try:
        problems += ledger.verify()
        for trial in ledger.trials():
            if trial.bills[Phase.ADAPT].requests != allotment or trial.bills[Phase.REPLAY] != Bill():
                problems.append(f"trial {trial.trial} paid {trial.bills[Phase.ADAPT].requests} of {allotment}")
    except FareboxError as error:
        problems.append(str(error))
    ledger.close()
    asked = calls * TRIALS * (WORKERS - 1)
    return {
        "charges": limit,
        "asked": asked,
        "kills": kills,
        "seconds": round(seconds, 1),
        "asked_per_s": round(asked / seconds),
        "problems": problems,
    }
