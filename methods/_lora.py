"""Low-rank changes of linear maps beside their weights, with dropout, and the gradients in them. A part, not a method.

Shapes: T tokens, W width, r rank; 3: queries, keys and values.
Cost: none. The toy model and the endpoint compute with these functions.
Paper: Hu et al., LoRA, arXiv:2106.09685, equation 3, with dropout as in its released code:

    h = W x + scale * B A dropout(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods._torch import Tensor, torch
from methods.base import Lora, LowRank


@dataclass(frozen=True)
class Dropout:
    """Set a share of the values to zero and divide the others by 1 - rate. A generator on its device draws them."""

    rate: float
    generator: torch.Generator

    @classmethod
    def seeded(cls, rate: float, seed: int, device: str = "cpu") -> Dropout:
        """Return the dropout of one call."""
        return cls(rate, torch.Generator(device).manual_seed(seed))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.rate:
            return x
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


def low_rank(x_TW: Tensor, a_3rW: Tensor, b_3Wr: Tensor, dropout: Dropout | None = None) -> Tensor:
    """Return B A dropout(x) [3, T, W]; queries, keys and values have masks of their own."""
    x_3TW = x_TW.expand(3, *x_TW.shape)
    return (dropout(x_3TW) if dropout else x_3TW) @ a_3rW.mT @ b_3Wr.mT


def loss_and_gradients(lora: Lora, loss_of: Callable[[Lora], Tensor]) -> Tensor:
    """Return a loss of a change and its gradients in `lora.factors`, as one vector."""
    with torch.enable_grad():
        factors = [factor.detach().clone().requires_grad_() for factor in lora.factors]
        loss = loss_of(Lora(LowRank(*factors[:2]), LowRank(*factors[2:]), lora.scale))
    gradients = torch.autograd.grad(loss, factors)
    return torch.cat([loss.detach().cpu().view(1), *(gradient.flatten() for gradient in gradients)])


def unpacked(values: Tensor, lora: Lora) -> tuple[Tensor, ...]:
    """Return the loss and the gradients, in the shapes of `lora.factors`, that `loss_and_gradients` packed."""
    loss, *gradients = torch.split(values, [1, *(factor.numel() for factor in lora.factors)])
    shaped = (gradient.view_as(factor) for gradient, factor in zip(gradients, lora.factors, strict=True))
    return loss.squeeze(), *shaped
