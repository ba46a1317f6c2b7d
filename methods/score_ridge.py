"""Score ridge: ridge regression from the scores of the class prompts to the labels. A closed-form baseline at scores.

What is learned: W [T * C, C], in closed form, and a temperature; T * C * C + 1 numbers.
Shapes: B images in a call, C classes, N training images, T templates.
Cost: T requests, T * N image rows, T * C prompts: the plain training images are scored once with each template of the
data set's ensemble (its template if it has none). T is cut to what the allotment pays for, at least 1.
Prediction: T requests, T * B image rows a call.
Paper: none reports it; similarity mapping with the data set's own class names, arXiv:2506.04005, see `sim.py`:

    W = (L' L + lambda I)^-1 L' Y        logits(l) = temperature * l W        (1)

L [N, T * C] are the cosines of the training images: the scores divided by the logit scale. Y is one-hot.

Departures from `sim`:
1. The prompts are the data set's classes under its templates, so that a row of W belongs to a class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._ridge import Ridge
from methods._templates import TemplatesPlan, by_image, plan_templates, template_prompts
from methods._torch import Tensor
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
)


@method(name="score_ridge", access=Access.TEXT | Access.SCORES, paper="arXiv:2506.04005", uses_views=False)
class ScoreRidge(Method):
    """Ridge regression on the scores of the class prompts under every template."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of the regression."""

        ridge: float = 0.1
        """lambda, on cosines: the value that the paper uses with class names."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> TemplatesPlan:
        return plan_templates(shape, remaining, Bill.scores(1, shape.n_train, shape.n_classes))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: TemplatesPlan) -> None:
        self.prompts = template_prompts(task.classes, plan.templates)
        cosines_NQ = self._cosines(task.train.images, box)
        self.ridge = Ridge.fit(cosines_NQ, task.train.labels, len(task.classes), self.config.ridge)
        self.trainable_params = self.ridge.weight_QC.numel() + 1
        self.notes.update(templates=plan.templates, temperature=self.ridge.temperature)

    def _cosines(self, images: ImageSet, box: BlackBox) -> Tensor:
        """Return the cosines [B, T * C] of images, template by template."""
        return by_image(box.scores(images, self.prompts) / box.logit_scale)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.ridge.logits(self._cosines(images, box))

    def deployed(self) -> dict[str, Tensor]:
        return {"weight_QC": self.ridge.weight_QC}
