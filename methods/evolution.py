"""Search of a soft prompt by CMA-ES in a random subspace: the half that `bbt` and `craft` share. A part, not a method.

What is searched: z [K]; the prompt is p(z) = p0 + A z with p0 the embeddings of the start words and A drawn once,
entries N(0, std^2), never trained.
Shapes: K intrinsic dimension, L context tokens, E token-embedding width, P population.
Cost: none; candidates are scored by the method that owns the search.
Papers: Hansen, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772 (run by pycma); the random subspace is
BBT's, arXiv:2201.03514, here with the Gaussian A of CraFT's released code (arXiv:2402.04050, main_craft.py).

Three of pycma's defaults are not left to it:
1. Its `seed` reseeds numpy's global generator, so that two searches in one process disturb each other. Here every
   normal number comes from the search's own generator, which is pickled with it.
2. pycma 4.5 replaces cumulative step-size adaptation (CSA) by two-point adaptation (TPA) from 300 dimensions on. The
   papers ran earlier releases (4.0 and 3.3 still have CSA at 512), and TPA refuses a second `ask()`. CSA is asked for
   by name.
3. The eigendecomposition is torch's, so that one thread count, torch's, governs a trial. At K = 512 it falls due in
   every third generation: about 20 ms a generation on one quiet core, of which 12 are this.

pycma's own stopping rules are not consulted: the budget ends a search, as it does any other method here.
"""

from __future__ import annotations

import cma
import numpy as np
import torch
from torch import Tensor

from methods.base import Bill, Remaining, torch_generator
from methods.finite import finite

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class StandardNormal:
    """A picklable source of normal numbers for pycma: randn(n, dim) from a generator of its own."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape)


def eigh(c_KK: Array) -> tuple[Array, Array]:
    """Eigenvalues [K] and eigenvectors [K, K] of a symmetric matrix, on torch's threads."""
    values_K, vectors_KK = torch.linalg.eigh(torch.from_numpy(c_KK))
    return values_K.numpy(), vectors_KK.numpy()


class Evolution:
    """CMA-ES by ask and tell, minimising; bit-identical when pickled between any two calls."""

    def __init__(self, dim: int, *, sigma: float, popsize: int, bound: float, rng: np.random.Generator) -> None:
        options = {
            "popsize": popsize,
            "bounds": [-bound, bound] if bound > 0 else [None, None],
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "CMA_eigenmethod": eigh,
            "randn": StandardNormal(rng.spawn(1)[0]),
            "seed": np.nan,  # pycma's word for "leave numpy's global generator alone"
            "signals_filename": "",  # no file in the working directory may steer a run
            "verbose": -9,
            "verb_log": 0,
        }
        self.es = cma.CMAEvolutionStrategy(np.zeros(dim), sigma, options)
        self.asked: list[Array] = []

    def ask(self) -> Tensor:
        """A new population [P, K]."""
        self.asked = self.es.ask()
        return self._tensor(np.stack(self.asked))

    def tell(self, fitness_P: Tensor) -> None:
        """The values of the population last asked for; small is good. FloatingPointError for one that is not finite."""
        finite(fitness_P, "fitness")
        self.es.tell(self.asked, fitness_P.double().tolist())
        self.asked = []

    def mean(self) -> Tensor:
        """The mean of the search distribution [K], within the bounds."""
        return self._tensor(self.es.result.xfavorite)

    def second_ask(self) -> Tensor:
        """The average [K] of a new population that is never scored nor told; it advances the generator."""
        return self._tensor(np.mean(self.es.ask(), axis=0))

    @staticmethod
    def _tensor(values: Array) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)


class PromptSearch:
    """Contexts p0 + A z, with z searched by CMA-ES."""

    def __init__(
        self,
        p0_LE: Tensor,
        *,
        intrinsic_dim: int,
        std: float,
        sigma: float,
        bound: float,
        popsize: int,
        rng: np.random.Generator,
    ) -> None:
        self.p0_LE = p0_LE
        self.a_KF = std * torch.randn(intrinsic_dim, p0_LE.numel(), generator=torch_generator(rng))  # F = L * E
        self.evolution = Evolution(intrinsic_dim, sigma=sigma, popsize=popsize, bound=bound, rng=rng)

    def ask(self) -> Tensor:
        """The contexts [P, L, E] of a new population."""
        return self._context(self.evolution.ask())

    def tell(self, fitness_P: Tensor) -> None:
        """Their fitness; small is good."""
        self.evolution.tell(fitness_P)

    def mean(self, second_ask: bool = False) -> Tensor:
        """The context [L, E] at the search's mean, or at the average of a second, unscored population."""
        return self._context(self.evolution.second_ask() if second_ask else self.evolution.mean())

    def _context(self, z_K: Tensor) -> Tensor:
        return self.p0_LE + (z_K @ self.a_KF).view(*z_K.shape[:-1], *self.p0_LE.shape)


def plan_generations(at_most: int, popsize: int, shots: int, one: Bill, remaining: Remaining) -> int:
    """As many generations as the allotment pays, at most `at_most` if that is set.

    Where nothing limits them: the number of candidates in CraFT's released code (8,000 from 8 shots, 4,000 from 2,
    else 2,000), in whole generations.
    """
    paid = remaining.affords(one)
    if paid is None:
        paid = at_most or (8000 if shots >= 8 else 4000 if shots >= 2 else 2000) // popsize
    return min(paid, at_most) if at_most else paid
