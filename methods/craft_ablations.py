"""CraFT's ablation without collaboration: the prompt is searched first, then the refiner is trained on that prompt.

What is learned: as in `craft`. The search minimizes CE alone, as `bbt` does; afterwards the refiner is trained for as
many epochs as there were generations.
Shapes: as in `craft`; V views.
Cost: P requests and P * N images per generation; then the final prompt is scored once on each of the V fixed views of
the N training images, V requests. With fresh views each epoch scores a new view, so a generation costs P + 1 requests.
The schedule has as many generations as the allotment pays for after the fixed views are set aside.
Prediction: 1 prompt set for each image.
Paper: Wang et al., arXiv:2402.04050, its ablation of collaborative training. No code of it was released: the number of
epochs and the views are ours. Departures: those of `craft`.
"""

from __future__ import annotations

import numpy as np

from methods._prompt_search import SearchPlan, n_generations
from methods._torch import Tensor
from methods._views import EpochViews, n_views_used
from methods.base import Access, Bill, BlackBox, FewShotTask, Remaining, TaskShape, method
from methods.craft import CraFT


@method(name="craft_sequential", access=Access.SOFT | Access.SCORES, paper="arXiv:2402.04050", version=1)
class CraFTSequential(CraFT):
    """CraFT without collaboration: the prompt is searched first, then the refiner is trained."""

    def plan(self, shape: TaskShape, remaining: Remaining) -> SearchPlan:
        n, c, fresh = shape.n_train, shape.n_classes, shape.fresh_views
        generation = Bill.scores(self.config.popsize + fresh, n, c)
        if not fresh:
            remaining = remaining.minus(Bill.scores(max(1, shape.views), n, c))
        generations = n_generations(self.config, shape, generation, remaining)
        views = 0 if fresh or not generations else n_views_used(shape, generations)
        return SearchPlan(bill=generation * generations + Bill.scores(views, n, c), generations=generations)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: SearchPlan) -> None:
        super().start(task, box, rng, plan)
        views = n_views_used(TaskShape.of(task, box.feature_dim), self.generations)
        self.epoch, self.views = 0, EpochViews(task, max(1, views), self.generations)

    def step(self, box: BlackBox) -> bool:
        """Run one generation of the prompt; after the last generation, one epoch of the refiner."""
        if self.generation < self.generations:
            self._search_prompt(box)
            self.generation += 1
            return True
        if self.epoch < self.generations:
            raw_NC = self.views.of(self.epoch, lambda images: self._raw(box, images))
            self._train_refiner(raw_NC, self.epoch)
            self.epoch += 1
        return self.epoch < self.generations

    def _refined(self, raw_PBC: Tensor) -> Tensor:
        return raw_PBC  # so that the KL term of the fitness is zero
