"""Convert rows to names, metrics, params, tags and tables that every MLflow store accepts.

MLflow allows letters, digits and `_-. :/` in keys, 250 characters in a key and about 6,000 in a value. Names of data
sets and notes of methods may contain anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from pipeline.budget import UNITS, Phase
from pipeline.files import strict_json
from pipeline.results.comparison import FULL, answers_order
from pipeline.results.row import STATUSES, ResultRow
from pipeline.results.tables import limits

FIRST_PARAMS = ("dataset", "method", "seed", "shots")
"""Params under their plain names. MLflow sorts params by name: the others start with `trial/`, and so stand below."""
PARAMS = (
    *("model", "access", "status", "budget_requests", "budget_images", "answers", "views", "validation", "hparams"),
    *("precision", "base_method", "method_version", "split_digest", "draw", "model_digest", "template"),
    *("templates_digest", "classnames_digest", "data_digest", "test_digest", "augment", "transform", "code_digest"),
    *("method_digest", "chosen"),
)
SYSTEM = ("cpu", "device", "threads", "torch_version", "python_version", "farebox_version")
"""Columns that describe the machine and its software: tags, as they are no setting of the trial."""
MAIN = ("accuracy", "macro_accuracy", "nll", "ece")
COSTS = ("requests", "images", "paper_queries", "labels_used", "seconds", "trainable_params")
METRICS = (*MAIN, *COSTS)
FIRST = ("label", "test_set", "accuracy", "gain_zero_shot", "gain_logit_head", "shots", "rank", "requests", "images")
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
    """Yield (key, value, step) of each metric of a trial. The step of a curve is the number of requests."""
    source = rows[0]
    for name in METRICS:
        if (value := getattr(source, name)) is not None:
            yield name, round(float(value), 3), 0  # MLflow shows all digits; the rows have full precision
    for row in rows[1:]:
        for name in MAIN:
            if (value := getattr(row, name)) is not None:
                yield f"{fit_key(row.kind, row.test_set)}/{name}", round(float(value), 3), 0
    for requests, images, accuracy in json.loads(source.curve):
        yield "curve/accuracy", float(accuracy), int(requests)
        yield "curve/images", float(images), int(requests)


def params_of(row: ResultRow) -> dict[str, str]:
    """Return the params of a trial by key, without empty ones."""
    values = {name: getattr(row, name) for name in FIRST_PARAMS}
    values |= {f"trial/{name}": getattr(row, name) for name in PARAMS}
    for group, column in (("config", row.config), ("notes", row.notes)):
        for name, value in json.loads(column).items():
            values[fit_key("trial", f"{group}.{name}")] = value if isinstance(value, str) else strict_json(value)
    return _texts(values)


def system_of(row: ResultRow) -> dict[str, str]:
    """Return tags with the machine and the versions of a trial."""
    return _texts({f"system.{name.removesuffix('_version')}": getattr(row, name) for name in SYSTEM})


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: fit_value(str(value)) for key, value in values.items() if value not in (None, "")}


def bill_of(row: ResultRow) -> dict[str, Any]:
    """Return the bill of a trial by phase, in the format of MLflow's `log_table`."""
    data = [[phase.value, *(getattr(row, f"{phase}_{unit}") for unit in UNITS)] for phase in Phase]
    return {"columns": ["phase", *UNITS], "data": [*data, ["paid", *(getattr(row, u) for u in UNITS)]]}


def name_of(row: ResultRow) -> str:
    """Return the name of a trial's run. Trials of one sweep that differ in method, task or budget differ in it."""
    limits = _limits(row.budget_requests, row.budget_images)
    more = [] if row.hparams == "default" else [row.hparams]
    limits += _degraded(row.answers)
    parts = [row.method, row.dataset, f"{row.shots}shot", f"s{row.seed}", *more, *limits]
    return fit_value("-".join(parts), LONGEST_NAME)


def mean_name(record: Mapping[str, Any]) -> str:
    """Return the name of the run with the means of a method over data sets and seeds."""
    limits = [*_limits(record["budget_requests"], record["budget_images"]), *_degraded(record["answers"])]
    parts = [record["label"], "mean", f"{record['shots']}shot", *limits, record["model"], record["precision"]]
    return fit_value("-".join(parts), LONGEST_NAME)


def _limits(requests: int | None, images: int | None) -> list[str]:
    limits = [f"{n}{unit}" for n, unit in ((requests, "requests"), (images, "images")) if n is not None]
    return limits or ["unlimited"]


def _degraded(answers: str) -> list[str]:
    return [answers] if answers != FULL else []


def description_of(rows: Sequence[ResultRow]) -> str:
    """Return the description of a trial's run, in Markdown."""
    source = rows[0]
    lines = [f"`{source.method}` on `{source.dataset}`, {source.shots} shots, seed {source.seed}: {_outcome(source)}"]
    lines += [f"- {row.kind} `{row.test_set}`: {row.accuracy:.1f}%" for row in rows[1:] if row.accuracy is not None]
    lines += ["", f"Trial `{source.trial_id}`. Artifacts: `bill.json` (every phase), `rows.json` (all columns)."]
    if source.error:
        lines += ["", fit_value(source.error, LONGEST_VALUE - 1000)]
    return fit_value("\n".join(lines))


def _outcome(row: ResultRow) -> str:
    paid = f"{row.requests:,} requests and {row.images:,} image rows"
    scored = "not scored" if row.accuracy is None else f"{row.accuracy:.1f}% of {row.n_test or 0:,} test images"
    return f"{scored}, for {paid}. Status: {STATUSES[row.status]}."


def means_of(summary: Sequence[Mapping[str, Any]]) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
    """Return metrics and params of each mean over data sets and seeds, by the name of its run.

    A method has one mean for each combination of shots, allotment and model. Metrics of other kinds of test sets than
    the first are prefixed with the kind. A reference that is listed in several sections is one mean.
    """
    means: dict[str, tuple[dict[str, float], dict[str, str]]] = {}
    for record in summary:
        if record["accuracy"] is None:
            continue
        params = {"dataset": "mean", "method": record["label"], "shots": record["shots"], "seed": "mean"}
        names = ("model", "access", "precision", "budget_requests", "budget_images", "answers", "datasets", "seeds")
        params |= {f"trial/{name}": record[name] for name in names}
        metrics, _ = means.setdefault(mean_name(record), ({}, _texts(params)))
        first = record["kind"] in ("source", "base")
        for name in METRICS if first else MAIN:
            if record[name] is not None:
                metrics.setdefault(name if first else f"{record['kind']}/{name}", round(float(record[name]), 3))
    return means


def main_means(summary: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of the means that are compared at first: most shots, largest allotment, fullest answers."""
    if not summary:
        return set()
    shots = max(r["shots"] for r in summary)
    allotment = max((limits(r) for r in summary), key=lambda of: of.size)
    answers = min((r["answers"] for r in summary), key=answers_order)
    cell = shots, allotment, answers
    return {mean_name(r) for r in summary if (r["shots"], limits(r), r["answers"]) == cell}


def table_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the leaderboard in the format of MLflow's `log_table`, rounded, with the main columns first."""
    names = [*FIRST, *(n for n in records[0] if n not in FIRST)]
    return {
        "columns": names,
        "data": [[round(v, 2) if isinstance(v := r[n], float) else v for n in names] for r in records],
    }


def table_tag(path: str) -> str:
    """Return the value of the tag `mlflow.loggedArtifacts`, with which MLflow shows an artifact as a table."""
    return strict_json([{"path": path, "type": "table"}])


def milliseconds(created: str) -> int:
    """Return the time of creation in milliseconds since 1970; 0 if it is unknown."""
    return int(1000 * datetime.fromisoformat(created).timestamp()) if created else 0
