"""ZS-LP and CLAP: a linear probe that starts at the text features, without or with a penalty on what moves away.

What is learned: the class weights W [C, D], at first the text features; C * D numbers. `clap` adds a penalty whose
weight for each class is set once by the zero-shot probabilities of its training images.
Shapes: B images in a batch or a call, C classes, D feature width, N training images, V views, R = V * N rows.
Cost: 1 request (C prompts) for the text features and 1 request, V * N image rows, for the views, all of which are kept
as samples. V = `views`, by default the views that the task offers (20, as released, with fresh views; 1 without views),
cut to what the allotment pays for after the text features, at least 1. All epochs run, since they cost nothing here.
Prediction: 1 request, B image rows a call.
Paper: Silva-Rodriguez et al., A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models,
arXiv:2312.12730 (CVPR 2024), as in its released trainers/adapters.py. With t of unit length, r = `box.text_norm` and s
the logit scale, so that W starts at the scale of the text tower's output:

    w_c = r * t_c at first        (1)        logit_c(f) = s * cos(f, w_c)        (2)
    zs_lp: L = CE(logits, y)      (3)        clap: L = CE(logits, y) + mean_c lambda_c * |w_c - r * t_c|^2      (4)
    lambda_c = mean over the rows of class c of softmax(s * f t')_c                                             (5)

by SGD with momentum. An epoch is a new order of all R rows, of which the first max(1, N // 256) batches of 256 are
used: about 1 / V of them. The learning rate of an epoch is Dassl's, as in `taskres`. The last epoch is used; there is
no validation, by design.

Departures from the released code:
1. One length r for all classes, the model's; the released text features each have their own. With r = 1 a learning
   rate would act r^2 times as strongly, and the penalty 1 / r^2 times.
2. V is the sweep's by default; the release has 20 (`views`, set by hparams=paper), with crops of 8 % to 100 %.
3. One template, the data set's; the released ImageNet run averages 8, at their own lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from methods._settings import number
from methods._torch import F, Tensor, no_grad, torch
from methods._training import descend, shuffled_batches, warm_cosine_lr
from methods._views import ViewsPlan, plan_views, training_views
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

RELEASED_VIEWS = 20


@method(name="zs_lp", access=Access.TEXT | Access.FEATURES, paper="arXiv:2312.12730", uses_text_norm=True)
class ZeroShotLinearProbe(Method):
    """A linear probe without bias on unit-length features, started at the text features."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings, the same for every data set."""

        views: int | None = None
        """V: augmented views that are kept as samples; None = those that the task offers."""
        lr: float = 0.1
        """Learning rate of SGD after the warm-up."""
        momentum: float = number(0.9, at_most=1)
        """Momentum of SGD."""
        batch_size: int = 256
        """Rows per step."""
        epochs: int = 300
        """Epochs of max(1, N // `batch_size`) steps."""
        warmup_epochs: int = number(1, at_least=0)
        """Epochs at `warmup_lr` before the cosine starts."""
        warmup_lr: float = 1e-5
        """Learning rate during the warm-up."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ViewsPlan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        offered = RELEASED_VIEWS if shape.fresh_views else shape.views
        wanted = (self.config.views or offered) if shape.views else 1  # without views: the plain images
        return plan_views(shape, remaining, text, wanted)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ViewsPlan) -> None:
        self.epoch, self.generator, self.logit_scale = 0, torch_generator(rng), box.logit_scale
        self.text_CD = box.text_norm * box.text_features(task.classes.prompts())[0]
        self.rows_RD = box.image_features(training_views(task, plan.views))
        self.labels_R = task.train.labels.repeat(plan.views)
        self.n_batches = max(1, len(task.train.labels) // self.config.batch_size)
        self.weight_CD = self.text_CD.clone().requires_grad_()  # (1)
        self.optimizer = torch.optim.SGD([self.weight_CD], lr=self.config.lr, momentum=self.config.momentum)
        self.trainable_params = self.weight_CD.numel()
        self.notes.update(epochs=self.config.epochs, views=plan.views, text_norm=box.text_norm)

    def step(self, box: BlackBox) -> bool:
        """Run one epoch of SGD."""
        c = self.config
        rate = warm_cosine_lr(c.lr, c.warmup_lr, self.epoch, c.epochs, c.warmup_epochs)
        self.optimizer.param_groups[0]["lr"] = rate
        batches = shuffled_batches(len(self.labels_R), c.batch_size, self.generator)
        for rows_B in islice(batches, self.n_batches):
            logits_BC, labels_B = self.logits(self.rows_RD[rows_B]), self.labels_R[rows_B]
            loss = F.cross_entropy(logits_BC, labels_B) + self.penalty()  # (3), (4)
            descend(self.optimizer, loss, f"loss in epoch {self.epoch + 1}")
        self.epoch += 1
        return self.epoch < c.epochs

    def penalty(self) -> Tensor | float:
        """Return what is added to the cross-entropy: nothing (3)."""
        return 0.0

    def logits(self, features_BD: Tensor) -> Tensor:
        """Return the logits [B, C] (2)."""
        return self.logit_scale * features_BD @ F.normalize(self.weight_CD, dim=-1).T

    @no_grad
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.logits(box.image_features(images))

    def deployed(self) -> dict[str, Tensor]:
        return {"weight_CD": self.weight_CD.detach()}


@method(name="clap", access=Access.TEXT | Access.FEATURES, paper="arXiv:2312.12730", uses_text_norm=True)
class CLAP(ZeroShotLinearProbe):
    """ZS-LP with a penalty on the distance from the text features, weighted by class."""

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ViewsPlan) -> None:
        super().start(task, box, rng, plan)
        with torch.no_grad():
            own_R = self.logits(self.rows_RD).softmax(-1)[torch.arange(len(self.labels_R)), self.labels_R]
        n_C = torch.bincount(self.labels_R, minlength=len(self.text_CD)).clamp(min=1)
        self.lambda_C = torch.zeros(len(self.text_CD)).index_add_(0, self.labels_R, own_R) / n_C  # (5)
        self.notes["mean_lambda"] = float(self.lambda_C.mean())

    def penalty(self) -> Tensor:
        """Return the mean over classes of lambda_c |w_c - r t_c|^2 (4)."""
        return (self.lambda_C * (self.weight_CD - self.text_CD).square().sum(-1)).mean()
