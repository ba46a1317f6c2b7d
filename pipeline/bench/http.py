"""Throughput of eight trials over HTTP to a served model, relative to calls of the same model without a boundary.

Measured with ViT-S/32 (random weights) on one thread. Over HTTP, views are made and encoded as PNG by the client. When
other programs use the machine, the CPU times of both processes change less than the ratio.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from methods.base import Bill
from pipeline.bench.harness import BenchResult, bench, machine, paired, random_card
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import EndpointLike
from pipeline.blackbox.request import Request
from pipeline.budget import Phase
from pipeline.cards import HttpCard, ModelCard, Rate, SentImage
from pipeline.config.card_files import dataset_card
from pipeline.console import Echo
from pipeline.data.dataset import source_of
from pipeline.data.images import Images
from pipeline.ledger.records import Charge
from pipeline.remote.endpoint import RemoteEndpoint
from pipeline.trials.isolation import torch_threads

TRIALS = 8
IMAGES = 32
"""Images of a request, and of an HTTP call."""
PAIRS = 3
SIDE = 224


@bench("http")
def http(echo: Echo) -> BenchResult:
    """Image features of new views, asked for by eight trials at once."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        card = random_card(Path(folder), "ViT-S-32")
        direct, lock = Endpoint(card, None), threading.Lock()
        with served(card, Path(folder)) as (url, server):
            remote = RemoteEndpoint(client_card(url, direct), Path(folder) / "records")
            direct_s, client_s, server_s = list[float](), list[float](), list[float]()
            try:
                echo(f"{TRIALS} trials, {IMAGES} images each, directly and over HTTP")
                slow = timed(_trials(direct, lock), time.process_time, direct_s)
                fast = timed(_trials(remote, None), time.process_time, client_s)
                pair = paired(slow, timed(fast, lambda: cpu_seconds(server), server_s), PAIRS, echo)
            finally:
                remote.close()
    images = TRIALS * IMAGES
    detail = {"direct images/s": images / pair.slow_s, "HTTP images/s": images / pair.fast_s}
    spent = {"direct": direct_s, "HTTP client": client_s, "HTTP server": server_s}
    detail |= {f"{side} CPU ms/image": 1e3 * median(seconds) / images for side, seconds in spent.items()}
    return BenchResult("http", **pair.spread(), detail=detail | machine())


def timed(run: Callable[[], None], clock: Callable[[], float], seconds: list[float]) -> Callable[[], None]:
    """Return a function that also appends what it takes by a clock."""

    def timing() -> None:
        began = clock()
        run()
        seconds.append(clock() - began)

    return timing


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far; NaN where the system does not have /proc."""
    if not Path("/proc").is_dir():
        return math.nan
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(card: ModelCard, folder: Path) -> Iterator[tuple[str, int]]:
    """Serve a model in a process of its own, on one thread; give the address and the process id."""
    file = folder / "served.yaml"
    file.write_text(f"kind: {card.kind}\narch: {card.arch}\nweights: {card.weights}\ngrant: TEXT+FEATURES\n")
    command = [sys.executable, "-m", "pipeline.cli", "serve", f"model={file}", "port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1], server.pid
    finally:
        server.terminate()
        server.communicate()


def client_card(url: str, endpoint: Endpoint) -> ModelCard:
    """Return a card of a served model."""
    size = SentImage(size=SIDE)
    card = HttpCard(
        url=url,
        adapter="farebox",
        image=size,
        feature_dim=endpoint.info.feature_dim,
        logit_scale=endpoint.info.logit_scale,
        rate=Rate(at_once=TRIALS),
    )
    return ModelCard(name="served", kind="http", grant="TEXT+FEATURES", http=card)


def _trials(endpoint: EndpointLike, lock: threading.Lock | None) -> Callable[[], None]:
    """Return a function that asks for the features of new views in `TRIALS` threads."""
    source = source_of(dataset_card("icons"))
    plain = Images.plain(source, "train", source.rows_of("train")[:IMAGES], "crop_flip")
    charge, seeds = Charge("bench", "http", 0, "digest", Phase.ADAPT, Bill()), itertools.count()

    def ask(seed: int) -> None:
        request = Request("image_features", plain.views(1, seed), None, charge)
        if lock is None:
            endpoint.compute(request)
            return
        with lock:  # one thread at a time may call an Endpoint
            endpoint.compute(request)

    def run() -> None:
        with ThreadPoolExecutor(TRIALS) as pool:
            list(pool.map(ask, [next(seeds) for _ in range(TRIALS)]))

    return run
