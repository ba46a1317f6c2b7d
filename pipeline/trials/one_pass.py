"""The rule of one pass: what `predict` may send for a batch of test images without a charge to adapt."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from methods.base import Prompts
from pipeline.blackbox.request import prompt_counts, prompts_digest
from pipeline.budget import Phase


@dataclass
class OnePass:
    """The calls made so far while one test set is predicted."""

    phase: Phase
    most_sets: int
    """Number of different prompt sets that one pass may use."""
    prompts: set[str] = field(default_factory=set)
    n_sets: int = 0
    batch: str = ""
    seen: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """Whether each image of the present batch was part of a call."""

    def covers(self, positions: np.ndarray, prompts: Prompts | None) -> bool:
        """Return whether a call belongs to one pass over the batch with at most `most_sets` prompt sets, and record it.

        Other calls are not recorded; they are charged to adapt.
        """
        if self.seen[positions].any() or len(np.unique(positions)) < len(positions):
            return False
        if prompts is not None and (digest := prompts_digest(prompts)) not in self.prompts:
            n_sets = self.n_sets + prompt_counts(prompts)[0]
            if n_sets > self.most_sets:
                return False
            self.n_sets = n_sets
            self.prompts.add(digest)
        self.seen[positions] = True
        return True
