"""The search of a tuned method: which settings it tries, what each may spend, and which it chooses (docs/tuning.md).

A search fits each candidate, which is the method with other settings, on the training images and scores it on the
validation images. Rounds share the search's part of the allotment equally, and so do the candidates of a round. Sampler
`halving` keeps the better half of the candidates from round to round; the others have one round. All decisions are
functions of the plan and of the scores, so that a resumed trial makes the same ones.

Shapes: M validation images, R bootstrap draws in memory, S candidates of a round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from methods.base import Access, Bill, Method, TaskShape
from pipeline.budget import LIMITED_UNITS, UNITS, Limits, total
from pipeline.config.method_choice import MethodChoice
from pipeline.config.tuning import Tuning
from pipeline.errors import ConfigError
from pipeline.trials.protocol import TEST_BATCH

DRAWS, PART = 1000, 100
"""Number of bootstrap draws of the validation images, and of those in memory at a time."""


@dataclass(frozen=True)
class Attempt:
    """A candidate, by its place in `Search.settings`, in a round."""

    candidate: int
    round: int


@dataclass(frozen=True)
class Scored:
    """An attempt that was fitted and scored."""

    attempt: Attempt
    bill: Bill
    """What its fit and its prediction of the validation images cost."""
    hits_M: tuple[bool, ...]
    """Whether each validation image was classified correctly."""
    error: str = ""
    """Why it has no score: its fit or its logits were not finite. It counts as wrong on every image."""

    @property
    def accuracy(self) -> float:
        """Accuracy on the validation images in percent."""
        return 100 * sum(self.hits_M) / len(self.hits_M)


class Search:
    """The search of one trial.

    Args:
        choice: the tuned method.
        shape: sizes of the few-shot task.
        allotment: that of the trial; at least one unit is limited.
        seed: of the trial; sampler `random` and `halving` draw the candidates with it.
    """

    def __init__(self, choice: MethodChoice, shape: TaskShape, allotment: Limits, seed: int) -> None:
        assert choice.tuning is not None
        self.choice, self.tuning, self.shape, self.allotment, self.seed = choice, choice.tuning, shape, allotment, seed
        self.settings = candidates(self.tuning, dict(choice.config), seed)
        self.rounds = rounds(self.tuning)
        self.one_pass = one_pass(choice.info.access, shape)

    def method(self, candidate: int) -> Method:
        """Return a new instance of a candidate."""
        return self.choice.build(self.settings[candidate])

    def limits(self, attempt: Attempt, spent: Bill) -> Limits:
        """Return the limits within which the attempt is fitted, by the bill of the whole trial.

        Args:
            attempt: the attempt.
            spent: bill of the trial before the attempt.
        """
        money, after = self._money(attempt.round), spent + self.one_pass * -1
        return Limits(
            *(None if (m := getattr(money, unit)) is None else m + getattr(after, unit) for unit in LIMITED_UNITS)
        )

    def next(self, scored: Sequence[Scored]) -> Attempt | None:
        """Return the next attempt, or None when the search is finished."""
        alive: Iterable[int] = range(len(self.settings))
        for n_round in range(len(self.rounds)):
            of_round = [one for one in scored if one.attempt.round == n_round]
            done = {one.attempt.candidate for one in of_round}
            if (candidate := next((c for c in alive if c not in done), None)) is not None:
                return Attempt(candidate, n_round)
            alive = sorted(best(of_round, self._kept(n_round)))
        return None

    def chosen(self, scored: Sequence[Scored]) -> int:
        """Return the candidate with the highest accuracy in the last round; of equal ones, the first."""
        return best([one for one in scored if one.attempt.round == len(self.rounds) - 1], 1)[0]

    def noise(self, scored: Sequence[Scored]) -> float:
        """Return the share of bootstrap draws of the validation images in which another candidate would be chosen.

        In a draw, the chosen candidate must be kept in each round, among the candidates that were scored in it.
        """
        n_val, rng = len(scored[0].hits_M), np.random.default_rng(self.seed)
        parts = (rng.multinomial(n_val, np.full(n_val, 1 / n_val), PART) for _ in range(DRAWS // PART))
        return 1 - sum(self._n_kept(scored, counts_RM) for counts_RM in parts) / DRAWS

    def _n_kept(self, scored: Sequence[Scored], counts_RM: np.ndarray) -> int:
        """Return in how many draws the chosen candidate is kept. A draw counts each validation image so many times."""
        chosen, kept_R = self.chosen(scored), np.ones(len(counts_RM), bool)
        for n_round in range(len(self.rounds)):
            of_round = sorted((one.attempt.candidate, one.hits_M) for one in scored if one.attempt.round == n_round)
            correct_RS = counts_RM @ np.array([hits_M for _, hits_M in of_round]).T
            place = [candidate for candidate, _ in of_round].index(chosen)
            earlier_S = np.arange(len(of_round)) < place
            own_R1 = correct_RS[:, [place]]
            ahead_RS = (correct_RS > own_R1) | ((correct_RS == own_R1) & earlier_S)
            kept_R &= ahead_RS.sum(1) < self._kept(n_round)
        return int(kept_R.sum())

    def notes(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Return what a result row notes about the search: every candidate, and the chooser's noise."""
        return {
            "candidates": [
                {
                    "settings": self.settings[one.attempt.candidate],
                    "round": one.attempt.round + 1,
                    **{unit: getattr(one.bill, unit) for unit in LIMITED_UNITS},
                    "val_accuracy": round(one.accuracy, 4),
                    **({"error": one.error} if one.error else {}),
                }
                for one in scored
            ],
            "chooser_noise": round(self.noise(scored), 4),
        }

    def bound(self, where: str) -> Bill:
        """Return an upper bound of what the search and the final fit are charged.

        In a limited unit it is at most the allotment. In a unit without a limit, the final fit is taken to spend most
        when most is left.

        Args:
            where: the trial in messages, such as "craft@tuned on icons, 16 shots".

        Raises:
            ConfigError: no unit is limited, there are no validation images, or a fit cannot be paid.
        """
        if self.allotment == Limits():
            raise ConfigError(
                f"{where}: a search spends a share of the allotment: set budget.requests or budget.images"
            )
        if not self.shape.n_val:
            raise ConfigError(f"{where}: a search needs validation images: leave validation=none out")
        methods = [self.method(candidate) for candidate in range(len(self.settings))]
        most = least = Bill()
        for n_round, count in enumerate(self.rounds):
            money = self._money(n_round)
            fits = [self._fit(method, money, self.one_pass) for method in methods]
            if None in fits:
                one_pass = f"{self.one_pass.requests:,} requests and {self.one_pass.images:,} images"
                raise self._unpayable(
                    f"{where}: a candidate gets {money.text}, with {one_pass} set aside for validation"
                )
            payable = [fit for fit in fits if fit is not None]
            most += _extreme(payable, count, largest=True) + self.one_pass * count
            least += _extreme(payable, count, largest=False)
        if None in [self._fit(method, self.allotment, most) for method in methods]:
            raise self._unpayable(f"{where}: its search may take {most.requests:,} requests and {most.images:,} images")
        finals = [method.bill(self.shape, self.allotment.remaining(least)) for method in methods]
        bound = most + _extreme(finals, 1, largest=True)
        limits = {unit: getattr(self.allotment, unit) for unit in LIMITED_UNITS}
        return Bill(*(n if (m := limits.get(unit)) is None else min(n, m) for unit, n in asdict(bound).items()))

    def _fit(self, method: Method, money: Limits, spent: Bill) -> Bill | None:
        """Return the bill of a fit with what is left of `money`; None if it cannot be paid, or if it buys nothing."""
        left = money.remaining(spent)
        if min(left) < 0:
            return None
        bill, whole = method.bill(self.shape, left), method.bill(self.shape, self.allotment.remaining(Bill()))
        payable = money.exceeded_unit(spent, bill) is None and (bill != Bill() or whole == Bill())
        return bill if payable else None

    def _unpayable(self, what: str) -> ConfigError:
        tune = f"method.{self.choice.name}.tune"
        return ConfigError(
            f"{what}; the rest pays for no fit: raise the budget, or change {tune}.trials (now {self.tuning.trials}) "
            f"or {tune}.share (now {self.tuning.share:g})"
        )

    def _money(self, n_round: int) -> Limits:
        """Return what a candidate may spend in a round, on its fit and its prediction of the validation images."""
        parts = len(self.rounds) * self.rounds[n_round]
        limits = (getattr(self.allotment, unit) for unit in LIMITED_UNITS)
        return Limits(*(None if n is None else int(Fraction(str(self.tuning.share)) * n / parts) for n in limits))

    def _kept(self, n_round: int) -> int:
        """Return how many candidates of a round go on: to the next round, or to the final fit."""
        return (*self.rounds, 1)[n_round + 1]


def candidates(tuning: Tuning, own: dict[str, Any], seed: int) -> tuple[dict[str, Any], ...]:
    """Return the settings that are tried, in order: the method's own ones, then others of the space.

    Sampler `grid` takes all of them, in the order of the space; the others draw without replacement.
    """
    names, values = zip(*tuning.space, strict=True)
    sizes = [len(choices) for choices in values]
    size = math.prod(sizes)
    first = {name: own[name] for name in names}
    if tuning.sampler == "grid":
        places: Iterable[int] = range(size)
    else:
        places = np.random.default_rng(seed).choice(size, min(size, tuning.trials), replace=False).tolist()
    drawn = (
        {name: choices[i] for name, choices, i in zip(names, values, np.unravel_index(place, sizes), strict=True)}
        for place in places
    )
    return (first, *(settings for settings in drawn if settings != first))[: tuning.trials]


def rounds(tuning: Tuning) -> tuple[int, ...]:
    """Return the number of candidates in each round."""
    counts = [tuning.trials]
    while tuning.sampler == "halving" and counts[-1] >= 4:
        counts.append(counts[-1] // 2)
    return tuple(counts)


def best(scored: Sequence[Scored], count: int) -> list[int]:
    """Return the candidates with the most hits, best first; of equal ones, the first in the order of the search."""
    ranked = sorted(scored, key=lambda one: (-sum(one.hits_M), one.attempt.candidate))
    return [one.attempt.candidate for one in ranked[:count]]


def one_pass(access: Access, shape: TaskShape) -> Bill:
    """Return the most that one pass over the validation images takes: all templates of the ensemble.

    Its prompts and outputs are those of the task's classes; nothing is limited by them.
    """
    sets, batches = shape.n_templates, -(-shape.n_val // TEST_BATCH)
    scores = Bill.scores(sets, shape.n_val, shape.n_classes)
    if not access.covers(Access.LABELS):
        return Bill()
    most = Bill(sets * batches, scores.images, scores.prompts * batches, scores.outputs)
    if Access.FEATURES in access.closure():
        texts = Bill.text_features(sets, shape.n_classes, shape.feature_dim) * batches
        features = Bill.image_features(shape.n_val, shape.feature_dim)
        most = _extreme([most, texts + Bill(batches, features.images, 0, features.outputs)], 1, largest=True)
    return most


def _extreme(bills: Sequence[Bill], count: int, largest: bool) -> Bill:
    """Return the sum of the `count` largest or smallest bills, in each unit by itself."""
    return Bill(*(sum(sorted(of_unit, reverse=largest)[:count]) for of_unit in zip(*map(_counts, bills), strict=True)))


def _counts(bill: Bill) -> Iterator[int]:
    return (getattr(bill, unit) for unit in UNITS)


def search_bill(scored: Sequence[Scored]) -> Bill:
    """Return what a search has cost so far."""
    return total(one.bill for one in scored)
