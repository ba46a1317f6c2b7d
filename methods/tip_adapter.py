"""Tip-Adapter: zero-shot logits plus a cache of the training features, without training or (-F) with trained keys.

What is learned: two numbers, alpha and beta; `tip_adapter_f` also learns the keys F, N * D numbers.
Shapes: B images in a call, C classes, D feature width, N training images, M validation images, V views, E epochs.
Cost: 1 request (C prompts) for the text features; 1 request, V * N image rows for the keys; 1 request, M image rows for
the validation features. With fresh views, -F adds 1 request and N image rows per epoch. The allotment pays for the
validation images first, then for V = the views that the task offers, at least 1. If not even one view fits beside the
validation images, alpha and beta keep their initial values, as without validation images. -F's fresh views get the
rest, n: epoch e trains on view e mod n, or on the keys' views if n is 0.
Prediction: 1 request, B image rows a call.
Paper: Zhang et al., Tip-Adapter, arXiv:2207.09519 (ECCV 2022); symbols are the paper's:

    F = normalize(mean over views of f_train)        L = onehot(y_train)        (1)
    A(f) = exp(-beta * (1 - f F'))        (2)        logits(f) = scale * f W' + alpha * A(f) L        (3)

alpha and beta: the first with the best validation accuracy of 20 alphas x 200 betas, `0.1 + i * (max - 0.1) / n`.
-F: F is trained by cross-entropy at the initial alpha and beta (AdamW, lr 1e-3, eps 1e-4, a cosine over all steps,
batches of 256), then alpha and beta are searched with the trained keys.

Departures from the paper and its released code:
1. The search uses min(shots, 4) validation images per class. The released code searches on the full validation split
   (on ImageNet: on the test set).
2. -F keeps its last epoch. The released code keeps the epoch with the best *test* accuracy; there is no such option.
3. `box.logit_scale` replaces a hard-coded 100 (they agree for OpenAI's CLIP).
4. The features of a view have unit length before the mean over views, as the endpoint returns them.
5. One template, the data set's; the released ImageNet run averages 7.
6. -F reuses the keys' views by default; the released loader draws a new view per epoch (`views=fresh`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from methods._finite import finite
from methods._torch import F, Tensor, no_grad, torch
from methods._training import cosine_lr, descend, shuffled_batches
from methods._views import EpochViews, ValidationPlan, plan_validation, training_views
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


@dataclass(frozen=True, kw_only=True)
class CachePlan(ValidationPlan):
    """Which images the allotment pays for. The views make the keys; alpha and beta are searched."""

    fresh_views: int = 0
    """Views that -F queries while it trains; 0 = it reuses those of the keys."""


@method(name="tip_adapter", access=Access.TEXT | Access.FEATURES, paper="arXiv:2207.09519")
class TipAdapter(Method):
    """A cache model over the training features, without training."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The most common settings of the paper."""

        init_alpha: float = 1.17
        """Initial weight of the cache, also used while -F trains."""
        init_beta: float = 1.0
        """Initial sharpness of the cache, also used while -F trains."""
        alpha_max: float = 3.0
        """Upper end of the searched alphas, exclusive (second number of the released `search_scale`)."""
        beta_max: float = 7.0
        """Upper end of the searched betas, exclusive (first number of `search_scale`)."""
        n_alphas: int = 20
        """Number of alphas in the grid."""
        n_betas: int = 200
        """Number of betas in the grid."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> CachePlan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        return CachePlan(**vars(plan_validation(shape, remaining, text, max(1, shape.views))))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: CachePlan) -> None:
        self.alpha, self.beta = self.config.init_alpha, self.config.init_beta
        self.scale, self.labels_N, self.n_classes = box.logit_scale, task.train.labels, len(task.classes)
        self.text_CD = box.text_features(task.classes.prompts())[0]
        bank_VND = box.image_features(training_views(task, plan.views)).view(plan.views, len(self.labels_N), -1)
        self.keys_ND = F.normalize(bank_VND.mean(0), dim=-1)  # (1)
        self.val = (box.image_features(task.val.images), task.val.labels) if plan.search else None
        searched_on_val = len(task.val.labels) * plan.search
        self.notes.update(views=plan.views, fresh_views=plan.fresh_views, searched_on_val=searched_on_val)
        self._adapt(task, plan, bank_VND, rng)

    def _adapt(self, task: FewShotTask, plan: CachePlan, bank_VND: Tensor, rng: np.random.Generator) -> None:
        self._search()

    def cache(self, features_BD: Tensor, beta: float) -> Tensor:
        """Return A(f) L [B, C]: affinities to the training images (2), summed by class since L is one-hot."""
        affinity_BN = torch.exp(-beta * (1 - features_BD @ self.keys_ND.T))
        return affinity_BN.new_zeros(len(features_BD), self.n_classes).index_add(1, self.labels_N, affinity_BN)

    def logits(self, features_BD: Tensor) -> Tensor:
        """Return the logits [B, C] (3)."""
        return self.scale * features_BD @ self.text_CD.T + self.alpha * self.cache(features_BD, self.beta)

    @no_grad
    def _search(self) -> None:
        """Search alpha and beta on the validation images; the first of equals wins, betas in the outer loop."""
        if self.val is not None:
            (features_MD, labels_M), config, best = self.val, self.config, 0.0
            zero_shot_MC = self.scale * features_MD @ self.text_CD.T
            alpha_A11 = torch.tensor(grid(config.alpha_max, config.n_alphas)).view(-1, 1, 1)
            for beta in grid(config.beta_max, config.n_betas):
                logits_AMC = zero_shot_MC + alpha_A11 * self.cache(features_MD, beta)
                finite(logits_AMC, "a validation logit")
                accuracy, a = (logits_AMC.argmax(-1) == labels_M).double().mean(-1).max(0)
                if accuracy.item() > best:
                    best, self.beta, self.alpha = accuracy.item(), beta, alpha_A11[int(a)].item()
        self.val = None
        self.notes.update(alpha=self.alpha, beta=self.beta)

    @no_grad
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.logits(box.image_features(images))

    def deployed(self) -> dict[str, Tensor]:
        return {"keys_ND": self.keys_ND.detach(), "labels_N": self.labels_N, "text_CD": self.text_CD}


@method(name="tip_adapter_f", access=Access.TEXT | Access.FEATURES, paper="arXiv:2207.09519")
class TipAdapterF(TipAdapter):
    """Tip-Adapter with its cache keys fine-tuned; the last epoch is kept."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TipAdapter.Config):
        """The most common settings of the paper."""

        epochs: int = 20
        """Passes over the training images."""
        lr: float = 1e-3
        """Initial learning rate of AdamW (eps 1e-4, weight decay 0.01)."""
        batch_size: int = 256
        """Images per step; a short last batch is used."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> CachePlan:
        plan, view = super().plan(shape, remaining), Bill.image_features(shape.n_train, shape.feature_dim)
        wanted, times = self.config.epochs if shape.fresh_views else 0, remaining.minus(plan.bill).affords(view)
        fresh_views = wanted if times is None else min(wanted, times)
        return replace(plan, fresh_views=fresh_views, bill=plan.bill + view * fresh_views)

    def _adapt(self, task: FewShotTask, plan: CachePlan, bank_VND: Tensor, rng: np.random.Generator) -> None:
        self.epoch = 0
        self.generator = torch_generator(rng)
        self.keys_ND.requires_grad_()
        self.optimizer = torch.optim.AdamW([self.keys_ND], lr=self.config.lr, eps=1e-4)
        bank = None if plan.fresh_views else bank_VND
        self.views = EpochViews(task, plan.fresh_views or plan.views, self.config.epochs, bank)
        self.trainable_params = self.keys_ND.numel()

    def step(self, box: BlackBox) -> bool:
        """Run one epoch of AdamW on the keys; search after the last."""
        features_ND = self.views.of(self.epoch, box.image_features)
        batches = list(shuffled_batches(len(self.labels_N), self.config.batch_size, self.generator))
        for done, rows in enumerate(batches, self.epoch * len(batches)):
            lr = cosine_lr(self.config.lr, done, self.config.epochs * len(batches))
            self.optimizer.param_groups[0]["lr"] = lr
            loss = F.cross_entropy(self.logits(features_ND[rows]), self.labels_N[rows])
            descend(self.optimizer, loss, f"loss in epoch {self.epoch + 1}")
        self.epoch += 1
        if self.epoch == self.config.epochs:
            self._search()
        return self.epoch < self.config.epochs


def grid(top: float, n: int) -> list[float]:
    """Return n evenly spaced values from 0.1 to `top`, exclusive."""
    return [0.1 + i * (top - 0.1) / n for i in range(n)]
