"""CoOp: a soft prompt trained by the true gradient through the text tower. A white-box reference, not a competitor.

What is learned: ctx [L, E], the context before every class name (one context for all classes), L * E numbers.
Shapes: B images in a batch, C classes, D feature width, N training images, L context tokens, E token-embedding width,
V views.
Cost: the features of the training views once (fixed views: 1 request, V * N images; fresh views: 1 request, N images
per epoch), then 2 requests, 2 * C prompts per step: the class features of the current context and their gradient. 16
shots of 10 classes: 200 epochs of 5 batches, 2,001 requests. The allotment's images pay for views, then its requests
for as many of the published steps as possible; the learning-rate schedule is stretched over them. Without any steps,
the context stays the template's.
Prediction: 1 prompt set for each image.
Paper: Zhou et al., Learning to Prompt for Vision-Language Models, arXiv:2109.01134, unified context, class name last:

    min over ctx of CE(logit_scale * f(x) . t(ctx, name_c), y)        (1)

by SGD with momentum, learning rate as in `taskres` (Dassl's one epoch of warm-up, then cosine).
The gradient leaves the endpoint (access GRADIENTS), which no ranked method may request. The model stays behind the
endpoint, so these calls are metered too.

Departures from the released code:
1. The words of the data set's template after the class name stay, as for every method here; the code always ends with
   ".". The context starts at random as in the code; `n_ctx=0` starts from the template.
2. Fixed views in turn; `views=fresh` restores a new view per epoch. The released crops keep half of the image or more.
3. float32; the code computes in float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._torch import F, Tensor, torch
from methods._training import shuffled_batches, warm_cosine_lr, with_context
from methods._views import n_views_used, view_features, view_features_bill
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Plan,
    Remaining,
    TaskShape,
    method,
    torch_generator,
    with_templates,
)


@dataclass(frozen=True, kw_only=True)
class CoOpPlan(Plan):
    """How much of the published schedule the allotment pays for."""

    steps: int
    views: int


@method(
    name="coop", access=Access.SOFT | Access.FEATURES | Access.GRADIENTS, paper="arXiv:2109.01134", new_classes=True
)
class CoOp(Method):
    """White-box reference: context tokens trained by the true gradient through the text tower."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        n_ctx: int = 16
        """L: number of context tokens, initialized at random; 0 = those of the data set's template."""
        init_std: float = 0.02
        """Standard deviation of the random initialization."""
        lr: float = 0.002
        """Learning rate of SGD: a cosine to zero after one epoch at `warmup_lr`."""
        warmup_lr: float = 1e-5
        """Learning rate of the first epoch."""
        momentum: float = number(0.9, at_most=1)
        """SGD's momentum: Dassl's default, in force in the released code."""
        weight_decay: float = 5e-4
        """SGD's L2 term: Dassl's default, in force in the released code."""
        batch_size: int = 32
        """B: images per step; a short last batch is dropped."""
        epochs: int | None = None
        """Epochs of the schedule; None = 50 at 1 shot, 100 up to 4, 200 above (the paper: always 50 on ImageNet)."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> CoOpPlan:
        steps, views = self._schedule(shape, remaining)
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim) * (2 * steps)
        return CoOpPlan(bill=text + view_features_bill(shape, views), steps=steps, views=views)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: CoOpPlan) -> None:
        c, n = self.config, len(task.train.labels)
        self.generator = torch_generator(rng)
        self.classes, self.labels_N = with_context(task.classes), task.train.labels
        self.logit_scale = box.logit_scale
        self.steps, self.epochs = plan.steps, self._epochs(task.shots)
        self.notes |= {"steps": plan.steps, "views": plan.views, "epochs": self.epochs}
        self.done, self.epoch, self.batches = 0, -1, list[Tensor]()
        self.ctx_LE = box.embed_text(self.classes.context).clone()
        if c.n_ctx and plan.steps:
            self.ctx_LE = c.init_std * torch.randn(c.n_ctx, box.token_dim, generator=self.generator)
        self.ctx_LE.requires_grad_()
        self.optimizer = torch.optim.SGD([self.ctx_LE], lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        self.trainable_params = self.ctx_LE.numel()
        if plan.steps:
            self.views = view_features(task, plan.views, self._epochs_of(plan.steps, n), box)

    def step(self, box: BlackBox) -> bool:
        """Run one step of SGD on one batch."""
        if self.done == self.steps:
            return False
        if not self.batches:
            size = self.config.batch_size
            self.batches = list(shuffled_batches(len(self.labels_N), size, self.generator, drop_last=True))
            self.epoch += 1
        rows_B = self.batches.pop(0)
        x_BD = self.views.of(self.epoch, box.image_features)[rows_B]
        prompts = self.classes.soft(self.ctx_LE.detach().unsqueeze(0))
        text_PCD = box.text_features(prompts).requires_grad_()
        loss = F.cross_entropy(self.logit_scale * x_BD @ text_PCD[0].T, self.labels_N[rows_B])  # (1)
        finite(loss, f"loss in step {self.done + 1}")
        (upstream_PCD,) = torch.autograd.grad(loss, text_PCD)

        self.ctx_LE.grad = box.text_gradients(prompts, upstream_PCD)[0]
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.done * self.epochs // self.steps)
        self.optimizer.step()
        self.done += 1
        return self.done < self.steps

    def learning_rate(self, epoch: int) -> float:
        """Return the rate of one epoch of the published schedule: one epoch of warm-up, then a cosine."""
        return warm_cosine_lr(self.config.lr, self.config.warmup_lr, epoch, self.epochs)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        named = with_templates(classes or self.classes, self.classes.template)
        return box.scores(images, named.soft(self.ctx_LE.detach().unsqueeze(0)))[0]

    def deployed(self) -> dict[str, Tensor]:
        return {"ctx_LE": self.ctx_LE.detach()}

    def _epochs(self, shots: int) -> int:
        return self.config.epochs or (50 if shots == 1 else 100 if shots <= 4 else 200)

    def _epochs_of(self, steps: int, n_train: int) -> int:
        """Return the epochs that `steps` take: whole batches only, unless there are too few images for one."""
        return math.ceil(steps / max(1, n_train // self.config.batch_size))

    def _schedule(self, shape: TaskShape, remaining: Remaining) -> tuple[int, int]:
        """Return (steps, views): views are paid for first, then steps from the remaining requests."""
        n, requests = shape.n_train, remaining.requests
        full = self._epochs(shape.shots) * max(1, n // self.config.batch_size)
        steps = full if math.isinf(requests) else min(full, (int(requests) - 1) // 2)
        payable = remaining.affords(Bill(images=n))
        while steps > 0:
            wanted = n_views_used(shape, self._epochs_of(steps, n))
            views = wanted if payable is None else min(wanted, payable)
            if not views:
                break
            if 2 * steps + (views if shape.fresh_views else 1) <= requests:
                return steps, views
            steps -= 1  # make room for the requests of fresh views
        return 0, 0
