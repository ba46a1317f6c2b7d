"""TaskRes: a residual on the text features, learned on cached image features.

What is learned: x [C, D], zero at first, so that the start is zero-shot; C * D numbers.
Shapes: B images in a call, C classes, D feature width, N training images, V views, E epochs.
Cost: 1 request (C prompts) for the text features; then V * N image rows, in 1 request for V fixed views, or in V
requests of N rows, one an epoch, for fresh views (V = E). Prediction asks features: 1 request, B image rows a call.
Paper: Yu et al., Task Residual for Tuning Vision-Language Models, arXiv:2211.10277; symbols are the paper's:

    t'_c = t_c + alpha * x_c            logit_c(f) = scale * cos(f, t'_c)

trained by cross-entropy with Adam. Learning rate of epoch e, as Dassl composes its schedulers (the cosine stands still
during the warm-up and counts from 0 when that ends, over E and not E - 1 epochs, so that it never reaches zero):

    lr(0) = 1e-5            lr(e) = lr * (1 + cos(pi * (e - 1) / E)) / 2,  e = 1 .. E - 1

The loader drops the short last batch when there is more than a batch of images. The last epoch's x is used.

Within the allotment: all E epochs are always run, since they cost nothing here. V = the fixed views that the task
offers (or E when fresh), cut to what remains after the text features, at least 1; epoch e learns view e mod V.

Departs from the paper and its released code:
1. Fixed views, reused, by default; the released loader draws a new view an epoch (`views=fresh`).
2. t has unit length, as the endpoint returns it. The released t keeps the tower's length s (it varies a little by
   class), which after the cosine is this method with alpha / s.
3. One template, the data set's; the released ImageNet run averages 8 (docs/methods/taskres.md).
4. The "enhanced base" (a text projection fine-tuned with gradients) is not black-box and not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

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
from methods.optim import EpochViews, affordable, shuffled_batches, training_views, views_wanted, warm_cosine_lr


@method(name="taskres", access=Access.TEXT | Access.FEATURES, paper="arXiv:2211.10277")
class TaskRes(Method):
    """A learned offset on each class's text feature."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        alpha: float = 0.5
        """Residual scale; 0 leaves zero-shot."""
        lr: float = 2e-3
        """Adam's learning rate after the warm-up."""
        weight_decay: float = 5e-4
        """Adam's L2 term: Dassl's default, which the released configs leave in force and the paper does not mention."""
        batch_size: int = 256
        """Images in a step."""
        epochs: int | None = None
        """Passes over the training images; None: 100 up to 4 shots, 200 above."""
        warmup_epochs: int = 1
        """Epochs at `warmup_lr` before the cosine starts."""
        warmup_lr: float = 1e-5
        """The constant learning rate of the warm-up."""

    config: Config

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        shape = TaskShape.of(task, box.feature_dim)
        self.epochs, self.epoch = self._epochs(shape), 0
        n_views = self._views(shape, box.remaining)
        self.generator = torch_generator(rng)
        self.labels_N = task.train.labels
        self.logit_scale = box.logit_scale
        self.text_CD = box.text_features(task.classes.prompts())[0]
        self.residual_CD = torch.zeros_like(self.text_CD, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.residual_CD], weight_decay=self.config.weight_decay)
        bank_VND = None
        if not task.fresh_views:
            bank_VND = box.image_features(training_views(task, n_views)).view(n_views, shape.n_train, -1)
        self.views = EpochViews(task, n_views, self.epochs, bank_VND)
        self.trainable_params = self.residual_CD.numel()
        self.notes.update(epochs=self.epochs, views=n_views)

    def step(self, box: BlackBox) -> bool:
        features_ND = self.views.of(self.epoch, box.image_features)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.epoch)
        for rows in shuffled_batches(len(self.labels_N), self.config.batch_size, self.generator, drop_last=True):
            logits_BC = self.logit_scale * features_ND[rows] @ self.classifier().T
            loss = cross_entropy(logits_BC, self.labels_N[rows])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.epoch += 1
        return self.epoch < self.epochs

    def learning_rate(self, epoch: int) -> float:
        """The rate of one whole epoch: the warm-up's constant, then a cosine over `epochs` that starts after it."""
        c = self.config
        return warm_cosine_lr(c.lr, c.warmup_lr, epoch, self.epochs, c.warmup_epochs)

    def classifier(self) -> Tensor:
        """t' = t + alpha * x at unit length, [C, D]."""
        return normalize(self.text_CD + self.config.alpha * self.residual_CD, dim=-1)

    @torch.no_grad()
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.logit_scale * box.image_features(images) @ self.classifier().T

    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        n_views, d = self._views(shape, remaining), shape.feature_dim
        text = Bill.text_features(1, shape.n_classes, d)
        if shape.fresh_views:
            return text + Bill.image_features(shape.n_train, d) * n_views
        return text + Bill.image_features(shape.n_train * n_views, d)

    def deployed(self) -> dict[str, Tensor]:
        return {"classifier_CD": self.classifier().detach()}

    def _epochs(self, shape: TaskShape) -> int:
        return self.config.epochs or (100 if shape.shots <= 4 else 200)

    def _views(self, shape: TaskShape, remaining: Remaining) -> int:
        left = remaining.minus(Bill.text_features(1, shape.n_classes, shape.feature_dim))
        view = Bill(requests=1 if shape.fresh_views else 0, images=shape.n_train)
        return affordable(views_wanted(shape, self._epochs(shape)), view, left)
