"""Throughput of 1 to 16 replicas whose device waits 100 ms, two callers to a replica."""

from __future__ import annotations

from statistics import median
from typing import Any

from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, Say, bench, machine, seconds_of
from pipeline.blackbox.ray_pool import RayPool

COUNTS, DEVICE_S, CALLERS, EACH, ROUNDS = (1, 2, 4, 8, 16), 0.1, 2, 12, 5


@bench("replicas")
def replicas(say: Say) -> BenchResult:
    """Requests a second at 16 replicas against one; every round times all counts."""
    with actors.cluster() as cluster:
        say(f"starting {COUNTS[-1]} replicas")
        made = cluster.replicas(COUNTS[-1], actors.waiting(DEVICE_S))
        runs = {n: cluster.asking([RayPool(made[:n]) for _ in range(CALLERS * n)], EACH) for n in COUNTS}
        rates: dict[int, list[float]] = {n: [] for n in COUNTS}
        for turn in range(ROUNDS + 1):
            for n, run in runs.items():
                (seconds,) = seconds_of(run)
                if turn:  # the first is not counted: callers find their places
                    rates[n].append(CALLERS * n * EACH / seconds)
            if turn:
                say("  " + "  ".join(f"{n}: {rates[n][-1]:.4g}/s" for n in COUNTS))
    ratios = {n: [of_n / of_one for of_n, of_one in zip(rates[n], rates[1], strict=True)] for n in COUNTS}
    detail: dict[str, Any] = {
        f"{n} replicas": {"requests/s": median(rates[n]), "times one": median(r), "low": min(r), "high": max(r)}
        for n, r in ratios.items()
    }
    most = ratios[COUNTS[-1]]
    detail |= {"device": f"waits {DEVICE_S * 1000:.0f} ms a request; {CALLERS} callers to a replica", **machine()}
    return BenchResult("replicas", min(most), max(most), ROUNDS, detail, ratio=median(most))
