"""BBT: black-box tuning of a soft prompt by CMA-ES, with nothing learned on the client.

What is learned: z [K], whose prompt p0 + A z replaces the template's context [L, E] (`_prompt_search.py`).
Shapes: P population, N training images, C classes, K intrinsic dimension, L context tokens, E token-embedding width.
Cost: a generation scores P prompt sets on one fixed augmented view of the N training images: P requests, P * N images,
P * C prompts, P * N * C outputs; 200 generations at 8,000 requests. The schedule has as many generations as the
allotment pays for; with none, the prompt is the template's.
Prediction: 1 prompt set for each image.
Paper: Sun et al., Black-Box Tuning for Language-Model-as-a-Service, arXiv:2201.03514:

    z* = argmin_z CE(f(p0 + A z; X), Y)        (1)

run as the BBT rows of CraFT's tables (arXiv:2402.04050): CraFT's prompt search without the KL term. The code of those
rows was not released; CraFT's was read for what BBT's paper leaves open.

Departures from the papers:
1. CLIP and context tokens before the class name, not a language model and 50 prepended tokens.
2. A is Gaussian with CraFT's standard deviation. BBT's default is normal with std sigma / sqrt(d), unbounded, in 500
   dimensions. P = 40 as in CraFT; BBT has 20.
3. The prompt is the mean of the last search distribution; BBT keeps the best candidate on a development set.
4. The start is the data set's template, or the first of its ensemble that has words before the class name;
   `paper_init` restores "a photo of a {}." on every data set (CraFT's).
5. The allotment ends the search, not CMA-ES's tolerances.
6. The logit scale is the model's own; CraFT's code hard-codes 100.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._prompt_search import PromptSearch, SearchPlan, n_generations
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
    Remaining,
    TaskShape,
    method,
    with_templates,
)


@method(name="bbt", access=Access.SOFT | Access.SCORES, paper="arXiv:2201.03514", version=1, new_classes=True)
class BBT(Method):
    """A soft prompt searched by CMA-ES on the training loss alone."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PromptSearch.Config):
        """Settings of the search."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> SearchPlan:
        generation = Bill.scores(self.config.popsize, shape.n_train, shape.n_classes)
        generations = n_generations(self.config, shape, generation, remaining)
        return SearchPlan(bill=generation * generations, generations=generations)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: SearchPlan) -> None:
        self.images, self.labels_N = training_views(task, 1), task.train.labels
        self.search = PromptSearch(task.classes, box.embed_text, self.config, rng)
        self.ctx_LE = self.search.p0_LE
        self.generation, self.generations = 0, plan.generations
        self.trainable_params = self.config.intrinsic_dim
        self.paper_queries = self.config.popsize * self.generations
        self.notes |= {"generations": self.generations, "start": self.search.classes.template}

    def step(self, box: BlackBox) -> bool:
        """Run one generation."""
        if self.generation == self.generations:
            return False
        candidates_PLE = self.search.ask()  # p0 + A z
        n, loss_P = len(self.labels_N), torch.zeros(self.config.popsize)
        for rows, scores_PBC in box.score_blocks(self.images, self.search.classes.soft(candidates_PLE)):
            labels_B = self.labels_N[rows]
            loss_P += mean_cross_entropy(scores_PBC, labels_B) * (len(labels_B) / n)  # (1)
        self.search.tell(loss_P)
        self.ctx_LE = self.search.mean()
        self.generation += 1
        return self.generation < self.generations

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        own = self.search.classes
        return box.scores(images, with_templates(classes or own, own.template).soft(self.ctx_LE.unsqueeze(0)))[0]

    def deployed(self) -> dict[str, Tensor]:
        return {"ctx_LE": self.ctx_LE}
