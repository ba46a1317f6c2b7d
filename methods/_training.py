"""What several methods share to train: batches, learning-rate schedules, losses, and the start of a soft prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator

from methods._finite import finite
from methods._torch import Tensor, torch
from methods.base import Bill, Classes, Remaining, with_templates

CLIP_TEMPLATE = "a photo of a {}."
"""CLIP's default prompt, from which several papers start on every data set."""


def shuffled_batches(n: int, size: int, generator: torch.Generator, drop_last: bool = False) -> Iterator[Tensor]:
    """Yield the row numbers of one epoch in a new order, `size` at a time.

    `drop_last` drops a short last batch unless it is the only one.
    """
    rows = torch.randperm(n, generator=generator)
    kept = n - n % size if drop_last and n >= size else n
    for start in range(0, kept, size):
        yield rows[start : min(start + size, kept)]


def cosine_lr(base: float, step: int, total: int) -> float:
    """Return the cosine-annealed rate without restarts: `base` at step 0, zero at step `total`."""
    return base * (1 + math.cos(math.pi * step / total)) / 2


def warm_cosine_lr(base: float, warmup: float, epoch: int, total: int, warmup_epochs: int = 1) -> float:
    """Return Dassl's rate for an epoch: `warmup` in the first epochs, then a cosine over `total` epochs."""
    after = epoch - warmup_epochs
    return warmup if after < 0 else cosine_lr(base, after, total)


def linear_init(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    """Return torch's initial weights of a linear layer, uniform on +-1 / sqrt(inputs), which require a gradient."""
    drawn: Tensor = (torch.rand(shape, generator=generator) * 2 - 1) * inputs**-0.5
    return drawn.requires_grad_()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, name: str) -> None:
    """Take one step of an optimizer. Raises FloatingPointError with the loss's name if it is not finite."""
    finite(loss, name)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def affordable(wanted: int, one: Bill, remaining: Remaining) -> int:
    """Return how many times `one` fits in `remaining`: at most `wanted`, and at least 1."""
    times = remaining.affords(one)
    return max(1, wanted if times is None else min(wanted, times))


def mean_cross_entropy(logits_PBC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the cross-entropy averaged over images for each of P prompt sets, [P]."""
    log_p_PBC = logits_PBC.log_softmax(-1)
    return -log_p_PBC[:, torch.arange(len(labels_B)), labels_B].mean(-1)


def with_context(classes: Classes) -> Classes:
    """Return the classes under a template that has words before the class name, which a soft prompt replaces.

    The first of: the data set's template, its ensemble templates, CLIP's default.
    """
    for template in (classes.template, *classes.templates):
        if template.split("{}")[0].strip():
            return with_templates(classes, template)
    return with_templates(classes, CLIP_TEMPLATE)
