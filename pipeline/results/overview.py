"""The overview of a leaderboard: one line per method, one column per value of an axis, and what follows from it.

An axis is shots, dataset, budget, access or answers. Everything else has one value: the largest number of shots, the
largest allotment, the most detailed answers, and the mean over data sets. `screen.py` and `tables.py` write an
overview; nothing is computed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from methods.base import Bill
from pipeline.budget import Limits
from pipeline.results import ladder
from pipeline.results.comparison import CLASSES, FULL, HARMONIC, LOCAL, access_class, answers_order, is_native
from pipeline.results.identity import listed
from pipeline.results.leaderboard import UNFINISHED
from pipeline.results.row import STATUSES
from pipeline.results.standing import UNFITTED
from pipeline.results.tables import budget, compact, limits

Record = dict[str, Any]

AXES = ("dataset", "shots", "budget", "access", "answers")
"""Axes of `farebox leaderboard --by`."""
NO_FIT = "no fit"
"""Group of the references without a fit."""
MEAN = "mean"
"""Header of the mean over data sets."""
HALVES = {"H": HARMONIC, "base": "base", "new": "new"}
"""Columns of base-to-new, by data set, with their kinds."""
_MODEL = ("model", "model_digest", "precision")


@dataclass(frozen=True)
class Line:
    """One method: its record in each column, None where it has no result."""

    group: str
    records: tuple[Record | None, ...]
    main: Record
    """The record by which methods are sorted, and whose bill is shown."""


@dataclass(frozen=True)
class Overview:
    """A table of methods by an axis."""

    axis: str
    columns: tuple[str, ...]
    main: int
    """Index of the column that is shown with intervals, and by which methods are sorted."""
    groups: dict[str, tuple[Line, ...]]
    """Lines by access class (by access for the axis `access`), the best method first."""
    facts: dict[str, str]
    """What the table is about: methods, data, shots, seeds, allotment and model."""
    summary: list[Record] = field(repr=False)
    """All records over data sets of the model."""
    shift_sets: tuple[str, ...] = ()
    allotments: tuple[Limits, ...] = ()
    """Allotment of each column, by budget."""

    @cached_property
    def lines(self) -> list[Line]:
        """All lines."""
        return [line for group in self.groups.values() for line in group]

    @property
    def shows_gains(self) -> bool:
        """Whether gains over zero_shot are shown: some method could be compared with it. Otherwise accuracies are.

        By answers, accuracies are: zero_shot differs between the columns, and cannot run in all of them.
        """
        return self.axis != "answers" and any(
            r and r["gain_zero_shot"] is not None for line in self.lines for r in line.records
        )

    @property
    def value(self) -> str:
        """Name of the value that is shown, a column of the leaderboard."""
        return "gain_zero_shot" if self.shows_gains else "accuracy"


def overview(board: pa.Table, summary: pa.Table, axis: str | None = None) -> Overview | None:
    """Return the overview of a leaderboard; None if there are no results.

    Args:
        board: The leaderboard by test set.
        summary: The leaderboard over data sets.
        axis: One of `AXES`; None for shots, or if there is one number of shots, for answers or for data sets. By data
            set, base-to-new has columns for H (the harmonic mean), base and new as well.
    """
    every, over_sets = board.to_pylist(), summary.to_pylist()
    if not over_sets:
        return None
    model = max({_model(r) for r in over_sets}, key=lambda m: (sum(_model(r) == m for r in over_sets), m))
    every, over_sets = ([r for r in records if _model(r) == model] for records in (every, over_sets))
    kinds = {r["kind"] for r in over_sets}
    kind = next(k for k in ("source", HARMONIC, *sorted(kinds)) if k in kinds)
    of_kind = [r for r in over_sets if r["kind"] == kind]
    all_shots = sorted({r["shots"] for r in of_kind})
    allotments = sorted({limits(r) for r in of_kind}, key=lambda of: of.size)
    shots, allotment = all_shots[-1], allotments[-1]
    sets = list(dict.fromkeys(r["dataset"] for r in every if r["kind"] == kind))
    shifts = list(dict.fromkeys(r["test_set"] for r in every if r["kind"] == "shift"))
    all_answers = sorted({r["answers"] for r in of_kind}, key=answers_order)
    by = axis or _default_axis(all_shots, all_answers, len(sets) > 1 or kind == HARMONIC)

    def where(of: str, k: int, paid: Limits, test_set: str = "all", answers: str = all_answers[0]) -> dict[str, Any]:
        return {"kind": of, "shots": k, "test_set": test_set, "budget": paid, "answers": answers}

    if by == "dataset":
        full = {r["dataset"]: r["test_set"] for r in every if r["kind"] == kind}
        means, suffix = (HALVES, " H") if kind == HARMONIC else ({MEAN: kind}, "")
        columns = {name: where(of, shots, allotment) for name, of in means.items()}
        own = {name + suffix: where(kind, shots, allotment, full[name]) for name in sets}
        if len(sets) > 1:
            columns |= own
        elif kind != HARMONIC:  # one data set is its own mean
            columns = own
        columns |= {f"{name} (shift)": where("shift", shots, allotment, name) for name in shifts}
        main = 0
    elif by == "budget":
        columns = {budget_header(of): where(kind, shots, of) for of in allotments}
        main = len(columns) - 1
    elif by == "answers":
        columns = {text: where(kind, shots, allotment, answers=text) for text in all_answers}
        main = 0
    else:
        columns = {f"{k} shot{'s' * (k > 1)}": where(kind, k, allotment) for k in all_shots}
        main = len(columns) - 1
        if shifts:
            columns["shift"] = where("shift", shots, allotment)
    lines = _lines([*every, *over_sets], list(columns.values()), main, by)
    facts = {
        "data": " and ".join(sets) if len(sets) < 3 else f"{len(sets)} data sets",
        "kind": "H (harmonic mean of base and new classes)" if kind == HARMONIC else "",
        "shots": f"{'/'.join(map(str, all_shots if by == 'shots' else [shots]))} shot{'s' * (shots > 1)}",
        "seeds": _seeds([line.main for line in lines]),
        "allotment": budget(allotment) + f" (largest of {len(allotments)} allotments)" * (len(allotments) > 1)
        if by != "budget"
        else "",
        "answers": _answers_fact(all_answers) if by != "answers" else "",
        "model": model[0],
        "methods": _count(len({r["label"] for r in of_kind}), "method"),
    }
    rungs = tuple(allotments) if by == "budget" else ()
    return Overview(by, tuple(columns), main, _grouped(lines), facts, over_sets, tuple(shifts), rungs)


def conclusions(view: Overview) -> list[str]:
    """Return sentences about an overview, which hold for its numbers: who leads, what is tied, shift and budget."""
    sentences, leaders = [], []
    for name in CLASSES:
        lines = [line for line in view.lines if line.main["access_class"] == name and line.main["leader"]]
        if lines:
            sentences.append(_of_class(name, lines[0].main, view))
            leaders.append(lines[0].main)
    if view.axis == "budget" and leaders:
        return [*sentences, *ladder.sentences(view.summary, leaders[0]["shots"], leaders[0]["answers"])]
    return [*sentences, *_under_shift(leaders, view), *_by_budget(leaders, view)]


def unfinished(view: Overview) -> str:
    """Return how many trials of the columns have no result, in words; empty if all are done."""
    counts = {s: sum(r[s] for line in view.lines for r in line.records if r) for s in UNFINISHED}
    return ", ".join(f"{n:,} {STATUSES[s]}" for s, n in counts.items() if n)


def _default_axis(all_shots: Sequence[int], all_answers: Sequence[str], several_columns: bool) -> str:
    if len(all_shots) > 1:
        return "shots"
    return "answers" if len(all_answers) > 1 else "dataset" if several_columns else "shots"


def _answers_fact(all_answers: Sequence[str]) -> str:
    """Return the answers that an overview shows, with the number of others; empty if all are full."""
    if all_answers == [FULL]:
        return ""
    return f"answers: {all_answers[0]}" + f" (first of {len(all_answers)} kinds)" * (len(all_answers) > 1)


def _model(record: Record) -> tuple[str, ...]:
    return tuple(record[name] for name in _MODEL)


def budget_header(of: Limits) -> str:
    """Return an allotment as the header of a column, e.g. '1,000 requests' and '8,000 req, 256k im'."""
    if of.requests is not None and of.images is not None:
        return f"{compact(of.requests)} req, {compact(of.images)} im"
    return budget(of)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _seeds(records: Sequence[Record]) -> str:
    numbers = sorted({r["seeds"] for r in records if r["method"] not in UNFITTED} or {r["seeds"] for r in records})
    return _count(numbers[0], "seed") if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} seeds"


def _lines(records: list[Record], columns: list[dict[str, Any]], main: int, axis: str) -> list[Line]:
    """Return a line per method that has a record in the main column, or else in any column.

    A reference is shown in its own access class, although the leaderboard shows it in every class. By budget, a method
    that did not run with an allotment is shown with the result of a larger one whose bill fits into it.
    """
    placed: dict[tuple[str, str], list[Record | None]] = {}
    own = {r["label"] for r in records if is_native(r, r["access_class"])}
    for record in records:
        key = {**{k: record[k] for k in ("kind", "shots", "test_set", "answers")}, "budget": limits(record)}
        if key not in columns:
            continue
        if record["method"] in UNFITTED:
            group = NO_FIT
        elif is_native(record, record["access_class"]) or record["label"] not in own:  # no other method in its class
            name = access_class(record["access"], record["local_model"])
            group = record["access"] + LOCAL * bool(record["local_model"]) if axis == "access" else name
        else:
            continue
        cells = placed.setdefault((group, record["label"]), [None] * len(columns))
        cells[columns.index(key)] = record
    lines = []
    for (group, _), cells in placed.items():
        if axis == "budget":
            cells = [cell or _fitting(cells[i + 1 :], columns[i]["budget"]) for i, cell in enumerate(cells)]
        first = cells[main] or next(r for r in cells if r)
        lines.append(Line(group, tuple(cells), first))
    return lines


def _fitting(larger: Sequence[Record | None], of: Limits) -> Record | None:
    """Return the first record whose allotment is not smaller in either unit, and whose bill the allotment `of` pays."""

    def fits(record: Record) -> bool:
        no_smaller = all(own >= limit for own, limit in zip(limits(record).size, of.size, strict=True))
        return no_smaller and of.exceeded_unit(Bill(), ladder.bill_of(record)) is None

    return next((record for record in larger if record and fits(record)), None)


def _grouped(lines: list[Line]) -> dict[str, tuple[Line, ...]]:
    order = [NO_FIT, *CLASSES, *sorted({line.group for line in lines})]

    def rank(line: Line) -> tuple[Any, ...]:
        accuracy = line.main["accuracy"]
        return UNFITTED.index(line.main["method"]) if line.group == NO_FIT else 0, accuracy is None, -(accuracy or 0.0)

    return {
        name: tuple(sorted((line for line in lines if line.group == name), key=rank))
        for name in dict.fromkeys(order)
        if any(line.group == name for line in lines)
    }


def _signed(record: Record, name: str) -> str:
    return f"{record[name]:+.1f}" if name != "accuracy" else f"{record[name]:.1f}%"


def _of_class(name: str, leader: Record, view: Overview) -> str:
    others = [line.main for line in view.lines if line.main["access_class"] == name and line.main["tied"] is not None]
    tied = [r["label"] for r in others if r["tied"]]
    gain, ci95 = leader["gain_zero_shot"], leader["gain_zero_shot_ci95"]
    value = view.value if leader[view.value] is not None else "accuracy"  # no reference was run with its settings
    text = f"With {name}, {leader['label']} leads ({_signed(leader, value)}"
    if gain is not None and (gain <= 0 or (ci95 is not None and gain <= ci95)):
        text = f"With {name}, none is clearly above zero_shot (best: {leader['label']} {gain:+.1f}"
    return text + (f"; tied: {listed(tied)}" if tied else "") + ")."


def _under_shift(leaders: list[Record], view: Overview) -> list[str]:
    found = []
    for leader in leaders:
        key = {k: leader[k] for k in ("access_class", "shots", "budget_requests", "budget_images", "answers", "label")}
        for r in view.summary:
            if r["kind"] == "shift" and all(r[k] == v for k, v in key.items()) and r[view.value] is not None:
                found.append(_signed(r, view.value))
    if len(found) < len(leaders) or not found:
        return []
    one, several = ("its gain is", "their gains are") if view.shows_gains else ("it reaches", "they reach")
    who = several if len(found) > 1 else one
    return [f"Under domain shift ({listed(view.shift_sets)}) {who} {' and '.join(found)}."]


def _by_budget(leaders: list[Record], view: Overview) -> list[str]:
    """Return a sentence about the method with the highest gain whose bill follows its allotment."""
    if not leaders:
        return []
    kind, shots = leaders[0]["kind"], leaders[0]["shots"]
    ladders: dict[str, list[Record]] = {}
    for r in sorted(view.summary, key=lambda r: limits(r).size):
        same = r["kind"] == kind and r["shots"] == shots and not r["reference"]
        if same and r[view.value] is not None and r["requests"] is not None:
            ladders.setdefault(r["label"], []).append(r)
    ladders = {name: rows for name, rows in ladders.items() if len({r["requests"] for r in rows}) == len(rows) > 1}
    if not ladders:
        return []
    name, rows = max(ladders.items(), key=lambda item: float(item[1][-1][view.value]))
    values = " / ".join(_signed(r, view.value) for r in rows)
    requests = " / ".join(f"{r['requests']:,.0f}" for r in rows)
    return [f"{name} with {requests} requests: {values}."]
