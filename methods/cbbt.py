"""CBBT: the estimated-gradient prompt of `cbbt_prompt`, and an adapter on the image features trained with it.

What is learned: the prompt's tokens [T, E] by estimated gradient, and on the client the adapter's 2 * D * H numbers by
true gradient. Both learn from the same batch in the same step.
Shapes: N training images, B images in a batch, C classes, D feature width, H = D / reduction, V views, T learned
tokens, E token-embedding width, Q directions, P = Q + 1 prompt sets in a step.
Cost: the features of the training views once (fixed views: 1 request, V * N images; fresh views: 1 request, N images
per epoch), then P requests, P * C prompts, P * C * D outputs per step. The published schedule on 160 images: 192,751
requests. The allotment's images pay for views (without any, the prompt stays the template's and there is no adapter),
then its requests for the steps by the rule of `cbbt_prompt`. If there are fewer fresh views than epochs, they are used
in turn.
Prediction: 1 request, B image rows, and 1 prompt set a call.
Paper: Guo et al., Black-Box Tuning of Vision-Language Models with Effective Gradient Approximation, Findings of EMNLP
2023, arXiv:2312.15901. The adapter is CLIP-Adapter's, Gao et al., arXiv:2110.04544:

    x' = ratio * relu(relu(x W1) W2) + (1 - ratio) * x    (1)    logits = logit_scale * cos(x', t(ctx))    (2)

The adapter's trainer was never released. Sources of what is inferred:
1. The abstract: a lightweight adapter over the output feature, tuned together with the prompt.
2. The released script (main_adapter.sh: `adapter_ratio 0.2`) and defaults (train.py: `adapter_startepoch` 10):
   CLIP-Adapter's residual ratio 0.2, and an adapter that joins after 10 of the 150 epochs. That default is only used
   by the other released script, for a Tip-Adapter variant, which is not implemented here.
3. Its config (CBBTadapter/vit_b16.yaml): the prompt's Adam settings, schedule and batch, used for both parts.
4. Stated nowhere and chosen here: the image side, reduction 4, no bias, and prompt losses through the adapter.

Departures from the released code: those of `cbbt_prompt`, and:
1. Fixed views are cached as features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from methods._settings import number
from methods._torch import F, Tensor, torch
from methods._training import linear_init, mean_cross_entropy
from methods._views import n_views_used, view_features, view_features_bill
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
        self.w1_DH, self.w2_HD = (linear_init((i, o), i, generator) for i, o in ((dim, hidden), (hidden, dim)))
        weights = [self.w1_DH, self.w2_HD]
        self.optimizer = torch.optim.Adam(weights, lr=config.lr, weight_decay=config.weight_decay)

    def __call__(self, x_BD: Tensor) -> Tensor:
        """Return the adapted features at unit length, with gradients (1)."""
        bottleneck_BD = ((x_BD @ self.w1_DH).relu() @ self.w2_HD).relu()
        return F.normalize(self.ratio * bottleneck_BD + (1 - self.ratio) * x_BD, dim=-1)


@method(name="cbbt", access=Access.SOFT | Access.FEATURES, paper="arXiv:2312.15901", new_classes=True)
class CBBT(CBBTPrompt):
    """CBBT's estimated-gradient prompt with a feature adapter trained with it (inferred: its code is unreleased)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(CBBTPrompt.Config):
        """Settings of the prompt and of the adapter."""

        n_directions: int = number(CBBTPrompt.Config.n_directions, at_least=0)
        """As in `cbbt_prompt`; 0 = the prompt stays the template's."""
        min_directions: int = number(CBBTPrompt.Config.min_directions, at_least=0)
        """As in `cbbt_prompt`."""
        ratio: float = number(0.2, at_most=1)
        """Weight of the adapter's output in the adapted feature; 0 = the prompt alone."""
        reduction: int = 4
        """D / H: reduction factor of the bottleneck."""
        adapter_start_epoch: int = number(10, at_least=0)
        """Epoch of the published schedule from which the adapter is trained and used."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> CBBTPlan:
        steps, directions, views = self._schedule_with_views(shape, remaining)
        text = Bill.text_features(directions + 1, shape.n_classes, shape.feature_dim) * steps
        bill = text + view_features_bill(shape, views)
        return CBBTPlan(bill=bill, steps=steps, directions=directions, views=views)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: CBBTPlan) -> None:
        super().start(task, box, rng, plan)
        self.logit_scale = box.logit_scale
        self.adapter = Adapter(box.feature_dim, self.config, self.generator)
        self.adapter_joined = False
        self.trainable_params += self.adapter.w1_DH.numel() + self.adapter.w2_HD.numel()
        if plan.steps:
            epochs = math.ceil(plan.steps / self._batches_per_epoch(len(task.train.labels)))
            self.views = view_features(task, plan.views, epochs, box)

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

        loss = F.cross_entropy(self.logit_scale * adapted_BD @ text_PCD[0].T, labels_B)
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
