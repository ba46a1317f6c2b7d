"""Logit head: CraFT's refiner alone, trained on the zero-shot scores. The baseline at equal access.

CraFT learns a prompt and a refiner; this keeps the prompt as it is. What CraFT gains over it is what its prompt search
is worth.
What is learned: the residual network of `methods/refiner.py`; 2CH + H + C numbers.
Shapes: B images in a call, C classes, H hidden units, N training images, V views, E epochs.
Cost: V requests, V * N image rows, V * C prompts: one prompt set scored on one view of the training images, V times.
Prediction asks scores: 1 request, B image rows a call.
Paper: Wang et al., CraFT, arXiv:2402.04050, the refinement part; no paper reports it alone:

    refined = raw + net(raw)            loss = CE(refined, y) + weight * KL(raw || refined)

One epoch of Adam on each view in turn, as CraFT trains its head once a generation; the KL term only in the first
quarter of the epochs (CraFT's budget // n, n = 4 in most of its configs).

Within the allotment: all E epochs are always run, since they cost nothing here. V = the fixed views that the task
offers (or E when fresh), cut to what remains, at least 1; epoch e learns view e mod V, asked when it first needs it.

Departs from CraFT's head:
1. The prompt is the data set's template throughout, so a view's scores never go stale and are asked once.
2. E = 200 at any number of shots (CraFT: 200 generations at 8 and 16 shots, 100 at 2 and 4, 50 at 1), so that the
   baseline is never the less trained of the two.
3. Scores are the endpoint's, from unit-length features; CraFT's head trains on un-normalised image features and is
   tested on normalised ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Remaining,
    TaskShape,
    method,
    torch_generator,
)
from methods.optim import EpochViews, affordable, views_wanted
from methods.refiner import Refiner


@method(name="logit_head", access=Access.TEXT | Access.SCORES, paper="arXiv:2402.04050")
class LogitHead(Method):
    """CraFT's refiner on zero-shot scores, without any prompt search."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """CraFT's settings of its head."""

        epochs: int = 200
        """Passes over the training images: CraFT's generations at 16 shots."""
        lr: float = 1e-3
        """Adam's learning rate, constant."""
        weight: float = 0.1
        """Weight of KL(raw || refined)."""
        kl_share: float = 0.25
        """Share of the epochs, from the first, that have the KL term: CraFT's 1/n. 1 keeps it throughout."""
        hidden: int = 256
        """Hidden units."""
        batch_size: int = 256
        """Images in a step; a short last batch is used."""

    config: Config

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        config = self.config
        n_views = self._views(TaskShape.of(task, box.feature_dim), box.remaining)
        self.epoch = 0
        self.labels_N = task.train.labels
        self.prompts = task.classes.prompts()
        self.views = EpochViews(task, n_views, config.epochs)
        self.generator = torch_generator(rng)
        self.refiner = Refiner(
            len(task.classes),
            self.generator,
            hidden=config.hidden,
            lr=config.lr,
            weight=config.weight,
            batch_size=config.batch_size,
        )
        self.trainable_params = self.refiner.n_params
        self.notes.update(epochs=config.epochs, views=n_views)

    def step(self, box: BlackBox) -> bool:
        raw_NC = self.views.of(self.epoch, lambda images: box.scores(images, self.prompts)[0])
        weight = None if self.epoch < self.config.kl_share * self.config.epochs else 0.0
        self.refiner.train_epoch(raw_NC, self.labels_N, self.generator, weight)
        self.epoch += 1
        return self.epoch < self.config.epochs

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.refiner.refine(box.scores(images, self.prompts)[0])

    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        return self._view(shape) * self._views(shape, remaining)

    def deployed(self) -> dict[str, Tensor]:
        return {f"refiner_{i}": w.detach() for i, w in enumerate(self.refiner.weights())}

    @staticmethod
    def _view(shape: TaskShape) -> Bill:
        return Bill.scores(1, shape.n_train, shape.n_classes)

    def _views(self, shape: TaskShape, remaining: Remaining) -> int:
        return affordable(views_wanted(shape, self.config.epochs), self._view(shape), remaining)
