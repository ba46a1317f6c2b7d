"""The leaderboard: Arrow rows in, Arrow records out, and nothing else.

Rows that differ in what they were measured on or by (data, template, weights, code, ...) are never averaged or paired:
`identity.select` leaves out all but the current ones first. `comparison.py` says what stands in one section. A *cell*
is one method in a section; its rows differ in the seed alone. What the numbers mean:

kind        source: a data set's own test split; shift, transfer: another set, scored without refitting; base, new: the
            fitted classes and the others, each alone; harmonic: of those two accuracies, for each data set and seed
accuracy    mean over seeds of the per cent right; `_half` is half of Student's 95 % interval over seeds (null under 2)
gain_*      mean over seeds of (method - reference) on the same data set, test set, shots and seed, in points, with
            Student's half-width over those differences. `_low` and `_high`: the bootstrap over test images instead; the
            seeds stay and the images are drawn again 1,000 times (null where predictions are missing). The first speaks
            of other draws of the few shots, the second of other test images
rank        average over data sets of the rank by mean accuracy, among the methods of this class that finished at least
            five seeds on every data set of the section; null, and `ranked` false, for all others
truncated   trials that ran out of budget: counted, scored in `truncated_accuracy`, kept out of every mean
bill        means over the same seeds; a bill belongs to the trial, so it is equal on each of its test sets
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.comparison import FREE, GAINS, Cells, Row, Section, access_class, cells, may_pair, partner
from pipeline.errors import DataError
from pipeline.identity import Selection, select
from pipeline.results import Predictions
from pipeline.stats import mean_or_none, ranks, resampled_means, student

ReadPredictions = Callable[[str, str], Predictions]

MIN_SEEDS = 5
_BILL = ("requests", "images", "prompts", "outputs", "evaluate_requests", "papers_count")
_COSTS = ("seconds", "trainable_params", "client_bytes", "labels_used")
_MEANS = ("macro_accuracy", "nll", "ece", *_BILL, *_COSTS)


def _schema() -> pa.Schema:
    text, count, number = pa.string(), pa.int64(), pa.float64()
    integers = {"shots", "budget_requests", "budget_images"}
    columns = [(n, count if n in integers else text) for n in Section._fields]
    columns += [("budget_unit", text), ("datasets", count), ("method", text), ("label", text), ("access", text)]
    columns += [("reference", pa.bool_()), ("rank", number), ("ranked", pa.bool_()), ("ranked_among", count)]
    columns += [("seeds", count), ("truncated", count), ("failed", count), ("unfunded", count)]
    columns += [("accuracy", number), ("accuracy_half", number), ("truncated_accuracy", number)]
    for name in GAINS:
        columns += [(f"gain_{name}{part}", number) for part in ("", "_half", "_low", "_high")]
        columns += [(f"gain_{name}_pairs", count)]
    return pa.schema(columns + [(n, number) for n in _MEANS] + [("sources", count)])


SCHEMA = _schema()


def leaderboard(rows: pa.Table | Selection, predictions: ReadPredictions | None = None) -> pa.Table:
    """One record for each cell, by section; within a section by accuracy, best first.

    `rows`: a table of result rows, of which the current ones are selected, or a selection made before.
    """
    by_section = cells(_current(rows))
    groups = {(s, label): [(s, found)] for s, methods in by_section.items() for label, found in methods.items()}
    return _table(groups, by_section, predictions)


def summary(rows: pa.Table | Selection, predictions: ReadPredictions | None = None) -> pa.Table:
    """The same records averaged over data sets (for the seeds finished on all of them), each kind apart."""
    by_section = cells(_current(rows))
    groups: dict[tuple[Section, str], list[tuple[Section, list[Row]]]] = defaultdict(list)
    for section, methods in by_section.items():
        for label, found in methods.items():
            groups[section._replace(dataset="all", test_set="all"), label].append((section, found))
    return _table(dict(groups), by_section, predictions)


def _current(rows: pa.Table | Selection) -> pa.Table:
    return (rows if isinstance(rows, Selection) else select(rows)).rows


def _table(
    groups: dict[tuple[Section, str], list[tuple[Section, list[Row]]]],
    cells: Cells,
    predictions: ReadPredictions | None,
) -> pa.Table:
    ranking, read = _ranks(cells), _Correct(predictions)
    records = []
    for (section, label), parts in groups.items():
        record: Row = section._asdict() | {"label": label, "datasets": len(parts)} | _estimates(parts, cells, read)
        units = [u for u in ("requests", "images") if record[f"budget_{u}"] is not None]
        record["budget_unit"] = "+".join(units) or "none"
        rank = ranking.get((section._replace(dataset="all", test_set="all"), label))
        record |= {"ranked": rank is not None, "rank": rank and rank[0], "ranked_among": rank and rank[1]}
        accuracy = record["accuracy"]
        records.append(((section.order, accuracy is None, -(accuracy or 0.0), label), record))
    return pa.Table.from_pylist([record for _, record in sorted(records, key=lambda r: r[0])], schema=SCHEMA)


def _done(rows: list[Row]) -> dict[int, Row]:
    """Rows with an accuracy, by seed."""
    return {row["seed"]: row for row in rows if row["status"] == "done" and _is_number(row["accuracy"])}


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ranks(cells: Cells) -> dict[tuple[Section, str], tuple[float, int]]:
    """(average rank, methods ranked) by section-over-data-sets and label."""
    grouped: dict[Section, list[dict[str, float]]] = defaultdict(list)
    for section, methods in cells.items():
        means = {}
        for label, rows in methods.items():
            done = _done(rows)
            if len(done) >= MIN_SEEDS and access_class(rows[0]["access"]) == section.access_class:
                means[label] = float(np.mean([row["accuracy"] for row in done.values()]))
        grouped[section._replace(dataset="all", test_set="all")].append(means)
    found: dict[tuple[Section, str], tuple[float, int]] = {}
    for section, tables in grouped.items():
        labels = sorted(set.intersection(*(set(t) for t in tables)))
        if len(labels) > 1:
            average = np.mean([ranks(t[label] for label in labels) for t in tables], axis=0)
            found |= {(section, label): (float(r), len(labels)) for label, r in zip(labels, average, strict=True)}
    return found


class _Correct:
    """Which test images a row got right, read once for each file."""

    def __init__(self, read: ReadPredictions | None) -> None:
        self.read = read
        self.known: dict[tuple[str, str], tuple[list[str], np.ndarray] | None] = {}

    def __call__(self, row: Row) -> tuple[list[str], np.ndarray] | None:
        key = row["trial_id"], row["test_set"]
        if self.read is not None and key not in self.known:
            try:
                found = self.read(*key)
                self.known[key] = found.image_keys, (found.predicted == found.labels).astype(np.float64)
            except DataError:
                self.known[key] = None
        return self.known.get(key)


def _pairs(section: Section, rows: list[Row], name: str, cells: Cells) -> dict[int, tuple[Row, Row]]:
    """(method's row, reference's row) by seed. A zero-shot reference that is equal for all seeds serves any seed."""
    others = _done(partner(cells[section], rows[0], name))
    same = name in FREE and len({row["accuracy"] for row in others.values()}) == 1
    pairs = {}
    for seed, row in _done(rows).items():
        candidates = [*([others[seed]] if seed in others else []), *(others.values() if same else ())]
        other = next((other for other in candidates if may_pair(row, other)), None)
        if other is not None:
            pairs[seed] = row, other
    return pairs


def _estimates(parts: list[tuple[Section, list[Row]]], cells: Cells, read: _Correct) -> Row:
    """The numbers of one record; with several parts (data sets), their mean for each seed that all of them have."""
    first = parts[0][1][0]
    everything = [row for _, rows in parts for row in rows]
    done = [_done(rows) for _, rows in parts]
    seeds = sorted(set.intersection(*(set(d) for d in done)))
    kept = [d[seed] for d in done for seed in seeds]
    record: Row = {k: first[k] for k in ("method", "access", "reference")}
    record |= {s: sum(row["status"] == s for row in everything) for s in ("truncated", "failed", "unfunded")}
    record["seeds"] = len(seeds)
    record["accuracy"], record["accuracy_half"] = student(np.mean([d[s]["accuracy"] for d in done]) for s in seeds)
    record["truncated_accuracy"] = mean_or_none(row["accuracy"] for row in everything if row["status"] == "truncated")
    record |= {name: mean_or_none(row[name] for row in kept) for name in _MEANS}
    record["sources"] = len({(row["method_digest"], row["code_digest"]) for row in kept})
    for name in GAINS:
        if first["method"] != name:
            record |= _gain(name, [_pairs(s, rows, name, cells) for s, rows in parts], read)
    return record


def _gain(name: str, pairs: list[dict[int, tuple[Row, Row]]], read: _Correct) -> Row:
    seeds = sorted(set.intersection(*(set(p) for p in pairs)))
    mean, half = student(np.mean([p[s][0]["accuracy"] - p[s][1]["accuracy"] for p in pairs]) for s in seeds)
    record: Row = {f"gain_{name}": mean, f"gain_{name}_half": half, f"gain_{name}_pairs": len(seeds)}
    differences = [d for p in pairs for d in _image_differences([p[s] for s in seeds], read)]
    if seeds and len(differences) == len(pairs):
        means = np.mean([resampled_means(d) for d in differences], axis=0)
        record[f"gain_{name}_low"], record[f"gain_{name}_high"] = (float(q) for q in np.quantile(means, [0.025, 0.975]))
    return record


def _image_differences(pairs: list[tuple[Row, Row]], read: _Correct) -> Iterator[np.ndarray]:
    """Points gained on each test image, mean over seeds, [N]; nothing when an image set is missing or another."""
    found = [(read(row), read(other)) for row, other in pairs]
    known = [(a, b) for a, b in found if a is not None and b is not None]
    if known and len(known) == len(found) and all(a[0] == b[0] == known[0][0][0] for a, b in known):
        yield 100 * np.mean([a[1] - b[1] for a, b in known], axis=0)
