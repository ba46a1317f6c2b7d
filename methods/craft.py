"""CraFT: a soft prompt searched by CMA-ES, and a refiner of the logits trained beside it, held together by KL terms.

What is learned: z [K], whose prompt p0 + A z replaces the template's context [L, E] (`evolution.py`), and the refiner
net of 2CH + H + C numbers with refined = raw + net(raw) (`refiner.py`).
Shapes: P population, N training images, B images in a call, C classes, H hidden, K intrinsic dimension, L context
tokens, E token-embedding width.
Cost: a generation scores P candidates on one fixed view of the N training images, then the present prompt on the view
of that epoch: P + 1 requests, (P + 1) * N images, (P + 1) * C prompts, (P + 1) * N * C outputs. P = 40: 41 requests,
    195 generations at 8,000 requests; the paper counts the candidates only, so 200.
    Within an allotment as many generations as it pays, none at worst: then prediction is the template's raw scores.
    `together=False`: P requests a generation, then one for each view that the refiner learns from.
Prediction asks 1 prompt set about each image; the refiner runs on the client.
Paper: Wang et al., Connecting the Dots: Collaborative Fine-tuning for Black-Box Vision-Language Models,
arXiv:2402.04050, as in its released main_craft.py (means are over images, logits are scores):
    fitness(z)    = CE(raw(z), y)   + weight * KL(refined(z) || raw(z))       the refiner held fixed
    loss(refiner) = CE(refined, y)  + weight * KL(raw || refined)             the prompt held fixed, one epoch of Adam
The KL terms run in opposite directions. The second is dropped after the first 1/n of the candidates, the first never.

Departs from the released code:
1. The prompt is the mean of CMA-ES's distribution. The code asks for a second population and averages its 40 unscored
   members, a noisy mean that also advances the generator: `second_ask`.
2. The refiner learns from the endpoint's scores, logit scale * cosine, as it is used afterwards. The code trains it on
   image features that were never normalised; a box that answers with scores cannot be asked so: no flag restores it.
3. p0 is the data set's own template, or where that has no words before the class name the first of its ensemble that
   has; the words after the class name stay. The code has "a photo of a {}." on every data set: `paper_start`.
4. The refiner's epochs go through the task's fixed views in turn; `views=fresh` restores a new view in every epoch.
   The fitness keeps one augmented view throughout, as in the code.
5. A request of the refiner is paid for, and the budget, not CMA-ES's tolerance rules, ends the run. All images of an
   epoch are scored in one call, in their own order: the prompt is constant within it.
6. The separate script for ImageNet (best candidate as prompt, 512 hidden units) is not followed; `hidden` can be set.
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
    torch_generator,
    with_templates,
)
from methods.evolution import PromptSearch, plan_generations
from methods.optim import EpochViews, epoch_view, mean_cross_entropy, training_views, views_wanted, with_context
from methods.refiner import Refiner, kl_divergence


def fitness(raw_PBC: Tensor, refined_PBC: Tensor, labels_B: Tensor, weight: float) -> Tensor:
    """CE(raw, y) + weight * KL(refined || raw), for each of P candidates; [P], small is good."""
    return mean_cross_entropy(raw_PBC, labels_B) + weight * kl_divergence(refined_PBC, raw_PBC)


@method(name="craft", access=Access.SOFT | Access.SCORES, paper="arXiv:2402.04050")
class CraFT(Method):
    """A soft prompt searched by CMA-ES together with a small network that refines the scores."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings: the commonest in the paper's released configs."""

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
        weight: float = 0.1
        """Weight of both KL terms."""
        n: int = 4
        """The refiner's KL term is dropped after the first 1/n of the candidates; 1 keeps it throughout."""
        lr: float = 1e-3
        """The refiner's Adam learning rate."""
        batch_size: int = 256
        """The refiner's mini-batch."""
        hidden: int = 256
        """H: width of the refiner."""
        together: bool = True
        """False: an ablation, the search alone first, then the refiner on its prompt, as many epochs as generations."""
        second_ask: bool = False
        """The released code's prompt: the average of a second, unscored population, not the mean of the search."""
        paper_start: bool = False
        """The released code's start: "a photo of a {}." on every data set, not the data set's template."""

    config: Config

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        c = self.config
        self.classes = with_templates(task.classes, "a photo of a {}.") if c.paper_start else with_context(task.classes)
        self.task, self.fixed_view = task, training_views(task, 1)
        self.search = PromptSearch(
            box.embed_text(self.classes.context),
            intrinsic_dim=c.intrinsic_dim,
            std=c.std,
            sigma=c.sigma,
            bound=c.bound,
            popsize=c.popsize,
            rng=rng,
        )
        self.generator = torch_generator(rng)
        self.refiner = Refiner(
            len(task.classes), self.generator, hidden=c.hidden, lr=c.lr, weight=c.weight, batch_size=c.batch_size
        )
        self.ctx_LE = self.search.p0_LE
        self.trainable_params = c.intrinsic_dim + self.refiner.n_params
        self.generation = 0
        shape = TaskShape.of(task, box.feature_dim)
        self.generations = self._generations(shape, box.remaining)
        if not c.together:
            self.epoch = 0
            self.views = EpochViews(task, max(1, views_wanted(shape, self.generations)), self.generations)
        self.paper_queries = c.popsize * self.generations
        self.notes |= {"generations": self.generations, "start": self.classes.template}

    def step(self, box: BlackBox) -> bool:
        """One generation of the prompt, then one epoch of the refiner."""
        if self.generation == self.generations:
            return not self.config.together and self._refine_after(box)
        candidates_PLE = self.search.ask()
        self.search.tell(self._fitness(box, candidates_PLE))
        self.ctx_LE = self.search.mean(self.config.second_ask)
        self.generation += 1
        if not self.config.together:
            return True

        self._refine(self._raw(box, epoch_view(self.task, self.generation - 1)), self.generation)
        return self.generation < self.generations

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        raw_BC = self._raw(box, images)
        return self.refiner.refine(raw_BC) if self.generations else raw_BC  # never through an untrained network

    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        generations = self._generations(shape, remaining)
        counted = self.config.together or shape.fresh_views or not generations
        apart = 0 if counted else views_wanted(shape, generations)
        return self._one_generation(shape) * generations + Bill.scores(apart, shape.n_train, shape.n_classes)

    def deployed(self) -> dict[str, Tensor]:
        weights = {f"refiner_{i}": w.detach() for i, w in enumerate(self.refiner.weights())}
        return {"ctx_LE": self.ctx_LE, **weights}

    def _fitness(self, box: BlackBox, candidates_PLE: Tensor) -> Tensor:
        """The fitness [P] on the fixed view, block by block over the images."""
        labels_N, total_P = self.task.train.labels, torch.zeros(len(candidates_PLE))
        for rows, raw_PBC in box.score_blocks(self.fixed_view, self.classes.soft(candidates_PLE)):
            labels_B = labels_N[rows]
            refined_PBC = self.refiner.refine(raw_PBC) if self.config.together else raw_PBC
            values_P = fitness(raw_PBC, refined_PBC, labels_B, self.config.weight)
            total_P += values_P * (len(labels_B) / len(labels_N))
        return total_P

    def _raw(self, box: BlackBox, images: ImageSet) -> Tensor:
        """The scores [B, C] of the present prompt."""
        return box.scores(images, self.classes.soft(self.ctx_LE.unsqueeze(0)))[0]

    def _refiner_weight(self, epoch: int) -> float:
        """The KL weight of an epoch, numbered from 1: as many generations' candidates against 1/n of all."""
        c = self.config
        return c.weight if c.popsize * epoch <= c.popsize * self.generations // c.n else 0.0

    def _refine(self, raw_NC: Tensor, epoch: int) -> None:
        weight = self._refiner_weight(epoch)
        self.refiner.train_epoch(raw_NC, self.task.train.labels, self.generator, weight=weight)

    def _refine_after(self, box: BlackBox) -> bool:
        """An epoch of the refiner after the search; False when as many as the generations are done."""
        if self.epoch == self.generations:
            return False
        raw_NC = self.views.of(self.epoch, lambda images: self._raw(box, images))
        self.epoch += 1
        self._refine(raw_NC, self.epoch)
        return self.epoch < self.generations

    def _one_generation(self, shape: TaskShape) -> Bill:
        """The candidates, and one prompt set more where the refiner asks in the same generation or for a fresh view."""
        asks = self.config.together or shape.fresh_views
        return Bill.scores(self.config.popsize + asks, shape.n_train, shape.n_classes)

    def _generations(self, shape: TaskShape, remaining: Remaining) -> int:
        c = self.config
        if not c.together and not shape.fresh_views:  # set the refiner's views aside first
            remaining = remaining.minus(Bill.scores(max(1, shape.views), shape.n_train, shape.n_classes))
        return plan_generations(c.generations, c.popsize, shape.shots, self._one_generation(shape), remaining)
