"""BBT: black-box tuning of a soft prompt by CMA-ES, with nothing learned on the client.

What is learned: z [K], whose prompt p0 + A z replaces the template's context [L, E] (`evolution.py`).
Shapes: P population, N training images, C classes, K intrinsic dimension, L context tokens, E token-embedding width.
Cost: a generation scores P prompt sets on one fixed augmented view of the N training images:
    P requests, P * N images, P * C prompts, P * N * C outputs; 200 generations at 8,000 requests.
    Within an allotment as many generations as it pays, none at worst: then the prompt is the template's.
Prediction asks 1 prompt set about each image.
Paper: Sun et al., Black-Box Tuning for Language-Model-as-a-Service, arXiv:2201.03514:
    z* = argmin_z CE(f(p0 + A z; X), Y)
run as the BBT rows of CraFT's tables (arXiv:2402.04050), as far as that is known: CraFT's prompt search without the KL
term. The code of those rows was not released; CraFT's was read for everything here that BBT's paper leaves open.

Departs from the papers:
1. CLIP and context tokens before the class name, not a language model and 50 prepended tokens.
2. A is Gaussian with CraFT's `std`; BBT draws it uniformly. P = 40 as CraFT; BBT has 20.
3. The prompt is the mean of the last generation's search distribution; BBT keeps the candidate that is best on a
   development set. Nothing is chosen on test.
4. The start is the data set's own template, or where that has no words before the class name the first of its
   ensemble that has; `paper_start` restores "a photo of a {}." everywhere (CraFT's).
5. The allotment ends the search; CMA-ES's tolerance rules do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    with_templates,
)
from methods.evolution import PromptSearch, plan_generations
from methods.optim import mean_cross_entropy, training_views, with_context


@method(name="bbt", access=Access.SOFT | Access.SCORES, paper="arXiv:2201.03514", new_classes=True)
class BBT(Method):
    """A soft prompt searched by CMA-ES on the training loss alone."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings: the commonest in CraFT's released configs."""

        popsize: int = 40
        """P: candidate prompts in a generation, each one request."""
        generations: int = 0
        """At most so many; 0: what the allotment pays, and with no limit 8,000 candidates (fewer under 8 shots)."""
        intrinsic_dim: int = 512
        """K: width of the searched vector z."""
        sigma: float = 1.0
        """CMA-ES's first step size."""
        bound: float = 5.0
        """Each entry of z stays within [-bound, bound]; 0 leaves it free."""
        std: float = 0.2
        """Standard deviation of the entries of A."""
        paper_start: bool = False
        """Start from "a photo of a {}." on every data set, as CraFT's code does, not from the data set's template."""

    config: Config

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        c = self.config
        self.classes = with_templates(task.classes, "a photo of a {}.") if c.paper_start else with_context(task.classes)
        self.images, self.labels_N = training_views(task, 1), task.train.labels
        self.search = PromptSearch(
            box.embed_text(self.classes.context),
            intrinsic_dim=c.intrinsic_dim,
            std=c.std,
            sigma=c.sigma,
            bound=c.bound,
            popsize=c.popsize,
            rng=rng,
        )
        self.ctx_LE = self.search.p0_LE
        self.trainable_params = c.intrinsic_dim
        self.generation = 0
        self.generations = self._generations(TaskShape.of(task, box.feature_dim), box.remaining)
        self.paper_queries = c.popsize * self.generations
        self.notes |= {"generations": self.generations, "start": self.classes.template}

    def step(self, box: BlackBox) -> bool:
        """One generation."""
        if self.generation == self.generations:
            return False
        prompts = self.classes.soft(self.search.ask())
        n, loss_P = len(self.labels_N), torch.zeros(self.config.popsize)
        for rows, scores_PBC in box.score_blocks(self.images, prompts):
            labels_B = self.labels_N[rows]
            loss_P += mean_cross_entropy(scores_PBC, labels_B) * (len(labels_B) / n)
        self.search.tell(loss_P)
        self.ctx_LE = self.search.mean()
        self.generation += 1
        return self.generation < self.generations

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        named = with_templates(classes or self.classes, self.classes.template)
        return box.scores(images, named.soft(self.ctx_LE.unsqueeze(0)))[0]

    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        return self._one_generation(shape) * self._generations(shape, remaining)

    def deployed(self) -> dict[str, Tensor]:
        return {"ctx_LE": self.ctx_LE}

    def _one_generation(self, shape: TaskShape) -> Bill:
        return Bill.scores(self.config.popsize, shape.n_train, shape.n_classes)

    def _generations(self, shape: TaskShape, remaining: Remaining) -> int:
        c = self.config
        return plan_generations(c.generations, c.popsize, shape.shots, self._one_generation(shape), remaining)
