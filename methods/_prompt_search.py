"""Search of a soft prompt by CMA-ES in a random subspace, shared by `bbt`, `craft` and `sharpzo`. A part, not a method.

The prompt is p(z) = p0 + A z (1). p0 holds the token embeddings of the template's context, A [L * E, K] is drawn once
with entries N(0, projection_std^2) and never trained, and z [K] is searched.
Shapes: K intrinsic dimension, L context tokens, E token-embedding width, P population.
Cost: none. The method that owns the search scores the candidates.
Papers: Hansen, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772 (run by pycma). The random subspace is BBT's,
arXiv:2201.03514, with the Gaussian A of CraFT's released code (arXiv:2402.04050, main_craft.py).

Three defaults of pycma are overridden:
1. Its `seed` reseeds numpy's global generator, so two searches in one process disturb each other. Here the normal
   numbers come from a generator that belongs to the search and is pickled with it.
2. From 300 dimensions on, pycma 4.5 replaces cumulative step-size adaptation (CSA) by two-point adaptation (TPA). The
   papers used earlier releases, and TPA does not allow a second `ask()`. CSA is requested by name.
3. The eigendecomposition is torch's, so that torch's thread count applies to the whole trial. At K = 512 it runs in
   every third generation and takes about 12 of the 20 ms of a generation on one core.

pycma's stopping rules are not used: the budget ends a search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._torch import Tensor, torch
from methods._training import CLIP_TEMPLATE, with_context
from methods.base import Bill, Classes, Plan, Remaining, TaskShape, torch_generator, with_templates

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class StandardNormal:
    """Picklable source of standard normal numbers for pycma: randn(n, dim) from its own generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape)


def eigh(c_KK: Array) -> tuple[Array, Array]:
    """Return eigenvalues [K] and eigenvectors [K, K] of a symmetric matrix, computed with torch's threads."""
    values_K, vectors_KK = torch.linalg.eigh(torch.from_numpy(c_KK))
    return values_K.numpy(), vectors_KK.numpy()


class Evolution:
    """CMA-ES with the ask/tell interface, minimizing. Continues bit for bit when pickled between two calls."""

    def __init__(self, dim: int, *, sigma: float, popsize: int, bound: float, rng: np.random.Generator) -> None:
        import cma  # it imports matplotlib and scipy.stats, which takes longer than a short trial

        options = {
            "popsize": popsize,
            "bounds": [-bound, bound] if bound > 0 else [None, None],
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "CMA_eigenmethod": eigh,
            "randn": StandardNormal(rng.spawn(1)[0]),
            "seed": np.nan,  # pycma then leaves numpy's global generator alone
            "signals_filename": "",  # else a file in the working directory could change a run
            "verbose": -9,
            "verb_log": 0,
        }
        self.es = cma.CMAEvolutionStrategy(np.zeros(dim), sigma, options)
        self.population: list[Array] = []

    def ask(self) -> Tensor:
        """Return a new population [P, K]."""
        self.population = self.es.ask()
        return self._tensor(np.stack(self.population))

    def tell(self, fitness_P: Tensor) -> None:
        """Pass the fitness of the last population; smaller is better. FloatingPointError if a value is not finite."""
        finite(fitness_P, "fitness")
        self.es.tell(self.population, fitness_P.double().tolist())
        self.population = []

    def mean(self) -> Tensor:
        """Return the mean of the search distribution [K], within the bounds."""
        return self._tensor(self.es.result.xfavorite)

    def mean_of_extra_population(self) -> Tensor:
        """Return the average [K] of a new population that is never scored. Advances the generator."""
        return self._tensor(np.mean(self.es.ask(), axis=0))

    @staticmethod
    def _tensor(values: Array) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class SearchPlan(Plan):
    """How long the search runs."""

    generations: int
    """Populations that are scored."""


class PromptSearch:
    """Soft prompts p0 + A z with z searched by CMA-ES. Pickles with its generators."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of the search: the most common ones in CraFT's released configs."""

        popsize: int = number(40, at_least=2)
        """P: candidate prompts per generation; each is one request."""
        generations: int = 0
        """Maximum number of generations; 0 = as many as the budget allows, or the paper's if there is no limit."""
        intrinsic_dim: int = 512
        """K: dimension of the searched vector z."""
        sigma: float = number(1.0, above=0)
        """Initial step size of CMA-ES."""
        z_bound: float = 5.0
        """Bound of each entry of z: [-z_bound, z_bound]; 0 = unbounded."""
        projection_std: float = number(0.2, above=0)
        """Standard deviation of the entries of A."""
        paper_init: bool = False
        """Start from "a photo of a {}." on every data set, as the released code does, not from its template."""

    def __init__(
        self, classes: Classes, embed_text: Callable[[str], Tensor], config: Config, rng: np.random.Generator
    ) -> None:
        self.classes = with_templates(classes, CLIP_TEMPLATE) if config.paper_init else with_context(classes)
        self.p0_LE = embed_text(self.classes.context)
        shape = (config.intrinsic_dim, self.p0_LE.numel())
        self.a_KF = config.projection_std * torch.randn(shape, generator=torch_generator(rng))  # F = L * E
        self.evolution = Evolution(
            config.intrinsic_dim, sigma=config.sigma, popsize=config.popsize, bound=config.z_bound, rng=rng
        )

    def ask(self) -> Tensor:
        """Return the contexts [P, L, E] of a new population."""
        return self.context(self.evolution.ask())

    def tell(self, fitness_P: Tensor) -> None:
        """Pass the fitness of the last population; smaller is better."""
        self.evolution.tell(fitness_P)

    def mean(self) -> Tensor:
        """Return the context [L, E] at the mean of the search distribution."""
        return self.context(self.evolution.mean())

    def mean_of_extra_population(self) -> Tensor:
        """Return the context [L, E] at the average of a new population that is never scored."""
        return self.context(self.evolution.mean_of_extra_population())

    def context(self, z_K: Tensor) -> Tensor:
        """Return the context [L, E] of z [K], or the contexts [P, L, E] of P of them."""
        return self.p0_LE + (z_K @ self.a_KF).view(*z_K.shape[:-1], *self.p0_LE.shape)  # (1)


def n_generations(config: PromptSearch.Config, shape: TaskShape, one: Bill, remaining: Remaining) -> int:
    """Return how many generations, each billed `one`, the allotment pays for; at most `config.generations` if set.

    Without a limit: the number of candidates in CraFT's released code (8,000 from 8 shots on, 4,000 from 2, else
    2,000) in whole generations.
    """
    affordable = remaining.affords(one)
    if affordable is None:
        candidates = 8000 if shape.shots >= 8 else 4000 if shape.shots >= 2 else 2000
        affordable = config.generations or candidates // config.popsize
    return min(affordable, config.generations) if config.generations else affordable
