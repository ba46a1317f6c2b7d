"""ProKeR: kernel regression on image features of what the zero-shot scores leave unexplained.

What is learned: A, a weight for each training row and class, in closed form, beta, lambda and a temperature.
Shapes: B images in a call, C classes, D feature width, N training images, M validation images, V views, n = V * N rows.
Cost: 1 request (C prompts) for the text features; 1 request, V * N image rows for the training features; 1 request, M
image rows for the validation features. The allotment pays for the validation images first, then for V = the views that
the task offers, at least 1; V is also cut so that n <= 8,000. beta and lambda are constants if there are no validation
images, if they and one view cannot be paid, or if N alone exceeds 8,000.
Prediction: 1 request, B image rows a call.
Paper: Bendou et al., ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models,
arXiv:2501.11175 (CVPR 2025); X [n, D] are the features of all views, Y [n, C] their labels, one-hot:

    K = exp(-beta * (1 - X X'))        A = (K / lambda + I)^-1 (Y - X t')        (1)
    logits(f) = temperature * (f t' + exp(-beta * (1 - f X')) A)        (2)

beta and lambda: the first with the best validation accuracy of 20 betas from 0.1 to 10 and 100 lambdas from 0.001 to
10, betas in the outer loop. A step is one beta, for which K is decomposed once:

    K = U diag(e) U'        A = U (U' (Y - X t') * lambda / (e + lambda))        (3)

Departures from the paper and from omarnust/BReg-Adapter, a derivative of its code (the original is not available):
1. beta and lambda are chosen on min(shots, 4) validation images per class. That code searches on the full validation
   split (on ImageNet: on the test set).
2. One range for all data sets; the code has a file with other ranges for each.
3. The code has no temperature. Ours is fitted on training images that are left out with all of their views (closed
   form, no query). It changes NLL and ECE and no predicted class.
4. One template, the data set's; the ImageNet run averages 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._temperature import fitted_temperature
from methods._torch import F, Tensor, torch
from methods._views import ValidationPlan, plan_validation, training_views
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Remaining,
    TaskShape,
    method,
)

CONSTANTS = {1: (3.0, 0.05), 2: (2.6, 0.05), 4: (1.5, 0.05), 8: (1.66, 0.07), 16: (1.7, 0.1)}
"""beta and lambda by shots, which the paper chose on ImageNet with RN50 and uses on other data sets."""


@method(name="proker", access=Access.TEXT | Access.FEATURES, paper="arXiv:2501.11175")
class ProKeR(Method):
    """Kernel ridge regression on image features, regularized towards the zero-shot classifier."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The common settings of the paper."""

        search: bool = True
        """Choose beta and lambda on the validation images; False = the constants."""
        beta: float | None = None
        """Constant beta; None = the paper's for ImageNet with RN50, at the nearest number of shots below."""
        ridge: float | None = None
        """Constant lambda; None = as for beta."""
        beta_min: float = 0.1
        """First beta of the grid."""
        beta_max: float = 10.0
        """Last beta of the grid."""
        n_betas: int = 20
        """Number of betas in the grid, evenly spaced."""
        ridge_min: float = 0.001
        """First lambda of the grid."""
        ridge_max: float = 10.0
        """Last lambda of the grid."""
        n_ridges: int = 100
        """Number of lambdas in the grid, evenly spaced."""
        max_rows: int = 8000
        """Maximum number of rows n: K has n * n elements and its decomposition takes n^3 operations."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ValidationPlan:
        text, n = Bill.text_features(1, shape.n_classes, shape.feature_dim), shape.n_train
        wanted = min(max(1, shape.views), max(1, self.config.max_rows // n))
        return plan_validation(shape, remaining, text, wanted, self.config.search and n <= self.config.max_rows)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ValidationPlan) -> None:
        config, self.labels_N, self.views = self.config, task.train.labels, plan.views
        self.text_CD = box.text_features(task.classes.prompts())[0]
        self.rows_nD = box.image_features(training_views(task, plan.views))
        constants = CONSTANTS[max((k for k in CONSTANTS if k <= task.shots), default=1)]
        self.beta = constants[0] if config.beta is None else config.beta
        self.ridge = constants[1] if config.ridge is None else config.ridge
        self.val = (box.image_features(task.val.images), task.val.labels) if plan.search else None
        self.betas = np.linspace(config.beta_min, config.beta_max, config.n_betas).tolist() if plan.search else []
        self.best = -1.0
        searched_on_val = len(task.val.labels) * plan.search
        self.notes.update(views=plan.views, searched_on_val=searched_on_val)

    def step(self, box: BlackBox) -> bool:
        """Evaluate one beta with every lambda; after the last, solve (1) with the best."""
        if self.betas:
            self._try(self.betas.pop(0))
        if not self.betas:
            self.val = None
            self._solve()
        return bool(self.betas)

    def kernel(self, features_BD: Tensor, beta: float) -> Tensor:
        """Return the kernel [B, n] of images and training rows, in float64 (1)."""
        return (features_BD.double() @ self.rows_nD.double().T - 1).mul_(beta).exp_()

    def zero_shot(self, features_BD: Tensor) -> Tensor:
        """Return the cosines [B, C] with the text features, in float64."""
        return features_BD.double() @ self.text_CD.double().T

    def residual(self) -> Tensor:
        """Return Y - X t' [n, C]."""
        labels_n = self.labels_N.repeat(self.views)
        return F.one_hot(labels_n, len(self.text_CD)).double() - self.zero_shot(self.rows_nD)

    def _try(self, beta: float) -> None:
        assert self.val is not None
        (features_MD, labels_M), config = self.val, self.config
        values_n, vectors_nn = torch.linalg.eigh(finite(self.kernel(self.rows_nD, beta), "an element of the kernel"))
        residual_nC = vectors_nn.T @ self.residual()
        kernel_Mn, zero_shot_MC = self.kernel(features_MD, beta) @ vectors_nn, self.zero_shot(features_MD)
        for ridge in np.linspace(config.ridge_min, config.ridge_max, config.n_ridges).tolist():
            logits_MC = zero_shot_MC + (kernel_Mn * (ridge / (values_n.clamp(min=0) + ridge))) @ residual_nC  # (3)
            finite(logits_MC, "a validation logit")
            accuracy = (logits_MC.argmax(-1) == labels_M).double().mean().item()
            if accuracy > self.best:
                self.best, self.beta, self.ridge = accuracy, beta, ridge

    def _solve(self) -> None:
        """Solve (1), and fit the temperature on the logits of each image without its V rows."""
        system_nn = self.kernel(self.rows_nD, self.beta)
        system_nn.diagonal().add_(self.ridge)
        inverse_nn = torch.cholesky_inverse(torch.linalg.cholesky(system_nn))
        solution_nC = finite(inverse_nn @ self.residual(), "a weight of the kernel regression")
        self.weight_nC = (self.ridge * solution_nC).float()
        v, n = self.views, len(self.labels_N)
        rows_NV = torch.arange(v * n).view(v, n).T
        blocks_NVV = inverse_nn[rows_NV.unsqueeze(2), rows_NV.unsqueeze(1)]
        # without an image, the regression errs on its rows by block^-1 (inverse * residual), as for one row
        errors_NVC = torch.linalg.solve(blocks_NVV, solution_nC[rows_NV])
        left_out_NVC = self.zero_shot(self.rows_nD)[rows_NV] + self.ridge * (self.residual()[rows_NV] - errors_NVC)
        self.temperature = fitted_temperature(left_out_NVC.flatten(0, 1), self.labels_N.repeat_interleave(v))
        self.trainable_params = self.weight_nC.numel() + 3
        self.notes.update(beta=self.beta, ridge=self.ridge, temperature=self.temperature)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        features_BD = box.image_features(images)
        logits_BC = self.zero_shot(features_BD) + self.kernel(features_BD, self.beta) @ self.weight_nC.double()
        return (self.temperature * logits_BC).float()  # (2)

    def deployed(self) -> dict[str, Tensor]:
        return {"rows_nD": self.rows_nD, "weight_nC": self.weight_nC, "text_CD": self.text_CD}
