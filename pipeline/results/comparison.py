"""Comparison groups: which rows stand in one section of the leaderboard, under which label, beside which references.

A *section* is what may be compared: one access class, model, test set, shots and allotment. Its rows are grouped by
label: the method's name, with the settings that tell variants of one method apart. `zero_shot`, `zero_shot_ensemble`,
`pixel_nn` and `logit_head` stand in every section as references. A section without such trials takes them from another
one of the same model and test set: for the zero-shot rows (which cost nothing to fit) any shots and budget will do; for
the others the shots must be equal, and of other budgets one whose bill fits in this allotment comes first.

A row is paired with a reference's row only when `may_pair` holds: both agree in everything that affects a number apart
from the method.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.results.stats import harmonic
from pipeline.results.store import KINDS

Row = dict[str, Any]
Cells = dict["Section", dict[str, list[Row]]]

CLASSES = ("scores", "features", "white box")
HARMONIC = "harmonic"
FREE = ("zero_shot", "zero_shot_ensemble")
"""References that learn nothing: no setting of the fit, no few-shot draw and no budget affects them."""
GAINS = {"zero_shot": (*KINDS, HARMONIC), "logit_head": ("source", "shift")}
"""References that gains are computed over, and the kinds of test set that each can be run on."""
REFERENCES = (*FREE, "pixel_nn", "logit_head")
FIT_SETTINGS = ("views", "validation")
"""Settings of the fit that a method and its reference must share."""
SHARED = (
    *("model_digest", "transform", "code_digest", "data_digest", "test_digest"),
    *("template", "templates_digest", "classnames_digest", "augment"),
)
"""Columns in which a method's row and its reference's row must agree."""


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


def access_class(access: str) -> str:
    """The class that an access label ranks in, by what comes out of the box: scores, features, or gradients."""
    flags = access.split("+")
    return "white box" if "GRADIENTS" in flags else "features" if "FEATURES" in flags else "scores"


def cells(rows: pa.Table) -> Cells:
    """Rows by section and label, with the references filled in. Of two rows of a cell and seed the later one counts."""
    native: dict[Section, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    records = [row | {"reference": row["method"] in REFERENCES} for row in rows.to_pylist()]
    records = [*records, *_harmonic(records)]
    sections = [_section(row) for row in records]
    label = _labels(records, sections)
    latest = {(section, label(row), row["seed"]): row for row, section in zip(records, sections, strict=True)}
    for (section, name, _), row in latest.items():
        native[section][name].append(row)
    filled = {section: _with_references(section, methods, native) for section, methods in native.items()}
    bare = {s for s in filled if all(rows[0]["reference"] for rows in native[s].values())}
    shown = {row["trial_id"] for s in filled.keys() - bare for rows in filled[s].values() for row in rows}
    for section in bare:  # only references ran in it: shown when they are not all seen beside a method already
        if all(row["trial_id"] in shown for rows in native[section].values() for row in rows):
            del filled[section]
    return filled


def partner(methods: dict[str, list[Row]], row: Row, name: str) -> list[Row]:
    """The rows of reference `name` in a section that a method's row is compared with; empty when there are none.

    Where the reference ran under several settings that agree with the method's, those with equal `hparams` come first,
    then the newest.
    """
    found = [rows for rows in methods.values() if rows[0]["method"] == name and _same_fit(row, rows[0])]
    return max(found, key=lambda rows: (rows[0]["hparams"] == row["hparams"], _age(rows)), default=[])


def may_pair(row: Row, other: Row) -> bool:
    """Whether the difference of two accuracies on one test set is a gain of `row`'s method over `other`'s."""
    draw = other["method"] in FREE or row["split_digest"] == other["split_digest"]
    return draw and _same_fit(row, other) and all(row[column] == other[column] for column in SHARED)


def _same_fit(row: Row, other: Row) -> bool:
    """Whether the settings of both fits agree, as far as both methods use them."""
    if other["method"] in FREE:
        return True
    return all(row[k] == other[k] or "" in (row[k], other[k]) for k in FIT_SETTINGS)


def _age(rows: list[Row]) -> tuple[str, str]:
    return max((row["created"], row["trial_id"]) for row in rows)


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
    """A method's name; where rows of it differ in settings, with the settings that differ.

    `hparams=paper` gives each data set a configuration of its own, so configurations are compared within a section
    there, and over all sections otherwise: a mean over data sets never mixes two configurations unseen.
    """

    def spec(row: Row) -> Row:
        if row["method"] in FREE:
            return {}
        fixed = {k: row[k] for k in (*FIT_SETTINGS, "hparams")}
        return {k: json.dumps(v) for k, v in json.loads(row["config"]).items()} | fixed

    first: dict[Any, Row] = {}
    varying: dict[str, set[str]] = defaultdict(set)
    for row, section in zip(rows, sections, strict=True):
        mine, method = spec(row), row["method"]
        where = section if row["hparams"] == "paper" else None
        for key, part in (
            ((method,), {k: v for k, v in mine.items() if k in (*FIT_SETTINGS, "hparams")}),
            ((method, row["hparams"], where), mine),
        ):
            other = first.setdefault(key, part)
            varying[method] |= {k for k in part.keys() | other.keys() if part.get(k) != other.get(k)}

    def label(row: Row) -> str:
        mine = spec(row)
        return " ".join([row["method"], *(f"{k}={mine.get(k, '')}" for k in sorted(varying[row["method"]]))])

    return label


def _with_references(
    section: Section, methods: dict[str, list[Row]], native: dict[Section, dict[str, list[Row]]]
) -> dict[str, list[Row]]:
    """A section's rows by label, with the references that its methods lack taken from the nearest section with them."""

    def distance(other: Section, rows: list[Row]) -> tuple[Any, ...]:
        fits = all(
            limit is None or row[unit] <= limit
            for row in rows
            for unit, limit in (("requests", section.budget_requests), ("images", section.budget_images))
        )
        return other.shots != section.shots, other[-2:] != section[-2:], not fits, other.order

    def usable(other: Section, name: str) -> bool:
        return other[1:7] == section[1:7] and (name in FREE or other.shots == section.shots)

    result = dict(methods)
    for name in REFERENCES:
        alone = [r[0] for r in methods.values() if r[0]["method"] != name and not partner(methods, r[0], name)]
        candidates: dict[str, list[tuple[Section, list[Row]]]] = defaultdict(list)
        for other in (s for s in native if alone and usable(s, name)):
            for label, rows in native[other].items():
                if rows[0]["method"] == name and label not in methods:
                    candidates[label].append((other, rows))
        for label, found in candidates.items():
            if any(_same_fit(row, found[0][1][0]) for row in alone):
                result[label] = min(found, key=lambda c: distance(*c))[1]
    return result
