"""Filters of `farebox leaderboard`: which rows of a storage are shown.

`model`, `datasets` and `seeds` restrict the rows before anything is computed. `methods`, `shots`, the budget and
`answers` restrict the records; rows of references outside them still serve to compute gains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.budget import LIMITED_UNITS
from pipeline.errors import ConfigError
from pipeline.results.comparison import REFERENCES
from pipeline.results.identity import FREE, Selection

Row = dict[str, Any]

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "model": ("model",),
    "methods": ("method",),
    "datasets": ("dataset", "test_set"),
    "shots": ("shots",),
    "seeds": ("seed",),
    "budget.requests": ("budget_requests",),
    "budget.images": ("budget_images",),
    "answers": ("answers",),
}
"""Columns of a row by the key that filters them; a row is kept if one of them has one of the values."""
_OF_RECORDS = ("shots", "budget.requests", "budget.images", "answers")


@dataclass(frozen=True)
class Filter:
    """Values to keep, by a key of `COLUMNS`; keys without values keep everything."""

    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods to show; empty for all."""
        return tuple(self.values.get("methods", ()))

    def keeps(self, row: Row, keys: Mapping[str, tuple[str, ...]] = COLUMNS) -> bool:
        """Return whether a row has one of the values of each of the keys."""
        return all(any(row[c] in self.values[key] for c in keys[key]) for key in self.values if key in keys)

    def select(self, selection: Selection, references: bool = True) -> Selection:
        """Return the rows to show and, with `references`, those that their gains need.

        Raises:
            ConfigError: no row is left; the message has the values that exist.
        """
        if not self.values:
            return selection
        everything = selection.everything.to_pylist()
        if not any(self.keeps(row) for row in everything):
            raise ConfigError(self._nothing(everything))
        rows = selection.rows.to_pylist()
        keep = self._keep_with_references(rows) if references else self.keeps
        return replace(
            selection,
            rows=_only(selection.rows, [keep(row) for row in rows]),
            everything=_only(selection.everything, [self.keeps(row) for row in everything]),
            notes=(*self._affordable(everything), *selection.notes),
        )

    def records(self, table: pa.Table) -> pa.Table:
        """Return the records of a leaderboard with the shots and budgets to show."""
        keys = {key: COLUMNS[key] for key in _OF_RECORDS}
        return _only(table, [self.keeps(record, keys) for record in table.to_pylist()])

    def _keep_with_references(self, rows: list[Row]) -> Callable[[Row], bool]:
        fixed = {key: COLUMNS[key] for key in ("model", "datasets")}
        seeds = {key: COLUMNS[key] for key in ("seeds",)}
        # zero-shot has no draw: without rows of these seeds, those of others serve
        have = {(r["method"], r["test_set"]) for r in rows if self.keeps(r, seeds)}

        def keep(row: Row) -> bool:
            if not self.keeps(row, fixed):
                return False
            own_seed = self.keeps(row, seeds)
            if row["method"] in FREE:
                return own_seed or (row["method"], row["test_set"]) not in have
            if row["method"] in REFERENCES:
                return own_seed
            return own_seed and self.keeps(row)

        return keep

    def _affordable(self, rows: list[Row]) -> list[str]:
        """Return a note that names methods whose bills fit into the budgets to show, under other allotments.

        A method whose bill does not grow with its allotment may have run with a larger one only. References are shown
        whatever their allotment is.
        """
        limits = {unit: self.values.get(f"budget.{unit}") for unit in LIMITED_UNITS}
        most = {unit: max(of) for unit, of in limits.items() if of and None not in of}
        others = {key: COLUMNS[key] for key in COLUMNS if not key.startswith("budget.")}
        shown = {row["method"] for row in rows if self.keeps(row)}
        fitting = {
            row["method"]
            for row in rows
            if self.keeps(row, others) and all(row[unit] <= limit for unit, limit in most.items())
        }
        names = sorted(fitting - shown - {*REFERENCES}) if most else []
        note = f"--by budget also has, within this budget: {', '.join(names)}"
        return [note] if names else []

    def _nothing(self, rows: list[Row]) -> str:
        asked = " ".join(f"{key}={_joined(values)}" for key, values in self.values.items())
        exists = "; ".join(f"{key}: {_joined(_values(rows, key))}" for key in self.values)
        return f"no results match {asked}; the storage has {exists}"


def _only(table: pa.Table, mask: list[bool]) -> pa.Table:
    return table.filter(pa.array(mask, pa.bool_()))


def _values(rows: list[Row], key: str) -> tuple[Any, ...]:
    values = {row[column] for row in rows for column in COLUMNS[key]}
    return tuple(sorted(values, key=lambda value: (value is None, value)))


def _joined(values: tuple[Any, ...]) -> str:
    return ",".join("null" if value is None else str(value) for value in values)
