"""Compare the leaderboard with accuracies printed in papers (see README.md in this folder).

A printed row is matched by method, backbone, data set and shots only: budgets, validation, views and prompts may
differ. No printed number enters a mean, a gain or a rank.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.files import verified
from pipeline.results.comparison import FULL
from pipeline.results.identity import FREE
from pipeline.results.releases import printed_selection

Record = dict[str, Any]

FILE = Path(__file__).parent / "published.csv"
EVIDENCE = {
    "read": "read as digits in the source",
    "digitised": "measured from the pixels of a figure",
    "notes": "read in somebody else's notes on the paper",
}
ORIGIN = {
    "authors": "printed by the method's own authors",
    "quoted": "taken over from an earlier print",
    "rerun": "run again by others",
    "others": "printed by others, run or taken over",
}
OURS = (
    *("method", "label", "access", "model", "model_digest", "precision", "kind", "dataset", "test_set", "shots"),
    *("budget_requests", "budget_images", "seeds", "accuracy", "accuracy_ci95"),
)
"""Columns of our cell in a record; those of `Printed` follow with the prefix `printed_`, then `ours_minus_printed`."""


class Printed(NamedTuple):
    """A printed accuracy: one line of published.csv."""

    paper: str
    """Where it is printed: paper and table, log or figure."""
    method: str
    """The method's name there."""
    farebox_method: str
    """The method here that it is compared with; empty: none."""
    backbone: str
    """A model card's name, or as printed."""
    dataset: str
    """A data set card's name, or as printed."""
    shots: int
    """0: zero-shot."""
    accuracy: float
    """Per cent."""
    queries: int | None
    """The source's own count of its queries."""
    source: str
    """Where it was read."""
    evidence: str
    """A key of EVIDENCE."""
    origin: str
    """A key of ORIGIN."""
    note: str
    """What to know before use."""


@cache
def printed() -> tuple[Printed, ...]:
    """Return all printed accuracies. Raises DataError if the file is damaged."""
    with verified(FILE).open(newline="", encoding="utf-8") as file:
        return tuple(_typed(row) for row in csv.DictReader(file))


def _typed(row: Record) -> Printed:
    numbers = {"shots": int(row["shots"]), "accuracy": float(row["accuracy"])}
    return Printed(**row | numbers | {"queries": int(row["queries"]) if row["queries"] else None})


def matches(board: pa.Table) -> list[Record]:
    """Return one record per pair of a leaderboard cell and a matching printed row, by model, test set and shots.

    Only a data set's own test set and its shift sets are matched, and only full answers. Zero-shot is printed at 0
    shots and has no allotment, so our zero-shot result is matched once, with 0 shots and without an allotment.
    """
    about: dict[tuple[str, str, str, int], list[Printed]] = defaultdict(list)
    for row in printed():
        about[row.farebox_method, row.backbone, row.dataset, row.shots].append(row)
    records: dict[tuple[Any, ...], Record] = {}
    for cell in board.to_pylist():
        if cell["kind"] not in ("source", "shift") or cell["accuracy"] is None or cell["answers"] != FULL:
            continue
        free = {"shots": 0, "budget_requests": None, "budget_images": None} if cell["method"] in FREE else {}
        ours = {k: cell[k] for k in OURS} | free
        for row in about[ours["method"], ours["model"], ours["test_set"], ours["shots"]]:
            theirs = {f"printed_{k}": v for k, v in row._asdict().items() if k not in ("farebox_method", "shots")}
            theirs["printed_selects_on"] = printed_selection(ours["method"], row.dataset, row.origin)
            difference = ours["accuracy"] - row.accuracy
            key = *(ours[k] for k in OURS if k not in ("seeds", "accuracy", "accuracy_ci95")), row
            records.setdefault(key, ours | theirs | {"ours_minus_printed": difference})
    return sorted(records.values(), key=_order)


def _order(record: Record) -> tuple[Any, ...]:
    budget = (record[k] if record[k] is not None else float("inf") for k in ("budget_requests", "budget_images"))
    shift = record["kind"] == "shift"
    return record["model"], record["precision"], record["dataset"], shift, record["test_set"], record["shots"], *budget


def unmatched(records: list[Record]) -> int:
    """Return the number of printed rows that match none of our cells."""
    parts = ("paper", "method", "backbone", "dataset", "source")
    used = {(*(r[f"printed_{k}"] for k in parts), r["shots"]) for r in records}
    return sum((*(getattr(row, k) for k in parts), row.shots) not in used for row in printed())
