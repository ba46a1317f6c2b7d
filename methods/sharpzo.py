"""SharpZO: a soft prompt searched by CMA-ES with a sharpness-aware shift, then trained by random finite differences.

What is learned: z [K], whose prompt p0 + A z replaces the template's context [L, E] (`_prompt_search.py`).
Shapes: P population, N training images, B images in a call, C classes, K intrinsic dimension, Q coordinates that are
differenced, L context tokens, E token-embedding width.
Cost: an evaluation scores one prompt set on one fixed augmented view of the N training images: 1 request, N images, C
prompts, N * C outputs. A step of stage 1 takes P + 2 Q = 1,064 of them, a step of stage 2 takes 2. The script's
schedule, 100 + 199,900 steps, sends 106,400 + 399,800 = 506,200 requests. From an allotment that does not pay for it,
stage 1 gets 21 % (the script's share), at least one step where one can be paid; stage 2 gets the rest. 8,000 requests:
1 + 3,468 steps. Without any steps, the prompt stays the template's.
Prediction: 1 prompt set for each image.
Paper: Yang et al., SharpZO: Hybrid Sharpness-Aware Vision Language Model Prompt Tuning via Forward-Only Passes, NeurIPS
2025, arXiv:2506.20990, as in its released main_sharpzo.py. With f(z) = CE(p0 + A z) over all N images, m the mean of
the search distribution and e_k the k-th unit vector:

    g_k = (f(m + h e_k) - f(m - h e_k)) / 2h   for all k                                            (1)
    fitness(z) = f(z + rho g / |g|)             stage 1: CMA-ES                                     (2)
    z <- z - lr (f(z + h u) - f(z - h u)) / 2h * u,   u ~ N(0, I)     stage 2, from z = m           (3)

Departures from the released code, and the settings that restore it (`conf/method/sharpzo_released.yaml` has all four):
1. The shift has length rho. The release divides rho by the norm over P equal copies of g: `short_shift`.
2. Stage 2 takes the step of (3). The release adds each estimate to a sum that is never reset, which starts at the last
   g of stage 1, and takes a step along the sum: `accumulate`.
3. The prompt after stage 1 is m. The release draws a second population and averages its P unscored members, a noisy
   mean that also advances the generator: `prompt_from_extra_population`.
4. p0 is the data set's template (or the first of its ensemble with words before the class name), whose words after the
   class name stay. The release starts from "a photo of a {}." on every data set: `paper_init`.
5. The logit scale is the model's own; the release hard-codes 100, the scale of OpenAI's CLIP.
6. The allotment ends the run. The release's `budget` is never read, its pruned variant of stage 2 is left out, and the
   last prompt is used without any test score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._prompt_search import PromptSearch
from methods._settings import number
from methods._torch import Tensor, torch
from methods._training import mean_cross_entropy
from methods._views import training_views
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
)


@dataclass(frozen=True, kw_only=True)
class SharpZOPlan(Plan):
    """How long each stage runs."""

    cma_steps: int
    zo_steps: int


@method(name="sharpzo", access=Access.SOFT | Access.SCORES, paper="arXiv:2506.20990")
class SharpZO(Method):
    """A soft prompt by sharpness-aware CMA-ES, then by random finite differences."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PromptSearch.Config):
        """Settings of the released script; `popsize` candidates are scored in a step of stage 1."""

        generations: int = 100
        """Steps of stage 1 in the published schedule: the script's `change_point`; 0 = no stage 1."""
        zo_steps: int = 199_900
        """Steps of stage 2 in the published schedule: the script's `total_steps` without those of stage 1."""
        cma_share: float = number(0.21, at_most=1)
        """Share of stage 1 in an allotment that does not pay for the published schedule."""
        sigma: float = number(0.4, above=0)
        """Initial step size of CMA-ES."""
        n_directions: int = 512
        """Q: coordinates that are differenced in a step of stage 1, drawn anew each time if < K; 0 = no shift."""
        rho: float = 0.1
        """Length of the shift."""
        fd_step: float = number(1e-3, above=0)
        """h: step of the finite differences, in both stages."""
        lr: float = 1e-3
        """Step size of stage 2."""
        short_shift: bool = False
        """Divide the length of the shift by sqrt(popsize), as the released code does."""
        accumulate: bool = False
        """Step along the sum of all estimates so far, as the released code does."""
        prompt_from_extra_population: bool = False
        """Take the average of a second, unscored population as the prompt, as the released code does."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> SharpZOPlan:
        one = Bill.scores(1, shape.n_train, shape.n_classes)
        cma_steps, zo_steps = self._schedule(remaining.affords(one))
        bill = one * (cma_steps * self._evaluations_of_a_cma_step() + 2 * zo_steps)
        return SharpZOPlan(bill=bill, cma_steps=cma_steps, zo_steps=zo_steps)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: SharpZOPlan) -> None:
        c = self.config
        self.images, self.labels_N = training_views(task, 1), task.train.labels
        self.search = PromptSearch(task.classes, box.embed_text, c, rng)
        self.generator = torch_generator(rng)
        self.z_K, self.sum_K = torch.zeros(c.intrinsic_dim), torch.zeros(c.intrinsic_dim)
        self.cma_steps, self.steps, self.done = plan.cma_steps, plan.cma_steps + plan.zo_steps, 0
        self.trainable_params = c.intrinsic_dim
        self.notes |= {"cma_steps": plan.cma_steps, "zo_steps": plan.zo_steps, "directions": self._n_directions()}
        self.notes["start"] = self.search.classes.template

    def step(self, box: BlackBox) -> bool:
        """Run one step of stage 1 or of stage 2."""
        if self.done == self.steps:
            return False
        if self.done < self.cma_steps:
            self._cma_step(box)
        else:
            self._zo_step(box)
        self.done += 1
        return self.done < self.steps

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, self.search.classes.soft(self.search.context(self.z_K.unsqueeze(0))))[0]

    def deployed(self) -> dict[str, Tensor]:
        return {"ctx_LE": self.search.context(self.z_K)}

    def _cma_step(self, box: BlackBox) -> None:
        """Move the search distribution by a population that is scored at shifted positions."""
        c, evolution = self.config, self.search.evolution
        g_K = self._coordinate_gradient(box)  # (1)
        length = c.rho / math.sqrt(c.popsize) if c.short_shift else c.rho
        shift_K = length * torch.nn.functional.normalize(g_K, dim=0)
        evolution.tell(self._losses(box, evolution.ask() + shift_K))  # (2)
        self.z_K = evolution.mean_of_extra_population() if c.prompt_from_extra_population else evolution.mean()
        self.sum_K = g_K

    def _coordinate_gradient(self, box: BlackBox) -> Tensor:
        """Return the gradient [K] at the prompt by central differences in Q coordinates, times K / Q (1)."""
        h, dim, q = self.config.fd_step, self.config.intrinsic_dim, self._n_directions()
        if not q:
            return torch.zeros(dim)
        rows_Q = torch.arange(dim) if q == dim else torch.randperm(dim, generator=self.generator)[:q]
        offsets_QK = h * torch.eye(dim)[rows_Q]
        losses_2Q = self._losses(box, torch.cat([self.z_K + offsets_QK, self.z_K - offsets_QK]))
        plus_Q, minus_Q = torch.split(losses_2Q, q)
        return torch.zeros(dim).index_copy(0, rows_Q, (plus_Q - minus_Q) / (2 * h) * (dim / q))

    def _zo_step(self, box: BlackBox) -> None:
        """Take one step against the gradient that is estimated along a random direction."""
        h, u_K = self.config.fd_step, torch.randn(self.config.intrinsic_dim, generator=self.generator)
        plus, minus = self._losses(box, torch.stack([self.z_K + h * u_K, self.z_K - h * u_K]))
        estimate_K = (plus - minus) / (2 * h) * u_K
        self.sum_K = self.sum_K + estimate_K if self.config.accumulate else estimate_K
        self.z_K = self.z_K - self.config.lr * self.sum_K  # (3)

    def _losses(self, box: BlackBox, z_PK: Tensor) -> Tensor:
        """Return f(z) [P], with at most `popsize` prompt sets in a call, so that responses stay as small as CraFT's."""
        n, losses = len(self.labels_N), []
        for z_pK in torch.split(z_PK, self.config.popsize):
            loss_p = torch.zeros(len(z_pK))
            for rows, scores_pBC in box.score_blocks(self.images, self.search.classes.soft(self.search.context(z_pK))):
                loss_p += mean_cross_entropy(scores_pBC, self.labels_N[rows]) * (len(self.labels_N[rows]) / n)
            losses.append(loss_p)
        return finite(torch.cat(losses), f"loss in step {self.done + 1}")

    def _n_directions(self) -> int:
        return min(self.config.n_directions, self.config.intrinsic_dim)

    def _evaluations_of_a_cma_step(self) -> int:
        return self.config.popsize + 2 * self._n_directions()

    def _schedule(self, evaluations: int | None) -> tuple[int, int]:
        """Return the steps of both stages: the published ones if `evaluations` pays for them; None = no limit."""
        c, one = self.config, self._evaluations_of_a_cma_step()
        if evaluations is None or evaluations >= c.generations * one + 2 * c.zo_steps:
            return c.generations, c.zo_steps
        cma_steps = max(math.floor(c.cma_share * evaluations / one), min(1, evaluations // one))
        cma_steps = min(cma_steps, c.generations)
        return cma_steps, min((evaluations - cma_steps * one) // 2, c.zo_steps)
