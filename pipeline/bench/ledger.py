"""Durable charges a second through the ledger's actor, and the meter's share of a request of 25 ms."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, Say, bench, machine, paired
from pipeline.blackbox.ray_pool import RayPool

FORWARD = 8
"""Charges in one call: those of eight trials at one replica."""
CALLERS, CALLS, TIMES = 2, 100, 5


@bench("ledger")
def ledger(say: Say) -> BenchResult:
    """Charges a second, eight to a call, by two callers; beside it one and 32 to a call, and what a request loses."""
    with actors.cluster() as cluster:
        rates = {n: _rates(cluster, n, say) for n in (1, FORWARD, 32)}
        plain = cluster.unmetered(actors.waiting(0.025))
        metered = cluster.replicas(1, actors.waiting(0.025))
        shares: dict[str, Any] = {}
        for label, callers in (("share of 25 ms, closed loop", 1), ("share of 25 ms, two in flight", 2)):
            say(label)
            with_, without = ([RayPool(side) for _ in range(callers)] for side in (metered, plain))
            each = 80 // callers
            pair = paired(cluster.asking(with_, each), cluster.asking(without, each), 7, say)
            shares[label] = {"median": 1 - 1 / pair.ratio, "low": 1 - 1 / pair.low, "high": 1 - 1 / pair.high}
            shares[label] |= {"ms metered": pair.slow_s * 12.5, "ms without": pair.fast_s * 12.5, "pairs": pair.pairs}
        problems = cluster.books.verify()
    detail = {f"{n} to a call": {"charges/s": median(r), "low": min(r), "high": max(r)} for n, r in rates.items()}
    main = rates[FORWARD]
    detail |= shares | {"books": "add up" if not problems else problems[0], **machine()}
    return BenchResult("ledger", min(main), max(main), TIMES, detail, value=median(main), unit="charges/s")


def _rates(cluster: actors.Cluster, n: int, say: Say) -> list[float]:
    def call(_: int) -> None:
        for charges in batches.pop():
            cluster.books.charge(charges)

    rates = []
    for _ in range(TIMES + 1):
        batches = [[cluster.charges(n) for _ in range(CALLS)] for _ in range(CALLERS)]
        began = time.perf_counter()
        with ThreadPoolExecutor(CALLERS) as threads:
            list(threads.map(call, range(CALLERS)))
        rates.append(n * CALLERS * CALLS / (time.perf_counter() - began))
    say(f"{n} charges to a call: {median(rates[1:]):,.0f} a second")
    return rates[1:]
