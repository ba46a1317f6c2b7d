"""CraFT: a soft prompt searched by CMA-ES and a refiner of the logits, trained together.

What is learned: z [K], whose prompt p0 + A z replaces the template's context [L, E] (`_prompt_search.py`), and the
refiner with refined = raw + net(raw), 2CH + H + C numbers (`_refiner.py`).
Shapes: P population, N training images, B images in a call, C classes, H hidden units, K intrinsic dimension, L context
tokens, E token-embedding width.
Cost: a generation scores P candidates on one fixed view of the N training images, then the current prompt on the view
of that epoch: P + 1 requests, (P + 1) * N images, (P + 1) * C prompts, (P + 1) * N * C outputs. P = 40: 41 requests,
195 generations at 8,000 requests; the paper counts the candidates only, hence 200. The schedule has as many generations
as the allotment pays for; with none, prediction returns the template's raw scores.
Prediction: 1 prompt set for each image. The refiner runs on the client.
Paper: Wang et al., Connecting the Dots: Collaborative Fine-tuning for Black-Box Vision-Language Models,
arXiv:2402.04050, as in its released main_craft.py (means over images; logits are scores):

    fitness(z)    = CE(raw(z), y) + kl_weight * KL(refined(z) || raw(z))        refiner fixed         (1)
    loss(refiner) = CE(refined, y) + kl_weight * KL(raw || refined)             prompt fixed          (2)

The KL terms have opposite directions. (2) loses its KL term after the first `kl_fraction` of the candidates, (1) never.

Departures from the released code:
1. The prompt is the mean of CMA-ES's distribution. The release draws a second population and averages its 40 unscored
   members, a noisy mean that also advances the generator: `prompt_from_extra_population`.
2. The refiner learns from the endpoint's scores, logit scale * cosine, as it is used at prediction. The release trains
   it on image features that were never normalized, which a box that returns scores cannot provide.
3. p0 is the data set's template, or the first of its ensemble that has words before the class name; the words after
   the class name stay. The release starts from "a photo of a {}." on every data set: `paper_init`.
4. The refiner's epochs use the task's fixed views in turn; `views=fresh` restores a new view per epoch. The fitness
   keeps one augmented view throughout, as in the release.
5. The refiner's requests are charged, and the budget ends the run, not CMA-ES's tolerances. All images of an epoch are
   scored in one call, since the prompt is constant within it.
6. The separate script for ImageNet (best candidate as prompt, 512 hidden units) is not followed; `hidden` can be set.
7. The logit scale is the model's own. The release hard-codes 100, which is the scale of OpenAI's CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._prompt_search import PromptSearch, SearchPlan, n_generations
from methods._refiner import Refiner, kl_divergence
from methods._torch import Tensor, torch
from methods._training import mean_cross_entropy
from methods._views import epoch_view, training_views
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


def fitness(raw_PBC: Tensor, refined_PBC: Tensor, labels_B: Tensor, kl_weight: float) -> Tensor:
    """Return the fitness (1) of P candidates, [P]; smaller is better."""
    return mean_cross_entropy(raw_PBC, labels_B) + kl_weight * kl_divergence(refined_PBC, raw_PBC)


@method(name="craft", access=Access.SOFT | Access.SCORES, paper="arXiv:2402.04050", version=1)
class CraFT(Method):
    """A soft prompt searched by CMA-ES together with a small network that refines the scores."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PromptSearch.Config, Refiner.Config):
        """Settings of the search and of the refiner, and where the prompt comes from."""

        prompt_from_extra_population: bool = False
        """Take the average of a second, unscored population as the prompt, as the released code does."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> SearchPlan:
        generation = Bill.scores(self.config.popsize + 1, shape.n_train, shape.n_classes)
        generations = n_generations(self.config, shape, generation, remaining)
        return SearchPlan(bill=generation * generations, generations=generations)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: SearchPlan) -> None:
        self.task, self.fixed_view = task, training_views(task, 1)
        self.search = PromptSearch(task.classes, box.embed_text, self.config, rng)
        self.generator = torch_generator(rng)
        self.refiner = Refiner(len(task.classes), self.config, self.generator)
        self.ctx_LE = self.search.p0_LE
        self.generation, self.generations = 0, plan.generations
        self.trainable_params = self.config.intrinsic_dim + self.refiner.n_params
        self.paper_queries = self.config.popsize * self.generations
        self.notes |= {"generations": self.generations, "start": self.search.classes.template}

    def step(self, box: BlackBox) -> bool:
        """Run one generation of the prompt, then one epoch of the refiner."""
        if self.generation == self.generations:
            return False
        self._search_prompt(box)
        self._train_refiner(self._raw(box, epoch_view(self.task, self.generation)), self.generation)
        self.generation += 1
        return self.generation < self.generations

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        raw_BC = self._raw(box, images)
        return self.refiner.refine(raw_BC) if self.generations else raw_BC  # never through an untrained network

    def deployed(self) -> dict[str, Tensor]:
        weights = {f"refiner_{i}": w.detach() for i, w in enumerate(self.refiner.weights())}
        return {"ctx_LE": self.ctx_LE, **weights}

    def _search_prompt(self, box: BlackBox) -> None:
        """Score one population and move the search distribution."""
        candidates_PLE = self.search.ask()  # p0 + A z
        self.search.tell(self._fitness(box, candidates_PLE))  # (1)
        extra = self.config.prompt_from_extra_population
        self.ctx_LE = self.search.mean_of_extra_population() if extra else self.search.mean()

    def _fitness(self, box: BlackBox, candidates_PLE: Tensor) -> Tensor:
        """Return the fitness [P] on the fixed view, summed block by block over the images."""
        labels_N, total_P = self.task.train.labels, torch.zeros(len(candidates_PLE))
        for rows, raw_PBC in box.score_blocks(self.fixed_view, self.search.classes.soft(candidates_PLE)):
            values_P = fitness(raw_PBC, self._refined(raw_PBC), labels_N[rows], self.config.kl_weight)
            total_P += values_P * (len(labels_N[rows]) / len(labels_N))
        return total_P

    def _refined(self, raw_PBC: Tensor) -> Tensor:
        """Return the logits that the fitness compares with the raw ones."""
        return self.refiner.refine(raw_PBC)

    def _train_refiner(self, raw_NC: Tensor, epoch: int) -> None:
        """Run one epoch of (2)."""
        self.refiner.train_epoch(raw_NC, self.task.train.labels, self.generator, self._has_kl_term(epoch))

    def _has_kl_term(self, epoch: int) -> bool:
        """Return whether the epoch lies within the first `kl_fraction` of the candidates."""
        candidates = self.config.popsize * (epoch + 1)
        return candidates <= int(self.config.popsize * self.generations * self.config.kl_fraction)

    def _raw(self, box: BlackBox, images: ImageSet) -> Tensor:
        """Return the scores [B, C] of the current prompt."""
        return box.scores(images, self.search.classes.soft(self.ctx_LE.unsqueeze(0)))[0]
