"""Linear classifiers that are trained side by side on the same batches, as the runs of one grid.

Shapes: R runs, B rows in a batch, C classes, D feature width, N rows.
"""

from __future__ import annotations

from methods._torch import Tensor, torch
from methods._training import shuffled_batches

LabelledRows = tuple[Tensor, Tensor]
"""Features [N, D] and their labels [N]."""


class ParallelRuns:
    """R classifiers of one batch size, trained side by side on the same batches, each with its own rate and decay."""

    def __init__(self, numbers: list[int], lrs: list[float], decays: list[float], weight_CD: Tensor, size: int) -> None:
        self.numbers, self.half, self.done = numbers, max(1, size // 2), 0
        self.lr_R11, self.decay_R11 = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (lrs, decays))
        self.weight_RCD = weight_CD.repeat(len(numbers), 1, 1)
        self.mean_RCD, self.square_RCD = torch.zeros_like(self.weight_RCD), torch.zeros_like(self.weight_RCD)
        self.batches: tuple[list[Tensor], list[Tensor]] = [], []

    def next_batch(self, images: LabelledRows, texts: LabelledRows, generator: torch.Generator) -> LabelledRows:
        """Return half a batch of each modality; each starts a new epoch when its whole batches are used up."""
        parts = []
        for (x_ND, labels_N), batches in zip((images, texts), self.batches, strict=True):
            if not batches:
                batches += shuffled_batches(len(x_ND), min(self.half, len(x_ND)), generator, drop_last=True)
            rows = batches.pop(0)
            parts.append((x_ND[rows], labels_N[rows]))
        return torch.cat([x for x, _ in parts]), torch.cat([labels for _, labels in parts])

    def products(self, x_BD: Tensor) -> Tensor:
        """Return x W' of every run, [B, R, C]."""
        return (x_BD @ self.weight_RCD.flatten(0, 1).T).view(len(x_BD), *self.weight_RCD.shape[:2])

    def train(self, x_BD: Tensor, labels_B: Tensor, scale: float, lr_R11: Tensor) -> None:
        """Take one step of AdamW (betas 0.9 and 0.999, eps 1e-8) along the gradient of (1), in place."""
        b = len(x_BD)
        error_BRC = (scale * self.products(x_BD)).softmax(-1)
        error_BRC[torch.arange(b), :, labels_B] -= 1
        gradient_RCD = (error_BRC.flatten(1).T @ x_BD * (scale / b)).view_as(self.weight_RCD)
        self.done += 1
        self.mean_RCD.lerp_(gradient_RCD, 0.1)
        self.square_RCD.mul_(0.999).addcmul_(gradient_RCD, gradient_RCD, value=0.001)
        root_RCD = (self.square_RCD / (1 - 0.999**self.done)).sqrt_().add_(1e-8)
        self.weight_RCD *= 1 - lr_R11 * self.decay_R11
        self.weight_RCD -= lr_R11 / (1 - 0.9**self.done) * self.mean_RCD / root_RCD
