"""CraFT's refiner: a small residual network on the logits of a black box, shared by `craft` and `logit_head`.

What is learned: net = Linear(C, H) - ReLU - Linear(H, C), so refined = raw + net(raw) (1); 2CH + H + C numbers.
Shapes: B images in a call, N training images, C classes, H hidden units.
Cost: none. The method that owns the refiner queries the raw logits.
Paper: Wang et al., Connecting the Dots: Collaborative Fine-tuning for Black-Box Vision-Language Models (CraFT),
arXiv:2402.04050; the head's loss in the released main_craft.py:

    loss = CE(refined, y) + kl_weight * KL(softmax(raw) || softmax(refined))        (2)

The KL term keeps the refined prediction near the raw one. In the prompt's fitness it has the other direction,
KL(refined || raw).

Departures from the released code:
1. The weights are drawn as torch draws those of a linear layer (uniform within 1 / sqrt(inputs), as in the release),
   but from the trial's own generator. The released `std` scales the prompt's projection, never this network.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods._settings import number
from methods._torch import F, Tensor, no_grad, torch
from methods._training import descend, linear_init, shuffled_batches


def kl_divergence(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """Return KL(softmax(p) || softmax(q)), summed over classes and averaged over images; [P, B, C] gives [P]."""
    log_p_BC = p_BC.log_softmax(-1)
    return (log_p_BC.exp() * (log_p_BC - q_BC.log_softmax(-1))).sum(-1).mean(-1)


class Refiner:
    """The network with its Adam state. Pickles as a whole; the optimizer keeps pointing at these weights."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of the refiner: the most common ones in CraFT's released configs."""

        lr: float = 1e-3
        """Learning rate of Adam, constant."""
        batch_size: int = 256
        """Images per step; a short last batch is used."""
        hidden: int = 256
        """H: hidden units."""
        kl_weight: float = 0.1
        """Weight of the KL term."""
        kl_fraction: float = number(0.25, at_most=1)
        """Fraction of the training, from its start, in which the refiner's loss has the KL term; 1 = all of it."""

    def __init__(self, n_classes: int, config: Config, generator: torch.Generator) -> None:
        def uniform(inputs: int, *shape: int) -> Tensor:
            return linear_init(shape, inputs, generator)

        hidden, self.kl_weight, self.batch_size = config.hidden, config.kl_weight, config.batch_size
        self.w1_CH, self.b1_H = uniform(n_classes, n_classes, hidden), uniform(n_classes, hidden)
        self.w2_HC, self.b2_C = uniform(hidden, hidden, n_classes), uniform(hidden, n_classes)
        self.optimizer = torch.optim.Adam(self.weights(), lr=config.lr)

    def weights(self) -> list[Tensor]:
        """Return the trained tensors."""
        return [self.w1_CH, self.b1_H, self.w2_HC, self.b2_C]

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return sum(w.numel() for w in self.weights())

    def __call__(self, raw_BC: Tensor) -> Tensor:
        """Return the refined logits [..., B, C] with gradients (1)."""
        hidden_BH: Tensor = (raw_BC @ self.w1_CH + self.b1_H).relu()
        return raw_BC + hidden_BH @ self.w2_HC + self.b2_C

    @no_grad
    def refine(self, raw_BC: Tensor) -> Tensor:
        """Return the refined logits [..., B, C] without gradients (1)."""
        return self(raw_BC)

    def loss(self, raw_BC: Tensor, labels_B: Tensor, kl: bool = True) -> Tensor:
        """Return the loss (2), a mean over images; without the KL term if `kl` is False."""
        refined_BC = self(raw_BC)
        weight = self.kl_weight if kl else 0.0
        return F.cross_entropy(refined_BC, labels_B) + weight * kl_divergence(raw_BC, refined_BC)

    def train_epoch(self, raw_NC: Tensor, labels_N: Tensor, generator: torch.Generator, kl: bool = True) -> None:
        """Run one epoch of Adam in shuffled batches."""
        for rows in shuffled_batches(len(labels_N), self.batch_size, generator):
            descend(self.optimizer, self.loss(raw_NC[rows], labels_N[rows], kl), "loss of the refiner")
