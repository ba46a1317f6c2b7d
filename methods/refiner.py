"""CraFT's collaborative refiner: a small residual network on the logits of a black box. A part, not a method.

What is learned: net = Linear(C, H) - ReLU - Linear(H, C), so refined = raw + net(raw); 2CH + H + C numbers.
Shapes: B images in a call, N training images, C classes, H hidden units.
Cost: none; the raw logits are asked for by the method that owns the refiner (`craft`, `logit_head`).
Paper: Wang et al., Connecting the Dots: Collaborative Fine-tuning for Black-Box Vision-Language Models (CraFT),
arXiv:2402.04050; loss of the head in the released main_craft.py:

    CE(refined, y) + weight * KL(softmax(raw) || softmax(refined))

The KL term keeps the refined prediction near the raw one. It runs in the *other* direction in the prompt's fitness,
KL(refined || raw): there `craft` calls `kl_divergence(refined, raw)`.

Departs from the released code:
1. The weights are drawn as torch draws a Linear layer's (uniform within 1 / sqrt(inputs), as there), but from the
   trial's own generator.
2. Nothing else. The released `std` scales the prompt's random projection and never this network; Adam's settings are
   torch's; a short last batch is used, not dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods.finite import finite
from methods.optim import shuffled_batches


def kl_divergence(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) from logits, summed over classes, averaged over images; [P, B, C] gives [P]."""
    log_p_BC = p_BC.log_softmax(-1)
    return (log_p_BC.exp() * (log_p_BC - q_BC.log_softmax(-1))).sum(-1).mean(-1)


class Refiner:
    """The network with its Adam state; pickles whole, the optimizer still pointing at these weights."""

    def __init__(
        self,
        n_classes: int,
        generator: torch.Generator,
        *,
        hidden: int = 256,
        lr: float = 1e-3,
        weight: float = 0.1,
        batch_size: int = 256,
    ) -> None:
        def uniform(inputs: int, *shape: int) -> Tensor:
            drawn: Tensor = (torch.rand(shape, generator=generator) * 2 - 1) * inputs**-0.5
            return drawn.requires_grad_()

        self.weight, self.batch_size = weight, batch_size
        self.w1_CH, self.b1_H = uniform(n_classes, n_classes, hidden), uniform(n_classes, hidden)
        self.w2_HC, self.b2_C = uniform(hidden, hidden, n_classes), uniform(hidden, n_classes)
        self.optimizer = torch.optim.Adam(self.weights(), lr=lr)

    def weights(self) -> list[Tensor]:
        """The trained tensors; `predict` needs them all."""
        return [self.w1_CH, self.b1_H, self.w2_HC, self.b2_C]

    @property
    def n_params(self) -> int:
        """How many numbers are trained."""
        return sum(w.numel() for w in self.weights())

    def __call__(self, raw_BC: Tensor) -> Tensor:
        """refined = raw + net(raw), with gradients; [..., B, C]."""
        hidden_BH: Tensor = (raw_BC @ self.w1_CH + self.b1_H).relu()
        return raw_BC + hidden_BH @ self.w2_HC + self.b2_C

    @torch.no_grad()
    def refine(self, raw_BC: Tensor) -> Tensor:
        """refined = raw + net(raw), without gradients; [..., B, C]."""
        return self(raw_BC)

    def loss(self, raw_BC: Tensor, labels_B: Tensor, weight: float | None = None) -> Tensor:
        """CE(refined, y) + weight * KL(raw || refined), each a mean over images; `weight` None is the one set."""
        refined_BC = self(raw_BC)
        weight = self.weight if weight is None else weight
        return cross_entropy(refined_BC, labels_B) + weight * kl_divergence(raw_BC, refined_BC)

    def train_epoch(
        self, raw_NC: Tensor, labels_N: Tensor, generator: torch.Generator, weight: float | None = None
    ) -> None:
        """One pass of Adam in shuffled batches; `weight` 0 for the epochs that CraFT leaves without the KL term."""
        for rows in shuffled_batches(len(labels_N), self.batch_size, generator):
            loss = finite(self.loss(raw_NC[rows], labels_N[rows], weight), "loss of the refiner")
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
