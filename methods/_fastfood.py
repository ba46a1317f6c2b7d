"""Fastfood: fixed random linear maps by signs, a permutation and two Walsh-Hadamard transforms. A part, not a method.

A map takes x [q], padded with zeros to W = 2^k numbers, to E of the W numbers

    V x = H G Pi H B x / (sqrt(W * sum G^2) * sqrt(E / W))        (1)

B are random signs, Pi is a permutation, G ~ N(0, 1), and H the Walsh-Hadamard transform with entries +-1. For constant
G and without the cut to E numbers, V is orthogonal up to its scale: V' V = (W / E) I. In general, an output is as long
as x on average.
Shapes: L maps, q inputs, E outputs, W = the power of two from max(q, E) on.
Cost: none. On the client, W log W additions for each map.
Paper: Le et al., Fastfood: Approximating Kernel Expansions in Loglinear Time, arXiv:1408.3060; scaled as in the
intrinsic-dimension code that ZIP uses (arXiv:2504.06838).
"""

from __future__ import annotations

import math

from methods._torch import Tensor, torch


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return H x along the last axis, whose length is a power of two. H is not normalized: H H = W I."""
    width, half = x.shape[-1], 1
    while half < width:
        pairs = x.view(*x.shape[:-1], -1, 2, half)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2)
        x, half = x.flatten(-3), 2 * half
    return x


class Fastfood:
    """L different maps from q to E numbers, drawn once."""

    def __init__(self, n_maps: int, q: int, n_outputs: int, generator: torch.Generator) -> None:
        self.n_outputs, width = n_outputs, 2 ** math.ceil(math.log2(max(q, n_outputs)))
        self.signs_LW = 2.0 * torch.randint(0, 2, (n_maps, width), generator=generator) - 1
        self.order_LW = torch.stack([torch.randperm(width, generator=generator) for _ in range(n_maps)])
        self.gains_LW = torch.randn(n_maps, width, generator=generator)

    def __call__(self, x_PLq: Tensor) -> Tensor:
        """Return the outputs [P, L, E] of map l for row l of x."""
        width = self.signs_LW.shape[1]
        x_PLW = torch.nn.functional.pad(x_PLq, (0, width - x_PLq.shape[-1]))
        x_PLW = walsh_hadamard(self.signs_LW * x_PLW)  # H B
        x_PLW = x_PLW.gather(-1, self.order_LW.expand_as(x_PLW))  # Pi
        x_PLW = walsh_hadamard(self.gains_LW * x_PLW)  # H G
        scale_L = (width * (self.gains_LW**2).sum(1)).sqrt() * math.sqrt(self.n_outputs / width)
        return x_PLW[..., : self.n_outputs] / scale_L.unsqueeze(-1)  # (1)
