"""Local probe: logistic regression on the features of a local model, with the true labels, without any request.

A control: what a pretrained model on the client gives for nothing. A method with the same local model that does not
beat it has gained nothing from its requests.
What is learned: a weight [F, C] and a bias [C]; F * C + C numbers. The class names are not used.
Shapes: B images in a call, C classes, F feature width of the local model, N training images, M validation images.
Cost: no request, neither to fit nor to predict. The validation images are used to choose C_reg; they are labelled
images in hand, which the local model encodes, so their use is free here, unlike in methods that query them.
Prediction: no request.
Paper: the control is ours; the regression and the search for C_reg are those of `linear_probe` (Radford et al., CLIP,
arXiv:2103.00020, section 3.2) on x / ||x||, x the local model's features of the plain image.

Departures: those of `linear_probe`.
"""

from __future__ import annotations

import numpy as np

from methods._torch import F, Tensor
from methods.base import Access, Bill, BlackBox, Classes, FewShotTask, ImageSet, Remaining, TaskShape, method
from methods.linear_probe import LinearProbe, ProbePlan


@method(name="local_probe", access=Access.TEXT, paper="arXiv:2103.00020", uses_views=False, uses_local=True)
class LocalProbe(LinearProbe):
    """Logistic regression on a local model's features, without any request: a control, not a competitor."""

    def plan(self, shape: TaskShape, remaining: Remaining) -> ProbePlan:
        return ProbePlan(bill=Bill(), search=shape.n_val > 0)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ProbePlan) -> None:
        assert task.local is not None
        self.local = task.local
        val_MF = self._features(task.val.images) if plan.search else None
        self.fit(task, self._features(task.train.images), val_MF)

    def _features(self, images: ImageSet) -> Tensor:
        return F.normalize(self.local.features(images), dim=-1)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.logits(self._features(images))
