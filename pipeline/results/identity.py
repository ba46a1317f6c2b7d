"""Select the current rows of a storage: those that may be averaged and compared, and why others are left out.

Data, templates, class names, weights, preprocessing and code may change between two runs into one storage. The rows of
both runs stay on disk. For each column that affects a result and is not compared by the leaderboard (`IDENTITY`), the
newest row determines the current value, within a scope such as the data set. A row with another value is left out of
every mean, gain and figure. It is counted, and the reason is reported. Of several rows of one cell and seed, the newest
is used.

A row is newer than another if a later run planned its trial (`pipeline.results.runs`); among trials of one run, the
time of creation decides. Restoring an earlier data card and running again therefore makes the earlier rows current
again, although nothing is recomputed.

Results of other code that the last run kept on purpose stay in the means while that run is the last one. They are
marked, and never paired with rows of the present code.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.console import plain
from pipeline.results.row import FINISHED
from pipeline.results.runs import RunRecord

Row = dict[str, Any]


FREE = ("zero_shot", "zero_shot_ensemble")
"""Methods without a fit: neither fit settings, nor the few-shot draw, nor the budget affects them."""
FIT_SETTINGS = ("views", "validation", "draw", "local_model")
"""Settings of the fit in which a method and its reference must agree, unless one of them has no such setting."""


class Column(NamedTuple):
    """A column in which the rows of one scope must agree."""

    name: str
    scope: tuple[str, ...]
    """Columns that define the scope; `protocol` is base_to_new or all_to_all."""
    text: str
    """Description for messages."""


IDENTITY = (
    Column("code_digest", (), "Farebox code"),
    Column("method_version", ("method",), "method version"),
    Column("method_digest", ("method",), "method code"),
    Column("model_digest", ("model", "precision"), "model weights"),
    Column("transform", ("model", "precision"), "image preprocessing"),
    Column("local_digest", ("local_model",), "local model"),
    Column("data_digest", ("dataset",), "data"),
    Column("test_digest", ("kind", "test_set"), "test data"),
    Column("template", ("dataset",), "template"),
    Column("templates_digest", ("dataset",), "ensemble templates"),
    Column("classnames_digest", ("dataset", "protocol"), "class names"),
    Column("augment", ("dataset",), "augmentation"),
)
SHARED = tuple(column.name for column in IDENTITY if column.scope not in (("method",), ("local_model",)))
"""Columns in which the rows of a method and of its reference must agree."""
CODE = ("code_digest", "method_digest")
"""Columns in which rows that were kept on purpose may differ."""
AT_THE_END = ("transform", "test_digest")
"""Columns that are empty in rows without a score."""
ENVIRONMENT = {"cpu": "CPU", "device": "device", "threads": "threads", "torch_version": "torch"}
"""Columns of the machine. Results are bit-identical per value; a mixture is reported, and no row is left out."""
_CELL = (
    *("access", "model", "precision", "kind", "dataset", "test_set", "shots", "seed"),
    *("budget_requests", "budget_images", "answers", "method", "config", "hparams", *FIT_SETTINGS),
)
_READ = tuple(
    dict.fromkeys(
        (*_CELL, *(c.name for c in IDENTITY), *ENVIRONMENT, "trial_id", "created", "status", "accuracy"),
    )
)
NAMED = 4
"""Values that a note names; further ones are counted."""


@dataclass(frozen=True)
class Selection:
    """Rows of a storage that a leaderboard shows, and those that it leaves out."""

    rows: pa.Table
    """Current rows, oldest first."""
    everything: pa.Table
    """All rows."""
    left_out: Mapping[tuple[str, str], str]
    """Reason for each row that is not shown, by (trial_id, test_set)."""
    notes: tuple[str, ...]
    """One line per group of rows left out, per unfinished run, per mixture of environments and per noise floor."""
    floors: tuple[Row, ...] = ()
    """Measured noise floors of the endpoints (`noise_floor`)."""


def select(rows: pa.Table, runs: RunRecord | None = None) -> Selection:
    """Select the current rows of a storage.

    Args:
        rows: All rows, with `row.SCHEMA`.
        runs: The storage's record of runs; None for an empty record.
    """
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


def listed(values: Sequence[str]) -> str:
    """Return the first `NAMED` values, and the number of further ones."""
    more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
    return ", ".join(values[:NAMED]) + more


def _order(row: Row, runs: RunRecord) -> tuple[int, str, str]:
    return runs.trials.get(row["trial_id"], 0), row["created"], row["trial_id"]


def _scope(column: Column, row: Row) -> tuple[Any, ...]:
    protocol = "base_to_new" if row["kind"] in ("base", "new") else "all_to_all"
    return (column.name, *(protocol if name == "protocol" else row[name] for name in column.scope))


def _is_filled(column: Column, row: Row) -> bool:
    return row["status"] in FINISHED or column.name not in AT_THE_END


def _current(ordered: Sequence[Row]) -> dict[tuple[Any, ...], Any]:
    """Return the value of the newest row by column and scope."""
    return {_scope(c, row): row[c.name] for row in ordered for c in IDENTITY if _is_filled(c, row)}


def _differing(row: Row, current: Mapping[tuple[Any, ...], Any], kept: set[str]) -> Iterator[Column]:
    for column in IDENTITY:
        if not _is_filled(column, row) or (column.name in CODE and row["trial_id"] in kept):
            continue
        if row[column.name] != current[_scope(column, row)]:
            yield column


def _cell(row: Row) -> tuple[Any, ...]:
    unused = (*FIT_SETTINGS, "hparams") if row["method"] in FREE else ()
    return tuple(row[name] for name in _CELL if name not in unused)


def _reason(row: Row, differing: Sequence[Column], current: Mapping[tuple[Any, ...], Any]) -> str:
    """Describe how a row differs, e.g. "different template ('an icon of a {}', now 'a drawing of a {}')"."""
    other, unknown = [], []
    for column in differing:
        now = current[_scope(column, row)]
        if row[column.name] == "" and column.name.endswith("_digest") and column.name != "templates_digest":
            unknown.append(column.text)
        elif column.name == "template":
            other.append(f"{column.text} ('{plain(row['template'], 50)}', now '{plain(now, 50)}')")
        else:
            other.append(column.text)
    parts = [f"different {', '.join(other)}"] if other else []
    parts += [f"not recorded: {', '.join(unknown)}"] if unknown else []
    return "; ".join(parts)


def _left_out(ordered: Sequence[Row], reasons: Mapping[int, str], shown: set[tuple[Any, ...]]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for i, reason in reasons.items():
        groups[ordered[i]["dataset"], reason].append(ordered[i])
    for (dataset, reason), rows in groups.items():
        methods = listed(sorted({row["method"] for row in rows}))
        lacking = sum(_cell(row) not in shown for row in rows)
        verb = "has" if lacking == 1 else "have"
        again = (
            f"; {lacking:,} of them {verb} no current result: run the same command to measure them" if lacking else ""
        )
        yield f"left out: {_rows(len(rows))} of {dataset} ({methods}): {reason}{again}"


def _unfinished(runs: RunRecord, have_rows: set[str]) -> Iterator[str]:
    waiting = sum(trial_id not in have_rows for trial_id in runs.last)
    if waiting:
        verb = "have" if waiting > 1 else "has"
        yield f"{waiting:,} trial{'s' * (waiting > 1)} of the last run {verb} no result yet: run the same command again"


def _environments(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line if the scored rows come from several machines or versions of torch."""
    mixed = []
    for column, text in ENVIRONMENT.items():
        scored = (str(row[column]) for row in rows if row["accuracy"] is not None)
        counts = Counter(sorted(value for value in scored if value))
        if len(counts) > 1:
            values = [f"{value} ({_rows(count)})" for value, count in counts.most_common()]
            mixed.append(f"{text} {listed(values)}")
    if mixed:
        yield f"mixed environments (rounding may differ between rows): {'; '.join(mixed)}"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
