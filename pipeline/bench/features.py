"""The image-feature store: features of the same images from an empty store and from a filled one.

The digits' 480 training images, embedded model, one thread. Every run uses a new endpoint, whose caches are empty:
with a filled store it maps the files and verifies the checksum of every row.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

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


@bench("features")
def features(echo: Echo) -> BenchResult:
    """Image features from a filled store against an empty one, embedded model."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        return compare(model_card("tiny"), digits(), Path(folder), echo)


def compare(card: ModelCard, images: Images, folder: Path, echo: Echo) -> BenchResult:
    """Compare both stores for any model and images."""
    request = Request("image_features", images, None, Charge("bench", "features", 0, "", Phase.ADAPT, Bill()))
    encoded: dict[str, set[int]] = {"cold": set(), "warm": set()}
    Endpoint(card, folder / "warm").compute(request)
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
        **machine(),
    }
    return BenchResult("features", **timing.spread(), detail=detail)


def digits() -> Images:
    """Return the digits' training images."""
    card = dataset_card("digits")
    source = source_of(card)
    return Images.plain(source, "train", source.rows_of("train"), card.augment)
