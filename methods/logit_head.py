"""Logit head: CraFT's refiner alone, trained on the zero-shot scores. The baseline at equal access.

CraFT learns a prompt and a refiner; here the prompt is fixed, so CraFT's gain over it is the gain of the prompt search.
What is learned: the residual network of `_refiner.py`; 2CH + H + C numbers.
Shapes: B images in a call, C classes, H hidden units, N training images, V views, E epochs.
Cost: V requests, V * N image rows, V * C prompts: one prompt set is scored on V views of the training images. All E
epochs always run, since they cost nothing here. V = the fixed views that the task offers (E if fresh), cut to what the
allotment pays for, at least 1; epoch e uses view e mod V, which is queried when it is first needed.
Prediction: 1 request, B image rows a call.
Paper: Wang et al., CraFT, arXiv:2402.04050, the refinement part; no paper reports it alone:

    refined = raw + net(raw)            loss = CE(refined, y) + kl_weight * KL(raw || refined)        (1)

One epoch of Adam on each view in turn, as CraFT trains its head once a generation. The KL term is in the loss for the
first `kl_fraction` of the epochs only (CraFT's budget // n, n = 4 in most of its configs).

Departures from CraFT's head:
1. The prompt is the data set's template throughout, so each view is scored once.
2. E = 200 at any number of shots (CraFT: 200 generations at 8 and 16 shots, 100 at 2 and 4, 50 at 1), so that the
   baseline is never trained less than CraFT.
3. Scores are the endpoint's, from unit-length features and with the model's own logit scale; CraFT's head trains on
   features that are not normalized, with scale 100, and is tested on normalized ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._refiner import Refiner
from methods._torch import Tensor
from methods._training import affordable
from methods._views import EpochViews, ViewsPlan, n_views_used
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


@method(name="logit_head", access=Access.TEXT | Access.SCORES, paper="arXiv:2402.04050", version=1)
class LogitHead(Method):
    """CraFT's refiner on zero-shot scores, without any prompt search."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Refiner.Config):
        """Settings of the refiner, and how long it is trained."""

        epochs: int = 200
        """E: passes over the training images; CraFT's generations at 16 shots."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ViewsPlan:
        view = Bill.scores(1, shape.n_train, shape.n_classes)
        views = affordable(n_views_used(shape, self.config.epochs), view, remaining)
        return ViewsPlan(bill=view * views, views=views)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ViewsPlan) -> None:
        self.epoch = 0
        self.labels_N = task.train.labels
        self.prompts = task.classes.prompts()
        self.views = EpochViews(task, plan.views, self.config.epochs)
        self.generator = torch_generator(rng)
        self.refiner = Refiner(len(task.classes), self.config, self.generator)
        self.trainable_params = self.refiner.n_params
        self.notes.update(epochs=self.config.epochs, views=plan.views)

    def step(self, box: BlackBox) -> bool:
        """Run one epoch of (1)."""
        raw_NC = self.views.of(self.epoch, lambda images: box.scores(images, self.prompts)[0])
        kl = self.epoch < self.config.kl_fraction * self.config.epochs
        self.refiner.train_epoch(raw_NC, self.labels_N, self.generator, kl)
        self.epoch += 1
        return self.epoch < self.config.epochs

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.refiner.refine(box.scores(images, self.prompts)[0])

    def deployed(self) -> dict[str, Tensor]:
        return {f"refiner_{i}": w.detach() for i, w in enumerate(self.refiner.weights())}
