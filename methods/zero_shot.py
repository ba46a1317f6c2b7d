"""Zero-shot: the class prompts as they are, from one template or from an ensemble of templates.

Learns nothing. Shapes: B images, C classes, T templates.
Cost: nothing to fit. Prediction asks 1 prompt set (T for the ensemble) about each image.
Paper: Radford et al., CLIP, arXiv:2103.00020, section 3.1.
Departs from the paper: the ensemble averages the templates' *scores*, not their text features, because a scores-only
endpoint gives no features (with features, the paper's mean is taken before the cosine).
"""

from __future__ import annotations

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
    Plan,
    Remaining,
    TaskShape,
    method,
)


@method(
    name="zero_shot", access=Access.TEXT | Access.SCORES, paper="arXiv:2103.00020", new_classes=True, uses_views=False
)
class ZeroShot(Method):
    """The data set's one template, no fitting: the floor that every gain is measured from."""

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
    """The mean score over the data set's templates, no fitting."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, (classes or self.classes).ensemble()).mean(0)
