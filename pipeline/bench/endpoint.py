"""Throughput of trials at one metered replica, relative to one direct call of all their populations without Ray.

Measured with ViT-B/32's text tower (random weights) on one thread, and with an endpoint that sleeps 25 ms per
population.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods.base import Bill
from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, PairedTiming, bench, machine, paired, random_card
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.ray_pool import RayPool
from pipeline.blackbox.request import Request
from pipeline.budget import Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card
from pipeline.console import Echo
from pipeline.ledger.records import Charge
from pipeline.trials.isolation import torch_threads

TRIALS = (1, 4, 8)
FREE = Charge("bench", "direct", 0, "digest", Phase.ADAPT, Bill())


@bench("endpoint")
def endpoint(echo: Echo) -> BenchResult:
    """Throughput of 1, 4 and 8 trials through the actors, as a fraction of the direct call's."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(1), actors.cluster() as cluster:
        sleep = _side(cluster, actors.sleeping(0.025), model_card("fake"), {1: 40, 4: 20, 8: 10}, "25 ms", echo)
        tower_card = random_card(Path(folder))
        tower = _side(cluster, Endpoint, tower_card, {1: 3, 4: 1, 8: 1}, "ViT-B/32", echo)
        detail: dict[str, Any] = {}
        for label, timings in (("endpoint that sleeps 25 ms", sleep), ("ViT-B/32 text tower", tower)):
            for n, pair in timings.items():
                detail[f"{label}, {n} trials"] = pair.spread() | {"direct s": pair.slow_s, "actors s": pair.fast_s}
        detail |= _merging(Endpoint(tower_card, Path(folder) / "direct"), echo)
        detail |= {"request": f"{actors.POPULATION} prompt sets of {len(actors.NAMES)} classes", **machine()}
    return BenchResult("endpoint", **sleep[8].spread(), detail=detail)


def _side(
    cluster: actors.Cluster,
    make: Callable[..., Endpoint],
    card: ModelCard,
    each: dict[int, int],
    label: str,
    echo: Echo,
) -> dict[int, PairedTiming]:
    replicas = cluster.replicas(1, make, card)
    direct = make(card, cluster.folder / "direct")
    timings = {}
    for n in TRIALS:
        echo(f"{label}: {n} trials, {each[n]} requests each")
        pools = [RayPool(replicas) for _ in range(n)]
        timings[n] = paired(lambda n=n: _call_direct(direct, n * each[n]), cluster.workload(pools, each[n]), 5, echo)  # type: ignore[misc]
    return timings


def _call_direct(direct: Endpoint, populations: int) -> None:
    prompts = actors.population(direct.info.token_dim, populations * actors.POPULATION)
    direct.compute(Request("text_features", None, prompts, FREE))


def _merging(direct: Endpoint, echo: Echo) -> dict[str, Any]:
    """Return the largest gain of merging requests of one prompt set from eight trials into one forward."""

    def compute(p: int, times: int) -> None:
        for _ in range(times):
            direct.compute(Request("text_features", None, actors.population(direct.info.token_dim, p), FREE))

    echo("merging: eight calls of one prompt set against one call of eight")
    pair = paired(lambda: compute(1, 24), lambda: compute(8, 3), 5, echo)
    return {
        "largest gain of merging": pair.spread() | {"eight calls s": pair.slow_s / 3, "one call s": pair.fast_s / 3}
    }
