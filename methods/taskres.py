"""TaskRes: a residual on the text features, learned on cached image features.

What is learned: x [C, D], zero at first, so that the start is zero-shot; C * D numbers.
Shapes: B images in a call, C classes, D feature width, N training images, V views, E epochs.
Cost: 1 request (C prompts) for the text features, then V * N image rows: 1 request for fixed views, V requests for
fresh ones. V = the fixed views that the task offers (E if fresh), cut to what the allotment pays for after the text
features, at least 1. All E epochs run; epoch e uses view e mod V. Prediction: 1 request, B image rows a call.
Paper: Yu et al., Task Residual for Tuning Vision-Language Models, arXiv:2211.10277; symbols are the paper's:

    t'_c = s * t_c + alpha * x_c        (1)        logit_c(f) = scale * cos(f, t'_c)        (2)

with t of unit length and s = `box.text_norm`, the mean length of the text tower's output, to which the released code
adds alpha * x. Trained by cross-entropy with Adam; a short last batch is dropped unless it is the only one; the last x
is used. The rate of epoch e is Dassl's: the cosine starts after the warm-up, over E epochs, and never reaches zero:

    lr(0) = 1e-5            lr(e) = lr * (1 + cos(pi * (e - 1) / E)) / 2,  e = 1 .. E - 1        (3)

Departures from the paper and its released code:
1. Fixed views by default; the released loader draws a new view per epoch (`views=fresh`), with crops of 8 % to 100 %.
2. One length s for all classes; the released text features each have their own. `taskres_unit` has s = 1.
3. One template, the data set's (the released ImageNet run averages 8), and class names with spaces, not underscores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._settings import number
from methods._torch import F, Tensor, no_grad, torch
from methods._training import descend, shuffled_batches, warm_cosine_lr
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
    torch_generator,
)


@method(name="taskres", access=Access.TEXT | Access.FEATURES, paper="arXiv:2211.10277", version=2, uses_text_norm=True)
class TaskRes(Method):
    """A learned offset on each class's text feature."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        alpha: float = 0.5
        """Scale of the residual on text features at the tower's length; 0 = zero-shot."""
        lr: float = 2e-3
        """Learning rate of Adam after the warm-up."""
        weight_decay: float = 5e-4
        """Adam's L2 term: Dassl's default, which the released configs leave in force and the paper does not mention."""
        batch_size: int = 256
        """Images per step."""
        epochs: int | None = None
        """E: passes over the training images; None = 100 up to 4 shots, 200 above."""
        warmup_epochs: int = number(1, at_least=0)
        """Epochs at `warmup_lr` before the cosine starts."""
        warmup_lr: float = 1e-5
        """Learning rate during the warm-up."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ViewsPlan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        return plan_epoch_views(shape, remaining, text, self._n_epochs(shape.shots))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ViewsPlan) -> None:
        self.epoch, self.n_epochs = 0, self._n_epochs(task.shots)
        self.generator = torch_generator(rng)
        self.labels_N, self.logit_scale, self.text_norm = task.train.labels, box.logit_scale, self._text_norm(box)
        self.text_CD = box.text_features(task.classes.prompts())[0]
        self.residual_XD = self._zero_residual().requires_grad_()
        self.optimizer = self._adam(self.residual_XD)
        self.views = view_features(task, plan.views, self.n_epochs, box)
        self.trainable_params = self.residual_XD.numel()
        self.notes.update(epochs=self._residual_epochs(task.shots), views=plan.views)

    def step(self, box: BlackBox) -> bool:
        """Run one epoch of Adam."""
        features_ND = self.views.of(self.epoch, box.image_features)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.epoch)  # (3)
        for rows in shuffled_batches(len(self.labels_N), self.config.batch_size, self.generator, drop_last=True):
            loss = F.cross_entropy(self.logits(features_ND[rows]), self.labels_N[rows])
            descend(self.optimizer, loss, f"loss in epoch {self.epoch + 1}")
        self.epoch += 1
        if self.epoch == self.n_epochs:
            self.notes["classifier_rotation_deg"] = self.classifier_rotation_deg()
        return self.epoch < self.n_epochs

    def learning_rate(self, epoch: int) -> float:
        """Return the rate of one epoch of the residual (3)."""
        return warm_cosine_lr(self.config.lr, self.config.warmup_lr, epoch, self.n_epochs, self.config.warmup_epochs)

    def base(self) -> Tensor:
        """Return the text features t [C, D] that the residual is added to."""
        return self.text_CD

    def classifier(self) -> Tensor:
        """Return t' [C, D] at unit length (1)."""
        return F.normalize(self.base() + self.config.alpha / self.text_norm * self.residual_XD, dim=-1)

    def logits(self, features_BD: Tensor) -> Tensor:
        """Return the logits [B, C] (2)."""
        return self.logit_scale * features_BD @ self.classifier().T

    def classifier_rotation_deg(self) -> float:
        """Return the mean angle in degrees between t and t'."""
        with torch.no_grad():
            return float((self.base() * self.classifier()).sum(-1).clamp(-1, 1).arccos().rad2deg().mean())

    @no_grad
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.logits(box.image_features(images))

    def deployed(self) -> dict[str, Tensor]:
        return {"classifier_CD": self.classifier().detach()}

    def _text_norm(self, box: BlackBox) -> float:  # s
        self.notes["text_norm"] = box.text_norm
        return box.text_norm

    def _zero_residual(self) -> Tensor:
        return torch.zeros_like(self.text_CD)

    def _adam(self, learned: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([learned], weight_decay=self.config.weight_decay)

    def _residual_epochs(self, shots: int) -> int:
        return self.config.epochs or (100 if shots <= 4 else 200)

    def _n_epochs(self, shots: int) -> int:
        return self._residual_epochs(shots)  # all epochs
