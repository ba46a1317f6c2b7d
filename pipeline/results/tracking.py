"""Mirror the rows of a sweep to MLflow. This is the only module that imports MLflow, lazily, as that takes seconds.

The experiment has one run per trial, written in one batch by one process, and one run with the leaderboard's files.
Results are never read back from MLflow. A trial's run is found by its tag `farebox.trial_id`. It is kept if its tag
`farebox.digest` matches the rows, else replaced; the digest is set last, so an incomplete run has none. Every failure
of MLflow is a TrackingError, which a sweep survives. `Mirror.sync` rebuilds the mirror.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from pipeline.errors import TrackingError, first_line, masked
from pipeline.files import json_value, strict_json
from pipeline.results.row import FINISHED, ResultRow, to_rows
from pipeline.results.store import ResultStore
from pipeline.results.tracking_names import (
    LONGEST_NAME,
    VIEW,
    fit_key,
    fit_value,
    metrics_of,
    milliseconds,
    params_of,
    table_of,
)

TRIAL, DIGEST, ROOT, KIND = "farebox.trial_id", "farebox.digest", "farebox.root", "farebox.kind"
TABLE = "leaderboard_table.json"
PATIENCE = 3
"""Consecutive failures of MLflow itself after which `sync` stops."""


class _Run(NamedTuple):
    run_id: str
    digest: str


class Synced(NamedTuple):
    """Outcome of `Mirror.sync`."""

    mirrored: int
    """Number of trials of the store that MLflow now has."""
    problems: list[str]
    """One line for each trial that MLflow does not have."""


class Mirror:
    """One experiment of an MLflow store. All methods raise TrackingError, and nothing else, if MLflow fails."""

    def __init__(self, tracking_uri: str, artifact_root: Path, experiment: str) -> None:
        self.root, self.experiment = Path(artifact_root).absolute(), fit_value(experiment, LONGEST_NAME)
        own = tracking_uri.startswith("sqlite:///") and Path(tracking_uri[10:]).parent == self.root.parent
        with _mapped(f"MLflow at {tracking_uri} cannot be opened"):
            self.client = _client(tracking_uri)
            local = not tracking_uri.startswith(("http://", "https://", "databricks"))
            self.experiment_id = self._open(self.root.as_uri() if local else None, own)
            self._known = self._load()

    def mirror(self, rows: Sequence[ResultRow], files: Sequence[Path] = ()) -> bool:
        """Mirror the rows of one trial (the source test set first) and its files; return False if it is mirrored."""
        return self._mirror(rows, _digest(rows), lambda: files)

    def _mirror(self, rows: Sequence[ResultRow], digest: str, files: Callable[[], Sequence[Path]]) -> bool:
        trial_id = rows[0].trial_id
        old = self._known.get(trial_id)
        if old is not None and old.digest == digest:
            return False
        with _mapped(f"trial {trial_id} was not mirrored to MLflow"):
            self._known[trial_id] = _Run(self._write(rows, files(), digest), digest)
            if old is not None:  # only now: a crash leaves both, and the next load keeps the one with a digest
                self._delete(old.run_id)
        return True

    def log_report(self, folder: Path, board: list[dict[str, Any]]) -> str:
        """Replace the files of the experiment's leaderboard run by a report, and return the id of the run.

        Args:
            folder: The files of the report.
            board: Records of the leaderboard, which MLflow shows as a table.
        """
        with _mapped("the leaderboard was not mirrored to MLflow"):
            runs = self._search(f"tags.`{KIND}` = 'leaderboard'")
            if runs:
                run_id = runs[0].info.run_id
                self._clear(run_id)
            else:
                tags = {KIND: "leaderboard", ROOT: str(self.root), "mlflow.source.name": "farebox"}
                run_id = self.client.create_run(self.experiment_id, tags=tags, run_name="leaderboard").info.run_id
            self.client.log_artifacts(run_id, str(folder))
            if board:
                self.client.log_dict(run_id, table_of(board), TABLE)
                self.client.set_tag(run_id, "mlflow.loggedArtifacts", strict_json([{"path": TABLE, "type": "table"}]))
            self.client.set_terminated(run_id)
            self._write_note(run_id)
        return str(run_id)

    def sync(self, store: ResultStore) -> Synced:
        """Make the mirror equal to the rows of a store.

        A trial that MLflow refuses is named, and the others are mirrored. `PATIENCE` consecutive failures for another
        reason (no connection, a full disk) end the attempt. Damaged files are not mirrored; a trial with damaged rows
        keeps its run (see `store.damaged`).
        """
        rows = sorted(to_rows(store.read()), key=lambda r: (r.trial_id, r.test_set != r.dataset, r.test_set))
        trials = {trial_id: list(group) for trial_id, group in groupby(rows, key=lambda r: r.trial_id)}
        problems, consecutive = list[str](), 0
        for of_trial in trials.values():
            try:
                if self._mirror(of_trial, _digest(of_trial), partial(store.prediction_files, of_trial)):
                    consecutive = 0
            except TrackingError as error:
                problems.append(str(error))
                consecutive += not _refused(error)
                if consecutive == PATIENCE:
                    raise
        damaged = {damage.trial_id for damage in store.damaged.values()}
        with _mapped("runs of removed trials were not removed from MLflow"):
            for trial_id in self._known.keys() - trials.keys() - damaged:
                self._delete(self._known.pop(trial_id).run_id)
        return Synced(len(trials) - len(problems), problems)

    def _open(self, location: str | None, own: bool) -> str:
        """Return the id of the experiment whose artifacts are in this storage; create it if needed.

        MLflow fixes the artifact folder of an experiment when it is created. An experiment with another folder is
        renamed if that folder is gone, or if the MLflow store belongs to this storage: the storage was moved or copied.
        In an MLflow store that several storages share, the new experiment's name includes this storage's folder.
        """
        old = self._find()
        if old is not None and location not in (None, old.artifact_location):
            if own or _gone(old.artifact_location):
                self.client.rename_experiment(old.experiment_id, f"{self.experiment} (moved, {old.experiment_id})")
                self.client.delete_experiment(old.experiment_id)
                old = None
            else:
                self.experiment = f"{self.experiment} in {self.root.parent}"
                old = self._find()
        if old is not None:
            return str(old.experiment_id)
        self.root.mkdir(parents=True, exist_ok=True)
        experiment_id = str(self.client.create_experiment(self.experiment, artifact_location=location))
        self.client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        return experiment_id

    def _find(self) -> Any:
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        return experiment

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
        self.client.set_terminated(run_id, "FINISHED" if source.status in FINISHED else "FAILED", end)
        return run_id

    def _clear(self, run_id: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with contextlib.suppress(NotImplementedError):  # a remote store that only overwrites
            get_artifact_repository(self.client.get_run(run_id).info.artifact_uri).delete_artifacts()

    def _delete(self, run_id: str) -> None:
        self._clear(run_id)
        self.client.delete_run(run_id)

    def _write_note(self, run_id: str) -> None:
        here = f"#/experiments/{self.experiment_id}"
        note = (
            f"**{self.experiment}**: [the leaderboard, with figures]({here}/runs/{run_id}/artifacts/leaderboard.html), "
            f"[all trials as a table]({here}/runs?viewStateShareKey=leaderboard).\n\n"
            "There is one run per trial. This experiment mirrors the rows in the sweep's storage; `farebox sync` "
            "rebuilds it. MLflow hides the columns of a list of runs at first; the second link shows them."
        )
        self.client.set_experiment_tag(self.experiment_id, "mlflow.note.content", note)
        with contextlib.suppress(Exception):
            self.client.set_experiment_tag(self.experiment_id, "mlflow.sharedViewState.leaderboard", strict_json(VIEW))


@contextlib.contextmanager
def _fit_name(file: Path) -> Iterator[Path]:
    """Yield the file, or a renamed copy if its decoded name contains a path, which artifact servers refuse."""
    name = unquote(file.stem)
    if not set(name) & set("/\\") and name.strip("."):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copy(file, Path(folder) / f"{fit_key(name)}{file.suffix}"))


def ui_command(tracking_uri: str, port: int = 5000, host: str = "127.0.0.1") -> tuple[list[str], dict[str, str]]:
    """Return the command that serves MLflow's pages for a store, and the environment variables to add.

    The URI of the store may contain a password, so it is not an argument, which every user of the machine can read.
    """
    _quiet()
    serve = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    return serve, {"MLFLOW_BACKEND_STORE_URI": tracking_uri}


def _quiet() -> None:
    """Disable telemetry, and shorten the timeouts of remote stores, unless the user set these variables."""
    defaults = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    defaults |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def _client(uri: str) -> Any:
    _quiet()
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # reported once, as a TrackingError
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as db:
            db.execute("pragma journal_mode=wal")  # stored in the file: readers do not wait for the writer
    return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """Convert all errors of MLflow and its libraries to TrackingError."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(masked(f"{what}: {type(error).__name__}: {first_line(error)}")) from error


def _refused(error: TrackingError) -> bool:
    """Return whether MLflow or this module refused the content of one trial, rather than MLflow not working."""
    return error.__cause__ is None or getattr(error.__cause__, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _digest(rows: Sequence[ResultRow]) -> str:
    return hashlib.sha256(strict_json([asdict(row) for row in rows], sort_keys=True).encode()).hexdigest()


def _gone(location: str) -> bool:
    place = urlparse(location)
    return place.scheme in ("", "file") and not Path(unquote(place.path)).exists()
