"""The temperature of a closed-form classifier, for its NLL and ECE. It does not change which class is predicted."""

from __future__ import annotations

from methods._finite import finite
from methods._torch import Tensor, torch

LEAST, MOST = 1.0, 100.0
"""Limits of a temperature. The least is used at one shot, where the logits of a left-out image say nothing about its
class; the most, CLIP's limit of its own logit scale, where they are right for every image."""


def fitted_temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Return the factor in [1, 100] with the least cross-entropy of `factor * logits`, which are of left-out images.

    The cross-entropy is convex in the factor, so bisection on its derivative finds the minimum.
    """
    logits_NC = finite(logits_NC.double(), "a logit of a left-out image")
    own_N = logits_NC[torch.arange(len(labels_N)), labels_N]

    def not_rising(factor: float) -> bool:
        mean_N = ((factor * logits_NC).softmax(-1) * logits_NC).sum(-1)
        return bool((mean_N - own_N).mean() <= 0)  # the derivative of the cross-entropy

    low, high = LEAST, MOST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if not_rising(middle) else (low, middle)
    return (low * high) ** 0.5
