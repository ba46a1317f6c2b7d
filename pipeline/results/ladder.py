"""Accuracy by the bill of fitting: the points of each method in one unit, and the cheapest method near the best.

Several allotments give a method several points. A method whose bill does not grow with its allotment has one point, and
keeps its accuracy under every larger budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from methods.base import Bill
from pipeline.budget import LIMITED_UNITS, Limits
from pipeline.results.comparison import CLASSES, answers_order
from pipeline.results.tables import count, limits, md_grid

Record = dict[str, Any]

NEAR = 1.0
"""Points of accuracy below the best within which a cheaper method is named."""
NAMES = {"requests": "requests", "images": "image rows"}
"""Names of the units."""
_GROUP = ("model", "model_digest", "precision", "answers", "test_set", "shots", "access_class")
COLUMNS = (*_GROUP, "unit", "budget", "best", "best_accuracy", "cheapest", "cheapest_accuracy", "cost")
"""Columns of `cheapest`."""


def points(records: Iterable[Record], unit: str) -> dict[str, list[Record]]:
    """Return the records of each method from its lowest bill in `unit` on; of equal bills, the largest allotment's.

    Args:
        records: Records of the leaderboard with an accuracy, of one access class, test set and number of shots.
        unit: One of `NAMES`.
    """
    by_bill: dict[str, dict[float, Record]] = {}
    for record in sorted(records, key=lambda r: limits(r).size):
        by_bill.setdefault(record["label"], {})[record[unit]] = record
    return {label: [of_label[bill] for bill in sorted(of_label)] for label, of_label in sorted(by_bill.items())}


def bill_of(record: Record) -> Bill:
    """Return the limited units of a record's mean bill, rounded up."""
    return Bill(*(math.ceil(record[unit]) for unit in LIMITED_UNITS))


def is_complete(record: Record) -> bool:
    """Return whether a method keeps its bill, and so its accuracy, under larger allotments: it would fit in twice."""
    return limits(record).exceeded_unit(bill_of(record), bill_of(record)) is None


def compared(board: Sequence[Record], summary: Sequence[Record]) -> list[Record]:
    """Return the records that are compared by their bills: means over several data sets, then those of each set."""
    return [*(r for r in _comparable(summary) if r["datasets"] > 1), *_comparable(board)]


def _comparable(records: Iterable[Record]) -> list[Record]:
    """Return accuracies on data sets' own test sets, without means over fewer sets than others.

    A reference has all of its allotments in each access class that shows it, also those that the leaderboard shows in
    another class only.
    """
    own = [r for r in records if r["kind"] == "source" and r["accuracy"] is not None]
    most = max((r["datasets"] for r in own), default=0)
    by_method: dict[tuple[Any, ...], dict[Limits, Record]] = {}
    classes: dict[tuple[Any, ...], set[str]] = {}
    for record in (r for r in own if r["datasets"] == most):
        method = *(record[name] for name in _GROUP[:-1]), record["label"]
        by_method.setdefault(method, {})[limits(record)] = record
        classes.setdefault(method, set()).add(record["access_class"])
    return [
        record | {"access_class": name}
        for method, of_method in by_method.items()
        for name in sorted(classes[method])
        for record in of_method.values()
    ]


def budgets(bills: Iterable[float]) -> Iterator[int]:
    """Yield 1, 2, 5, 10, 20, ... from the smallest bill that is not 0 to the largest."""
    paid = sorted(bill for bill in bills if bill)
    if not paid:
        return
    for power in range(19):
        for budget in (10**power, 2 * 10**power, 5 * 10**power):
            if budget >= paid[0]:
                yield budget
            if budget >= paid[-1]:
                return


def cheapest(records: Iterable[Record], at: Callable[[Iterable[float]], Iterable[int]] = budgets) -> list[Record]:
    """Return the cheapest method near the best for each budget, with `COLUMNS`.

    The best has the highest accuracy of the methods' largest bills within the budget. The cheapest has the lowest bill
    of those whose accuracy is at most `NEAR` points lower.

    Args:
        records: Records as `compared` returns them.
        at: Returns the budgets that are looked at, from all bills.
    """
    found = []
    for key, group in groupby(sorted(records, key=_order), key=lambda r: [r[name] for name in _GROUP]):
        section = list(group)
        for unit in NAMES:
            lines = points(section, unit).values()
            for budget in at(r[unit] for line in lines for r in line):
                paid = [[r for r in line if r[unit] <= budget] for line in lines]
                best = max((line[-1] for line in paid if line), key=lambda r: r["accuracy"])
                near = [r for line in paid for r in line if r["accuracy"] >= best["accuracy"] - NEAR]
                least = min(near, key=lambda r: (r[unit], -r["accuracy"]))
                values = (unit, budget, best["label"], best["accuracy"], least["label"], least["accuracy"], least[unit])
                found.append(dict(zip(COLUMNS, (*key, *values), strict=True)))
    return found


def steps(found: Sequence[Record]) -> list[Record]:
    """Return the records of `cheapest` at which the cheapest method changes; each holds up to the next one."""
    same = (*_GROUP, "unit", "cheapest")
    return [next(part) for _, part in groupby(found, key=lambda r: [r[name] for name in same])]


def cheapest_md(found: Sequence[Record]) -> str:
    """Return the steps of `cheapest` as Markdown."""
    shown = [
        {
            "data": "mean" if r["test_set"] == "all" else r["test_set"],
            "shots": str(r["shots"]),
            "access": r["access_class"],
            "budget from": _budget(r),
            "cheapest": r["cheapest"],
            "its bill": count(r["cost"]),
            "accuracy": f"{r['cheapest_accuracy']:.1f}",
            "best": f"{r['best']} {r['best_accuracy']:.1f}",
        }
        for r in steps(found)
    ]
    title = f"The cheapest method within {NEAR:g} point of the best with budgets of 1, 2, 5, 10, ...: each change."
    return "\n\n".join([title, *([md_grid(shown)] if shown else [])]) + "\n"


def sentences(summary: Sequence[Record], shots: int, answers: str) -> list[str]:
    """Return which methods are the cheapest near the best, and from which bill on, as one sentence."""
    some = (r for r in _comparable(summary) if r["shots"] == shots and r["answers"] == answers)
    parts = []
    for name, group in groupby(steps(cheapest(some, _bills)), key=lambda r: r["access_class"]):
        by_unit = [list(of_unit) for _, of_unit in groupby(group, key=lambda r: r["unit"])]
        if len({tuple(r["cheapest"] for r in of_unit) for of_unit in by_unit}) == 1:
            parts.append(f"with {name} {_starts(zip(*by_unit, strict=True))}")
        else:
            parts.append(f"with {name} {'; or '.join(_starts((r,) for r in of_unit) for of_unit in by_unit)}")
    return [f"Cheapest within {NEAR:g} point of the best: {'; '.join(parts)}."] if parts else []


def _starts(of_units: Iterable[tuple[Record, ...]]) -> str:
    """Return from which budget on each method is the cheapest, in one unit or in both."""
    return ", ".join(f"{some[0]['cheapest']} from {' or '.join(map(_budget, some))}" for some in of_units)


def _budget(record: Record) -> str:
    return f"{record['budget']:,} {NAMES[record['unit']][: -1 if record['budget'] == 1 else None]}"


def _bills(bills: Iterable[float]) -> list[int]:
    return sorted({math.ceil(bill) for bill in bills if bill})


def _order(record: Record) -> tuple[Any, ...]:
    """Sort by the columns of `_GROUP`: means over data sets first, access classes as in the leaderboard."""
    model, sets = [record[name] for name in _GROUP[:3]], (record["test_set"] != "all", record["test_set"])
    return *model, answers_order(record["answers"]), *sets, record["shots"], CLASSES.index(record["access_class"])
