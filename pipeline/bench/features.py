"""The image-feature store: features of the same images from an empty store and from a filled one.

The digits' 480 training images, embedded model, one thread. Every run uses a new endpoint, whose caches are empty:
with a filled store it maps the files and verifies the checksum of every row. Then endpoints in several processes, as
replicas are, ask an empty store for the same images at the same time: together they encode each image once.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from methods.base import Bill
from pipeline.bench.harness import BenchResult, bench, machine, paired
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.request import Request
from pipeline.budget import Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import dataset_card, model_card
from pipeline.console import Echo
from pipeline.data.dataset import source_of
from pipeline.data.images import Images
from pipeline.ledger.records import Charge
from pipeline.trials.isolation import torch_threads

PAIRS = 5
PROCESSES = (1, 2, 4)
START_S = 600.0
"""How long processes may take to load the model, and to encode."""
CALL = Charge("bench", "features", 0, "", Phase.ADAPT, Bill())


@bench("features")
def features(echo: Echo) -> BenchResult:
    """Image features from a filled store against an empty one, embedded model."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        return compare(model_card("tiny"), digits(), Path(folder), echo)


def compare(card: ModelCard, images: Images, folder: Path, echo: Echo) -> BenchResult:
    """Compare both stores for any model and images."""
    request = Request("image_features", images, None, CALL)
    encoded: dict[str, set[int]] = {"cold": set(), "warm": set()}
    Endpoint(card, folder / "warm").compute(replace(request, charge=replace(CALL, call=1)))
    endpoints = {  # made here: loading the model is not timed
        "cold": [Endpoint(card, folder / f"cold{i}") for i in range(PAIRS + 1)],
        "warm": [Endpoint(card, folder / "warm") for _ in range(PAIRS + 1)],
    }

    def compute(side: str) -> None:
        encoded[side].add(endpoints[side].pop().compute(request).computed_images)

    timing = paired(lambda: compute("cold"), lambda: compute("warm"), PAIRS, echo)
    n = len(images)
    detail = {
        "images": n,
        "encoded cold": max(encoded["cold"]),
        "encoded warm": max(encoded["warm"]),
        "s cold": timing.slow_s,
        "s warm": timing.fast_s,
        "us per image, warm": 1e6 * timing.fast_s / n,
        "model": card.name,
        **{f"{n} processes": together(n, card, images, folder / f"processes{n}") for n in PROCESSES},
        **machine(),
    }
    return BenchResult("features", **timing.spread(), detail=detail)


def together(n: int, card: ModelCard, images: Images, folder: Path) -> dict[str, float]:
    """Return how many images n processes encode that ask for the same ones at the same time, and the seconds."""
    spawn = multiprocessing.get_context("spawn")
    barrier, encoded = spawn.Barrier(n + 1), spawn.Queue()
    processes = [spawn.Process(target=_replica, args=(card, images, folder, i, barrier, encoded)) for i in range(n)]
    for process in processes:
        process.start()
    barrier.wait(START_S)  # all have loaded the model
    start = time.perf_counter()
    total = sum(encoded.get(timeout=START_S) for _ in processes)
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return {"encoded": total, "s": seconds}


def _replica(card: ModelCard, images: Images, folder: Path, number: int, barrier: Any, encoded: Any) -> None:
    with torch_threads(1):
        endpoint = Endpoint(card, folder)
        request = Request("image_features", images, None, replace(CALL, call=number))
        barrier.wait(START_S)
        encoded.put(endpoint.compute(request).computed_images)


def digits() -> Images:
    """Return the digits' training images."""
    card = dataset_card("digits")
    source = source_of(card)
    return Images.plain(source, "train", source.rows_of("train"), card.augment)
