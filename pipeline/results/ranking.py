"""Ranks of methods over data sets, how certain they are, and which differences a section can resolve.

Rank: on each data set, methods of one access class are ranked by mean accuracy; a method's rank is the average over
data sets. Only methods with five or more seeds on every data set are ranked.

Rank interval: the 2.5% and 97.5% quantiles of the rank over bootstrap resamples. A resample draws, for each data set,
seeds and test images with replacement, the same ones for all methods (paired).

Critical difference: Nemenyi's test after Friedman's (Demšar, Statistical Comparisons of Classifiers over Multiple Data
Sets, JMLR 7, 2006, section 3.2.2). Two ranks over N data sets that differ by less than it are not separated at 5%.

Shapes: D data sets, S seeds, N test images, K methods, R resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.results.comparison import Row, Section, is_native
from pipeline.results.stats import ranks

MIN_SEEDS = 5
"""Seeds that a method needs on each data set to be ranked."""
RESAMPLES = 1000
AT_ONCE = 50
"""Resamples computed at once, which bounds the memory."""
Correct = Callable[[Row], tuple[list[str], np.ndarray] | None]
"""Returns the image keys and the correctness [N] of a row's predictions; None if they are missing."""
Done = Mapping[str, Mapping[int, Row]]
"""Finished rows of the ranked methods of one data set, by label and seed."""


def rankings(
    cells: Mapping[Section, Mapping[str, Mapping[int, Row]]], over: Callable[[Section], Section], correct: Correct
) -> dict[tuple[Section, str], Row]:
    """Return the columns of ranks by section over data sets and label.

    Args:
        cells: Finished rows by section, label and seed.
        over: Returns the section over data sets to which a section belongs.
        correct: Reads what the bootstrap needs.
    """
    grouped: dict[Section, list[Done]] = defaultdict(list)
    for section, methods in sorted(cells.items(), key=lambda item: item[0].order):
        ranked = {
            label: done
            for label, done in methods.items()
            if len(done) >= MIN_SEEDS and is_native(next(iter(done.values())), section.access_class)
        }
        grouped[over(section)].append(ranked)
    columns: dict[tuple[Section, str], Row] = {}
    for section, sets in grouped.items():
        labels = sorted(set.intersection(*(set(of_set) for of_set in sets)))
        if len(labels) < 2:
            continue
        average = np.mean([ranks([_mean(of_set[label]) for label in labels]) for of_set in sets], axis=0)
        low_K, high_K = _intervals(sets, labels, correct)
        for label, rank, low, high in zip(labels, average, low_K, high_K, strict=True):
            columns[section, label] = {"ranked": True, "rank": float(rank), "ranked_among": len(labels)}
            columns[section, label] |= {"rank_low": low, "rank_high": high}
    return columns


def _mean(done: Mapping[int, Row]) -> float:
    return float(np.mean([row["accuracy"] for row in done.values()]))


def _intervals(
    sets: Sequence[Done], labels: Sequence[str], correct: Correct
) -> tuple[Sequence[float | None], Sequence[float | None]]:
    """Return both ends of the rank intervals; None where predictions or common seeds are missing."""
    unknown = [None] * len(labels)
    arrays = []
    for of_set in sets:
        seeds = sorted(set.intersection(*(set(of_set[label]) for label in labels)))
        if len(seeds) < MIN_SEEDS:
            return unknown, unknown
        read = [[correct(of_set[label][seed]) for label in labels] for seed in seeds]
        known = [one for of_seed in read for one in of_seed if one is not None]
        if len(known) < len(seeds) * len(labels) or any(keys != known[0][0] for keys, _ in known):
            return unknown, unknown
        arrays.append(np.stack([one for _, one in known]).reshape(len(seeds), len(labels), -1).swapaxes(1, 2))
    low_K, high_K = rank_intervals(arrays)
    return low_K.tolist(), high_K.tolist()


def rank_intervals(
    correct_DSNK: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends [K] of the 95% bootstrap intervals of the average ranks.

    Args:
        correct_DSNK: Correctness [S, N, K] of each data set; the numbers of seeds and images may differ.
        resamples: Number of resamples.
        seed: Seed of the resamples.
    """
    rng = np.random.default_rng(seed)
    parts_RK = []
    for start in range(0, resamples, AT_ONCE):
        n = min(AT_ONCE, resamples - start)
        parts_RK.append(np.mean([_resampled_ranks(correct_SNK, n, rng) for correct_SNK in correct_DSNK], axis=0))
    low_K, high_K = np.quantile(np.concatenate(parts_RK), [0.025, 0.975], axis=0)
    return low_K, high_K


def _resampled_ranks(correct_SNK: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the ranks [n, K] of the methods on one data set in n resamples of its seeds and images."""
    s, images, _ = correct_SNK.shape
    seeds_RS = rng.multinomial(s, np.full(s, 1 / s), size=n)
    images_RN = rng.multinomial(images, np.full(images, 1 / images), size=n)
    correct_RK = np.einsum("rs,srk->rk", seeds_RS, images_RN.astype(np.float64) @ correct_SNK)
    return ranks(correct_RK)


def critical_difference(methods: int, data_sets: int) -> float:
    """Return Nemenyi's critical difference of average ranks at 5%."""
    from scipy.stats import studentized_range  # takes long to import

    q = float(studentized_range.ppf(0.95, methods, np.inf)) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * data_sets)))


def not_separated(average: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Return the largest groups of methods whose ranks differ by less than the critical difference.

    Args:
        average: Average ranks in ascending order.
        difference: The critical difference.

    Returns:
        (first, last) index of each group of two or more, without groups inside another one.
    """
    groups: list[tuple[int, int]] = []
    for first in range(len(average)):
        last = max(i for i in range(first, len(average)) if average[i] - average[first] < difference or i == first)
        if last > first and (not groups or last > groups[-1][1]):
            groups.append((first, last))
    return groups
