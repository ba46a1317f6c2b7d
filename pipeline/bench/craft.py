"""A CraFT trial of two generations against the released code's loop: the same model, images, views and candidates.

10 classes, 16 shots, one thread, ViT-B/32's shape (weights never trained). The figure is of a trial whose images the
store holds, as every trial of a sweep after the first on that data finds it; beside it stands the first. The trial is
whole: images, ledger, search, refiner. Of the loop a candidate and a few images are timed and multiplied; its search
and the refiner's own steps are not counted, in its favour.
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

from methods.base import Access, Classes, FewShotTask, LabelledImages, torch_generator
from methods.craft import CraFT
from methods.evolution import PromptSearch
from methods.optim import training_views, with_context
from methods.refiner import Refiner
from pipeline.bench.harness import (
    BenchResult,
    PairedTiming,
    Say,
    bench,
    machine,
    paired,
    random_card,
    seconds_of,
    threads,
)
from pipeline.bench.reference import CraftLoop
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.model import OpenClipModel
from pipeline.budget import Limits
from pipeline.cards import ModelCard
from pipeline.config.card_files import dataset_card
from pipeline.data.dataset import source_of
from pipeline.data.images import Images
from pipeline.ledger.ledger import Ledger

GENERATIONS, SHOTS, IMAGES_TIMED = 2, 16, 8
PLENTY = Limits(10**6, 10**9)


@bench("craft")
def craft(say: Say) -> BenchResult:
    """A whole CraFT trial of two generations against the published loop: one candidate at a time, images anew."""
    with tempfile.TemporaryDirectory() as folder, threads(1):
        sides = Sides(random_card(Path(folder)), Path(folder))
        given = task(SHOTS, 0)
        say("nothing stored, once")
        (first_s,) = seconds_of(lambda: sides.trial(given))
        say("image features stored")
        found = sides.compare(given, lambda: sides.trial(given), say)
        n = len(given.train.images)
        detail = {
            "s": found.fast_s,
            "of the loop": found.slow_s,
            "nothing stored, once": {"s": first_s, "ratio": found.slow_s / first_s},
            "images encoded": {"by the loop": (3 + GENERATIONS) * n, "at first": GENERATIONS * n, "afterwards": 0},
            "the figure": "image features stored by an earlier trial; the loop has no store",
            "slow side": f"one candidate and {IMAGES_TIMED} images, multiplied",
            "model": "ViT-B/32, random weights, fp32; 10 classes, 16 shots, 40 candidates, 2 generations",
            **machine(),
        }
    return BenchResult("craft", **found.spread(), detail=detail)


def task(shots: int, first: int) -> FewShotTask:
    """The digits with `shots` training images a class, from each class's first-th on (of 48, then from its start)."""
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
    """One model behind an endpoint with its ledger, and bare in the loop."""

    def __init__(self, card: ModelCard, folder: Path) -> None:
        self.endpoint = Endpoint(card, folder / "features")
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        self.ledger.open_account("ceiling", Limits())
        self.runs = 0

    def trial(self, task: FewShotTask, seed: int | None = None) -> list[Tensor]:
        """Two generations through the metered box; the fitness [P] of each. Without a seed: of other candidates."""
        self.runs += 1
        name = f"trial-{self.runs}"
        self.ledger.reserve("bench", name, ["ceiling"], PLENTY)
        box = MeteredBox(LocalPool(self.endpoint, self.ledger), "bench", name, Access.SOFT | Access.SCORES, PLENTY)
        method = CraFT(CraFT.Config(generations=GENERATIONS))
        method.start(task, box, np.random.default_rng(self.runs if seed is None else seed))
        found: list[Tensor] = []
        tell = method.search.tell
        method.search.tell = lambda fitness_P: (found.append(fitness_P), tell(fitness_P))[1]  # type: ignore[method-assign,func-returns-value]
        while method.step(box):
            pass
        self.ledger.settle("bench", name)
        return found

    def loop(self, task: FewShotTask, seed: int = 0) -> CraftLoop:
        """The same trial as the released code runs it, not begun."""
        model, c, rng = self.endpoint.model, CraFT.Config(), np.random.default_rng(seed)
        assert isinstance(model, OpenClipModel)
        classes = with_context(task.classes)
        search = PromptSearch(
            model.embed_text(classes.context),
            intrinsic_dim=c.intrinsic_dim,
            std=c.std,
            sigma=c.sigma,
            bound=c.bound,
            popsize=c.popsize,
            rng=rng,
        )
        generator = torch_generator(rng)
        head = Refiner(len(classes), generator, hidden=c.hidden, lr=c.lr, weight=c.weight, batch_size=c.batch_size)
        view, labels = training_views(task, 1), task.train.labels
        assert isinstance(view, Images)
        return CraftLoop(model.net, model.tokenizer, model.preprocess, classes, labels, view, search, head, generator)

    def compare(self, task: FewShotTask, fast: Callable[[], Any], say: Say) -> PairedTiming:
        """A whole trial against the loop's parts on the same number of images, multiplied."""
        loop, n = self.loop(task), len(task.train.images)
        part = loop.fixed_view[:IMAGES_TIMED]
        loop.image_ND = torch.zeros(n, self.endpoint.info.feature_dim)
        ctx_LE = loop.search.ask()[0]
        # the head's mini-batches encode the classes once more each, which is what a candidate takes
        prompts = GENERATIONS * (CraFT.Config().popsize + math.ceil(n / loop.head.batch_size))
        images = (lambda: loop.encode_images(part), (3 + GENERATIONS) * n / len(part))
        return paired(lambda: loop.fitness(ctx_LE), fast, 5, say, prompts, [images])
