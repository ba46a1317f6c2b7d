"""Group rows into sections of the leaderboard, add reference rows, and decide which rows may be compared.

A *section* holds comparable rows: one access class, model, kind of answers, test set, number of shots and allotment.
Its rows are grouped by label: the method's name, with the settings that differ between variants of the method.
`zero_shot`, `zero_shot_ensemble`, `pixel_nn`, `logit_head` and `score_ridge` appear in every section as references.
Methods that run a local model have access classes of their own, in which `local_probe` is one more reference. A section
without trials of a reference takes them from another section of the same model, answers and test set. For the zero-shot
references, which cost nothing to fit, any number of shots and any budget will do; for the others the shots must be
equal, and budgets under which the reference's bill fits into this section's allotment are preferred.

A row is paired with a reference row only if `may_pair` holds: both agree in everything that affects a result except the
method.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.budget import Limits
from pipeline.results.identity import FIT_SETTINGS, FREE, SHARED, listed
from pipeline.results.row import KINDS
from pipeline.results.stats import harmonic

Row = dict[str, Any]
Cells = dict["Section", dict[str, list[Row]]]

LOCAL = " + local model"
"""Mark of the access classes of methods that run a pretrained model on the client."""
CLASSES = tuple(name + mark for name in ("labels", "top-k", "scores", "features", "white box") for mark in ("", LOCAL))
"""Access classes, from the least detailed answers on."""
ANSWERS = ("logits", "probabilities", "top-k", "label")
"""Kinds of scores that an endpoint answers (the first word of the column `answers`), from the most detailed on."""
FULL = ANSWERS[0]
HARMONIC = "harmonic"
GAINS = {"zero_shot": (*KINDS, HARMONIC), "logit_head": ("source", "shift"), "score_ridge": ("source", "shift")}
"""References of gains, and the kinds of test set on which each can be evaluated."""
LOCAL_REFERENCE = "local_probe"
"""Reference of the classes with a local model: what that model gives without any request."""
REFERENCES = (*FREE, "pixel_nn", "logit_head", "score_ridge", LOCAL_REFERENCE)


_ACCESS = {
    "TEXT": "text prompts",
    "SOFT": "soft prompts",
    "PIXELS": "images of its own",
    "LABELS": "labels",
    "TOPK": "best labels",
    "SCORES": "scores",
    "FEATURES": "features",
    "GRADIENTS": "gradients",
    "LORA": "low-rank weights",
}


class Section(NamedTuple):
    """Key of a section; its fields are the first columns of the leaderboard."""

    access_class: str
    answers: str
    model: str
    model_digest: str
    precision: str
    kind: str
    """Kind of test set, or harmonic. No mean mixes kinds."""
    dataset: str
    test_set: str
    shots: int
    budget_requests: int | None
    budget_images: int | None

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key: access class first, answers from full ones on, and budgets from small to unlimited."""
        budget = Limits(self.budget_requests, self.budget_images).size
        kind = (*KINDS, HARMONIC).index(self.kind)
        first = CLASSES.index(self.access_class), *answers_order(self.answers), *self[2:5]
        return *first, kind, self.dataset, self.test_set, self.shots, *budget


def answers_order(answers: str) -> tuple[int, int, str]:
    """Sort key of the column `answers`: by the kind of scores, full ones first, then what is exact before the rest."""
    kind, *settings = answers.split(", ")
    return ANSWERS.index(kind if kind in ANSWERS else "top-k"), len(settings), answers


def access_class(access: str, local_model: str = "") -> str:
    """Return the access class of an access label, by the most detailed answer in it; scores if it has none.

    Methods with a local model have classes of their own.
    """
    flags = access.split("+")
    answers = {
        "GRADIENTS": "white box",
        "LORA": "white box",
        "FEATURES": "features",
        "SCORES": "scores",
        "TOPK": "top-k",
        "LABELS": "labels",
    }
    return next((name for flag, name in answers.items() if flag in flags), "scores") + LOCAL * bool(local_model)


def access_words(access: str) -> str:
    """Return what an access label lets a method send and receive, e.g. 'soft prompts → scores'."""
    return " → ".join(_ACCESS.get(flag, flag) for flag in access.split("+")) or "no access"


def is_native(row: Row, name: str) -> bool:
    """Return whether a row or record belongs to an access class itself: references are shown in others as well."""
    return access_class(row["access"], row["local_model"]) == name


def cells(rows: pa.Table) -> Cells:
    """Group rows by section and label, and add the references that sections lack.

    Of several rows of one cell and seed, the last one is used.
    """
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
    for section in bare:  # only references ran in it: dropped if all of them are shown beside a method elsewhere
        if all(row["trial_id"] in shown for rows in native[section].values() for row in rows):
            del filled[section]
    return filled


def partner(methods: dict[str, list[Row]], row: Row, name: str) -> list[Row]:
    """Return the rows of reference `name` that a method's row is compared with; an empty list if there are none.

    If the reference ran under several settings that agree with those of the method, equal `hparams` are preferred,
    then the newest rows.
    """
    candidates = [rows for rows in methods.values() if rows[0]["method"] == name and _same_fit(row, rows[0])]
    return max(candidates, key=lambda rows: (rows[0]["hparams"] == row["hparams"], _age(rows)), default=[])


def may_pair(row: Row, other: Row) -> bool:
    """Return whether two rows on one test set differ only in the method, so that their difference is a gain."""
    draw = other["method"] in FREE or row["split_digest"] == other["split_digest"]
    same_answers = row["answers"] == other["answers"]
    return draw and same_answers and _same_fit(row, other) and all(row[c] == other[c] for c in SHARED)


def _same_fit(row: Row, other: Row) -> bool:
    """Return whether the fit settings that both methods use are equal."""
    if other["method"] in FREE:
        return True
    return all(row[k] == other[k] or "" in (row[k], other[k]) for k in FIT_SETTINGS)


def _age(rows: list[Row]) -> tuple[str, str]:
    return max((row["created"], row["trial_id"]) for row in rows)


def _section(row: Row) -> Section:
    named = {name: row[name] for name in Section._fields if name in row}
    return Section(access_class=access_class(row["access"], row["local_model"]), **named)


def _harmonic(rows: list[Row]) -> Iterator[Row]:
    """Yield one row per base-to-new trial: the harmonic mean of its accuracies, or None if one is missing."""
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
    """Return a function that labels a row: the method's name, and the settings in which rows of the method differ.

    A draw that is not balanced is always named, as its number of shots is a mean.
    With the papers' settings each data set has its own configuration, so configurations are compared within a section.
    Otherwise they are compared over all sections, so that a mean over data sets does not mix configurations.
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
        draw = [] if mine.get("draw", "balanced") == "balanced" else [mine["draw"]]
        settings = (f"{k}={mine.get(k, '')}" for k in sorted(varying[row["method"]] - {"draw"}))
        return " ".join([row["method"], *draw, *settings])

    return label


def _with_references(
    section: Section, methods: dict[str, list[Row]], native: dict[Section, dict[str, list[Row]]]
) -> dict[str, list[Row]]:
    """Return a section's rows by label, with missing references taken from the nearest section that has them."""

    def distance(other: Section, rows: list[Row]) -> tuple[Any, ...]:
        fits = all(
            limit is None or row[unit] <= limit
            for row in rows
            for unit, limit in (("requests", section.budget_requests), ("images", section.budget_images))
        )
        pairs = zip(Limits(*other[-2:]).size, Limits(*section[-2:]).size, strict=True)
        smaller = any(own < limit for own, limit in pairs)  # the reference could have used more of this allotment
        return other.shots != section.shots, other[-2:] != section[-2:], not fits, smaller, other.order

    def usable(other: Section, name: str) -> bool:
        return other[1:8] == section[1:8] and (name in FREE or other.shots == section.shots)

    result = dict(methods)
    for name in REFERENCES if section.access_class.endswith(LOCAL) else REFERENCES[:-1]:
        alone = [r[0] for r in methods.values() if r[0]["method"] != name and not partner(methods, r[0], name)]
        candidates: dict[str, list[tuple[Section, list[Row]]]] = defaultdict(list)
        for other in (s for s in native if alone and usable(s, name)):
            for label, rows in native[other].items():
                if rows[0]["method"] == name and label not in methods:
                    candidates[label].append((other, rows))
        for label, options in candidates.items():
            if any(_same_fit(row, options[0][1][0]) for row in alone):
                result[label] = min(options, key=lambda c: distance(*c))[1]
    return result


def missing_references(board: pa.Table) -> list[str]:
    """Return one line per reference that some methods of a leaderboard could not be compared with.

    A leaderboard without any score_ridge has no such line: its column is left out.
    """
    lines = []
    for name, kinds in GAINS.items():
        if name == "score_ridge" and name not in board["method"].to_pylist():
            continue
        places: dict[str, list[str]] = defaultdict(list)
        for record in board.to_pylist():
            if answers_order(record["answers"])[0] >= ANSWERS.index("top-k"):
                continue  # the references need all scores
            has_gain = record["kind"] in kinds and record["accuracy"] is not None and record["method"] != name
            compared = record["method"] not in FREE and (name in FREE or not record["reference"])
            if has_gain and compared and record[f"gain_{name}"] is None:
                shots = f"{record['shots']} shot{'s' * (record['shots'] != 1)}"
                degraded = f" with {record['answers']}" * (record["answers"] != FULL)
                places[record["label"]].append(f"{record['test_set']} at {shots}{degraded}")
        if places:
            where = list(dict.fromkeys(place for of_label in places.values() for place in of_label))
            lines.append(
                f"no gain over {name} for {listed(list(places))} ({listed(where)}): no finished {name} result has the "
                f"same identity, draws and settings; add {name} to methods= and run the same command"
            )
    return lines
