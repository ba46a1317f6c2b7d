"""Bayesian label map: class probabilities from the labels, or the best labels, that the endpoint names for an image.

`label_map` is told one label for each image and template, `label_map_topk` the best labels with their probabilities;
`vote` is told one label and learns nothing.
What is learned: a map M [T * C, C] from named to true classes, counted, and a temperature; T * C * C + 1 numbers.
Shapes: B images in a call, C classes, N training images, T templates.
Cost: T requests, T * N image rows, T * C prompts: the plain training images are sent once with each template of the
data set's ensemble (its template if it has none). T is cut to what the allotment pays for, at least 1. `vote`: nothing.
Prediction: T requests, T * B image rows a call.
Paper: Cai et al., Bayesian-guided Label Mapping for Visual Reprogramming, arXiv:2410.24018 (NeurIPS 2024): BLM, BLM+.
u [T * C] of an image holds, for each template, 1 at the class that is named (BLM), or the probabilities of the k best
classes (BLM+), and 0 elsewhere; U [N, T * C] holds u of the training images, Y is one-hot:

    M = U' Y        M_jc <- M_jc / (1 + sum over c' of M_jc')        M_jc <- M_jc / sum over j' of M_j'c        (1)
    logits(u) = temperature * u M        (2)

Departures from the paper and its released code:
1. The paper re-estimates M in each epoch of a white-box visual prompt, whose best epoch is chosen on the test set. Only
   the map is black-box, and it is all of it that is used here, on prompts of the data set's own classes.
2. k is the endpoint's (5 by default), where BLM+ takes 15 % of the outputs.
3. The paper has no temperature. Ours is fitted on the training images, each with the map of the others (no query). It
   changes NLL and ECE and no predicted class.
"""

from __future__ import annotations

import numpy as np

from methods._answers import bill_of
from methods._temperature import fitted_temperature
from methods._templates import TemplatesPlan, by_image, plan_templates, template_prompts
from methods._torch import F, Tensor, torch
from methods.base import (
    Access,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Remaining,
    TaskShape,
    method,
)
from methods.zero_shot import ZeroShot

LEAST = 1e-12
"""Least sum of a column of the map: a column of zeros, of a class without images, stays zero."""


def _shares(counts_QC: Tensor) -> Tensor:
    """Return each row of counts divided by one more than its sum (1)."""
    return counts_QC / (1 + counts_QC.sum(1, keepdim=True))


def bayesian_map(counts_QC: Tensor) -> Tensor:
    """Return the map M [Q, C] from named to true classes, of the sums [Q, C] of u over the images of each class (1)."""
    rows_QC = _shares(counts_QC)
    return rows_QC / rows_QC.sum(0).clamp(min=LEAST)


def _left_out(u_NQ: Tensor, labels_N: Tensor, counts_QC: Tensor) -> Tensor:
    """Return the logits [N, C] of each training image with the map of the other images."""
    logits, sums_C = [], _shares(counts_QC).sum(0)
    for u_Q, label in zip(u_NQ, labels_N.tolist(), strict=True):
        told = u_Q.nonzero().flatten()  # only these rows of the map contain the image
        others_qC = counts_QC[told].clone()
        others_qC[:, label] = (others_qC[:, label] - u_Q[told]).clamp(min=0)
        rows_qC = _shares(others_qC)
        sums_of_others_C = sums_C - _shares(counts_QC[told]).sum(0) + rows_qC.sum(0)
        logits.append(u_Q[told] @ rows_qC / sums_of_others_C.clamp(min=LEAST))
    return torch.stack(logits)


@method(name="label_map", access=Access.TEXT | Access.LABELS, paper="arXiv:2410.24018", uses_views=False)
class LabelMap(Method):
    """Counts of true classes for each label that the endpoint names (BLM)."""

    answer = Access.LABELS

    def plan(self, shape: TaskShape, remaining: Remaining) -> TemplatesPlan:
        return plan_templates(shape, remaining, bill_of(self.answer, 1, shape.n_train, shape.n_classes, shape.top_k))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: TemplatesPlan) -> None:
        self.prompts = template_prompts(task.classes, plan.templates)
        u_NQ, labels_N = self._named(task.train.images, box).double(), task.train.labels
        counts_QC = u_NQ.T @ F.one_hot(labels_N, len(task.classes)).double()
        self.map_QC = bayesian_map(counts_QC).float()  # (1)
        self.temperature = fitted_temperature(_left_out(u_NQ, labels_N, counts_QC), labels_N)
        self.trainable_params = self.map_QC.numel() + 1
        self.notes.update(templates=plan.templates, temperature=self.temperature)

    def _named(self, images: ImageSet, box: BlackBox) -> Tensor:
        """Return u [B, T * C]: answers are logarithms, -inf where nothing is told."""
        return by_image(box.scores(images, self.prompts).exp())

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.temperature * self._named(images, box) @ self.map_QC  # (2)


@method(name="label_map_topk", access=Access.TEXT | Access.TOPK, paper="arXiv:2410.24018", uses_views=False)
class LabelMapTopK(LabelMap):
    """Probabilities of true classes for each of the best labels that the endpoint names (BLM+)."""

    answer = Access.TOPK


@method(name="vote", access=Access.TEXT | Access.LABELS, paper="arXiv:2410.24018", new_classes=True, uses_views=False)
class Vote(ZeroShot):
    """The number of templates under which the endpoint names a class, without fitting."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, (classes or self.classes).ensemble()).exp().sum(0)
