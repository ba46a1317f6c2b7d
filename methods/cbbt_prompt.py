"""CBBT's prompt: a soft prompt trained by a gradient that is estimated from randomly perturbed prompts.

What is learned: the last T tokens [T, E] of the template's context (T = 1: the word next to the class name).
Shapes: N training images, B images in a batch, C classes, T learned of L context tokens, E token-embedding width,
Q directions, P = Q + 1 prompt sets in a step.
Cost: a step sends P requests, P * B images, P * C prompts, P * B * C outputs; Q = 256, B = 32: 257 requests. The
published schedule is 150 epochs: on 160 images 5 * 150 * 257 = 192,750 requests. Let A be the number of evaluations
(one prompt set on one batch) that the allotment pays for. If A does not cover that schedule, Q = A / min_steps - 1,
clipped to min_directions .. 256, with as many steps as A pays for: directions are reduced before steps. Batch size and
learning rates stay; their schedule is stretched. With fewer than two evaluations the prompt stays the template's.
Prediction: 1 prompt set for each image.
Paper: Guo et al., Black-Box Tuning of Vision-Language Models with Effective Gradient Approximation, Findings of EMNLP
2023, arXiv:2312.15901, as in its released trainers/cooppara.py. With u_i uniform on the unit sphere, d = T * E numbers
learned and h = max(1/d, 0.001):

    g = d/Q * sum_i (CE(ctx + h u_i) - CE(ctx)) / h * u_i        clipped to norm 5, then Adam        (1)

Departures from the released code:
1. The last prompt is used. The release keeps the epoch that is best on the *test* set.
2. The start is the data set's template (or the first of its ensemble with words before the class name), whose last
   context word is learned. The release starts from "a {}." on every data set, one token as well: `paper_init`.
3. The factor is d, which makes the estimate unbiased as h -> 0. The release's 1/h is the same for d <= 1000.
4. Fixed views in turn; `views=fresh` restores a new view per epoch. The released transform gives half of
   the images no crop but cuts out 40 % in a random color; neither setting restores that.
5. No PCA of the token vocabulary: it needs the whole embedding table, and its files were not released.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._spsa import one_sided_gradient, sphere_directions
from methods._torch import Tensor, torch
from methods._training import mean_cross_entropy, shuffled_batches, warm_cosine_lr, with_context
from methods._views import epoch_view
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
    SoftPrompts,
    TaskShape,
    method,
    torch_generator,
    with_templates,
)


@dataclass(frozen=True, kw_only=True)
class CBBTPlan(Plan):
    """How much of the published schedule the allotment pays for."""

    steps: int
    directions: int
    """Q: perturbed prompts per step."""
    views: int = 0
    """Views of the training images whose features are queried (`cbbt` only)."""


@method(name="cbbt_prompt", access=Access.SOFT | Access.SCORES, paper="arXiv:2312.15901", new_classes=True)
class CBBTPrompt(Method):
    """A context token trained by a gradient that is estimated from perturbed prompts."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings, and two for allotments that do not pay for them."""

        n_directions: int = 256
        """Q: perturbed prompts per step in the published schedule, and the maximum; 0 = the prompt is not trained."""
        min_directions: int = 4
        """Minimum number of directions in a scaled schedule; steps are reduced instead."""
        min_steps: int = number(150, at_least=0)
        """Steps that a scaled schedule keeps by reducing directions."""
        epochs: int = 150
        """Epochs of the published schedule."""
        batch_size: int = 32
        """B: images per step; a short last batch is dropped."""
        lr: float = 0.002
        """Learning rate of Adam: a cosine to zero after one epoch at `warmup_lr`."""
        warmup_lr: float = 1e-5
        """Learning rate of the first epoch."""
        max_grad_norm: float = 5.0
        """Maximum norm of the estimated gradient."""
        weight_decay: float = 5e-4
        """Adam's L2 term: Dassl's default, in force in the released code."""
        n_ctx: int = 1
        """T: number of the last context tokens that are learned; the whole context if it is shorter."""
        paper_init: bool = False
        """Start from "a {}." on every data set, as the released scripts do, not from the data set's template."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> CBBTPlan:
        batch = min(self.config.batch_size, shape.n_train)
        steps, directions = self._schedule(shape.n_train, remaining.affords(Bill(requests=1, images=batch)))
        bill = Bill.scores(directions + 1, batch, shape.n_classes) * steps
        return CBBTPlan(bill=bill, steps=steps, directions=directions)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: CBBTPlan) -> None:
        c = self.config
        self.task, self.generator = task, torch_generator(rng)
        self.classes = with_templates(task.classes, "a {}.") if c.paper_init else with_context(task.classes)
        ctx_LE = box.embed_text(self.classes.context)
        self.kept_LE = ctx_LE[: -c.n_ctx].clone()
        self.learned_TE = ctx_LE[-c.n_ctx :].clone().requires_grad_()
        self.h = max(1 / self.learned_TE.numel(), 0.001)
        self.optimizer = torch.optim.Adam([self.learned_TE], lr=c.lr, weight_decay=c.weight_decay)
        self.trainable_params = self.learned_TE.numel() if c.n_directions else 0
        self.steps, self.directions = plan.steps, plan.directions
        start = self.classes.template
        self.notes |= {"steps": plan.steps, "directions": plan.directions, "views": plan.views, "start": start}
        self.done, self.epoch, self.batches = 0, -1, list[Tensor]()

    def step(self, box: BlackBox) -> bool:
        """Run one step of Adam on one batch, from Q + 1 prompt sets."""
        if self.done == self.steps:
            return False
        if not self.batches:
            n, size = len(self.task.train.labels), self.config.batch_size
            self.batches = list(shuffled_batches(n, size, self.generator, drop_last=True))
            self.epoch += 1
        shape, d = self.learned_TE.shape, self.learned_TE.numel()
        u_QTE = sphere_directions(self.directions, d, self.generator).view(self.directions, *shape)
        offsets_PTE = torch.cat([torch.zeros(1, *u_QTE.shape[1:]), self.h * u_QTE])
        losses_P = self._losses(box, self._prompts(self.classes, offsets_PTE), self.batches.pop(0))
        finite(losses_P, f"loss in step {self.done + 1}")

        if self.directions:
            gradient_d = one_sided_gradient(losses_P[1:], losses_P[0], u_QTE.flatten(1), self.h)  # (1)
            self.learned_TE.grad = gradient_d.view(shape)
            torch.nn.utils.clip_grad_norm_([self.learned_TE], self.config.max_grad_norm)
            self._adam_step(self.optimizer)
        self.done += 1
        return self.done < self.steps

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, self._prompts(classes or self.classes))[0]

    def deployed(self) -> dict[str, Tensor]:
        return {"ctx_LE": torch.cat([self.kept_LE, self.learned_TE.detach()])}

    def _losses(self, box: BlackBox, prompts: SoftPrompts, rows_B: Tensor) -> Tensor:
        """Return the loss [P] of each prompt set on one batch of the epoch's view."""
        scores_PBC = box.scores(epoch_view(self.task, self.epoch)[rows_B], prompts)
        return mean_cross_entropy(scores_PBC, self.task.train.labels[rows_B])

    def _prompts(self, classes: Classes, offsets_PTE: Tensor | None = None) -> SoftPrompts:
        """Return the current prompt, or the prompts at these offsets from it."""
        tokens_PTE = self.learned_TE.detach().unsqueeze(0)
        tokens_PTE = tokens_PTE if offsets_PTE is None else tokens_PTE + offsets_PTE
        kept_PLE = self.kept_LE.expand(len(tokens_PTE), -1, -1)
        return with_templates(classes, self.classes.template).soft(torch.cat([kept_PLE, tokens_PTE], dim=1))

    def _schedule_epoch(self) -> int:
        """Return the epoch of the published schedule that the current step corresponds to."""
        return self.done * self.config.epochs // self.steps

    def _adam_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step at the learning rate of the schedule: one epoch of warm-up, then a cosine."""
        c = self.config
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine_lr(c.lr, c.warmup_lr, self._schedule_epoch(), c.epochs)
        optimizer.step()

    def _batches_per_epoch(self, n_train: int) -> int:
        """Return the number of whole batches, at least 1."""
        return max(1, n_train // self.config.batch_size)

    def _schedule(self, n_train: int, evaluations: int | None) -> tuple[int, int]:
        """Return (steps, directions): the published schedule if `evaluations` pays for it, else the scaled one.

        One evaluation is one prompt set on one batch; None = no limit. The rule is in the module's docstring.
        """
        c = self.config
        full = c.epochs * self._batches_per_epoch(n_train)
        if evaluations is None or evaluations >= full * (c.n_directions + 1):
            return full, c.n_directions
        if evaluations < 2:
            return 0, 0
        wanted = evaluations // min(c.min_steps, full) - 1
        directions = min(max(wanted, c.min_directions), c.n_directions, evaluations - 1)
        return min(evaluations // (directions + 1), full), directions
