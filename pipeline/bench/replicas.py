"""Throughput of 1 to 16 replicas of an endpoint that sleeps 100 ms, with two clients per replica."""

from __future__ import annotations

from statistics import median
from typing import Any

from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, bench, machine, seconds_of
from pipeline.blackbox.ray_pool import RayPool
from pipeline.console import Echo

COUNTS, ENDPOINT_S, CLIENTS, EACH, ROUNDS = (1, 2, 4, 8, 16), 0.1, 2, 12, 5


@bench("replicas")
def replicas(echo: Echo) -> BenchResult:
    """Ratio of requests per second of 16 replicas to those of one. Every round times all counts."""
    with actors.cluster() as cluster:
        echo(f"starting {COUNTS[-1]} replicas")
        started = cluster.replicas(COUNTS[-1], actors.sleeping(ENDPOINT_S))
        runs = {n: cluster.workload([RayPool(started[:n]) for _ in range(CLIENTS * n)], EACH) for n in COUNTS}
        rates: dict[int, list[float]] = {n: [] for n in COUNTS}
        for turn in range(ROUNDS + 1):
            for n, run in runs.items():
                (seconds,) = seconds_of(run)
                if turn:  # the first round is a warm-up: clients spread over the replicas
                    rates[n].append(CLIENTS * n * EACH / seconds)
            if turn:
                echo("  " + "  ".join(f"{n}: {rates[n][-1]:.4g}/s" for n in COUNTS))
    ratios = {n: [of_n / of_one for of_n, of_one in zip(rates[n], rates[1], strict=True)] for n in COUNTS}
    detail: dict[str, Any] = {
        f"{n} replicas": {"requests/s": median(rates[n]), "ratio to one": median(r), "low": min(r), "high": max(r)}
        for n, r in ratios.items()
    }
    largest = ratios[COUNTS[-1]]
    detail |= {"endpoint": f"sleeps {ENDPOINT_S * 1000:.0f} ms per request; {CLIENTS} clients per replica", **machine()}
    return BenchResult("replicas", min(largest), max(largest), ROUNDS, detail, ratio=median(largest))
