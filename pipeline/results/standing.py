"""Who leads each access class of a section, and which methods are tied with the leader.

A method is *tied* with the leader if the 95% confidence interval of their difference contains 0. The differences are
paired by data set and seed: for each seed, the mean over data sets of (leader - method). With fewer than three common
seeds nothing is tested.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.results.comparison import Row, Section, access_class, may_pair
from pipeline.results.identity import FREE
from pipeline.results.stats import mean_ci95

MIN_SEEDS_CI95 = 3
"""Seeds that an interval needs: with two, Student's t has one degree of freedom and the factor 12.7."""
UNFITTED = (*FREE, "pixel_nn")
"""References that never lead: they use no labels, or not the model."""
Done = Sequence[Mapping[int, Row]]
"""Finished rows by seed, for each data set of a section in one order."""


def over_seeds(name: str, values: Sequence[float]) -> Row:
    """Return mean, interval and range of one value for each seed, in columns that begin with `name`."""
    mean, ci95 = mean_ci95(values)
    ends = {f"{name}_min": min(values), f"{name}_max": max(values)} if values else {}
    return {name: mean, f"{name}_ci95": ci95 if len(values) >= MIN_SEEDS_CI95 else None, **ends}


def standings(done: Mapping[tuple[Section, str], Done]) -> dict[tuple[Section, str], Row]:
    """Return the columns `leader`, `tied`, `behind_leader` and `resolution` of methods by section and label.

    Other methods than these cannot be compared with a leader: references without a fit, methods of another access
    class, and methods that did not finish on every data set of their section.
    """
    candidates: dict[Section, dict[str, Done]] = defaultdict(dict)
    n_sets: dict[Section, int] = defaultdict(int)
    for (section, _), parts in done.items():
        n_sets[section] = max(n_sets[section], len(parts))
    for (section, label), parts in done.items():
        if len(parts) == n_sets[section] and _seeds(parts):
            row = next(iter(parts[0].values()))
            if row["method"] not in UNFITTED and access_class(row["access"]) == section.access_class:
                candidates[section][label] = parts
    columns: dict[tuple[Section, str], Row] = {}
    for section, methods in candidates.items():
        resolution = _resolution(methods)
        for label, values in _against_leader(methods).items():
            columns[section, label] = values | {"resolution": resolution}
    return columns


def _seeds(parts: Done) -> list[int]:
    return sorted(set.intersection(*(set(part) for part in parts)))


def _mean(parts: Done) -> float:
    return float(np.mean([part[seed]["accuracy"] for part in parts for seed in _seeds(parts)]))


def _resolution(methods: Mapping[str, Done]) -> float | None:
    """Return the median half-width of the 95% confidence interval of the difference between two methods.

    Differences are paired by data set and seed. None for fewer than two methods with three common seeds.
    """
    several = [parts for parts in methods.values() if len(_seeds(parts)) >= MIN_SEEDS_CI95]
    seeds = sorted(set.intersection(*(set(_seeds(parts)) for parts in several))) if several else []
    if len(several) < 2 or len(seeds) < MIN_SEEDS_CI95:
        return None
    mean_KS = np.array([[np.mean([part[seed]["accuracy"] for part in parts]) for seed in seeds] for parts in several])
    one, other = np.triu_indices(len(several), 1)
    return float(np.median([mean_ci95(difference)[1] for difference in mean_KS[one] - mean_KS[other]]))


def _against_leader(methods: Mapping[str, Done]) -> dict[str, Row]:
    leader = min(methods, key=lambda label: (-_mean(methods[label]), label))
    columns: dict[str, Row] = {leader: {"leader": True}}
    for label, parts in methods.items():
        if label == leader:
            continue
        differences = []
        for seed in set(_seeds(parts)) & set(_seeds(methods[leader])):
            pairs = [(best[seed], part[seed]) for best, part in zip(methods[leader], parts, strict=True)]
            if all(may_pair(best, row) for best, row in pairs):
                differences.append(float(np.mean([best["accuracy"] - row["accuracy"] for best, row in pairs])))
        gap = over_seeds("behind_leader", differences)
        mean, ci95 = gap["behind_leader"], gap["behind_leader_ci95"]
        tied = None if ci95 is None else abs(mean) <= ci95
        columns[label] = {"leader": False, "tied": tied, "behind_leader": mean, "behind_leader_ci95": ci95}
    return columns
