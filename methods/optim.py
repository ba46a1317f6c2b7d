"""What three or more methods share: batches, learning-rate schedules, views of the training images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from methods.base import Bill, Classes, FewShotTask, ImageSet, Remaining, TaskShape, with_templates


def shuffled_batches(n: int, size: int, generator: torch.Generator, drop_last: bool = False) -> Iterator[Tensor]:
    """Row numbers of one epoch in a new order. `drop_last` leaves out a short last batch, unless it is the only one."""
    rows = torch.randperm(n, generator=generator)
    kept = n - n % size if drop_last and n >= size else n
    for start in range(0, kept, size):
        yield rows[start : min(start + size, kept)]


def cosine_lr(base: float, step: int, total: int) -> float:
    """Cosine annealing to zero without restarts: `base` at step 0, 0 at step `total`."""
    return base * (1 + math.cos(math.pi * step / total)) / 2


def warm_cosine_lr(base: float, warmup: float, epoch: int, total: int, warmup_epochs: int = 1) -> float:
    """Dassl's rate of an epoch: `warmup` in the first ones, then a cosine over `total` epochs, begun after them."""
    after = epoch - warmup_epochs
    return warmup if after < 0 else cosine_lr(base, after, total)


def affordable(wanted: int, one: Bill, remaining: Remaining) -> int:
    """As many of `one` as `remaining` pays, at most `wanted`, at least one (which the box may then refuse)."""
    times = remaining.affords(one)
    return max(1, wanted if times is None else min(wanted, times))


def views_wanted(shape: TaskShape, epochs: int) -> int:
    """Different views that `epochs` epochs can use: the fixed ones (the plain image counts as one), or one an epoch."""
    return epochs if shape.fresh_views else min(max(1, shape.views), epochs)


def training_views(task: FewShotTask, n: int) -> ImageSet:
    """n fixed views of the training images in one set, view-major; the plain images when the task offers no views."""
    return task.train.images.views(n) if task.views else task.train.images


class EpochViews:
    """One view of the training images for each epoch: n different ones, then again (epoch e learns view e mod n).

    A view's answer is asked for in the epoch that first needs it, unless `bank_VNX` already holds them all. It is kept
    until the next one where no later epoch comes back to it, and the images until all views are asked about.
    """

    def __init__(self, task: FewShotTask, n: int, epochs: int, bank_VNX: Tensor | None = None) -> None:
        self.n, self.epochs = n, epochs
        self.kept: dict[int, Tensor] = {} if bank_VNX is None else {v: view.clone() for v, view in enumerate(bank_VNX)}
        self.images = None if bank_VNX is not None else task.train.images
        self.fixed = None if bank_VNX is not None or task.fresh_views else training_views(task, n)

    def of(self, epoch: int, ask: Callable[[ImageSet], Tensor]) -> Tensor:
        """The answer [N, ...] that epoch `epoch` learns from; `ask` is called where it is new."""
        v = epoch % self.n
        if v not in self.kept:
            assert self.images is not None
            n = len(self.images)
            view = self.images.views(1, seed=v + 1) if self.fixed is None else self.fixed[v * n : (v + 1) * n]
            answer = ask(view)
            if self.epochs <= self.n:
                self.kept.clear()
            self.kept[v] = answer
            if v + 1 == self.n:
                self.images = self.fixed = None
        return self.kept[v]


def epoch_view(task: FewShotTask, epoch: int) -> ImageSet:
    """The view of the training images [N] that epoch `epoch` learns from: a new one, or the fixed views in turn."""
    if task.fresh_views:
        return task.train.images.views(1, seed=epoch + 1)
    if not task.views:
        return task.train.images
    n, v = len(task.train.images), epoch % task.views
    return task.train.images.views(task.views)[v * n : (v + 1) * n]


def mean_cross_entropy(logits_PBC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy averaged over images, for each of P prompt sets; [P]."""
    log_p_PBC = logits_PBC.log_softmax(-1)
    return -log_p_PBC[:, torch.arange(len(labels_B)), labels_B].mean(-1)


def with_context(classes: Classes) -> Classes:
    """The classes under a template with words before the class name, which is what a soft prompt replaces.

    That is the data set's own template if it has any; else the first of its ensemble that does, else CLIP's own.
    """
    for template in (classes.template, *classes.templates):
        if template.split("{}")[0].strip():
            return with_templates(classes, template)
    return with_templates(classes, "a photo of a {}.")
