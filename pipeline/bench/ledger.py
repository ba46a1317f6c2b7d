"""Committed charges per second through the ledger's actor, and the meter's share of a request of 25 ms."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, bench, machine, paired
from pipeline.blackbox.ray_pool import RayPool
from pipeline.console import Echo

BATCH = 8
"""Charges in one call to the ledger, as of eight trials at one replica."""
CLIENTS, CALLS, REPEATS = 2, 100, 5


@bench("ledger")
def ledger(echo: Echo) -> BenchResult:
    """Charges per second from two clients, eight per call (also one and 32), and the overhead of charging."""
    with actors.cluster() as cluster:
        rates = {n: _rates(cluster, n, echo) for n in (1, BATCH, 32)}
        plain = cluster.unmetered(actors.sleeping(0.025))
        metered = cluster.replicas(1, actors.sleeping(0.025))
        shares: dict[str, Any] = {}
        for label, n_clients in (("share of 25 ms, closed loop", 1), ("share of 25 ms, two in flight", 2)):
            echo(label)
            with_, without = ([RayPool(side) for _ in range(n_clients)] for side in (metered, plain))
            each = 80 // n_clients
            pair = paired(cluster.workload(with_, each), cluster.workload(without, each), 7, echo)
            shares[label] = {"median": 1 - 1 / pair.ratio, "low": 1 - 1 / pair.low, "high": 1 - 1 / pair.high}
            shares[label] |= {"ms metered": pair.slow_s * 12.5, "ms without": pair.fast_s * 12.5, "pairs": pair.pairs}
        problems = cluster.ledger.verify()
    detail = {f"{n} per call": {"charges/s": median(r), "low": min(r), "high": max(r)} for n, r in rates.items()}
    main = rates[BATCH]
    detail |= shares | {"ledger": "adds up" if not problems else problems[0], **machine()}
    return BenchResult("ledger", min(main), max(main), REPEATS, detail, value=median(main), unit="charges/s")


def _rates(cluster: actors.Cluster, n: int, echo: Echo) -> list[float]:
    def call(_: int) -> None:
        for charges in batches.pop():
            cluster.ledger.charge(charges)

    rates = []
    for _ in range(REPEATS + 1):
        batches = [[cluster.charges(n) for _ in range(CALLS)] for _ in range(CLIENTS)]
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(call, range(CLIENTS)))
        rates.append(n * CLIENTS * CALLS / (time.perf_counter() - began))
    echo(f"{n} charges per call: {median(rates[1:]):,.0f} charges/s")
    return rates[1:]
