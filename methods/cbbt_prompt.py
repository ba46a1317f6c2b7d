"""CBBT's prompt half: a soft prompt trained by the gradient estimated from randomly perturbed prompts.

What is learned: the last T tokens [T, E] of the template's context (T = 1: the word next to the class name). The words
before them stay as they are.
Shapes: N training images, B images in a batch, C classes, T learned of L context tokens, E token-embedding width,
Q directions, P = Q + 1 prompt sets in a step.
Cost: a step asks P requests, P * B images, P * C prompts, P * B * C outputs; Q = 256, B = 32: 257 requests. The
    published schedule is 150 epochs: on 160 images 5 * 150 * 257 = 192,750 requests.
    Within an allotment, let A be what it pays in evaluations (one prompt set on one batch). If A covers the published
    schedule, that is run. Else Q = A / min_steps - 1, held between min_directions and 256, and as many steps as A
    pays: directions are given up before steps, and steps beyond `min_steps` come only when all 256 directions are
    paid. Batch and learning rates stay; the curve of the rates is drawn over the steps there are. If not even two
    evaluations are paid, the prompt stays the template's.
Prediction asks 1 prompt set about each image.
Paper: Guo et al., Black-Box Tuning of Vision-Language Models with Effective Gradient Approximation, Findings of EMNLP
2023, arXiv:2312.15901, as in its released trainers/cooppara.py. With u_i uniform on the unit sphere, d = T * E numbers
learned and h = max(1/d, 0.001):
    g = d/Q * sum_i (CE(ctx + h u_i) - CE(ctx)) / h * u_i        clipped to norm 5, then Adam

Departs from the released code:
1. It keeps the epoch that is best on the *test* set. Here the last step's prompt is used, and nothing restores that.
2. Its prompt is "a {}." on every data set, that one token learned: `paper_start`. Here the start is the data set's own
   template (where it has no words before the class name, the first of its ensemble that has), and its last context
   word is learned, so that d and the directions are the paper's.
3. Its factor is 1/h. That is d, which makes the estimate unbiased as h -> 0, wherever d <= 1000; beyond, d is used.
4. The task's fixed views in turn; `views=fresh` restores a new view in every epoch.
5. The optional PCA of the token vocabulary is left out: it needs the whole embedding table, and its files were not
   released (the documented commands leave it off).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Remaining,
    SoftPrompts,
    TaskShape,
    method,
    torch_generator,
    with_templates,
)
from methods.finite import finite
from methods.optim import epoch_view, mean_cross_entropy, shuffled_batches, warm_cosine_lr, with_context


class Plan(NamedTuple):
    """What an allotment lets a run do. `views` are those that are asked for once (`cbbt` only)."""

    steps: int
    directions: int
    views: int = 0


def sphere(q: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """q directions of this shape, uniform on the unit sphere; [q, *shape]."""
    return normalize(torch.randn(q, shape.numel(), generator=generator), dim=-1).view(q, *shape)


def estimated_gradient(losses_P: Tensor, u_QTE: Tensor, h: float) -> Tensor:
    """Forward differences along u: losses_P[0] is the loss at ctx, losses_P[1 + i] that at ctx + h u_i; [T, E]."""
    slopes_Q = (losses_P[1:] - losses_P[0]) / h
    return (slopes_Q.view(-1, 1, 1) * u_QTE).mean(0) * u_QTE[0].numel()


@method(name="cbbt_prompt", access=Access.SOFT | Access.SCORES, paper="arXiv:2312.15901", new_classes=True)
class CBBTPrompt(Method):
    """A context token trained by a gradient that is estimated from perturbed prompts."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings: those of the released configs, and two for allotments that cannot pay them."""

        directions: int = 256
        """Q: perturbed prompts a step in the published schedule, and at most; 0: the prompt stays as it starts."""
        min_directions: int = 4
        """When scaled: never fewer directions than this, rather fewer steps."""
        min_steps: int = 150
        """When scaled: directions are given up before the number of steps falls below this."""
        epochs: int = 150
        """Epochs of the published schedule."""
        batch_size: int = 32
        """B: images a step; a short last batch is left out."""
        lr: float = 0.002
        """Adam's learning rate, cosine to zero after one epoch at `warmup_lr`."""
        warmup_lr: float = 1e-5
        """Learning rate in the first epoch."""
        max_grad_norm: float = 5.0
        """The estimate is clipped to this norm."""
        weight_decay: float = 5e-4
        """Adam's (an L2 term in the gradient): Dassl's default, in force in the released code."""
        learned_tokens: int = 1
        """T: how many of the last context tokens are learned; the whole context if it is shorter."""
        paper_start: bool = False
        """The released scripts' start: "a {}." on every data set, not the data set's template."""

    config: Config

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        c = self.config
        self.task, self.generator = task, torch_generator(rng)
        self.classes = with_templates(task.classes, "a {}.") if c.paper_start else with_context(task.classes)
        ctx_LE = box.embed_text(self.classes.context)
        self.kept_LE = ctx_LE[: -c.learned_tokens].clone()
        self.learned_TE = ctx_LE[-c.learned_tokens :].clone().requires_grad_()
        self.h = max(1 / self.learned_TE.numel(), 0.001)
        self.optimizer = torch.optim.Adam([self.learned_TE], lr=c.lr, weight_decay=c.weight_decay)
        self.trainable_params = self.learned_TE.numel() if c.directions else 0
        self.plan = self._plan(TaskShape.of(task, box.feature_dim), box.remaining)
        self.notes |= {**self.plan._asdict(), "start": self.classes.template}
        self.done, self.epoch, self.batches = 0, -1, list[Tensor]()

    def step(self, box: BlackBox) -> bool:
        """One batch, Q + 1 prompt sets, one move of the learned tokens."""
        if self.done == self.plan.steps:
            return False
        if not self.batches:
            n, size = len(self.task.train.labels), self.config.batch_size
            self.batches = list(shuffled_batches(n, size, self.generator, drop_last=True))
            self.epoch += 1
        u_QTE = sphere(self.plan.directions, self.learned_TE.shape, self.generator)
        offsets_PTE = torch.cat([torch.zeros(1, *u_QTE.shape[1:]), self.h * u_QTE])
        losses_P = self._losses(box, self._prompts(self.classes, offsets_PTE), self.batches.pop(0))
        finite(losses_P, f"loss in step {self.done + 1}")

        if self.plan.directions:
            self.learned_TE.grad = estimated_gradient(losses_P, u_QTE, self.h)
            torch.nn.utils.clip_grad_norm_([self.learned_TE], self.config.max_grad_norm)
            self._move(self.optimizer)
        self.done += 1
        return self.done < self.plan.steps

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, self._prompts(classes or self.classes))[0]

    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        plan, batch = self._plan(shape, remaining), min(self.config.batch_size, shape.n_train)
        return Bill.scores(plan.directions + 1, batch, shape.n_classes) * plan.steps

    def deployed(self) -> dict[str, Tensor]:
        return {"ctx_LE": torch.cat([self.kept_LE, self.learned_TE.detach()])}

    def _losses(self, box: BlackBox, prompts: SoftPrompts, rows_B: Tensor) -> Tensor:
        """The loss [P] of each prompt set on one batch of the epoch's view."""
        scores_PBC = box.scores(epoch_view(self.task, self.epoch)[rows_B], prompts)
        return mean_cross_entropy(scores_PBC, self.task.train.labels[rows_B])

    def _prompts(self, classes: Classes, offsets_PTE: Tensor | None = None) -> SoftPrompts:
        """The present prompt, or the prompts at these offsets from it."""
        tokens_PTE = self.learned_TE.detach().unsqueeze(0)
        if offsets_PTE is not None:
            tokens_PTE = tokens_PTE + offsets_PTE
        kept_PLE = self.kept_LE.expand(len(tokens_PTE), -1, -1)
        return with_templates(classes, self.classes.template).soft(torch.cat([kept_PLE, tokens_PTE], dim=1))

    def _schedule_epoch(self) -> int:
        """Which epoch of the published schedule the present step stands for."""
        return self.done * self.config.epochs // self.plan.steps

    def _move(self, optimizer: torch.optim.Optimizer) -> None:
        """A step at the schedule's learning rate: warm-up for one epoch, then cosine."""
        c = self.config
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine_lr(c.lr, c.warmup_lr, self._schedule_epoch(), c.epochs)
        optimizer.step()

    def _batches_per_epoch(self, n_train: int) -> int:
        """Whole batches only, unless there are too few images for one."""
        return max(1, n_train // self.config.batch_size)

    def _plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        """One evaluation is one prompt set on one batch: 1 request and B images."""
        batch = min(self.config.batch_size, shape.n_train)
        return self._scaled(shape.n_train, remaining.affords(Bill(requests=1, images=batch)))

    def _scaled(self, n_train: int, evaluations: int | None) -> Plan:
        """The published schedule if `evaluations` pays it (None: no limit), else the rule at the top of this file."""
        c = self.config
        full = c.epochs * self._batches_per_epoch(n_train)
        if evaluations is None or evaluations >= full * (c.directions + 1):
            return Plan(full, c.directions)
        if evaluations < 2:
            return Plan(0, 0)
        wanted = evaluations // min(c.min_steps, full) - 1
        directions = min(max(wanted, c.min_directions), c.directions, evaluations - 1)
        return Plan(min(evaluations // (directions + 1), full), directions)
