"""Memory of client and replica where one answer is 2.4 GiB: 40 prompt sets, 1,000 classes, 16,000 images.

That is 16-shot ImageNet. Towers are drawn, not computed: features of RN50's width (1,024) come from a seed, so that
only what holds and moves them is measured; scores are multiplied out, charged, sent in blocks and turned into CraFT's
fitness. The client is a process of its own, as a trial is. Memory is PSS (a page that n processes share counts 1/n to
each), from /proc, so on Linux only.
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

from methods.base import Access, Prompts, SoftPrompts
from methods.craft import fitness
from methods.refiner import Refiner
from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, Say, bench, machine
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint, prompt_counts
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.blackbox.ray_pool import RayPool
from pipeline.budget import Limits
from pipeline.cards import ModelCard
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.errors import ConfigError

P, N, C, WIDTH = 40, 16_000, 1_000, 1_024
TIMES, EVERY_S = 3, 0.25
CEILING_GIB = 4


@bench("memory")
def memory(say: Say) -> BenchResult:
    """Peak memory of the client and of its replica while they score one population, call after call."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise ConfigError("bench memory reads /proc/PID/smaps_rollup, which this system does not have: run it on Linux")
    peaks: list[dict[str, float]] = []
    with actors.cluster() as cluster:
        replicas = cluster.replicas(1, Drawn)
        caller = actors.Caller.remote(replicas)  # type: ignore[attr-defined]
        trial = cluster.charges(1)[0].trial
        pids = {"client": actors.get(caller.pid.remote()), "replica": int((cluster.folder / PID).read_text())}
        before = {who: pss(pid) for who, pid in pids.items()}
        for turn in range(TIMES):
            began = time.perf_counter()
            with Peak(pids) as peak:
                actors.get(caller.do.remote(score_a_population, actors.STORAGE, trial, turn))
            peaks.append(peak.gib | {"seconds": time.perf_counter() - began})
            say("  " + "  ".join(f"{who} {value:.3g}" for who, value in peaks[-1].items()))
    most = [max(peak["client"], peak["replica"]) for peak in peaks]
    detail: dict[str, Any] = {
        who: {"GiB at most": max(p[who] for p in peaks), "median": median(p[who] for p in peaks), "before": before[who]}
        for who in pids
    }
    detail |= {
        "one answer, GiB": 4 * P * N * C / 2**30,
        "seconds a population": median(peak["seconds"] for peak in peaks),
        "shape": f"{P} prompt sets, {N:,} images, {C:,} classes; features of width {WIDTH:,} drawn from a seed",
        "ceiling, GiB": CEILING_GIB,
        **machine(),
    }
    return BenchResult("memory", min(most), max(most), TIMES, detail, value=max(most), unit="GiB")


PID = "replica.pid"


class Drawn(Endpoint):
    """An endpoint whose towers are a random generator; everything behind them is the product's."""

    def __init__(self, card: ModelCard, features: Path) -> None:
        super().__init__(card, features)
        self.model.encode_images, self.model.encode_prompts = _images, _prompts  # type: ignore[method-assign]
        self.model.feature_dim = WIDTH
        self.store = FeatureStore(features, "drawn", WIDTH)
        (features.parent / PID).write_text(str(os.getpid()))


def _images(images: Images) -> Tensor:
    return normalize(
        torch.randn(len(images), WIDTH, generator=torch.Generator().manual_seed(int(images.rows[0]))), dim=1
    )


def _prompts(prompts: Prompts) -> Tensor:
    p, c = prompt_counts(prompts)
    return normalize(torch.randn(p, c, WIDTH, generator=torch.Generator().manual_seed(p)), dim=2)


@dataclass(frozen=True)
class Numbered:
    """As much of a source as scoring asks of one: images that are a number each."""

    digest: str = "numbered"

    def keys_of(self, rows: np.ndarray) -> list[str]:
        """Content keys."""
        return [f"{int(row):032x}" for row in rows]


def score_a_population(pool: RayPool, storage: str, trial: str, turn: int) -> float:
    """CraFT's fitness of one population, in the client's process; the best of it."""
    torch.set_num_threads(1)
    box = MeteredBox(pool, storage, trial, Access.SOFT | Access.SCORES, Limits())
    box.meter.call = turn  # each turn is another call of one trial
    generator = torch.Generator().manual_seed(turn)
    ctx_PLE = torch.randn(P, 4, box.token_dim, generator=generator)
    images = Images.plain(cast(Source, Numbered()), "train", np.arange(N), "crop")
    labels_N, total_P = torch.arange(N) % C, torch.zeros(P)
    refiner = Refiner(C, generator)
    for rows, raw_PBC in box.score_blocks(images, SoftPrompts(ctx_PLE, tuple(f"class {c}" for c in range(C)))):
        labels_B = labels_N[rows]
        total_P += fitness(raw_PBC, refiner.refine(raw_PBC), labels_B, 0.1) * (len(labels_B) / N)
    return float(total_P.min())


class Peak:
    """The most memory (GiB) that some processes hold while it is entered, looked at every EVERY_S seconds."""

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
        while not self._stop.wait(EVERY_S):
            for who, pid in self.pids.items():
                self.gib[who] = max(self.gib[who], pss(pid))


def pss(pid: int) -> float:
    """The proportional set size of a process, in GiB."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found.group(1)) / 2**20
