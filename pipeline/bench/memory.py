"""Memory of client and replica for scores of 2.4 GiB: 40 prompt sets, 1,000 classes, 16,000 images (16-shot ImageNet).

Features of RN50's width (1,024) are random numbers instead of a tower's output, so that only storing and moving them
is measured. Scores are computed, charged, sent in blocks and reduced to CraFT's fitness. The client is a process of
its own, as a trial is. Memory is PSS (a page shared by n processes counts 1/n in each), read from /proc, so on Linux
only.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods._refiner import Refiner
from methods.base import Access, Prompts, SoftPrompts
from methods.craft import fitness
from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, bench, machine
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.blackbox.ray_pool import RayPool
from pipeline.blackbox.request import prompt_counts
from pipeline.budget import Limits
from pipeline.cards import ModelCard
from pipeline.console import Echo
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.errors import ConfigError

P, N, C, WIDTH = 40, 16_000, 1_000, 1_024
REPEATS, INTERVAL_S = 3, 0.25
CEILING_GIB = 4


@bench("memory")
def memory(echo: Echo) -> BenchResult:
    """Peak memory of client and replica while they score one population."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise ConfigError("bench memory reads /proc/PID/smaps_rollup, which this system does not have: run it on Linux")
    peaks: list[dict[str, float]] = []
    with actors.cluster() as cluster:
        replicas = cluster.replicas(1, RandomEndpoint)
        client = actors.Client.remote(replicas)  # type: ignore[attr-defined]
        trial = cluster.charges(1)[0].trial
        pids = {"client": actors.get(client.pid.remote()), "replica": int((cluster.folder / PID).read_text())}
        before = {name: pss(pid) for name, pid in pids.items()}
        for turn in range(REPEATS):
            start = time.perf_counter()
            with Peak(pids) as peak:
                actors.get(client.call.remote(score_a_population, actors.STORAGE, trial, turn))
            peaks.append(peak.gib | {"seconds": time.perf_counter() - start})
            echo("  " + "  ".join(f"{name} {value:.3g}" for name, value in peaks[-1].items()))
    largest = [max(peak["client"], peak["replica"]) for peak in peaks]
    detail: dict[str, Any] = {
        name: {
            "GiB, maximum": max(p[name] for p in peaks),
            "median": median(p[name] for p in peaks),
            "before": before[name],
        }
        for name in pids
    }
    detail |= {
        "scores of one call, GiB": 4 * P * N * C / 2**30,
        "seconds per population": median(peak["seconds"] for peak in peaks),
        "shape": f"{P} prompt sets, {N:,} images, {C:,} classes; random features of width {WIDTH:,}",
        "ceiling, GiB": CEILING_GIB,
        **machine(),
    }
    return BenchResult("memory", min(largest), max(largest), REPEATS, detail, value=max(largest), unit="GiB")


PID = "replica.pid"


class RandomEndpoint(Endpoint):
    """An endpoint whose towers return random features."""

    def __init__(self, card: ModelCard, features: Path) -> None:
        super().__init__(card, features)
        self.model.encode_images, self.model.encode_prompts = _images, _prompts  # type: ignore[method-assign]
        self.model.feature_dim = WIDTH
        self._stores["float"] = FeatureStore(features, "drawn", WIDTH)
        (features.parent / PID).write_text(str(os.getpid()))


def _images(images: Images, codec: str = "float") -> Tensor:
    return normalize(
        torch.randn(len(images), WIDTH, generator=torch.Generator().manual_seed(int(images.rows[0]))), dim=1
    )


def _prompts(prompts: Prompts) -> Tensor:
    p, c = prompt_counts(prompts)
    return normalize(torch.randn(p, c, WIDTH, generator=torch.Generator().manual_seed(p)), dim=2)


@dataclass(frozen=True)
class NumberedSource:
    """The part of a `Source` that scoring needs. An image is its number."""

    digest: str = "numbered"

    def keys_of(self, rows: np.ndarray) -> list[str]:
        """Return the keys of images."""
        return [f"{int(row):032x}" for row in rows]


def score_a_population(pool: RayPool, storage: str, trial: str, turn: int) -> float:
    """Return the best fitness of a CraFT population, computed in the client's process."""
    torch.set_num_threads(1)
    box = MeteredBox(pool, storage, trial, Access.SOFT | Access.SCORES, Limits())
    box.meter.call = turn  # each turn is a new call of one trial
    generator = torch.Generator().manual_seed(turn)
    ctx_PLE = torch.randn(P, 4, box.token_dim, generator=generator)
    images = Images.plain(cast(Source, NumberedSource()), "train", np.arange(N), "crop")
    labels_N, total_P = torch.arange(N) % C, torch.zeros(P)
    refiner = Refiner(C, Refiner.Config(), generator)
    for rows, raw_PBC in box.score_blocks(images, SoftPrompts(ctx_PLE, tuple(f"class {c}" for c in range(C)))):
        labels_B = labels_N[rows]
        total_P += fitness(raw_PBC, refiner.refine(raw_PBC), labels_B, 0.1) * (len(labels_B) / N)
    return float(total_P.min())


class Peak:
    """Peak memory (GiB) of processes while the context is entered, sampled every INTERVAL_S seconds."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.pids, self.gib = pids, dict.fromkeys(pids, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            for name, pid in self.pids.items():
                self.gib[name] = max(self.gib[name], pss(pid))


def pss(pid: int) -> float:
    """Return the proportional set size of a process in GiB."""
    match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert match is not None
    return int(match.group(1)) / 2**20
