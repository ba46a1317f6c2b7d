"""Throughput of eight trials over HTTP to a served model, relative to calls of the same model without a boundary.

Measured with ViT-S/32 (random weights) on one thread. Over HTTP, views are made and encoded as PNG by the client.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

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
        with served(card, Path(folder)) as url:
            remote = RemoteEndpoint(client_card(url, direct), Path(folder) / "records")
            try:
                echo(f"{TRIALS} trials, {IMAGES} images each, directly and over HTTP")
                pair = paired(_trials(direct, lock), _trials(remote, None), PAIRS, echo)
            finally:
                remote.close()
    images = TRIALS * IMAGES
    detail = {"direct images/s": images / pair.slow_s, "HTTP images/s": images / pair.fast_s, **machine()}
    return BenchResult("http", **pair.spread(), detail=detail)


@contextmanager
def served(card: ModelCard, folder: Path) -> Iterator[str]:
    """Serve a model in a process of its own, on one thread; give the address."""
    file = folder / "served.yaml"
    file.write_text(f"kind: {card.kind}\narch: {card.arch}\nweights: {card.weights}\ngrant: TEXT+FEATURES\n")
    command = [sys.executable, "-m", "pipeline.cli", "serve", f"model={file}", "port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
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
