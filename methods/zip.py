"""ZIP: a soft prompt of low rank in a random subspace, trained by a gradient that is estimated from perturbed prompts.

What is learned: w = (U [L, r], sigma [r], V [q, r], h [q]), from which the L vectors of the context follow (1). With
L = 8, q = 500 // L = 62 and r = 5: 417 numbers.
Shapes: N training images, B images in a batch, C classes, L context tokens, E token-embedding width, d numbers learned,
J directions, P = 2 J prompt sets in a step.
Cost: a step sends P requests, P * B images, P * C prompts, P * B * C outputs; J = 5, B = min(128, N): 10 requests,
1,280 images. The published schedule is 5,000 calls (500 steps): 5,000 requests, 640,000 images for every N >= 128. A
smaller allotment pays for fewer steps of the same size; the step sizes (2) do not depend on their number. Without any
steps, the context stays the template's.
Prediction: 1 prompt set for each image.
Paper: Park et al., ZIP: An Efficient Zeroth-order Prompt Tuning for Black-box Vision-Language Models, ICLR 2025,
arXiv:2504.06838, as in its released trainers/zip.py. With c0 the initial context, F_l a fixed Fastfood map of
its own for each token (`_fastfood.py`), and i = 1, 2, ... the step:

    ctx_l = c0_l + F_l(R_l),   R = U diag(sigma) V' + 1 h'                                           (1)
    a_i = 0.01 / (i + 1)^0.4,   c_i = 0.01 / i^0.1                                                   (2)
    g = 1/J * sum_j (CE(w + c_i p_j) - CE(w - c_i p_j)) / (2 c_i p_j)    p_j in +-[0.5, 1]^d         (3)
    w <- w - a_i g * min(1, sqrt(d) / |g|)                                                           (4)

U and h start at 0, so that training starts at c0; sigma starts at 1 and V at N(0, 1).

Departures from the released code:
1. One fixed view of the training images. The release augments each batch anew: `views=fresh`.
2. Without any steps, the prompt is the data set's template. With steps it starts as in the release, from random vectors
   before the class name and "."; `n_ctx=0` starts from the template, whose words after the class name then stay.
3. float32; the release computes the scores in float16 (autocast).
4. Where q exceeds E, the Fastfood maps have the width of q. This occurs with short templates (`n_ctx=0`) only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from methods._fastfood import Fastfood
from methods._finite import finite
from methods._settings import number
from methods._spsa import TrainingBatches, directions, estimated_gradient
from methods._torch import Tensor, torch
from methods._training import CLIP_TEMPLATE, mean_cross_entropy, with_context
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
    torch_generator,
    with_templates,
)


@dataclass(frozen=True, kw_only=True)
class ZIPPlan(Plan):
    """How much of the published schedule the allotment pays for."""

    steps: int


@method(name="zip", access=Access.SOFT | Access.SCORES, paper="arXiv:2504.06838")
class ZIP(Method):
    """A soft prompt of low rank in a random subspace, trained by an estimated gradient."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        n_ctx: int = number(8, at_least=0)
        """L: number of context tokens, initialized at random; 0 = those of the data set's template."""
        init_std: float = 0.02
        """Standard deviation of the random initialization."""
        intrinsic_dim: int = 500
        """Size of the subspace: q = intrinsic_dim // L numbers for each token, at least 1."""
        rank: int = 5
        """r: rank of the tokens' numbers, before the part h that all tokens share."""
        max_calls: int = 5000
        """Calls of the published schedule: one call scores one prompt set on one batch."""
        n_directions: int = 5
        """J: directions per step, each with two calls."""
        batch_size: int = 128
        """B: images per step; a short last batch is dropped."""
        lr: float = 0.01
        """a in a_i = a / (i + 1)^lr_decay, the step size."""
        lr_decay: float = 0.4
        """Exponent of the step size."""
        perturbation: float = number(0.01, above=0)
        """c in c_i = c / i^perturbation_decay, the length of a perturbation."""
        perturbation_decay: float = 0.1
        """Exponent of the perturbation."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ZIPPlan:
        sets = 2 * self.config.n_directions
        one = Bill.scores(sets, min(self.config.batch_size, shape.n_train), shape.n_classes)
        published, affordable = self.config.max_calls // sets, remaining.affords(one)
        steps = published if affordable is None else min(published, affordable)
        return ZIPPlan(bill=one * steps, steps=steps)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ZIPPlan) -> None:
        c = self.config
        self.generator, self.batches = torch_generator(rng), TrainingBatches(task, c.batch_size)
        at_random = bool(c.n_ctx and plan.steps)
        self.classes = with_templates(task.classes, CLIP_TEMPLATE) if at_random else with_context(task.classes)
        self.c0_LE = box.embed_text(self.classes.context)
        if at_random:
            self.c0_LE = c.init_std * torch.randn(c.n_ctx, box.token_dim, generator=self.generator)
        n_ctx, width = self.c0_LE.shape
        q, r = max(1, c.intrinsic_dim // n_ctx), c.rank
        self.fastfood = Fastfood(n_ctx, q, width, self.generator)
        self.sizes = [n_ctx * r, r, q * r, q]
        v_qr = torch.randn(q, r, generator=self.generator)
        self.w_d = torch.cat([torch.zeros(n_ctx * r), torch.ones(r), v_qr.flatten(), torch.zeros(q)])

        self.steps, self.done = plan.steps, 0
        self.trainable_params = sum(self.sizes)
        self.paper_queries = 2 * c.n_directions * plan.steps
        self.notes |= {"steps": plan.steps, "start": "random" if at_random else self.classes.template}

    def step(self, box: BlackBox) -> bool:
        """Run one step of gradient descent on one batch, from 2 J prompt sets."""
        if self.done == self.steps:
            return False
        c, i = self.config, self.done + 1
        a_i = c.lr / (i + 1) ** c.lr_decay  # (2)
        c_i = c.perturbation / i**c.perturbation_decay
        p_Jd = directions(c.n_directions, len(self.w_d), self.generator)
        losses_P = self._losses(box, torch.cat([self.w_d + c_i * p_Jd, self.w_d - c_i * p_Jd]))
        finite(losses_P, f"loss in step {i}")

        plus_J, minus_J = torch.split(losses_P, c.n_directions)
        g_d = estimated_gradient(plus_J, minus_J, p_Jd, c_i)  # (3)
        longest = math.sqrt(len(g_d))
        if (length := float(g_d.norm())) >= longest:
            g_d = g_d * (longest / length)
        self.w_d = self.w_d - a_i * g_d  # (4)
        self.done += 1
        return self.done < self.steps

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, self.classes.soft(self.context(self.w_d.unsqueeze(0))))[0]

    def deployed(self) -> dict[str, Tensor]:
        return {"ctx_LE": self.context(self.w_d.unsqueeze(0))[0]}

    def context(self, w_Pd: Tensor) -> Tensor:
        """Return the contexts [P, L, E] of P parameter vectors (1)."""
        u_Px, sigma_Pr, v_Px, h_Pq = torch.split(w_Pd, self.sizes, dim=1)
        r = self.config.rank
        u_PLr, v_Pqr = u_Px.view(len(w_Pd), -1, r), v_Px.view(len(w_Pd), -1, r)
        r_PLq = (u_PLr * sigma_Pr.unsqueeze(1)) @ v_Pqr.mT + h_Pq.unsqueeze(1)
        return self.c0_LE + self.fastfood(r_PLq)

    def _losses(self, box: BlackBox, w_Pd: Tensor) -> Tensor:
        """Return the loss [P] of each parameter vector on the next batch."""
        images, labels_B = self.batches.next(self.generator)
        return mean_cross_entropy(box.scores(images, self.classes.soft(self.context(w_Pd))), labels_B)
