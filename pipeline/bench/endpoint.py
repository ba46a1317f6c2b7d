"""Trials at one replica, metered, against one direct batched call of all their populations without meter or Ray.

With ViT-B/32's text tower (weights never trained) on one thread, and with a device that waits 25 ms for a population.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods.base import Bill
from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, PairedTiming, Say, bench, machine, paired, random_card, threads
from pipeline.blackbox.endpoint import Endpoint, Request
from pipeline.blackbox.ray_pool import RayPool
from pipeline.budget import Charge, Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card

TRIALS = (1, 4, 8)
FREE = Charge("bench", "direct", 0, "digest", Phase.ADAPT, Bill())


@bench("endpoint")
def endpoint(say: Say) -> BenchResult:
    """Throughput of 1, 4 and 8 trials through actors, as a part of the direct call's."""
    with tempfile.TemporaryDirectory() as folder, threads(1), actors.cluster() as cluster:
        waiting = _side(cluster, actors.waiting(0.025), model_card("fake"), {1: 40, 4: 20, 8: 10}, "25 ms", say)
        tower_card = random_card(Path(folder))
        tower = _side(cluster, Endpoint, tower_card, {1: 3, 4: 1, 8: 1}, "ViT-B/32", say)
        detail: dict[str, Any] = {}
        for label, found in (("device of 25 ms", waiting), ("ViT-B/32 text tower", tower)):
            for n, pair in found.items():
                detail[f"{label}, {n} trials"] = pair.spread() | {"direct s": pair.slow_s, "actors s": pair.fast_s}
        detail |= _merging(Endpoint(tower_card, Path(folder) / "alone"), say)
        detail |= {"request": f"{actors.POPULATION} prompt sets of {len(actors.NAMES)} classes", **machine()}
    return BenchResult("endpoint", **waiting[8].spread(), detail=detail)


def _side(
    cluster: actors.Cluster, make: Callable[..., Endpoint], card: ModelCard, each: dict[int, int], label: str, say: Say
) -> dict[int, PairedTiming]:
    replicas = cluster.replicas(1, make, card)
    alone = make(card, cluster.folder / "alone")
    found = {}
    for n in TRIALS:
        say(f"{label}: {n} trials, {each[n]} requests each")
        pools = [RayPool(replicas) for _ in range(n)]
        found[n] = paired(lambda n=n: _direct(alone, n * each[n]), cluster.asking(pools, each[n]), 5, say)  # type: ignore[misc]
    return found


def _direct(alone: Endpoint, populations: int) -> None:
    prompts = actors.population(alone.info.token_dim, populations * actors.POPULATION)
    alone.compute(Request("text_features", None, prompts, FREE))


def _merging(alone: Endpoint, say: Say) -> dict[str, Any]:
    """What merging the small requests of eight trials (one prompt set each) into one forward would gain at most."""

    def ask(p: int, times: int) -> None:
        for _ in range(times):
            alone.compute(Request("text_features", None, actors.population(alone.info.token_dim, p), FREE))

    say("merging: eight calls of one prompt set against one call of eight")
    pair = paired(lambda: ask(1, 24), lambda: ask(8, 3), 5, say)
    return {
        "merging would gain at most": pair.spread() | {"eight calls s": pair.slow_s / 3, "one call s": pair.fast_s / 3}
    }
