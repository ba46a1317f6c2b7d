"""SiM: ridge regression from the scores of generic prompts to the labels. The class names are never used.

What is learned: W [Q, C], in closed form, and a temperature; Q * C + 1 numbers.
Shapes: B images in a call, C classes, N training images, Q = 1,000 generic prompts.
Cost: 1 request, N image rows, Q prompts: the plain training images are scored once with ImageNet's class names in one
template. It cannot be cut.
Prediction: 1 request, B image rows and Q prompts a call.
Paper: Zanella et al., Vocabulary-free few-shot learning for vision-language models, arXiv:2506.04005 (CVPRW 2025),
similarity mapping:

    W = (L' L + lambda I)^-1 L' Y        logits(l) = temperature * l W        (1)

L [N, Q] are the cosines of the training images and the prompts, Y is one-hot, and lambda = 0.1.

Departures from the paper:
1. The endpoint returns logit scale * cosine; the scores are divided by the scale, since lambda is for cosines.
2. The logits are multiplied by a temperature, fitted on the predictions of training images that are left out (closed
   form, no query). It changes NLL and ECE and no predicted class.
3. One template, "a photo of a {}."; the paper's WordNet nouns are not offered.
4. The few-shot sets are the benchmark's, not 10 draws of the released sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._imagenet_names import IMAGENET_NAMES
from methods._ridge import Ridge
from methods._torch import Tensor
from methods._training import CLIP_TEMPLATE
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


@method(name="sim", access=Access.TEXT | Access.SCORES, paper="arXiv:2506.04005", uses_views=False)
class SiM(Method):
    """Similarity mapping: ridge regression on the scores of ImageNet's class names."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The paper's setting for ImageNet's class names."""

        ridge: float = 0.1
        """lambda, on cosines."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill.scores(1, shape.n_train, len(IMAGENET_NAMES)))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        cosines_NQ = self._cosines(task.train.images, box)
        self.ridge = Ridge.fit(cosines_NQ, task.train.labels, len(task.classes), self.config.ridge)  # (1)
        self.trainable_params = self.ridge.weight_QC.numel() + 1
        self.notes.update(generic_prompts=len(IMAGENET_NAMES), temperature=self.ridge.temperature)

    def _cosines(self, images: ImageSet, box: BlackBox) -> Tensor:
        """Return the cosines [B, Q] of images and generic prompts."""
        generic = Classes(IMAGENET_NAMES, CLIP_TEMPLATE).prompts()
        return box.scores(images, generic)[0] / box.logit_scale

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.ridge.logits(self._cosines(images, box))

    def deployed(self) -> dict[str, Tensor]:
        return {"weight_QC": self.ridge.weight_QC}
