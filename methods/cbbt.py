"""CBBT: the estimated-gradient prompt of `cbbt_prompt`, and an adapter on the image features trained beside it.

What is learned: the prompt's tokens [T, E], through the endpoint, by estimated gradient; and on the client, by true
gradient, the adapter's 2 * D * H numbers. Both learn from the same batch in the same step.
Shapes: N training images, B images in a batch, C classes, D feature width, H = D / reduction, V views, T learned
tokens, E token-embedding width, Q directions, P = Q + 1 prompt sets in a step.
Cost: the views of the training images once: fixed ones in 1 request of V * N images, fresh ones in a request of N
    images in each epoch. A step then asks P requests, no image, P * C prompts, P * C * D outputs.
    The published schedule on 160 images: 192,750 requests + 1.
    Within an allotment: as many views as its images pay (if none, the prompt stays the template's and there is no
    adapter), then the steps by `cbbt_prompt`'s rule from the requests left. Where fresh views run out before the
    epochs do, they are learned from in turn.
Prediction asks the features of each image, and of 1 prompt set a call.
Paper: Guo et al., Black-Box Tuning of Vision-Language Models with Effective Gradient Approximation, Findings of EMNLP
2023, arXiv:2312.15901. The adapter is CLIP-Adapter's, Gao et al., arXiv:2110.04544:
    x' = ratio * relu(relu(x W1) W2) + (1 - ratio) * x,        logits = logit_scale * cos(x', t(ctx))        (1)

Inferred, because the adapter's trainer was never released:
1. From the abstract: a lightweight adapter over the output feature, tuned together with the prompt.
2. From the released script (main_adapter.sh: `adapter_ratio 0.2`) and defaults (train.py: `adapter_startepoch` 10):
   CLIP-Adapter's residual ratio 0.2, and an adapter that joins after 10 of the 150 epochs. That default is only seen
   in use with the other released script, for a Tip-Adapter variant, which is not built here.
3. From its config (CBBTadapter/vit_b16.yaml): the prompt's Adam settings, schedule and batch, used for both parts.
4. Stated nowhere, our choice: the image side, reduction 4, no bias, and prompt losses seen through the adapter.
Departs from the released code in the points of `cbbt_prompt`, and in one more: fixed views are kept as features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from methods._training import mean_cross_entropy
from methods._views import EpochViews, n_views_used, training_views
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Remaining,
    SoftPrompts,
    TaskShape,
    method,
)
from methods.cbbt_prompt import CBBTPlan, CBBTPrompt


class Adapter:
    """CLIP-Adapter's bottleneck on unit features, with its Adam state."""

    def __init__(self, dim: int, config: CBBT.Config, generator: torch.Generator) -> None:
        hidden, self.ratio = max(1, dim // config.reduction), config.ratio
        self.w1_DH, self.w2_HD = (
            # torch's own start for a linear layer: uniform within 1 / sqrt(inputs)
            ((torch.rand(i, o, generator=generator) * 2 - 1) * i**-0.5).requires_grad_()
            for i, o in ((dim, hidden), (hidden, dim))
        )
        weights = [self.w1_DH, self.w2_HD]
        self.optimizer = torch.optim.Adam(weights, lr=config.lr, weight_decay=config.weight_decay)

    def __call__(self, x_BD: Tensor) -> Tensor:
        """Return the adapted features at unit length, with gradients (1)."""
        bottleneck_BD = ((x_BD @ self.w1_DH).relu() @ self.w2_HD).relu()
        return normalize(self.ratio * bottleneck_BD + (1 - self.ratio) * x_BD, dim=-1)


@method(name="cbbt", access=Access.SOFT | Access.FEATURES, paper="arXiv:2312.15901", new_classes=True)
class CBBT(CBBTPrompt):
    """CBBT's estimated-gradient prompt with a feature adapter trained beside it (its code is unreleased: inferred)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(CBBTPrompt.Config):
        """The prompt's settings and the adapter's."""

        ratio: float = 0.2
        """Share of the adapter's output in the adapted feature; 0 = the prompt alone."""
        reduction: int = 4
        """D / H: reduction of the bottleneck."""
        adapter_start_epoch: int = 10
        """Epoch of the published schedule from which the adapter is trained and used."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> CBBTPlan:
        n, d = shape.n_train, shape.feature_dim
        steps, directions, views = self._schedule_with_views(shape, remaining)
        bill = Bill.text_features(directions + 1, shape.n_classes, d) * steps
        if shape.fresh_views:
            bill += Bill.image_features(n, d) * views
        elif views:
            bill += Bill.image_features(views * n, d)
        return CBBTPlan(bill=bill, steps=steps, directions=directions, views=views)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: CBBTPlan) -> None:
        super().start(task, box, rng, plan)
        c, v = self.config, plan.views
        self.logit_scale = box.logit_scale
        self.adapter = Adapter(box.feature_dim, c, self.generator)
        self.adapter_joined = False
        self.trainable_params += self.adapter.w1_DH.numel() + self.adapter.w2_HD.numel()
        if not plan.steps:
            return
        bank_VND = None
        if not task.fresh_views:
            bank_VND = box.image_features(training_views(task, v)).view(v, -1, box.feature_dim)
        epochs = math.ceil(plan.steps / self._batches_per_epoch(len(task.train.labels)))
        self.views = EpochViews(task, v, epochs, bank_VND)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        text_CD = box.text_features(self._prompts(classes or self.classes))[0]
        with torch.no_grad():
            x_BD = box.image_features(images)
            return self.logit_scale * (self.adapter(x_BD) if self.adapter_joined else x_BD) @ text_CD.T

    def deployed(self) -> dict[str, Tensor]:
        return {**super().deployed(), "w1_DH": self.adapter.w1_DH.detach(), "w2_HD": self.adapter.w2_HD.detach()}

    def _losses(self, box: BlackBox, prompts: SoftPrompts, rows_B: Tensor) -> Tensor:
        """Return the loss [P] of each prompt set through the current adapter, then train the adapter on the batch."""
        x_BD, labels_B = self.views.of(self.epoch, box.image_features)[rows_B], self.task.train.labels[rows_B]
        text_PCD = box.text_features(prompts)
        if self._schedule_epoch() < self.config.adapter_start_epoch:
            return mean_cross_entropy(self.logit_scale * x_BD @ text_PCD.transpose(1, 2), labels_B)
        adapted_BD = self.adapter(x_BD)
        losses_P = mean_cross_entropy(self.logit_scale * adapted_BD.detach() @ text_PCD.transpose(1, 2), labels_B)

        loss = cross_entropy(self.logit_scale * adapted_BD @ text_PCD[0].T, labels_B)
        self.adapter.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam_step(self.adapter.optimizer)
        self.adapter_joined = True
        return losses_P

    def _schedule_with_views(self, shape: TaskShape, remaining: Remaining) -> tuple[int, int, int]:
        """Return (steps, directions, views): views are paid for first, then steps from the remaining requests."""
        n, requests = shape.n_train, remaining.requests
        payable = remaining.affords(Bill(images=n))
        steps, directions = self._schedule(n, None if math.isinf(requests) else int(requests) - 1)
        while steps:
            views = n_views_used(shape, math.ceil(steps / self._batches_per_epoch(n)))
            views = views if payable is None else min(views, payable)
            if not views:
                break
            if steps * (directions + 1) + (views if shape.fresh_views else 1) <= requests:
                return steps, directions, views
            steps -= 1  # make room for the requests of fresh views
        return 0, 0, 0
