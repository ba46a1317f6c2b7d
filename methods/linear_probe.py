"""Linear probe: L2-regularized multinomial logistic regression on the image features of the training images.

What is learned: a weight [D, C] and a bias [C]; D * C + C numbers. The class names are not used.
Shapes: B images in a call, C classes, D feature width, N training images, M validation images.
Cost: 1 request and N image rows for the training features; 1 request and M image rows for the validation features. If
the allotment does not pay for both, or there are no validation images, C_reg is not searched.
Prediction: 1 request, B image rows a call.
Paper: Radford et al., CLIP, arXiv:2103.00020, section 3.2, under the few-shot protocol of Zhou et al., CoOp,
arXiv:2109.01134, released lpclip/linear_probe.py:

    min over W, b:  sum_i CE(f_i W + b, y_i) + ||W||^2 / (2 C_reg)        (the bias is free)        (1)

C_reg is the first of 1e6, 1e4, ..., 1e-6 with the best validation accuracy, then moved by 8 steps of bisection in
log10 C_reg: each compares both ends of the interval (at first one decade to each side), keeps the better (the smaller
C_reg when equal) and moves the other end to the middle.

Departures from the released code:
1. Features have unit length, as the endpoint returns them. The release uses the tower's raw output, where the same
   C_reg regularizes less. The search range covers both.
2. The few-shot sets and the seeds are the benchmark's, not the released script's own sampler with seeds 1 to 10.
3. torch's L-BFGS (strong Wolfe line search) in float64 replaces scikit-learn's, with its tolerances and 1000
   iterations. At large C_reg it stops earlier than scikit-learn 1.9.1, and the search then often ends at another C_reg.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._torch import Tensor, torch
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Plan,
    Remaining,
    TaskShape,
    method,
)


def logistic_regression(x_ND: Tensor, labels_N: Tensor, n_classes: int, c_reg: float, max_iter: int) -> Tensor:
    """Return the minimizer [D + 1, C] of (1) in float64, started from zero; its last row is the bias."""
    n = len(x_ND)
    x_ND1 = torch.cat([x_ND.double(), torch.ones(n, 1, dtype=torch.float64)], dim=1)
    target_NC = torch.nn.functional.one_hot(labels_N, n_classes).double()
    w_D1C = torch.zeros(x_ND1.shape[1], n_classes, dtype=torch.float64)

    def closure() -> Tensor:  # (1) and its gradient, both divided by N
        log_p_NC = (x_ND1 @ w_D1C).log_softmax(dim=1)
        decay_D1C = w_D1C / (c_reg * n)
        decay_D1C[-1] = 0
        w_D1C.grad = x_ND1.T @ (log_p_NC.exp() - target_NC) / n + decay_D1C
        return -(log_p_NC * target_NC).sum() / n + (decay_D1C * w_D1C).sum() / 2

    optimizer = torch.optim.LBFGS(
        [w_D1C],
        max_iter=max_iter,
        history_size=10,
        tolerance_grad=1e-4 / n,
        tolerance_change=2e-9,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    finite(w_D1C, f"a weight at c_reg {c_reg:g}")
    w_D1C.grad = None
    return w_D1C


@dataclass(frozen=True, kw_only=True)
class ProbePlan(Plan):
    """Whether C_reg is chosen on the validation images."""

    search: bool


@method(name="linear_probe", access=Access.TEXT | Access.FEATURES, paper="arXiv:2103.00020", uses_views=False)
class LinearProbe(Method):
    """Logistic regression on image features, its regularization chosen on the validation images."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of CoOp's protocol."""

        c_reg: float = number(1.0, above=0)
        """Inverse regularization strength when it is not searched."""
        n_bisections: int = number(8, at_least=0)
        """Steps of bisection; 0 with one value in `coarse` fixes C_reg."""
        coarse: tuple[float, ...] = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)
        """Values of log10 C_reg that are tried first; the first best wins."""
        max_iter: int = 1000
        """Maximum number of L-BFGS iterations of one regression."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ProbePlan:
        train, val = (Bill.image_features(n, shape.feature_dim) for n in (shape.n_train, shape.n_val))
        search = shape.n_val > 0 and remaining.affords(train + val) != 0
        return ProbePlan(bill=train + val if search else train, search=search)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ProbePlan) -> None:
        x_ND = box.image_features(task.train.images)
        self.fit(task, x_ND, box.image_features(task.val.images) if plan.search else None)

    def fit(self, task: FewShotTask, x_ND: Tensor, val_MD: Tensor | None) -> None:
        """Fit on the features of the training images; choose C_reg on those of the validation images, if any."""
        fits: dict[float, Tensor] = {}

        def fit(log_c: float) -> Tensor:
            if log_c not in fits:
                fits[log_c] = logistic_regression(
                    x_ND, task.train.labels, len(task.classes), 10**log_c, self.config.max_iter
                )
            return fits[log_c]

        log_c = float(np.log10(self.config.c_reg))
        if val_MD is not None:

            def accuracy(log_c: float) -> float:
                w_D1C = fit(log_c)
                hit_M = (val_MD.double() @ w_D1C[:-1] + w_D1C[-1]).argmax(dim=1) == task.val.labels
                return hit_M.double().mean().item()

            log_c = max(self.config.coarse, key=accuracy)  # max keeps the first of equals
            low, high = log_c - 1, log_c + 1
            for _ in range(self.config.n_bisections):
                middle = (low + high) / 2
                if accuracy(low) < accuracy(high):
                    log_c, low = high, middle
                else:
                    log_c, high = low, middle
        w_D1C = fit(log_c)
        self.weight_DC, self.bias_C = w_D1C[:-1].float(), w_D1C[-1].float()
        self.trainable_params = w_D1C.numel()
        self.notes.update(c_reg=10**log_c, searched_on_val=0 if val_MD is None else len(task.val.labels))

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.logits(box.image_features(images))

    def logits(self, features_BD: Tensor) -> Tensor:
        """Return the logits [B, C], computed in float64, so that a row's logits do not depend on the other rows."""
        return (features_BD.double() @ self.weight_DC.double() + self.bias_C.double()).float()
