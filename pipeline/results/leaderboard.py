"""The leaderboard: Arrow rows in, Arrow records out.

Rows with different identities (data, template, weights, code, ...) are never averaged or paired: `identity.select`
leaves out all but the current rows, and `comparison.cells` groups them. A *cell* is one method in one section; its rows
differ in the seed only. Columns:

kind              source: the data set's own test split; shift, transfer: another data set, evaluated without refitting;
                  base, new: the fitted classes and the remaining ones; harmonic: their harmonic mean, per data set and
                  seed
accuracy          mean over seeds, in percent
accuracy_ci95     half-width of its 95% confidence interval over seeds (Student's t); null for fewer than three seeds
*_min, *_max      smallest and largest value over seeds
gain_*            mean over seeds of (method - reference) on the same data set, test set, shots and seed, in percentage
                  points; gain_*_ci95: half-width of the 95% confidence interval of these differences. It covers other
                  draws of the few-shot images
gain_*_low,_high  95% bootstrap confidence interval of the gain over test images (1,000 resamples, seeds fixed); null if
                  predictions are missing. It covers other test images
leader            the method of its access class with the highest mean accuracy over all data sets of the section
behind_leader     mean difference of the leader to the method, paired by data set and seed; *_ci95: half-width of its
                  95% confidence interval over seeds
tied              whether this interval contains 0; null for fewer than three common seeds, and for other access classes
rank              average over data sets of the rank by accuracy, among methods of the access class with five or more
                  seeds on every data set; for the others null, and `ranked` is false
rank_low, _high   95% bootstrap confidence interval of the rank over seeds and test images (`ranking.py`)
resolution        median half-width of the 95% confidence interval of the difference between two methods of the access
                  class, paired by data set and seed: smaller differences are not resolved by this section
budget_exhausted  number of trials that ran out of budget; their mean accuracy is `budget_exhausted_accuracy`, and they
                  enter no other mean
bills             means over the same seeds; a bill belongs to the trial, so it is equal on each of its test sets
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.results.comparison import GAINS, Cells, Row, Section, cells, may_pair, partner
from pipeline.results.identity import FREE
from pipeline.results.predictions import Predictions
from pipeline.results.ranking import rankings
from pipeline.results.standing import over_seeds, standings
from pipeline.results.stats import mean_or_none, resampled_means

ReadPredictions = Callable[[str, str], Predictions]
"""Reads predictions by trial id and test set; raises DataError if there are none."""
Groups = dict[tuple[Section, str], list[tuple[Section, list[Row]]]]
"""Cells averaged in one record, by its section and label."""

UNFINISHED = ("budget_exhausted", "failed", "unfunded")
"""Statuses that a record counts, in columns of these names."""
_BILL = ("requests", "images", "prompts", "outputs", "evaluate_requests", "paper_queries")
_COSTS = ("seconds", "trainable_params", "client_bytes", "labels_used")
_MEANS = ("macro_accuracy", "nll", "ece", *_BILL, *_COSTS)


class Leaderboard(NamedTuple):
    """Both tables of a leaderboard, with the columns of `SCHEMA`."""

    board: pa.Table
    """One record per cell, by section; best accuracy first."""
    summary: pa.Table
    """The same averaged over data sets, for seeds that finished on all of them; each kind of test set separately."""


def leaderboard(
    rows: pa.Table, predictions: ReadPredictions | None = None, methods: Collection[str] = ()
) -> Leaderboard:
    """Compute the leaderboard of current rows (`identity.select`).

    Args:
        rows: Rows with `row.SCHEMA`.
        predictions: Reads predictions for the bootstrap over test images; None leaves these intervals out.
        methods: Names of the methods to include; none for all. Others serve as references of gains only.
    """
    by_section = cells(rows)
    single: Groups = {}
    pooled: Groups = defaultdict(list)
    for section, of_section in by_section.items():
        for label, of_label in of_section.items():
            if methods and of_label[0]["method"] not in methods:
                continue
            single[section, label] = [(section, of_label)]
            pooled[_over_data_sets(section), label].append((section, of_label))
    correct = _Correctness(predictions)
    finished = {
        section: {label: done for label, rows in of_section.items() if (done := _done(rows))}
        for section, of_section in by_section.items()
    }
    ranking = rankings(finished, _over_data_sets, correct)
    return Leaderboard(*(_table(groups, by_section, ranking, correct) for groups in (single, pooled)))


def _schema() -> pa.Schema:
    text, count, number = pa.string(), pa.int64(), pa.float64()
    integers = {"shots", "budget_requests", "budget_images"}
    columns = [(n, count if n in integers else text) for n in Section._fields]
    columns += [("budget_unit", text), ("datasets", count), ("method", text), ("label", text), ("access", text)]
    columns += [("reference", pa.bool_()), ("rank", number), ("ranked", pa.bool_()), ("ranked_among", count)]
    columns += [("rank_low", number), ("rank_high", number), ("resolution", number)]
    columns += [("seeds", count), *((status, count) for status in UNFINISHED)]
    columns += [(f"accuracy{part}", number) for part in ("", "_ci95", "_min", "_max")]
    columns += [("budget_exhausted_accuracy", number)]
    columns += [("leader", pa.bool_()), ("tied", pa.bool_()), ("behind_leader", number), ("behind_leader_ci95", number)]
    for name in GAINS:
        columns += [(f"gain_{name}{part}", number) for part in ("", "_ci95", "_min", "_max", "_low", "_high")]
        columns += [(f"gain_{name}_pairs", count)]
    return pa.schema(columns + [(n, number) for n in _MEANS] + [("sources", count)])


SCHEMA = _schema()


def _over_data_sets(section: Section) -> Section:
    return section._replace(dataset="all", test_set="all")


def _table(groups: Groups, cells: Cells, ranking: Mapping[tuple[Section, str], Row], correct: _Correctness) -> pa.Table:
    records = []
    # the parts of a cell in one order, so that those of two methods belong to the same data sets
    ordered = {key: sorted(parts, key=lambda part: part[0].order) for key, parts in groups.items()}
    standing = standings({key: [_done(rows) for _, rows in parts] for key, parts in ordered.items()})
    for (section, label), parts in groups.items():
        record: Row = section._asdict() | {"label": label, "datasets": len(parts)} | _estimates(parts, cells, correct)
        record |= standing.get((section, label), {"leader": False})
        units = [u for u in ("requests", "images") if record[f"budget_{u}"] is not None]
        record["budget_unit"] = "+".join(units) or "none"
        record |= ranking.get((_over_data_sets(section), label), {"ranked": False})
        accuracy = record["accuracy"]
        records.append(((section.order, accuracy is None, -(accuracy or 0.0), label), record))
    return pa.Table.from_pylist([record for _, record in sorted(records, key=lambda r: r[0])], schema=SCHEMA)


def _done(rows: list[Row]) -> dict[int, Row]:
    """Return the rows with an accuracy, by seed."""
    return {row["seed"]: row for row in rows if row["status"] == "done" and _is_number(row["accuracy"])}


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


class _Correctness:
    """Image keys and correctness [N] of a row's predictions; each file is read once."""

    def __init__(self, read: ReadPredictions | None) -> None:
        self.read = read
        self.known: dict[tuple[str, str], tuple[list[str], np.ndarray] | None] = {}

    def __call__(self, row: Row) -> tuple[list[str], np.ndarray] | None:
        key = row["trial_id"], row["test_set"]
        if self.read is not None and key not in self.known:
            try:
                predictions = self.read(*key)
                correct = (predictions.predicted == predictions.labels).astype(np.float64)
                self.known[key] = predictions.image_keys, correct
            except DataError:
                self.known[key] = None
        return self.known.get(key)


def _pairs(section: Section, rows: list[Row], name: str, cells: Cells) -> dict[int, tuple[Row, Row]]:
    """Return (row, reference row) by seed. A zero-shot reference that is equal for all seeds is used for any seed."""
    others = _done(partner(cells[section], rows[0], name))
    same = name in FREE and len({row["accuracy"] for row in others.values()}) == 1
    pairs = {}
    for seed, row in _done(rows).items():
        candidates = [*([others[seed]] if seed in others else []), *(others.values() if same else ())]
        other = next((other for other in candidates if may_pair(row, other)), None)
        if other is not None:
            pairs[seed] = row, other
    return pairs


def _estimates(parts: list[tuple[Section, list[Row]]], cells: Cells, correct: _Correctness) -> Row:
    """Compute the values of one record: the mean over its parts (data sets), for seeds that all of them have."""
    first = parts[0][1][0]
    everything = [row for _, rows in parts for row in rows]
    done = [_done(rows) for _, rows in parts]
    seeds = sorted(set.intersection(*(set(d) for d in done)))
    kept = [d[seed] for d in done for seed in seeds]
    record: Row = {k: first[k] for k in ("method", "access", "reference")}
    record |= {s: sum(row["status"] == s for row in everything) for s in UNFINISHED}
    record["seeds"] = len(seeds)
    record |= over_seeds("accuracy", [float(np.mean([d[s]["accuracy"] for d in done])) for s in seeds])
    exhausted = [row["accuracy"] for row in everything if row["status"] == "budget_exhausted"]
    record["budget_exhausted_accuracy"] = mean_or_none(exhausted)
    record |= {name: mean_or_none(row[name] for row in kept) for name in _MEANS}
    record["sources"] = len({(row["method_digest"], row["code_digest"]) for row in kept})
    for name in GAINS:
        if first["method"] != name:
            record |= _gain(name, [_pairs(s, rows, name, cells) for s, rows in parts], correct)
    return record


def _gain(name: str, pairs: list[dict[int, tuple[Row, Row]]], correct: _Correctness) -> Row:
    seeds = sorted(set.intersection(*(set(p) for p in pairs)))
    gains = [float(np.mean([p[s][0]["accuracy"] - p[s][1]["accuracy"] for p in pairs])) for s in seeds]
    record: Row = over_seeds(f"gain_{name}", gains) | {f"gain_{name}_pairs": len(seeds)}
    differences = [d for p in pairs for d in _image_differences([p[s] for s in seeds], correct)]
    if seeds and len(differences) == len(pairs):
        means = np.mean([resampled_means(d) for d in differences], axis=0)
        record[f"gain_{name}_low"], record[f"gain_{name}_high"] = (float(q) for q in np.quantile(means, [0.025, 0.975]))
    return record


def _image_differences(pairs: list[tuple[Row, Row]], correct: _Correctness) -> Iterator[np.ndarray]:
    """Yield the mean gain over seeds on each test image [N]; nothing if predictions are missing or images differ."""
    loaded = [(correct(row), correct(other)) for row, other in pairs]
    known = [(a, b) for a, b in loaded if a is not None and b is not None]
    if known and len(known) == len(loaded) and all(a[0] == b[0] == known[0][0][0] for a, b in known):
        yield 100 * np.mean([a[1] - b[1] for a, b in known], axis=0)
