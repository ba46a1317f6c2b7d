"""A CraFT trial of two generations against the loop of the released code, with the same model, images and candidates.

10 classes, 16 shots, one thread, ViT-B/32 with random weights. The result is for a trial whose image features are
stored, as for every trial of a sweep after the first one on the same images; the first is reported as a detail. The
whole trial is timed: images, ledger, search and refiner. Of the loop, one candidate and a few images are timed and
multiplied, without its search and the refiner's steps, which favours the loop.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods._prompt_search import PromptSearch
from methods._refiner import Refiner
from methods._views import training_views
from methods.base import Access, Classes, FewShotTask, LabelledImages, torch_generator
from methods.craft import CraFT
from pipeline.bench.harness import (
    BenchResult,
    PairedTiming,
    bench,
    machine,
    paired,
    random_card,
    seconds_of,
)
from pipeline.bench.reference import CraftLoop
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.model import OpenClipModel
from pipeline.budget import Limits
from pipeline.cards import ModelCard
from pipeline.config.card_files import dataset_card
from pipeline.console import Echo
from pipeline.data.dataset import source_of
from pipeline.data.images import Images
from pipeline.ledger.ledger import Ledger
from pipeline.trials.isolation import torch_threads

GENERATIONS, SHOTS, IMAGES_TIMED = 2, 16, 8
AMPLE = Limits(10**6, 10**9)


@bench("craft")
def craft(echo: Echo) -> BenchResult:
    """A CraFT trial of two generations against the published loop, which encodes one candidate at a time."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        sides = Sides(random_card(Path(folder)), Path(folder))
        few_shot = task(SHOTS, 0)
        echo("no stored image features, once")
        (first_s,) = seconds_of(lambda: sides.trial(few_shot))
        echo("stored image features")
        timing = sides.compare(few_shot, lambda: sides.trial(few_shot), echo)
        n = len(few_shot.train.images)
        detail = {
            "s": timing.fast_s,
            "s of the loop": timing.slow_s,
            "no stored image features, once": {"s": first_s, "ratio": timing.slow_s / first_s},
            "images encoded": {"by the loop": (3 + GENERATIONS) * n, "first trial": GENERATIONS * n, "later trials": 0},
            "setting": "image features stored by an earlier trial; the loop has no store",
            "baseline": f"one candidate and {IMAGES_TIMED} images, multiplied",
            "model": "ViT-B/32, random weights, fp32; 10 classes, 16 shots, 40 candidates, 2 generations",
            **machine(),
        }
    return BenchResult("craft", **timing.spread(), detail=detail)


def task(shots: int, first: int) -> FewShotTask:
    """Return the digits with `shots` of each class's 48 training images, starting at index `first`, cyclically."""
    card = dataset_card("digits")
    source = source_of(card)
    train = source.rows_of("train")
    of_class = [train[source.labels[train] == y] for y in range(len(source.classnames))]
    rows = np.concatenate([np.roll(rows, -first)[:shots] for rows in of_class])
    plain = Images.plain(source, "train", rows, card.augment)
    classes = Classes(tuple(source.classnames), card.template)
    none = LabelledImages(plain[[]], torch.empty(0, dtype=torch.long))
    return FewShotTask(
        card.name, classes, shots, LabelledImages(plain, torch.from_numpy(source.labels[rows])), none, views=GENERATIONS
    )


class Sides:
    """Both sides of the comparison with one model: behind an endpoint with a ledger, and in the loop."""

    def __init__(self, card: ModelCard, folder: Path) -> None:
        self.endpoint = Endpoint(card, folder / "features")
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        self.ledger.open_account("ceiling", Limits())
        self.runs = 0

    def trial(self, task: FewShotTask, seed: int | None = None) -> list[Tensor]:
        """Run two generations through the metered box; return the fitness [P] of each. No seed: new candidates."""
        self.runs += 1
        name = f"trial-{self.runs}"
        self.ledger.reserve("bench", name, ["ceiling"], AMPLE)
        box = MeteredBox(LocalPool(self.endpoint, self.ledger), "bench", name, Access.SOFT | Access.SCORES, AMPLE)
        method = CraFT(CraFT.Config(generations=GENERATIONS))
        method.begin(task, box, np.random.default_rng(self.runs if seed is None else seed))
        fitness: list[Tensor] = []
        tell = method.search.tell
        method.search.tell = lambda fitness_P: (fitness.append(fitness_P), tell(fitness_P))[1]  # type: ignore[method-assign,func-returns-value]
        while method.step(box):
            pass
        self.ledger.release("bench", name)
        return fitness

    def loop(self, task: FewShotTask, seed: int = 0) -> CraftLoop:
        """Return the same trial in the released code's loop, not started."""
        model, c, rng = self.endpoint.model, CraFT.Config(), np.random.default_rng(seed)
        assert isinstance(model, OpenClipModel)
        search = PromptSearch(task.classes, model.embed_text, c, rng)
        generator = torch_generator(rng)
        head = Refiner(len(task.classes), c, generator)
        view, labels = training_views(task, 1), task.train.labels
        assert isinstance(view, Images)
        return CraftLoop(
            model.net, model.tokenizer, model.preprocess, search.classes, labels, view, search, head, generator
        )

    def compare(self, task: FewShotTask, fast: Callable[[], Any], echo: Echo) -> PairedTiming:
        """Time a whole trial against parts of the loop on the same images, multiplied."""
        loop, n = self.loop(task), len(task.train.images)
        part = loop.fixed_view[:IMAGES_TIMED]
        loop.image_ND = torch.zeros(n, self.endpoint.info.feature_dim)
        ctx_LE = loop.search.ask()[0]
        # each mini-batch of the head encodes the classes again, which costs as much as a candidate
        prompts = GENERATIONS * (CraFT.Config().popsize + math.ceil(n / loop.head.batch_size))
        images = (lambda: loop.encode_images(part), (3 + GENERATIONS) * n / len(part))
        return paired(lambda: loop.fitness(ctx_LE), fast, 5, echo, prompts, [images])
