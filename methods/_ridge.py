"""Ridge regression from cosine scores to one-hot labels, shared by `score_ridge` and `sim`.

What is learned: W [Q, C] in closed form, and a temperature; Q * C + 1 numbers.
Shapes: N training images, C classes, Q prompts.

    W = (L' L + lambda I)^-1 L' Y        logits(l) = l W        (1)
    l_n W without image n = (l_n W - h_n y_n) / (1 - h_n)        h_n = l_n (L' L + lambda I)^-1 l_n'        (2)
"""

from __future__ import annotations

from dataclasses import dataclass

from methods._finite import finite
from methods._temperature import fitted_temperature
from methods._torch import F, Tensor, torch


@dataclass(frozen=True)
class Ridge:
    """A fitted map from cosines [B, Q] to logits [B, C]."""

    weight_QC: Tensor
    temperature: float

    @classmethod
    def fit(cls, cosines_NQ: Tensor, labels_N: Tensor, n_classes: int, ridge: float) -> Ridge:
        """Return the regression, and the temperature that fits the predictions of images that are left out."""
        l_NQ, y_NC = cosines_NQ.double(), F.one_hot(labels_N, n_classes).double()
        n, q = l_NQ.shape
        if q <= n:
            gram_QQ = l_NQ.T @ l_NQ + ridge * torch.eye(q, dtype=torch.float64)
            solution_QN = torch.linalg.solve(gram_QQ, l_NQ.T)
        else:  # the same matrix from an N x N system
            gram_NN = l_NQ @ l_NQ.T + ridge * torch.eye(n, dtype=torch.float64)
            solution_QN = torch.linalg.solve(gram_NN, l_NQ).T
        weight_QC = finite(solution_QN @ y_NC, "a weight of the ridge regression")  # (1)
        leverage_N1 = (l_NQ * solution_QN.T).sum(-1, keepdim=True)
        left_out_NC = (l_NQ @ weight_QC - leverage_N1 * y_NC) / (1 - leverage_N1)  # (2)
        return cls(weight_QC.float(), fitted_temperature(left_out_NC, labels_N))

    def logits(self, cosines_BQ: Tensor) -> Tensor:
        """Return the logits [B, C] (1) times the temperature."""
        return (self.temperature * cosines_BQ.double() @ self.weight_QC.double()).float()
