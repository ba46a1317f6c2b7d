"""The image-feature store: the same images asked for with nothing stored, and by a process that finds them stored.

The digits' 480 training images through the embedded model, on one thread. Each time another endpoint is asked, so that
nothing is left in memory: the warm one maps the files and checks each row's sum.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from methods.base import Bill
from pipeline.bench.harness import BenchResult, Say, bench, machine, paired, threads
from pipeline.blackbox.endpoint import Endpoint, Request
from pipeline.budget import Charge, Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import dataset_card, model_card
from pipeline.data.dataset import source_of
from pipeline.data.images import Images

PAIRS = 5


@bench("features")
def features(say: Say) -> BenchResult:
    """Image features from a warm store against a cold one, on the embedded model."""
    with tempfile.TemporaryDirectory() as folder, threads(1):
        return compare(model_card("tiny"), images(), Path(folder), say)


def compare(card: ModelCard, wanted: Images, folder: Path, say: Say) -> BenchResult:
    """Any model and images."""
    request = Request("image_features", wanted, None, Charge("bench", "features", 0, "", Phase.ADAPT, Bill()))
    encoded: dict[str, set[int]] = {"cold": set(), "warm": set()}
    Endpoint(card, folder / "warm").compute(request)
    asked = {  # loading the model is not what is timed
        "cold": [Endpoint(card, folder / f"cold{i}") for i in range(PAIRS + 1)],
        "warm": [Endpoint(card, folder / "warm") for _ in range(PAIRS + 1)],
    }

    def ask(side: str) -> None:
        encoded[side].add(asked[side].pop().compute(request).computed_images)

    found = paired(lambda: ask("cold"), lambda: ask("warm"), PAIRS, say)
    n = len(wanted)
    detail = {
        "images": n,
        "encoded cold": max(encoded["cold"]),
        "encoded warm": max(encoded["warm"]),
        "s cold": found.slow_s,
        "s warm": found.fast_s,
        "us an image, warm": 1e6 * found.fast_s / n,
        "model": card.name,
        **machine(),
    }
    return BenchResult("features", **found.spread(), detail=detail)


def images() -> Images:
    """The digits' training images."""
    card = dataset_card("digits")
    source = source_of(card)
    return Images.plain(source, "train", source.rows_of("train"), card.augment)
