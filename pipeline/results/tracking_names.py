"""Convert rows to metrics, params and a table that every MLflow store accepts, and the columns that its pages show.

MLflow allows letters, digits and `_-. :/` in keys, 250 characters in a key and about 6,000 in a value. Names of data
sets and notes of methods may contain anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from pipeline.budget import UNITS, Phase
from pipeline.files import strict_json
from pipeline.results.row import ResultRow

PARAMS = (
    *("method", "dataset", "shots", "seed", "model", "access", "status", "budget_requests", "budget_images", "views"),
    *("validation", "hparams", "precision", "base_method", "method_version", "split_digest", "model_digest"),
    *("template", "templates_digest", "classnames_digest", "data_digest", "test_digest", "augment"),
    *("transform", "code_digest", "method_digest"),
)
MAIN = ("accuracy", "macro_accuracy", "nll", "ece")
METRICS = (*MAIN, *UNITS, "paper_queries", "labels_used", "seconds", "trainable_params", "client_bytes")
FIRST = ("label", "test_set", "accuracy", "gain_zero_shot", "gain_logit_head", "shots", "rank", "requests", "images")
VIEW = {
    "orderByKey": "metrics.`accuracy`",
    "orderByAsc": False,
    "searchFilter": "",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "startTime": "ALL",
    "viewMaximized": True,
    "selectedColumns": [
        *("metrics.`accuracy`", "metrics.`requests`", "metrics.`images`", "params.`method`", "params.`dataset`"),
        *("params.`shots`", "params.`seed`", "params.`access`", "params.`status`"),
    ],
}
"""A list of runs with columns, for `?viewStateShareKey=leaderboard`, in an internal format of MLflow."""
LONGEST_NAME, LONGEST_PART, LONGEST_VALUE = 250, 150, 5000
"""Maximum number of characters of a run's name, of a part of a key, and of a value."""


def fit_key(*parts: str) -> str:
    """Return the key of a metric or param from its parts.

    Characters other than letters, digits and `_-. :` are replaced. A part that changes, or is cut, ends in a digest of
    the original, so that different names stay different.
    """
    fitted = []
    for part in parts:
        kept = re.sub(r"[^\w.\- :]", "_", part)[:LONGEST_PART]
        if kept != part or not part.strip(". "):
            kept = f"{kept.strip('. ')}-{hashlib.sha256(part.encode(errors='replace')).hexdigest()[:8]}"
        fitted.append(kept)
    return "/".join(fitted)


def fit_value(text: str, longest: int = LONGEST_VALUE) -> str:
    """Return the value of a param, tag or name without control characters and lone surrogates, and cut to `longest`."""
    safe = "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
    return safe if len(safe) <= longest else safe[: longest - 1] + "…"


def metrics_of(rows: Sequence[ResultRow]) -> Iterator[tuple[str, float, int]]:
    """Yield (key, value, step) of each metric of a trial."""
    source = rows[0]
    columns = {name: name for name in METRICS}
    columns |= {f"bill/{p}_{u}": f"{p}_{u}" for p in Phase for u in UNITS}
    for key, column in columns.items():
        if (value := getattr(source, column)) is not None:
            yield key, round(float(value), 3), 0  # MLflow shows all digits; the rows have full precision
    for row in rows[1:]:
        for name in MAIN:
            if (value := getattr(row, name)) is not None:
                yield f"{fit_key(row.kind, row.test_set)}/{name}", round(float(value), 3), 0
    for requests, images, accuracy in json.loads(source.curve):
        yield "curve/accuracy", float(accuracy), int(requests)
        yield "curve/images", float(images), int(requests)


def params_of(row: ResultRow) -> dict[str, str]:
    """Return the params of a trial by key, without empty ones."""
    values = {name: getattr(row, name) for name in PARAMS}
    for group, column in (("config", row.config), ("notes", row.notes)):
        for name, value in json.loads(column).items():
            values[fit_key(f"{group}.{name}")] = value if isinstance(value, str) else strict_json(value)
    return {key: fit_value(str(value)) for key, value in values.items() if value not in (None, "")}


def table_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the leaderboard in the format of MLflow's `log_table`, rounded, with the main columns first."""
    names = [*FIRST, *(n for n in records[0] if n not in FIRST)]
    return {
        "columns": names,
        "data": [[round(v, 2) if isinstance(v := r[n], float) else v for n in names] for r in records],
    }


def milliseconds(created: str) -> int:
    """Return the time of creation in milliseconds since 1970; 0 if it is unknown."""
    return int(1000 * datetime.fromisoformat(created).timestamp()) if created else 0
