"""TaskRes on unit-length text features, and its own two comparisons: enhanced base, residual on the image side.

What is learned: `taskres_unit`: x [C, D], as `taskres`. `taskres_enhanced`: a map W [D, D] of the text features, then
x [C, D]. `taskres_image_side`: x [1, D].
Shapes: B images in a call, C classes, D feature width, N training images, V views.
Cost: that of `taskres`; the epochs of W count as epochs, so more fresh views are used. Prediction: as `taskres`.
Paper: Yu et al., Task Residual for Tuning Vision-Language Models, arXiv:2211.10277. `taskres_unit` takes s = 1 in
equation 1 of `taskres`: its alpha a is `taskres`'s alpha s * a. The enhanced base is the paper's t after CLIP's text
projection was tuned on the task's images:

    t W, with W from the identity, trained alone for `base_epochs` and then fixed below x        (1)

W follows the projection, so where the projection has full row rank every tuned projection is some W: what needed the
white box in the paper needs features here. The image-side residual moves the image feature, by one x for all classes:

    logit_c(f) = scale * cos(f + alpha * x, t_c)        (2)

Departures: those of `taskres`, and:
1. The training of the enhanced base was not released (its weights were). Adam, the schedule and the views are those of
   x; `base_lr` and `base_epochs` are ours, fixed once and not tuned.
2. The released enhanced base keeps the length of the tuned projection's output. Here t W has the length `text_norm`,
   which is that before tuning.
3. No image-side residual was released. f has unit length, and alpha applies to that: the endpoint tells no length of
   image features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._torch import F, Tensor, torch
from methods._training import warm_cosine_lr
from methods._views import ViewsPlan
from methods.base import Access, BlackBox, FewShotTask, method
from methods.taskres import TaskRes


@method(name="taskres_unit", access=Access.TEXT | Access.FEATURES, paper="arXiv:2211.10277", version=1)
class TaskResUnit(TaskRes):
    """TaskRes with its scale alpha on text features of unit length."""

    def _text_norm(self, box: BlackBox) -> float:
        return 1.0


@method(
    name="taskres_enhanced",
    access=Access.TEXT | Access.FEATURES,
    paper="arXiv:2211.10277",
    version=2,
    uses_text_norm=True,
)
class TaskResEnhanced(TaskRes):
    """TaskRes on text features that a learned map has moved first."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskRes.Config):
        """The settings of TaskRes, and those of the map."""

        base_lr: float = 2e-4
        """Learning rate of Adam for the map, with the schedule of x."""
        base_epochs: int = 50
        """Epochs in which the map is learned, before those of x."""

    config: Config

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ViewsPlan) -> None:
        super().start(task, box, rng, plan)
        self.map_DD: Tensor | None = torch.eye(box.feature_dim, requires_grad=True)
        self.optimizer = self._adam(self.map_DD)
        self.trainable_params += self.map_DD.numel()

    def step(self, box: BlackBox) -> bool:
        """Run one epoch of the map, or afterwards of the residual."""
        more = super().step(box)
        if self.map_DD is not None and self.epoch == self.config.base_epochs:
            self.text_CD, self.map_DD = self.base().detach(), None
            self.optimizer = self._adam(self.residual_XD)
        return more

    def learning_rate(self, epoch: int) -> float:
        """Return the rate of one epoch: the schedule of the map, then that of the residual."""
        c = self.config
        if epoch < c.base_epochs:
            return warm_cosine_lr(c.base_lr, c.warmup_lr, epoch, c.base_epochs, c.warmup_epochs)
        epochs = self.n_epochs - c.base_epochs
        return warm_cosine_lr(c.lr, c.warmup_lr, epoch - c.base_epochs, epochs, c.warmup_epochs)

    def base(self) -> Tensor:
        """Return t W at unit length while W is learned (1), afterwards the fixed base; [C, D]."""
        return self.text_CD if self.map_DD is None else F.normalize(self.text_CD @ self.map_DD, dim=-1)

    def _n_epochs(self, shots: int) -> int:
        return self.config.base_epochs + super()._n_epochs(shots)


@method(name="taskres_image_side", access=Access.TEXT | Access.FEATURES, paper="arXiv:2211.10277", version=1)
class TaskResImageSide(TaskResUnit):
    """A learned offset on every image feature instead of each class's text feature."""

    def classifier(self) -> Tensor:
        """Return t [C, D], which stays as it is."""
        return self.base()

    def logits(self, features_BD: Tensor) -> Tensor:
        """Return the logits [B, C] (2)."""
        return super().logits(F.normalize(features_BD + self.config.alpha * self.residual_XD, dim=-1))

    def deployed(self) -> dict[str, Tensor]:
        return {**super().deployed(), "residual_XD": self.residual_XD.detach()}

    def _zero_residual(self) -> Tensor:
        return torch.zeros_like(self.text_CD[:1])
