"""GDA: a Gaussian classifier with one shared covariance on image features, added to the zero-shot logits.

What is learned: a weight [C, D] and a bias [C], in closed form, and the number alpha; C * D + C + 1 numbers.
Shapes: B images in a call, C classes, D feature width, N training images, M validation images, V views, n = V * N rows.
Cost: 1 request (C prompts) for the text features; 1 request, V * N image rows for the training features; 1 request, M
image rows for the validation features. The allotment pays for the validation images first, then for V = the views that
the task offers, at least 1. If not even one view fits beside the validation images, or there are none, alpha = 0.1.
Prediction: 1 request, B image rows a call; 1 request for C prompts more for classes that were not fitted.
Paper: Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-Based Adaptation, arXiv:2402.04087 (ICLR 2024):

    mu_c = mean of class c's rows        S = sum over rows of (f - mu_y)(f - mu_y)' / (n - 1)        (1)
    A = D * pinv((n - 1) S + tr(S) I)        (2)
    w_c = A mu_c        b_c = -log C - mu_c' A mu_c / 2        (3)
    logit_c(f) = scale * f t_c + alpha * (f w_c + b_c)        (4)

alpha: the first of 1e-4, 1e-3, ..., 100 with the best validation accuracy.

New classes, as in the released main_base2new.py: for a new class with text feature t, take the 64 training rows with
the largest cosine to t. mu is the mean of these rows and 16 copies of t, S is their covariance about t, and A is (2)
with n = 64. The classes share the mean of their A. alpha is that of the fitted classes.

Departures from the paper and its released code:
1. alpha is chosen on min(shots, 4) validation images per class. The released code searches on the full validation split
   (on ImageNet: on the test set).
2. `box.logit_scale` replaces a hard-coded 100 (they agree for OpenAI's CLIP).
3. One template, the data set's; the released ImageNet run averages 7.
4. The fitted classes keep (2) when new classes are evaluated too. `base_to_new=true` does as main_base2new.py:
   A = pinv(mean over classes of the covariance of class c's rows), without the shrinkage of (2).
5. D is the model's feature width in the base-to-new form too; the released script has 512.
6. If one of the classes to predict was not fitted, all of them are predicted as new classes.
7. A class without training images, which (1) does not define, has the mean of the other classes' means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._torch import Tensor, torch
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


@method(name="gda", access=Access.TEXT | Access.FEATURES, paper="arXiv:2402.04087", new_classes=True)
class GDA(Method):
    """Gaussian discriminant analysis on image features, added to the zero-shot logits."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        alpha: float = 0.1
        """Weight of the Gaussian classifier when it is not searched."""
        alphas: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
        """Weights that are tried; the first best wins."""
        base_to_new: bool = False
        """Fit the classes of the task as the released base-to-new script does; see departure 4."""
        neighbours: int = 64
        """Training rows that represent a new class."""
        text_copies: int = number(16, at_least=0)
        """Copies of the text feature in the mean of a new class."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ValidationPlan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        return plan_validation(shape, remaining, text, max(1, shape.views))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ValidationPlan) -> None:
        self.classes, self.scale, self.alpha = task.classes, box.logit_scale, self.config.alpha
        self.text_CD = box.text_features(task.classes.prompts())[0]
        self.features_nD = box.image_features(training_views(task, plan.views))
        self.mean_CD, self.inverse_DD = self._fit(task.train.labels.repeat(plan.views))
        if plan.search:
            self.alpha = self._best_alpha(box.image_features(task.val.images), task.val.labels)
        self.trainable_params = self.text_CD.numel() + len(task.classes) + 1
        searched_on_val = len(task.val.labels) * plan.search
        self.notes.update(views=plan.views, alpha=self.alpha, searched_on_val=searched_on_val)

    def _fit(self, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class means [C, D] and A [D, D], in float64."""
        (n, d), n_classes = self.features_nD.shape, len(self.classes)
        count_C = torch.bincount(labels_n, minlength=n_classes)
        rows_C = count_C.double().clamp(min=1)
        mean_CD = torch.zeros(n_classes, d, dtype=torch.float64)
        scatter_DD = torch.zeros(d, d, dtype=torch.float64)
        per_row_C = 1 / (n_classes * (rows_C - 1).clamp(min=1)) if self.config.base_to_new else torch.ones_like(rows_C)
        blocks = [slice(i, i + 8192) for i in range(0, n, 8192)]  # a float64 copy of all rows can take gigabytes
        for rows in blocks:  # (1)
            mean_CD.index_add_(0, labels_n[rows], self.features_nD[rows].double() / rows_C[labels_n[rows], None])
        mean_CD[count_C == 0] = mean_CD.sum(0) / (count_C > 0).sum()
        for rows in blocks:
            centred_nD = self.features_nD[rows].double() - mean_CD[labels_n[rows]]
            scatter_DD += (centred_nD * per_row_C[labels_n[rows], None]).T @ centred_nD
        if self.config.base_to_new:
            return mean_CD, torch.linalg.pinv(scatter_DD, hermitian=True)
        shrinkage_DD = torch.eye(d, dtype=torch.float64) * scatter_DD.trace() / max(1, n - 1)
        return mean_CD, d * torch.linalg.pinv(scatter_DD + shrinkage_DD, hermitian=True)  # (2)

    def _best_alpha(self, features_MD: Tensor, labels_M: Tensor) -> float:
        """Return the first alpha with the best accuracy."""
        zero_shot_MC, gaussian_MC = self._parts(features_MD, self.text_CD, self.mean_CD, self.inverse_DD)

        def accuracy(alpha: float) -> float:
            logits_MC = finite(zero_shot_MC + alpha * gaussian_MC, "a validation logit")
            return (logits_MC.argmax(-1) == labels_M).double().mean().item()

        return max(self.config.alphas, key=accuracy)  # max keeps the first of equals

    def _parts(self, features_BD: Tensor, text_CD: Tensor, mean_CD: Tensor, a_DD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two terms of (4) without alpha, [B, C] each, in float64."""
        features_BD, weight_CD = features_BD.double(), mean_CD @ a_DD  # A is symmetric
        bias_C = -np.log(len(mean_CD)) - (mean_CD * weight_CD).sum(-1) / 2  # (3)
        return self.scale * features_BD @ text_CD.double().T, features_BD @ weight_CD.T + bias_C

    def _new(self, text_CD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means [C, D] and the shared A [D, D] of classes without training images."""
        d, k, copies = text_CD.shape[1], min(self.config.neighbours, len(self.features_nD)), self.config.text_copies
        inverse_DD, means = torch.zeros(d, d, dtype=torch.float64), []
        for text_D in text_CD.double():
            nearest_k = (self.features_nD @ text_D.float()).topk(k).indices
            rows_kD = self.features_nD[nearest_k].double()
            means.append((rows_kD.sum(0) + copies * text_D) / (k + copies))
            centred_kD = rows_kD - text_D
            shrinkage = centred_kD.square().sum() / max(1, k - 1)  # tr(S)
            # D * inverse(centred' centred + shrinkage * I), which has rank k beside the diagonal
            small_kk = centred_kD @ centred_kD.T + shrinkage * torch.eye(k, dtype=torch.float64)
            low_rank_DD = centred_kD.T @ torch.linalg.solve(small_kk, centred_kD)
            inverse_DD += d * (torch.eye(d, dtype=torch.float64) - low_rank_DD) / shrinkage / len(text_CD)
        return torch.stack(means), inverse_DD

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        text_CD, mean_CD, inverse_DD = self.text_CD, self.mean_CD, self.inverse_DD
        if classes is not None and set(classes.names) <= set(self.classes.names):
            columns = [self.classes.names.index(name) for name in classes.names]
            text_CD, mean_CD = text_CD[columns], mean_CD[columns]
        elif classes is not None:
            text_CD = box.text_features(classes.prompts())[0]
            mean_CD, inverse_DD = self._new(text_CD)
        zero_shot_BC, gaussian_BC = self._parts(box.image_features(images), text_CD, mean_CD, inverse_DD)
        return (zero_shot_BC + self.alpha * gaussian_BC).float()  # (4)

    def deployed(self) -> dict[str, Tensor]:
        weight_CD = self.scale * self.text_CD + self.alpha * self.mean_CD @ self.inverse_DD
        bias_C = -self.alpha * ((self.mean_CD @ self.inverse_DD) * self.mean_CD).sum(-1) / 2
        return {"weight_CD": weight_CD.float(), "bias_C": bias_C.float()}
