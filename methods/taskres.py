"""TaskRes: a residual on the text features, learned on cached image features.

What is learned: x [C, D], zero at first, so that the start is zero-shot; C * D numbers. The paper's own comparisons are
settings: `enhanced` first learns a map W [D, D] of the text features; `image_side` learns x [1, D] (X: C or 1 rows).
Shapes: B images in a call, C classes, D feature width, N training images, V views, E epochs.
Cost: 1 request (C prompts) for the text features; then V * N image rows, in 1 request for V fixed views, or in V
requests of N rows, one an epoch, for fresh views (V = E). Prediction asks features: 1 request, B image rows a call.
Paper: Yu et al., Task Residual for Tuning Vision-Language Models, arXiv:2211.10277; symbols are the paper's:

    t'_c = t_c + alpha * x_c            logit_c(f) = scale * cos(f, t'_c)

trained by cross-entropy with Adam. Learning rate of epoch e, as Dassl composes its schedulers (the cosine stands still
during the warm-up and counts from 0 when that ends, over E and not E - 1 epochs, so that it never reaches zero):

    lr(0) = 1e-5            lr(e) = lr * (1 + cos(pi * (e - 1) / E)) / 2,  e = 1 .. E - 1

The loader drops the short last batch when there is more than a batch of images. The last epoch's x is used.

The enhanced base is the paper's t after CLIP's text projection has been tuned on the task's own images: t W, with W
[D, D] from the identity, trained alone for `base_epochs` and then fixed beneath x. W follows the projection, so where
that has full row rank every tuned projection is some W: what took the white box in the paper takes features here.
The image residual moves the image feature instead, by one x for all classes: cos(f + alpha * x, t_c).

Within the allotment: all E epochs are always run, since they cost nothing here. V = the fixed views that the task
offers (or E when fresh), cut to what remains after the text features, at least 1; epoch e learns view e mod V.

Departs from the paper and its released code:
1. Fixed views, reused, by default; the released loader draws a new view an epoch (`views=fresh`).
2. t has unit length, as the endpoint returns it. The released t keeps the tower's length s (it varies a little by
   class), which after the cosine is this method with alpha / s.
3. One template, the data set's; the released ImageNet run averages 8 (docs/methods/taskres.md).
4. The enhanced base's training was not released (its weights were): Adam, the epochs' shape and the views are those of
   x, `base_lr` and `base_epochs` are ours, fixed once and not tuned.
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
from methods.finite import finite
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
        enhanced: bool = False
        """The enhanced base: x is added to the text features after a map that is learned first."""
        base_lr: float = 2e-4
        """Adam's learning rate for that map, with the schedule of x."""
        base_epochs: int = 50
        """Epochs in which it is learned, before those of x."""
        image_side: bool = False
        """x moves every image feature, not each class's text feature."""

    config: Config

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        c, shape = self.config, TaskShape.of(task, box.feature_dim)
        self.epochs, self.epoch = self._epochs(shape), 0
        n_views = self._views(shape, box.remaining)
        self.generator = torch_generator(rng)
        self.labels_N = task.train.labels
        self.logit_scale = box.logit_scale
        self.base_CD = box.text_features(task.classes.prompts())[0]
        self.residual_XD = torch.zeros_like(self.base_CD[:1] if c.image_side else self.base_CD, requires_grad=True)
        self.map_DD = torch.eye(shape.feature_dim, requires_grad=True) if c.enhanced else None
        self.optimizer = self._adam(self.residual_XD if self.map_DD is None else self.map_DD)
        bank_VND = None
        if not task.fresh_views:
            bank_VND = box.image_features(training_views(task, n_views)).view(n_views, shape.n_train, -1)
        self.views = EpochViews(task, n_views, self.base_epochs + self.epochs, bank_VND)
        self.trainable_params = self.residual_XD.numel() + (0 if self.map_DD is None else self.map_DD.numel())
        self.notes.update(epochs=self.epochs, views=n_views)

    def step(self, box: BlackBox) -> bool:
        """One epoch: of the map while the base is being enhanced, then of the residual."""
        features_ND = self.views.of(self.epoch, box.image_features)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.epoch)
        for rows in shuffled_batches(len(self.labels_N), self.config.batch_size, self.generator, drop_last=True):
            loss = cross_entropy(self._logits(features_ND[rows]), self.labels_N[rows])
            finite(loss, f"loss in epoch {self.epoch + 1}")
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.epoch += 1
        if self.map_DD is not None and self.epoch == self.base_epochs:
            self.base_CD, self.map_DD = self.base().detach(), None
            self.optimizer = self._adam(self.residual_XD)
        if self.epoch < self.base_epochs + self.epochs:
            return True
        self.notes["turned_degrees"] = self.turned_degrees()
        return False

    def learning_rate(self, epoch: int) -> float:
        """The rate of one whole epoch: the warm-up's constant, then a cosine over `epochs` that starts after it."""
        c = self.config
        lr, after, total = c.lr, epoch - self.base_epochs, self.epochs
        if after < 0:
            lr, after, total = c.base_lr, epoch, self.base_epochs
        return warm_cosine_lr(lr, c.warmup_lr, after, total, c.warmup_epochs)

    def base(self) -> Tensor:
        """t, or t W while W is learned, at unit length; [C, D]."""
        return self.base_CD if self.map_DD is None else normalize(self.base_CD @ self.map_DD, dim=-1)

    def classifier(self) -> Tensor:
        """t' = t + alpha * x at unit length, [C, D]; t where x moves the images."""
        if self.config.image_side:
            return self.base()
        return normalize(self.base() + self.config.alpha * self.residual_XD, dim=-1)

    def turned_degrees(self) -> float:
        """Mean angle by which the residual turned the classes' text features; 0 where it moves the images."""
        with torch.no_grad():
            return float((self.base() * self.classifier()).sum(-1).clamp(-1, 1).arccos().rad2deg().mean())

    def _logits(self, features_BD: Tensor) -> Tensor:
        if self.config.image_side:
            features_BD = normalize(features_BD + self.config.alpha * self.residual_XD, dim=-1)
        return self.logit_scale * features_BD @ self.classifier().T

    @torch.no_grad()
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self._logits(box.image_features(images))

    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        n_views, d = self._views(shape, remaining), shape.feature_dim
        text = Bill.text_features(1, shape.n_classes, d)
        if shape.fresh_views:
            return text + Bill.image_features(shape.n_train, d) * n_views
        return text + Bill.image_features(shape.n_train * n_views, d)

    def deployed(self) -> dict[str, Tensor]:
        moved = {"residual_XD": self.residual_XD.detach()} if self.config.image_side else {}
        return {"classifier_CD": self.classifier().detach(), **moved}

    def _adam(self, learned: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([learned], weight_decay=self.config.weight_decay)

    @property
    def base_epochs(self) -> int:
        """Epochs before those of the residual."""
        return self.config.base_epochs if self.config.enhanced else 0

    def _epochs(self, shape: TaskShape) -> int:
        return self.config.epochs or (100 if shape.shots <= 4 else 200)

    def _views(self, shape: TaskShape, remaining: Remaining) -> int:
        left = remaining.minus(Bill.text_features(1, shape.n_classes, shape.feature_dim))
        view = Bill(requests=1 if shape.fresh_views else 0, images=shape.n_train)
        return affordable(views_wanted(shape, self.base_epochs + self._epochs(shape)), view, left)
