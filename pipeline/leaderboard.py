"""The leaderboard: Arrow rows in, Arrow records out, and nothing else.

A *section* is what may be compared: one access class, model, test set, shots and allotment. A *cell* is one method in a
section; its rows differ in the seed alone. What the numbers mean:

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

`zero_shot`, `zero_shot_ensemble`, `pixel_nn` and `logit_head` stand in every section as references. A section without
such trials takes them from another one of the same model and test set: for the zero-shot rows (which cost nothing to
fit) any shots and budget will do; for the others the shots must be equal, and of other budgets one whose bill fits in
this allotment comes first.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.finite import strict_json
from pipeline.results import KINDS, Predictions
from pipeline.stats import harmonic, mean_or_none, ranks, resampled_means, student

Row = dict[str, Any]
Cells = dict["Section", dict[str, list[Row]]]
ReadPredictions = Callable[[str, str], Predictions]

CLASSES = ("scores", "features", "white box")
HARMONIC = "harmonic"
FREE = ("zero_shot", "zero_shot_ensemble")
REFERENCES = (*FREE, "pixel_nn", "logit_head")
GAINS = ("zero_shot", "logit_head")
MIN_SEEDS = 5
_BILL = ("requests", "images", "prompts", "outputs", "evaluate_requests", "papers_count")
_COSTS = ("seconds", "trainable_params", "client_bytes", "labels_used")
_MEANS = ("macro_accuracy", "nll", "ece", *_BILL, *_COSTS)


class Section(NamedTuple):
    """What may be compared; also the first columns of the table."""

    access_class: str
    model: str
    model_digest: str
    precision: str
    kind: str
    """What is tested, so that no mean mixes protocols: a row's kind, or harmonic."""
    dataset: str
    test_set: str
    shots: int
    budget_requests: int | None
    budget_images: int | None

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key: access first, small budgets before large ones, no limit last."""
        budget = tuple(np.inf if b is None else b for b in (self.budget_requests, self.budget_images))
        kind = (*KINDS, HARMONIC).index(self.kind)
        return CLASSES.index(self.access_class), *self[1:4], kind, self.dataset, self.test_set, self.shots, *budget


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


def access_class(access: str) -> str:
    """The class that an access label ranks in, by what comes out of the box: scores, features, or gradients."""
    flags = access.split("+")
    return "white box" if "GRADIENTS" in flags else "features" if "FEATURES" in flags else "scores"


def leaderboard(rows: pa.Table, predictions: ReadPredictions | None = None) -> pa.Table:
    """One record for each cell, by section; within a section by accuracy, best first."""
    cells = _cells(rows)
    groups = {(s, label): [(s, found)] for s, methods in cells.items() for label, found in methods.items()}
    return _table(groups, cells, predictions)


def summary(rows: pa.Table, predictions: ReadPredictions | None = None) -> pa.Table:
    """The same records averaged over data sets (for the seeds finished on all of them), each kind apart."""
    cells = _cells(rows)
    groups: dict[tuple[Section, str], list[tuple[Section, list[Row]]]] = defaultdict(list)
    for section, methods in cells.items():
        for label, found in methods.items():
            groups[section._replace(dataset="all", test_set="all"), label].append((section, found))
    return _table(dict(groups), cells, predictions)


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


def _cells(rows: pa.Table) -> Cells:
    """Rows by section and label, the references filled in."""
    native: dict[Section, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    found = [row | {"reference": row["method"] in REFERENCES} for row in rows.to_pylist()]
    found = [*found, *_harmonic(found)]
    sections = [_section(row) for row in found]
    labels = _labels(found, sections)
    latest: dict[tuple[Any, ...], Row] = {}
    for row, section in sorted(zip(found, sections, strict=True), key=lambda rs: rs[0]["created"]):
        latest[section, labels(row), row["seed"]] = row  # of two trials (other code, another split), the latest
    for (section, label, _), row in latest.items():
        native[section][label].append(row)
    filled = {section: _with_references(section, methods, native) for section, methods in native.items()}
    bare = {s for s in filled if all(rows[0]["reference"] for rows in native[s].values())}
    shown = {row["trial_id"] for s in filled.keys() - bare for rows in filled[s].values() for row in rows}
    for section in bare:  # only references ran in it: shown when they are not all seen beside a method already
        if all(row["trial_id"] in shown for rows in native[section].values() for row in rows):
            del filled[section]
    return filled


def _section(row: Row) -> Section:
    named = {name: row[name] for name in Section._fields if name in row}
    return Section(access_class=access_class(row["access"]), **named)


def _harmonic(rows: list[Row]) -> Iterator[Row]:
    """One row more for each base-to-new trial: the harmonic mean of its two accuracies, none where one is missing."""
    new = {row["trial_id"]: row for row in rows if row["kind"] == "new"}
    for base in (row for row in rows if row["kind"] == "base"):
        both = base["accuracy"], new.get(base["trial_id"], base)["accuracy"]
        yield base | {
            "kind": HARMONIC,
            "test_set": f"{base['dataset']}:{HARMONIC}",
            "accuracy": None if None in both else harmonic(*both),
            "evaluate_requests": base["evaluate_requests"] + new.get(base["trial_id"], base)["evaluate_requests"],
            **dict.fromkeys(("macro_accuracy", "nll", "ece")),
        }


def _labels(rows: list[Row], sections: list[Section]) -> Callable[[Row], str]:
    """A method's name; where one section holds it under several settings, with the settings that differ."""

    def spec(row: Row) -> Row:
        fixed = {k: row[k] for k in ("views", "validation", "settings")}
        return {k: strict_json(v) for k, v in json.loads(row["config"]).items()} | fixed

    seen: dict[tuple[str, Section], Row] = {}
    varying: dict[str, set[str]] = defaultdict(set)
    for row, section in zip(rows, sections, strict=True):
        mine = spec(row)
        first = seen.setdefault((row["method"], section), mine)
        varying[row["method"]] |= {k for k in mine.keys() | first.keys() if mine.get(k) != first.get(k)}

    def label(row: Row) -> str:
        mine = spec(row)
        return " ".join([row["method"], *(f"{k}={mine.get(k, '')}" for k in sorted(varying[row["method"]]))])

    return label


def _with_references(
    section: Section, methods: dict[str, list[Row]], native: dict[Section, dict[str, list[Row]]]
) -> dict[str, list[Row]]:
    """A section's cells, with the references that it lacks taken from the nearest section that has them."""

    def distance(other: Section, rows: list[Row]) -> tuple[Any, ...]:
        fits = all(
            limit is None or row[unit] <= limit
            for row in rows
            for unit, limit in (("requests", section.budget_requests), ("images", section.budget_images))
        )
        return other.shots != section.shots, other[-2:] != section[-2:], not fits, other.order

    def usable(other: Section, name: str) -> bool:
        return other[1:7] == section[1:7] and (name in FREE or other.shots == section.shots)

    cells = dict(methods)
    present = {rows[0]["method"] for rows in methods.values()}
    for name in REFERENCES:
        if name not in present:
            candidates = [(s, m[name]) for s, m in native.items() if name in m and usable(s, name)]
            if candidates:
                cells[name] = min(candidates, key=lambda c: distance(*c))[1]
    return cells


def _done(rows: list[Row]) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["status"] == "done" and row["accuracy"] is not None}


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
    others = _done(cells[section].get(name, []))
    same = name in FREE and len({row["accuracy"] for row in others.values()}) == 1
    anyone = next(iter(others.values())) if same else None
    found = {seed: (row, others.get(seed, anyone)) for seed, row in _done(rows).items()}
    return {seed: (row, other) for seed, (row, other) in found.items() if other is not None}


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
    record["sources"] = len({row["method_digest"] for row in kept})
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
