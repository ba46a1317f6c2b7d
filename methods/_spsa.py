"""Gradients estimated from losses at perturbed parameters, and batches of training images. A part, not a method.

Shapes: d parameters, J directions, B images in a batch.
Cost: none. The method that uses these functions sends the requests.
Papers: Spall, Multivariate stochastic approximation using a simultaneous perturbation gradient approximation (SPSA),
IEEE Trans. Autom. Control 37 (1992), with directions on +-[0.5, 1] as BlackVIP (arXiv:2303.14773) and ZIP
(arXiv:2504.06838) draw them; the one-sided estimate of BAR (arXiv:2007.08714) and
CBBT (arXiv:2312.15901), after Liu et al., arXiv:1805.10367:

    g = 1/J * sum_j (f(w + c p_j) - f(w - c p_j)) / (2 c p_j)      p_j in +-[0.5, 1]^d, entry by entry    (1)
    g = d/J * sum_j (f(w + c u_j) - f(w)) / c * u_j                u_j on the unit sphere                 (2)
"""

from __future__ import annotations

from methods._torch import Tensor, torch
from methods._training import shuffled_batches
from methods._views import epoch_view, training_views
from methods.base import FewShotTask, LabelledImages


def directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Return n directions [n, d] whose entries are uniform on [-1, -0.5] and [0.5, 1]."""
    signs = 2.0 * torch.randint(0, 2, (n, d), generator=generator) - 1
    return signs * (0.5 + 0.5 * torch.rand(n, d, generator=generator))


def estimated_gradient(plus_J: Tensor, minus_J: Tensor, p_Jd: Tensor, c: float) -> Tensor:
    """Return the gradient [d] from the losses at w + c p_j and at w - c p_j (1)."""
    return ((plus_J - minus_J).unsqueeze(1) / (2 * c * p_Jd)).mean(0)


def sphere_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Return n directions [n, d], uniform on the unit sphere."""
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


def one_sided_gradient(plus_J: Tensor, at_w: Tensor, u_Jd: Tensor, c: float) -> Tensor:
    """Return the gradient [d] from the losses at w + c u_j and the loss at w (2)."""
    return u_Jd.shape[1] * ((plus_J - at_w).unsqueeze(1) / c * u_Jd).mean(0)


class TrainingBatches:
    """Batches of the training images, epoch after epoch, in a new order each time; a short last batch is dropped.

    All epochs have one fixed view of the images, or each a fresh one if the task says so.
    """

    def __init__(self, task: FewShotTask, size: int) -> None:
        self.task, self.size, self.view = task, size, training_views(task, 1)
        self.epoch, self.rows = -1, list[Tensor]()

    def next(self, generator: torch.Generator) -> LabelledImages:
        """Return the next batch; `generator` draws the order of an epoch with its first batch."""
        labels_N = self.task.train.labels
        if not self.rows:
            self.rows = list(shuffled_batches(len(labels_N), self.size, generator, drop_last=True))
            self.epoch += 1
        rows_B = self.rows.pop(0)
        view = epoch_view(self.task, self.epoch) if self.task.fresh_views else self.view
        return LabelledImages(view[rows_B], labels_N[rows_B])
