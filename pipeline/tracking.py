"""The MLflow mirror of the rows, and the only module that imports MLflow (lazily: it takes seconds).

Runs are flat, one for each trial, made by one writer in one batch; one more run of the experiment holds the
leaderboard's files. MLflow is never read back for results: a run is found by its tag `farebox.trial_id`, is left alone
when its tag `farebox.digest` (set last, so a half-written run has none) is that of the rows, and is replaced when it is
not. Whatever MLflow does wrong is a TrackingError, which a sweep survives; `Mirror.sync` rebuilds the mirror.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from pipeline.errors import TrackingError, first_line, masked
from pipeline.finite import strict_json
from pipeline.results import PHASES, UNITS, ResultRow, Store, to_rows

TRIAL, DIGEST, ROOT, KIND = "farebox.trial_id", "farebox.digest", "farebox.root", "farebox.kind"
PARAMS = (
    *("method", "dataset", "shots", "seed", "model", "access", "status", "budget_requests", "budget_images", "views"),
    *("validation", "settings", "precision", "base_method", "method_version", "split_digest", "model_digest"),
)
MAIN = ("accuracy", "macro_accuracy", "nll", "ece")
METRICS = (*MAIN, *UNITS, "papers_count", "labels_used", "seconds", "trainable_params", "client_bytes")
SHOWN = (
    *("metrics.`accuracy`", "metrics.`requests`", "metrics.`images`", "params.`method`", "params.`dataset`"),
    *("params.`shots`", "params.`seed`", "params.`access`", "params.`status`"),
)
TABLE = "leaderboard_table.json"
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
    "selectedColumns": list(SHOWN),
}
"""A list of runs with columns, for `?viewStateShareKey=leaderboard`. MLflow's internal format: never relied on."""


class _Run(NamedTuple):
    run_id: str
    digest: str


class Mirror:
    """One experiment of an MLflow store. Raises TrackingError, and nothing else, when MLflow fails."""

    def __init__(self, tracking_uri: str, artifact_root: Path, experiment: str) -> None:
        self.root, self.experiment = Path(artifact_root).absolute(), experiment
        with _mapped(f"MLflow at {tracking_uri} cannot be opened"):
            self.client = _client(tracking_uri)
            local = not tracking_uri.startswith(("http://", "https://", "databricks"))
            self.experiment_id = self._open(self.root.as_uri() if local else None)
            self._known = self._load()

    def mirror(self, rows: Sequence[ResultRow], files: Sequence[Path] = ()) -> bool:
        """Mirror one trial's rows (the source test set first) and its files; False when they are there already."""
        trial_id, digest = rows[0].trial_id, _digest(rows)
        old = self._known.get(trial_id)
        if old is not None and old.digest == digest:
            return False
        with _mapped(f"trial {trial_id} was not mirrored to MLflow"):
            self._known[trial_id] = _Run(self._write(rows, files, digest), digest)
            if old is not None:  # only now: a crash leaves both, and the next load keeps the one with a digest
                self._delete(old.run_id)
        return True

    def sweep_run(self, folder: Path) -> str:
        """Put the report's files into the experiment's one leaderboard run, in place of the former; the run's id."""
        with _mapped("the leaderboard was not mirrored to MLflow"):
            found = self._search(f"tags.`{KIND}` = 'leaderboard'")
            if found:
                run_id = found[0].info.run_id
                self._clear(run_id)
            else:
                tags = {KIND: "leaderboard", ROOT: str(self.root), "mlflow.source.name": "farebox"}
                run_id = self.client.create_run(self.experiment_id, tags=tags, run_name="leaderboard").info.run_id
            self.client.log_artifacts(run_id, str(folder))
            records = folder / "leaderboard.json"
            if records.exists() and (table := json.loads(records.read_text())):
                self.client.log_dict(run_id, _split(table), TABLE)
                self.client.set_tag(run_id, "mlflow.loggedArtifacts", strict_json([{"path": TABLE, "type": "table"}]))
            self.client.set_terminated(run_id)
            self._signpost(run_id)
        return str(run_id)

    def sync(self, store: Store) -> int:
        """Make the mirror equal to the store's rows, whatever it holds now; how many trials the store has."""
        rows = sorted(to_rows(store.read()), key=lambda r: (r.trial_id, r.test_set != r.dataset, r.test_set))
        trials = {trial_id: list(group) for trial_id, group in groupby(rows, key=lambda r: r.trial_id)}
        for of_trial in trials.values():
            files = [store.storage / r.predictions_file for r in of_trial if r.predictions_file]
            self.mirror(of_trial, [f for f in files if f.exists()])
        with _mapped("runs of trials that are gone were not removed from MLflow"):
            for trial_id in self._known.keys() - trials.keys():
                self._delete(self._known.pop(trial_id).run_id)
        return len(trials)

    def _open(self, location: str | None) -> str:
        """The experiment's id. One whose artifact folder is gone (the storage was moved) is set aside for a new one."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        if found is not None and location not in (None, found.artifact_location) and _gone(found.artifact_location):
            self.client.rename_experiment(found.experiment_id, f"{self.experiment} (moved, {found.experiment_id})")
            self.client.delete_experiment(found.experiment_id)
            found = None
        if found is not None:
            return str(found.experiment_id)
        self.root.mkdir(parents=True, exist_ok=True)
        made = str(self.client.create_experiment(self.experiment, artifact_location=location))
        self.client.set_experiment_tag(made, "mlflow.experimentKind", "custom_model_development")
        return made

    def _search(self, query: str) -> list[Any]:
        runs, token = [], None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            runs += [run for run in page if run.data.tags.get(ROOT) == str(self.root)]
            token = page.token
            if not token:
                return runs

    def _load(self) -> dict[str, _Run]:
        known: dict[str, _Run] = {}
        for run in self._search(f"tags.`{KIND}` = 'trial'"):
            mine = _Run(run.info.run_id, run.data.tags.get(DIGEST, ""))
            other = known.get(run.data.tags[TRIAL])
            if other is not None:  # a crash between a new run and the removal of the old one
                worse, mine = sorted((other, mine), key=lambda r: bool(r.digest))
                self._delete(worse.run_id)
            known[run.data.tags[TRIAL]] = mine
        return known

    def _write(self, rows: Sequence[ResultRow], files: Sequence[Path], digest: str) -> str:
        from mlflow.entities import Metric, Param, RunTag

        source = rows[0]
        end = _milliseconds(source.created)
        start = end - int(1000 * (source.seconds or 0))
        name = f"{source.method}-{source.dataset}-{source.shots}shot-s{source.seed}"
        tags = {TRIAL: source.trial_id, KIND: "trial", ROOT: str(self.root), "mlflow.source.name": "farebox"}
        run_id = str(self.client.create_run(self.experiment_id, start_time=start, tags=tags, run_name=name).info.run_id)
        self.client.log_dict(run_id, [asdict(row) for row in rows], "rows.json")
        self.client.log_dict(run_id, json.loads(source.config), "config.json")
        for file in files:
            self.client.log_artifact(run_id, str(file), "predictions")
        metrics = [Metric(key, value, end, step) for key, value, step in _metrics(rows)]
        params = [Param(key, value[:6000]) for key, value in _params(source).items()]
        last = [RunTag(DIGEST, digest), *([RunTag("mlflow.note.content", source.error)] if source.error else [])]
        self.client.log_batch(run_id, metrics[:1000], params[:100], last)
        self.client.set_terminated(run_id, "FINISHED" if source.status in ("done", "truncated") else "FAILED", end)
        return run_id

    def _clear(self, run_id: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with contextlib.suppress(NotImplementedError):  # a remote store that only overwrites
            get_artifact_repository(self.client.get_run(run_id).info.artifact_uri).delete_artifacts()

    def _delete(self, run_id: str) -> None:
        self._clear(run_id)
        self.client.delete_run(run_id)

    def _signpost(self, run_id: str) -> None:
        here = f"#/experiments/{self.experiment_id}"
        note = (
            f"**{self.experiment}**: [the leaderboard, with figures]({here}/runs/{run_id}/artifacts/leaderboard.html), "
            f"[all trials as a table]({here}/runs?viewStateShareKey=leaderboard).\n\n"
            "One run for each trial. This is a mirror: the rows in the sweep's storage are the truth, and "
            "`farebox sync` rebuilds it. Each list of runs starts with its columns hidden; the second link shows them."
        )
        self.client.set_experiment_tag(self.experiment_id, "mlflow.note.content", note)
        with contextlib.suppress(Exception):
            self.client.set_experiment_tag(self.experiment_id, "mlflow.sharedViewState.leaderboard", strict_json(VIEW))


def ui_command(tracking_uri: str, port: int = 5000, host: str = "127.0.0.1") -> tuple[list[str], dict[str, str]]:
    """The command that serves MLflow's pages over this store, and what its environment needs beside ours.

    The store's URI may hold a password: as an argument, every user of the machine could read it.
    """
    _quiet()
    serve = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    return serve, {"MLFLOW_BACKEND_STORE_URI": tracking_uri}


def _quiet() -> None:
    """No telemetry; a remote store that is down is given up in seconds, not minutes. The user's own settings win."""
    words = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    words |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    for key, value in words.items():
        os.environ.setdefault(key, value)


def _client(uri: str) -> Any:
    _quiet()
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a server that is away is told once, as our error
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as db:
            db.execute("pragma journal_mode=wal")  # kept in the file: readers no longer wait for the writer
    return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """MLflow raises its own errors, SQLAlchemy's, requests' and the system's: callers get one."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(masked(f"{what}: {type(error).__name__}: {first_line(error)}")) from error


def _metrics(rows: Sequence[ResultRow]) -> Iterator[tuple[str, float, int]]:
    source = rows[0]
    columns = {name: name for name in METRICS}
    columns |= {f"bill/{p}_{u}": f"{p}_{u}" for p in PHASES for u in UNITS}
    for key, column in columns.items():
        if (value := getattr(source, column)) is not None:
            yield key, round(float(value), 3), 0  # a list of runs shows all digits; the rows have them
    for row in rows[1:]:
        for name in MAIN:
            if (value := getattr(row, name)) is not None:
                yield f"{row.kind}/{row.test_set}/{name}", round(float(value), 3), 0
    for requests, images, accuracy in json.loads(source.curve):
        yield "curve/accuracy", float(accuracy), int(requests)
        yield "curve/images", float(images), int(requests)


def _params(row: ResultRow) -> dict[str, str]:
    found = {name: getattr(row, name) for name in PARAMS} | {
        f"{group}.{key}": value if isinstance(value, str) else strict_json(value)
        for group, said in (("config", row.config), ("notes", row.notes))
        for key, value in json.loads(said).items()
    }
    return {key: str(value) for key, value in found.items() if value not in (None, "")}


def _split(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The leaderboard as MLflow's `log_table` writes it, rounded, the columns that its page shows at once in front."""
    names = [*FIRST, *(n for n in records[0] if n not in FIRST)]
    return {
        "columns": names,
        "data": [[round(v, 2) if isinstance(v := r[n], float) else v for n in names] for r in records],
    }


def _digest(rows: Sequence[ResultRow]) -> str:
    return hashlib.sha256(strict_json([asdict(row) for row in rows], sort_keys=True).encode()).hexdigest()


def _milliseconds(created: str) -> int:
    return int(1000 * datetime.fromisoformat(created).timestamp()) if created else 0


def _gone(location: str) -> bool:
    place = urlparse(location)
    return place.scheme in ("", "file") and not Path(unquote(place.path)).exists()
