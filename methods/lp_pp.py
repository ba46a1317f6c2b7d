"""LP++: a linear probe whose class weights are mixed with the text features by a learned weight per class.

What is learned: w [C, D], a bias b [C] and the text's weight alpha [C]; C * D + 2C numbers.
Shapes: B images in a call, C classes, D feature width, N training images, M validation images.
Cost: 1 request (C prompts) for the text features; 1 request, N image rows for one view of the training images; 1
request, M image rows for the validation features, which choose the epoch. If the allotment does not pay for all, or
there are no validation images, the last epoch is kept.
Prediction: 1 request, B image rows a call.
Paper: Huang et al., LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, arXiv:2404.02285 (CVPR 2024); symbols
are the paper's, f and t have unit length:

    logit_c(f) = f . (w_c + alpha_c * t_c) + b_c        trained by cross-entropy        (1)
    w_c(0) = sum of the f of class c,    b_c(0) = 0,    alpha_c(0) = 250 * mean_c mean_{i of c} f_i . t_c        (2)
    lr_w = 4 N / lambda_max(F' F)        lr_alpha = N / (4 * max_c sum_i (f_i . t_c)^2)        (3)

300 epochs, each one step of SGD with momentum 0.9 on w and b, with all N images. After every 10th epoch,
alpha <- alpha - lr_alpha * G, where G is the sum of the gradients of all epochs so far, as the released code computes
it: only w and b are in its optimizer, so the gradient of alpha is never set to zero (`accumulate_alpha_gradient`). The
epoch with the best validation accuracy is kept, the last of equals.

Departures from the paper and its released code:
1. min(shots, 4) validation images per class choose the epoch. The released code takes as many as shots.
2. One template, the data set's, and float32; the released code computes in float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._torch import F, Tensor, torch
from methods._views import ValidationPlan, plan_validation, training_views
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


@method(name="lp_pp", access=Access.TEXT | Access.FEATURES, paper="arXiv:2404.02285")
class LPPlusPlus(Method):
    """A linear probe mixed with the text features, its step sizes derived from the features."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        epochs: int = 300
        """Steps on all training images."""
        momentum: float = number(0.9, at_most=1)
        """Momentum of SGD on w and b."""
        alpha_every: int = 10
        """Epochs between two steps of alpha."""
        alpha_scale: float = 250.0
        """Factor of the initial alpha (2)."""
        accumulate_alpha_gradient: bool = True
        """Step alpha along the sum of all epochs' gradients, as the released code does; otherwise the last epoch's."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ValidationPlan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        return plan_validation(shape, remaining, text, wanted=1)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ValidationPlan) -> None:
        self.epoch, self.labels_N = 0, task.train.labels
        self.text_CD = box.text_features(task.classes.prompts())[0]
        self.features_ND = box.image_features(training_views(task, 1))
        self.val = (box.image_features(task.val.images), task.val.labels) if plan.search else None

        n, similarity_NC = len(self.labels_N), self.features_ND @ self.text_CD.T
        count_C = torch.bincount(self.labels_N, minlength=len(task.classes)).clamp(min=1)
        self.bias_C = torch.zeros(len(task.classes))
        self.weight_CD = torch.zeros_like(self.text_CD).index_add(0, self.labels_N, self.features_ND)  # (2)
        own_C = self.bias_C.index_add(0, self.labels_N, similarity_NC[torch.arange(n), self.labels_N]) / count_C
        self.alpha_C = torch.full_like(own_C, float(self.config.alpha_scale * own_C.mean()))
        self.alpha_gradient_C = torch.zeros_like(own_C)

        largest = torch.linalg.eigvalsh((self.features_ND.T @ self.features_ND).double())[-1]
        self.lr_weight = 4 * n / float(largest)  # (3)
        self.lr_alpha = n / (4 * float((similarity_NC**2).sum(0).max()))

        learned = [self.weight_CD.requires_grad_(), self.bias_C.requires_grad_()]
        self.optimizer = torch.optim.SGD(learned, lr=self.lr_weight, momentum=self.config.momentum)
        self.best_accuracy, self.best_epoch, self.best = -1.0, 0, self.classifier()
        self.trainable_params = self.weight_CD.numel() + self.bias_C.numel() + self.alpha_C.numel()
        self.notes["searched_on_val"] = len(task.val.labels) * plan.search

    def step(self, box: BlackBox) -> bool:
        """Run the epochs up to the next step of alpha, with that step."""
        for _ in range(min(self.config.alpha_every, self.config.epochs - self.epoch)):
            self._run_epoch()
        self.notes["epoch"] = self.best_epoch
        return self.epoch < self.config.epochs

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Return the weights w_c + alpha_c * t_c [C, D] and the bias [C] of the current epoch."""
        return (self.weight_CD + self.alpha_C[:, None] * self.text_CD).detach(), self.bias_C.detach().clone()

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        weight_CD, bias_C = self.best
        return box.image_features(images) @ weight_CD.T + bias_C

    def deployed(self) -> dict[str, Tensor]:
        return {"weight_CD": self.best[0], "bias_C": self.best[1]}

    def _run_epoch(self) -> None:
        alpha_C = self.alpha_C.detach().requires_grad_()
        weight_CD = self.weight_CD + alpha_C[:, None] * self.text_CD
        loss = F.cross_entropy(self.features_ND @ weight_CD.T + self.bias_C, self.labels_N)  # (1)
        finite(loss, f"loss in epoch {self.epoch + 1}")
        learned = (self.weight_CD, self.bias_C, alpha_C)
        self.weight_CD.grad, self.bias_C.grad, gradient_C = torch.autograd.grad(loss, learned)
        self.optimizer.step()
        self.epoch += 1
        before_C = self.alpha_gradient_C if self.config.accumulate_alpha_gradient else 0
        self.alpha_gradient_C = before_C + gradient_C
        if self.epoch % self.config.alpha_every == 0:
            self.alpha_C = self.alpha_C - self.lr_alpha * self.alpha_gradient_C
        self._keep_best()

    def _keep_best(self) -> None:
        """Keep this epoch's classifier unless an earlier one is better on the validation images."""
        weight_CD, bias_C = self.classifier()
        if self.val is not None:
            features_MD, labels_M = self.val
            logits_MC = finite(features_MD @ weight_CD.T + bias_C, "a validation logit")
            accuracy = (logits_MC.argmax(1) == labels_M).double().mean().item()
            if accuracy < self.best_accuracy:
                return
            self.best_accuracy = accuracy
        self.best_epoch, self.best = self.epoch, (weight_CD, bias_C)
