"""RLA: a linear map of the image features, kept near the identity by a penalty.

What is learned: W [D, D], the identity at first, so that the start is zero-shot; D * D numbers.
Shapes: B images in a call, C classes, D feature width, N training images, V views, E epochs.
Cost: 1 request (C prompts) for the text features, then V * N image rows: 1 request for fixed views, V requests for
fresh ones. V = the fixed views that the task offers (E if fresh), cut to what the allotment pays for after the text
features, at least 1. All E epochs run, since they cost nothing here; epoch e uses view e mod V.
Prediction: 1 request, B image rows a call; for new classes also 1 prompt set.
Paper: Fahes et al., CLIP's Visual Embedding Projector is a Few-shot Cornucopia, arXiv:2410.05270 (version 4), the
regularized linear adapter, which needs features only (the paper's ProLIP fine-tunes the projection in the model):

    logit_c(f) = scale * cos(f W', t_c)        (1)
    loss = CE(logits, y) + lambda * ||W - I||_F^2,    lambda = 1 / shots        (2)

by Adam (eps 1e-4) with all N images in a step; the rate follows a cosine to zero over E = 300 steps. The last W is
used. There is no validation: the paper reports rates from 1e-5 to 1e-2 as equally good, because of the penalty.

Departures from the paper and its released code:
1. Fixed views in turn. The released code encodes a new view for each of the 300 epochs (`views=fresh`).
2. `box.logit_scale` replaces a hard-coded 100 (they agree for OpenAI's CLIP).
3. One template, the data set's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._settings import number
from methods._torch import F, Tensor, no_grad, torch
from methods._training import cosine_lr, descend
from methods._views import ViewsPlan, plan_epoch_views, view_features
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


@method(name="rla", access=Access.TEXT | Access.FEATURES, paper="arXiv:2410.05270", new_classes=True)
class RegularizedLinearAdapter(Method):
    """A linear map of the image features, regularized towards the identity."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        lr: float = 1e-5
        """Initial learning rate of Adam."""
        eps: float = number(1e-4, above=0)
        """Adam's epsilon."""
        epochs: int = 300
        """E: steps on all training images."""
        penalty: float | None = None
        """Lambda, the weight of the penalty; None = 1 / shots."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ViewsPlan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        return plan_epoch_views(shape, remaining, text, self.config.epochs)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ViewsPlan) -> None:
        self.epoch, self.labels_N, self.logit_scale = 0, task.train.labels, box.logit_scale
        self.penalty = 1 / task.shots if self.config.penalty is None else self.config.penalty
        self.text_CD = box.text_features(task.classes.prompts())[0]
        self.map_DD = torch.eye(box.feature_dim).requires_grad_()
        self.optimizer = torch.optim.Adam([self.map_DD], eps=self.config.eps)
        self.views = view_features(task, plan.views, self.config.epochs, box)
        self.trainable_params = self.map_DD.numel()
        self.notes.update(views=plan.views, penalty=self.penalty)

    def step(self, box: BlackBox) -> bool:
        """Run one epoch, a single step of Adam."""
        features_ND = self.views.of(self.epoch, box.image_features)
        distance = (self.map_DD - torch.eye(len(self.map_DD))).square().sum()
        loss = F.cross_entropy(self.logits(features_ND, self.text_CD), self.labels_N) + self.penalty * distance  # (2)
        self.optimizer.param_groups[0]["lr"] = cosine_lr(self.config.lr, self.epoch, self.config.epochs)
        descend(self.optimizer, loss, f"loss in epoch {self.epoch + 1}")
        self.epoch += 1
        return self.epoch < self.config.epochs

    def logits(self, features_BD: Tensor, text_CD: Tensor) -> Tensor:
        """Return the logits [B, C] (1)."""
        return self.logit_scale * F.normalize(features_BD @ self.map_DD.T, dim=-1) @ text_CD.T

    @no_grad
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        text_CD = self.text_CD if classes is None else box.text_features(classes.prompts())[0]
        return self.logits(box.image_features(images), text_CD)

    def deployed(self) -> dict[str, Tensor]:
        return {"map_DD": self.map_DD.detach(), "text_CD": self.text_CD}
