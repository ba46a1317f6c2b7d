"""Zero-shot classification with the class prompts of one template or of an ensemble of templates.

What is learned: nothing.
Shapes: B images in a call, C classes, T templates.
Cost: nothing to fit.
Prediction: 1 prompt set for each image (T for the ensemble).
Paper: Radford et al., CLIP, arXiv:2103.00020, section 3.1.
Departures from the paper:
1. The ensemble averages the *scores* of the templates, not their text features, because an endpoint that returns only
   scores gives no features.
"""

from __future__ import annotations

import numpy as np

from methods._torch import Tensor
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Plan,
    Remaining,
    TaskShape,
    method,
)


@method(
    name="zero_shot", access=Access.TEXT | Access.SCORES, paper="arXiv:2103.00020", new_classes=True, uses_views=False
)
class ZeroShot(Method):
    """The data set's template without fitting; gains are measured from it."""

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill())

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        self.classes = task.classes

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, (classes or self.classes).prompts())[0]


@method(
    name="zero_shot_ensemble",
    access=Access.TEXT | Access.SCORES,
    paper="arXiv:2103.00020",
    new_classes=True,
    uses_views=False,
)
class ZeroShotEnsemble(ZeroShot):
    """The mean score over the data set's templates without fitting."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, (classes or self.classes).ensemble()).mean(0)
