"""LFA: a linear map from image features to text features, in closed form and then refined by a ranking loss.

What is learned: W [D, D], applied to the image features; D * D numbers.
Shapes: B images in a call, C classes, D feature width, N training images, V views, n steps.
Cost: 1 request (C prompts) for the text features; 1 request, V * N image rows for V = 5 fixed views (fewer if the task
offers fewer), cut to what the allotment pays for after the text features, at least 1. There is no validation.
Prediction: 1 request, B image rows a call; for new classes also 1 prompt set.
Paper: Ouali et al., Black Box Few-Shot Adaptation for Vision-Language Models, arXiv:2304.01752 (ICCV 2023). X are the
image features [V * N, D], T the text feature of each one's class, and U S V' = svd(X' T):

    W0 = U V' (orthogonal Procrustes)        W = (1 - beta) * W0 + beta * I        (1)
    q = normalize(f W)        d_c = ||q - t_c||        logit_c(f) = scale * q . t_c        (2)
    loss = mean over i and the 3 classes j nearest to q_i of  max(0, d_y + (1 - t_j . t_y) / 4 - d_j)        (3)

beta: the first of 25 values from 0 to 1 with the best mean accuracy over 3 random splits of the first view, 80 % to fit
W0 and 20 % to test. Then n steps of AdamW (lr 5e-4, cosine to 1e-7) on all N images: a step draws one view, adds noise
N(0, 0.035^2) with probability 1/2, and applies dropout 0.05 with probability 1/2. The own class may be among the 3 and
adds zero. The last W is used. `hparams=paper` sets the n of each data set, whose choice the release does not explain.

Departures from the paper and its released code:
1. Five augmented views in place of five crops (four corners and the centre); the first stands for the centre crop.
2. X' T has at most rank C, which leaves W0 open on its null space. 1e-6 * I is added, which makes W0 the solution
   nearest to the identity.
3. The three splits are the same for all values of beta.
4. `box.logit_scale` is the model's own, and the template is the data set's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._settings import number
from methods._torch import F, Tensor, no_grad, torch
from methods._training import cosine_lr, descend
from methods._views import ViewsPlan, plan_views, training_views
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
    torch_generator,
)

STEPS_PER_CALL = 10


def procrustes(image_ND: Tensor, text_ND: Tensor) -> Tensor:
    """Return the orthogonal map W0 [D, D] that brings `image_ND` nearest to `text_ND` (1)."""
    product_DD = image_ND.double().T @ text_ND.double() / len(image_ND)
    u_DD, _, vh_DD = torch.linalg.svd(product_DD + 1e-6 * torch.eye(len(product_DD)))
    return (u_DD @ vh_DD).float()


def ranking_loss(q_BD: Tensor, labels_B: Tensor, text_CD: Tensor, n_nearest: int, margin_scale: float) -> Tensor:
    """Return the adaptive re-ranking loss (3)."""
    distance_BC = (2 - 2 * q_BD @ text_CD.T).clamp(min=1e-8).sqrt()
    near_BK, j_BK = distance_BC.topk(min(n_nearest, len(text_CD)), largest=False)
    own_B1 = distance_BC.gather(1, labels_B[:, None])
    margin_BK = (1 - text_CD @ text_CD.T)[labels_B].gather(1, j_BK) / margin_scale
    return torch.where(j_BK == labels_B[:, None], 0, own_B1 + margin_BK - near_BK).clamp(min=0).mean()


@method(name="lfa", access=Access.TEXT | Access.FEATURES, paper="arXiv:2304.01752", new_classes=True)
class LFA(Method):
    """A linear map that aligns image features with text features."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        beta: float | None = None
        """Share of the identity in W, 0 to 1; None = cross-validated. The paper uses 0.9 for new classes."""
        n_views: int = 5
        """V: views in place of the paper's five crops."""
        steps: int = 200
        """n: steps of AdamW; 0 = the closed form alone."""
        lr: float = 5e-4
        """Initial learning rate of AdamW."""
        final_lr: float = 1e-7
        """Learning rate at the end of the cosine."""
        weight_decay: float = 5e-4
        """AdamW's weight decay."""
        n_nearest: int = 3
        """Nearest classes in the loss (3)."""
        margin_scale: float = 4.0
        """Divisor of the margin in the loss (3)."""
        noise: float = 0.035
        """Standard deviation of the noise on the features."""
        dropout: float = number(0.05, at_most=1)
        """Probability that an entry of a feature is set to zero."""
        n_betas: int = 25
        """Number of values of beta in the cross-validation."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ViewsPlan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        return plan_views(shape, remaining, text, min(max(1, shape.views), self.config.n_views))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ViewsPlan) -> None:
        self.done, self.labels_N, self.logit_scale = 0, task.train.labels, box.logit_scale
        self.generator = torch_generator(rng)
        self.text_CD = box.text_features(task.classes.prompts())[0]
        self.bank_VND = box.image_features(training_views(task, plan.views)).view(plan.views, len(self.labels_N), -1)
        self.beta = self.config.beta if self.config.beta is not None else self._cross_validated_beta()
        w0_DD = procrustes(self.bank_VND.flatten(0, 1), self.text_CD[self.labels_N.repeat(plan.views)])
        self.map_DD = torch.lerp(w0_DD, torch.eye(len(w0_DD)), self.beta).requires_grad_()  # (1)
        c = self.config
        self.optimizer = torch.optim.AdamW([self.map_DD], lr=c.lr, weight_decay=c.weight_decay)
        self.trainable_params = self.map_DD.numel()
        self.notes.update(views=plan.views, beta=self.beta, steps=c.steps)

    def step(self, box: BlackBox) -> bool:
        """Run ten steps of AdamW."""
        for _ in range(min(STEPS_PER_CALL, self.config.steps - self.done)):
            self._refine()
        return self.done < self.config.steps

    def project(self, features_BD: Tensor) -> Tensor:
        """Return q [B, D] (2)."""
        return F.normalize(features_BD @ self.map_DD, dim=-1)

    @no_grad
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        text_CD = self.text_CD if classes is None else box.text_features(classes.prompts())[0]
        return self.logit_scale * self.project(box.image_features(images)) @ text_CD.T  # (2)

    def deployed(self) -> dict[str, Tensor]:
        return {"map_DD": self.map_DD.detach(), "text_CD": self.text_CD}

    def _cross_validated_beta(self) -> float:
        """Return the first beta with the best mean accuracy over three random splits of the first view."""
        features_ND, n, right_A = self.bank_VND[0], len(self.labels_N), torch.zeros(self.config.n_betas)
        beta_A11 = torch.linspace(0, 1, self.config.n_betas).view(-1, 1, 1)
        for _ in range(3):
            order_N = torch.randperm(n, generator=self.generator)
            test, fit = order_N[: max(1, n // 5)], order_N[max(1, n // 5) :]
            w0_DD = procrustes(features_ND[fit], self.text_CD[self.labels_N[fit]])
            zero_shot_BC = features_ND[test] @ self.text_CD.T
            logits_ABC = torch.lerp(features_ND[test] @ w0_DD @ self.text_CD.T, zero_shot_BC, beta_A11)
            right_A += (logits_ABC.argmax(-1) == self.labels_N[test]).sum(-1)
        return float(beta_A11[int(right_A.argmax())])  # the first of equals

    def _refine(self) -> None:
        """Run one step of AdamW on one view."""
        c, g = self.config, self.generator
        features_ND = self.bank_VND[int(torch.randint(len(self.bank_VND), (), generator=g))]
        noisy, dropped = (torch.rand(2, generator=g) < 0.5).tolist()
        if noisy:
            features_ND = features_ND + c.noise * torch.randn(features_ND.shape, generator=g)
        if dropped:
            kept_ND = torch.rand(features_ND.shape, generator=g) >= c.dropout
            features_ND = features_ND * kept_ND / (1 - c.dropout)
        loss = ranking_loss(self.project(features_ND), self.labels_N, self.text_CD, c.n_nearest, c.margin_scale)
        self.optimizer.param_groups[0]["lr"] = c.final_lr + cosine_lr(c.lr - c.final_lr, self.done, c.steps)
        descend(self.optimizer, loss, f"loss in step {self.done + 1}")
        self.done += 1
