"""Identity of results: which rows of a storage may stand side by side, and which are left out and why.

Data, templates, class names, weights, preprocessing and code may change between two runs into one storage. The rows of
both stay on disk. This module selects the *current* ones: for each column that affects a number and is not what a
leaderboard compares (`IDENTITY`), the newest row decides which value is current, within a scope such as the data set.
A row that differs from the current value in any of them is left out of every mean, pair and figure. It is counted,
and the reason is given. Of several rows of one cell and seed, the newest counts.

A row is newer than another when a later run planned its trial (pipeline/results/runs.py), and by its time of creation
among the trials of one run. Restoring an earlier data card and running again therefore makes the earlier rows current
again, although nothing is computed.

Results of other code that a run kept on purpose (on_code_change=keep) stay in the means while that run is the last one.
They are marked, and never paired with rows of the present code.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.results.comparison import FIT_SETTINGS, FREE, GAINS
from pipeline.results.runs import RunRecord
from pipeline.results.store import FINISHED

Row = dict[str, Any]


class Column(NamedTuple):
    """A column in which the rows of one scope must agree."""

    name: str
    scope: tuple[str, ...]
    """Columns whose values make the scope; `protocol` is base_to_new or all_to_all."""
    text: str
    """What it describes, for messages."""


IDENTITY = (
    Column("code_digest", (), "Farebox code"),
    Column("method_version", ("method",), "method version"),
    Column("method_digest", ("method",), "method code"),
    Column("model_digest", ("model", "precision"), "model weights"),
    Column("transform", ("model", "precision"), "image preprocessing"),
    Column("data_digest", ("dataset",), "data"),
    Column("test_digest", ("kind", "test_set"), "test data"),
    Column("template", ("dataset",), "template"),
    Column("templates_digest", ("dataset",), "ensemble templates"),
    Column("classnames_digest", ("dataset", "protocol"), "class names"),
    Column("augment", ("dataset",), "augmentation"),
)
CODE = ("code_digest", "method_digest")
"""Columns in which rows kept by on_code_change=keep may differ."""
AT_THE_END = ("transform", "test_digest")
"""Columns that a trial without a score does not fill."""
ENVIRONMENT = {"cpu": "CPU", "device": "device", "threads": "threads", "torch_version": "torch"}
"""Columns of the machine: bit-identity is claimed per value, so a mixture is mentioned but nothing is left out."""
_CELL = (
    *("access", "model", "precision", "kind", "dataset", "test_set", "shots", "seed"),
    *("budget_requests", "budget_images", "method", "config", "hparams", *FIT_SETTINGS),
)
_READ = tuple(
    dict.fromkeys(
        (*_CELL, *(c.name for c in IDENTITY), *ENVIRONMENT, "trial_id", "created", "status", "accuracy"),
    )
)
SHOWN_METHODS = 4
"""Methods that a note names before it counts the others."""


@dataclass(frozen=True)
class Selection:
    """The rows of a storage that a leaderboard shows, and what it leaves out."""

    rows: pa.Table
    """Current rows, oldest first."""
    everything: pa.Table
    """All rows."""
    left_out: Mapping[tuple[str, str], str]
    """Reason by (trial_id, test_set) of each row that is not shown."""
    notes: tuple[str, ...]
    """One line for each group of rows that is left out, and for what else a reader must know."""


def select(rows: pa.Table, runs: RunRecord | None = None) -> Selection:
    """Select the current rows of a storage; `runs` is its record of runs, if it has one."""
    runs = runs or RunRecord()
    records = rows.select(list(_READ)).to_pylist()
    order = sorted(range(len(records)), key=lambda i: _order(records[i], runs))
    ordered = [records[i] for i in order]
    current = _current(ordered)
    kept = set(runs.last) if runs.keep else set[str]()
    reasons: dict[int, str] = {}
    newest: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(ordered):
        differing = list(_differing(row, current, kept))
        if differing:
            reasons[i] = _reason(row, differing, current)
        else:
            newest[_cell(row)] = i
    for i, row in enumerate(ordered):
        if i not in reasons and newest[_cell(row)] != i:
            reasons[i] = "replaced by a newer trial of the same cell"
    shown = [i for i in range(len(ordered)) if i not in reasons]
    notes = [
        *_left_out(ordered, reasons, {_cell(ordered[i]) for i in shown}),
        *_unfinished(runs, {row["trial_id"] for row in ordered}),
        *_environments([ordered[i] for i in shown]),
    ]
    left_out = {(ordered[i]["trial_id"], ordered[i]["test_set"]): reason for i, reason in reasons.items()}
    return Selection(rows.take(pa.array([order[i] for i in shown], pa.int64())), rows, left_out, tuple(notes))


def missing_references(board: pa.Table) -> list[str]:
    """One line for each reference that some methods of a leaderboard could not be compared with, and what to type."""
    lines = []
    for name, kinds in GAINS.items():
        places: dict[str, list[str]] = defaultdict(list)
        for record in board.to_pylist():
            wanted = record["kind"] in kinds and record["accuracy"] is not None and record["method"] != name
            compared = record["method"] not in FREE and (name in FREE or not record["reference"])
            if wanted and compared and record[f"gain_{name}"] is None:
                shots = f"{record['shots']} shot{'s' * (record['shots'] != 1)}"
                places[record["label"]].append(f"{record['test_set']} at {shots}")
        if places:
            where = list(dict.fromkeys(place for found in places.values() for place in found))
            lines.append(
                f"no gain over {name} for {_some(list(places))} ({_some(where)}): no finished {name} result has the "
                f"same identity, draws and settings; add {name} to methods=[...] and run the same command"
            )
    return lines


def _order(row: Row, runs: RunRecord) -> tuple[int, str, str]:
    return runs.trials.get(row["trial_id"], 0), row["created"], row["trial_id"]


def _scope(column: Column, row: Row) -> tuple[Any, ...]:
    protocol = "base_to_new" if row["kind"] in ("base", "new") else "all_to_all"
    return (column.name, *(protocol if name == "protocol" else row[name] for name in column.scope))


def _states(column: Column, row: Row) -> bool:
    return row["status"] in FINISHED or column.name not in AT_THE_END


def _current(ordered: Sequence[Row]) -> dict[tuple[Any, ...], Any]:
    """Value of the newest row, by column and scope."""
    return {_scope(c, row): row[c.name] for row in ordered for c in IDENTITY if _states(c, row)}


def _differing(row: Row, current: Mapping[tuple[Any, ...], Any], kept: set[str]) -> Iterator[Column]:
    for column in IDENTITY:
        if not _states(column, row) or (column.name in CODE and row["trial_id"] in kept):
            continue
        if row[column.name] != current[_scope(column, row)]:
            yield column


def _cell(row: Row) -> tuple[Any, ...]:
    unused = (*FIT_SETTINGS, "hparams") if row["method"] in FREE else ()
    return tuple(row[name] for name in _CELL if name not in unused)


def _reason(row: Row, differing: Sequence[Column], current: Mapping[tuple[Any, ...], Any]) -> str:
    """Say how a row differs, e.g. "other template ('an icon of a {}', now 'a drawing of a {}')"."""
    other, unknown = [], []
    for column in differing:
        now = current[_scope(column, row)]
        if row[column.name] == "" and column.name.endswith("_digest") and column.name != "templates_digest":
            unknown.append(column.text)
        elif column.name == "template":
            other.append(f"{column.text} ({_cut(row['template'])}, now {_cut(now)})")
        else:
            other.append(column.text)
    parts = [f"other {', '.join(other)}"] if other else []
    parts += [f"not recorded: {', '.join(unknown)}"] if unknown else []
    return "; ".join(parts)


def _left_out(ordered: Sequence[Row], reasons: Mapping[int, str], shown: set[tuple[Any, ...]]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for i, reason in reasons.items():
        groups[ordered[i]["dataset"], reason].append(ordered[i])
    for (dataset, reason), rows in groups.items():
        methods = _some(sorted({row["method"] for row in rows}))
        lacking = sum(_cell(row) not in shown for row in rows)
        verb = "has" if lacking == 1 else "have"
        again = (
            f"; {lacking:,} of them {verb} no current result: run the same command to measure them" if lacking else ""
        )
        yield f"left out: {_rows(len(rows))} of {dataset} ({methods}), {reason}{again}"


def _unfinished(runs: RunRecord, have_rows: set[str]) -> Iterator[str]:
    waiting = sum(trial_id not in have_rows for trial_id in runs.last)
    if waiting:
        yield f"{waiting:,} trial{'s' * (waiting > 1)} of the last run have no result yet: the same command continues"


def _environments(rows: Sequence[Row]) -> Iterator[str]:
    """One line when the scored rows come from several machines or versions of torch."""
    mixed = []
    for column, text in ENVIRONMENT.items():
        scored = (str(row[column]) for row in rows if row["accuracy"] is not None)
        counts = Counter(sorted(value for value in scored if value))
        if len(counts) > 1:
            values = [f"{value} ({_rows(count)})" for value, count in counts.most_common()]
            mixed.append(f"{text} {_some(values)}")
    if mixed:
        yield f"mixed environments, so last bits may differ between rows: {'; '.join(mixed)}"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _some(values: Sequence[str]) -> str:
    """The first values, and how many more there are."""
    more = f" and {len(values) - SHOWN_METHODS} more" if len(values) > SHOWN_METHODS else ""
    return ", ".join(values[:SHOWN_METHODS]) + more


def _cut(text: str, longest: int = 50) -> str:
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")
