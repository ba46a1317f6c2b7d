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
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from pipeline.errors import TrackingError, first_line, masked
from pipeline.finite import json_value, strict_json
from pipeline.results import ResultRow, Store, to_rows
from pipeline.tracking_names import LONGEST_NAME, fit_key, fit_value, metrics_of, milliseconds, params_of, table_of

TRIAL, DIGEST, ROOT, KIND = "farebox.trial_id", "farebox.digest", "farebox.root", "farebox.kind"
SHOWN = (
    *("metrics.`accuracy`", "metrics.`requests`", "metrics.`images`", "params.`method`", "params.`dataset`"),
    *("params.`shots`", "params.`seed`", "params.`access`", "params.`status`"),
)
TABLE = "leaderboard_table.json"
PATIENCE = 3
"""Failures in a row, not of a trial's own making, after which `sync` gives up."""
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


class Synced(NamedTuple):
    """What `Mirror.sync` did."""

    mirrored: int
    """Trials of the store that MLflow now holds."""
    problems: list[str]
    """One line for each trial that it does not hold."""


class Mirror:
    """One experiment of an MLflow store. Raises TrackingError, and nothing else, when MLflow fails."""

    def __init__(self, tracking_uri: str, artifact_root: Path, experiment: str) -> None:
        self.root, self.experiment = Path(artifact_root).absolute(), fit_value(experiment, LONGEST_NAME)
        own = tracking_uri.startswith("sqlite:///") and Path(tracking_uri[10:]).parent == self.root.parent
        with _mapped(f"MLflow at {tracking_uri} cannot be opened"):
            self.client = _client(tracking_uri)
            local = not tracking_uri.startswith(("http://", "https://", "databricks"))
            self.experiment_id = self._open(self.root.as_uri() if local else None, own)
            self._known = self._load()

    def mirror(self, rows: Sequence[ResultRow], files: Sequence[Path] = ()) -> bool:
        """Mirror one trial's rows (the source test set first) and its files; False when they are there already."""
        if self._has(rows):
            return False
        trial_id, digest = rows[0].trial_id, _digest(rows)
        old = self._known.get(trial_id)
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
                self.client.log_dict(run_id, table_of(table), TABLE)
                self.client.set_tag(run_id, "mlflow.loggedArtifacts", strict_json([{"path": TABLE, "type": "table"}]))
            self.client.set_terminated(run_id)
            self._signpost(run_id)
        return str(run_id)

    def sync(self, store: Store) -> Synced:
        """Make the mirror equal to the store's rows, whatever it holds now.

        A trial that MLflow refuses is named, and the others are mirrored. `PATIENCE` failures in a row for another
        reason (no connection, a full disk) end the attempt. Damaged files are not mirrored, and a trial whose rows are
        damaged keeps its run; see `store.damaged`.
        """
        rows = sorted(to_rows(store.scan().table), key=lambda r: (r.trial_id, r.test_set != r.dataset, r.test_set))
        trials = {trial_id: list(group) for trial_id, group in groupby(rows, key=lambda r: r.trial_id)}
        problems, in_a_row = list[str](), 0
        for of_trial in trials.values():
            if self._has(of_trial):
                continue
            try:
                self.mirror(of_trial, store.prediction_files(of_trial))
                in_a_row = 0
            except TrackingError as error:
                problems.append(str(error))
                in_a_row += not _refused(error)
                if in_a_row == PATIENCE:
                    raise
        damaged = {damage.trial_id for damage in store.damaged.values()}
        with _mapped("runs of trials that are gone were not removed from MLflow"):
            for trial_id in self._known.keys() - trials.keys() - damaged:
                self._delete(self._known.pop(trial_id).run_id)
        return Synced(len(trials) - len(problems), problems)

    def _has(self, rows: Sequence[ResultRow]) -> bool:
        """Whether these rows of one trial are mirrored."""
        old = self._known.get(rows[0].trial_id)
        return old is not None and old.digest == _digest(rows)

    def _open(self, location: str | None, own: bool) -> str:
        """The experiment's id, whose artifacts are in this storage.

        MLflow fixes the folder of an experiment's artifacts when it is created. One of another folder is set aside when
        that folder is gone or when the MLflow store is the storage's own: the storage was moved or copied. In a store
        that storages share, the experiment gets a name with this storage's folder.
        """
        found = self._find()
        if found is not None and location not in (None, found.artifact_location):
            if own or _gone(found.artifact_location):
                self.client.rename_experiment(found.experiment_id, f"{self.experiment} (moved, {found.experiment_id})")
                self.client.delete_experiment(found.experiment_id)
                found = None
            else:
                self.experiment = f"{self.experiment} in {self.root.parent}"
                found = self._find()
        if found is not None:
            return str(found.experiment_id)
        self.root.mkdir(parents=True, exist_ok=True)
        made = str(self.client.create_experiment(self.experiment, artifact_location=location))
        self.client.set_experiment_tag(made, "mlflow.experimentKind", "custom_model_development")
        return made

    def _find(self) -> Any:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found

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
        end = milliseconds(source.created)
        start = end - int(1000 * (source.seconds or 0))
        name = fit_value(f"{source.method}-{source.dataset}-{source.shots}shot-s{source.seed}", LONGEST_NAME)
        tags = {TRIAL: source.trial_id, KIND: "trial", ROOT: str(self.root), "mlflow.source.name": "farebox"}
        run_id = str(self.client.create_run(self.experiment_id, start_time=start, tags=tags, run_name=name).info.run_id)
        self.client.log_dict(run_id, json_value([asdict(row) for row in rows]), "rows.json")
        self.client.log_dict(run_id, json_value(json.loads(source.config)), "config.json")
        for file in files:
            with _fit_name(file) as fitted:
                self.client.log_artifact(run_id, str(fitted), "predictions")
        metrics = [Metric(key, value, end, step) for key, value, step in metrics_of(rows)]
        params = [Param(key, value) for key, value in params_of(source).items()]
        while len(metrics) > 1000 or len(params) > 100:  # what one call of MLflow takes
            self.client.log_batch(run_id, metrics[:1000], params[:100], [])
            metrics, params = metrics[1000:], params[100:]
        note = [RunTag("mlflow.note.content", fit_value(source.error))] if source.error else []
        self.client.log_batch(run_id, metrics, params, [RunTag(DIGEST, digest), *note])
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


@contextlib.contextmanager
def _fit_name(file: Path) -> Iterator[Path]:
    """The file, or a copy of it where its decoded name holds a path, which a server of artifacts refuses."""
    name = unquote(file.stem)
    if not set(name) & set("/\\") and name.strip("."):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copy(file, Path(folder) / f"{fit_key(name)}{file.suffix}"))


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


def _refused(error: TrackingError) -> bool:
    """Whether MLflow, or this module, refused one trial's content; false when MLflow itself did not work."""
    return error.__cause__ is None or getattr(error.__cause__, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _digest(rows: Sequence[ResultRow]) -> str:
    return hashlib.sha256(strict_json([asdict(row) for row in rows], sort_keys=True).encode()).hexdigest()


def _gone(location: str) -> bool:
    place = urlparse(location)
    return place.scheme in ("", "file") and not Path(unquote(place.path)).exists()
