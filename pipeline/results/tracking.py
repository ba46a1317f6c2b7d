"""Mirror the rows of a sweep to MLflow, which is imported lazily, as that takes seconds.

The experiment has one run per trial, written in one batch by one process, one per mean of a method, and one with the
leaderboard's files; the tag `farebox.kind` tells which. Results are never read back from MLflow. A run is found by its
tag `farebox.trial_id`. It is kept if its tag `farebox.digest` matches, else replaced; the digest is set last, so an
incomplete run has none. Every failure of MLflow is a TrackingError, which a sweep survives. `Mirror.sync` rebuilds the
mirror.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from pipeline.errors import TrackingError
from pipeline.files import strict_json
from pipeline.results.row import FINISHED, ResultRow
from pipeline.results.store import ResultStore
from pipeline.results.tracking_names import (
    LONGEST_NAME,
    bill_of,
    description_of,
    fit_value,
    means_of,
    metrics_of,
    milliseconds,
    name_of,
    params_of,
    system_of,
    table_of,
    table_tag,
)
from pipeline.results.tracking_store import git_tags, is_gone, mapped, open_client, write_files
from pipeline.results.tracking_views import SHARED, VIEWS, experiment_note
from pipeline.source_code import code_digest

TRIAL, DIGEST, ROOT, KIND = "farebox.trial_id", "farebox.digest", "farebox.root", "farebox.kind"
OWNER = "farebox.storage"
TABLE, BILL = "leaderboard_table.json", "bill.json"
FORMAT = 2
"""Version of what a run contains; runs of another version are replaced."""
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

    def __init__(self, tracking_uri: str, artifact_root: Path, experiment: str, storage_id: str = "") -> None:
        self.root, self.experiment = Path(artifact_root).absolute(), fit_value(experiment, LONGEST_NAME)
        self.owner = f"{storage_id} {self.root.parent}".strip()
        own = tracking_uri.startswith("sqlite:///") and Path(tracking_uri[10:]).parent == self.root.parent
        with mapped(f"MLflow at {tracking_uri} cannot be opened"):
            self.client = open_client(tracking_uri)
            self.local = not tracking_uri.startswith(("http://", "https://", "databricks"))
            self.experiment_id = self._open(self.root.as_uri() if self.local else None, own)
            self._known = self._load("trial")

    def missing(self, trials: Mapping[str, Sequence[ResultRow]]) -> list[str]:
        """Return the ids of the trials without a run, or with one of other rows."""
        return [t for t, rows in trials.items() if t not in self._known or self._known[t].digest != _digest(rows)]

    def mirror(self, rows: Sequence[ResultRow], files: Sequence[Path] = ()) -> bool:
        """Mirror the rows of one trial (the source test set first) and its files; return False if it is mirrored."""
        return self._mirror(rows, _digest(rows), lambda: files)

    def _mirror(self, rows: Sequence[ResultRow], digest: str, files: Callable[[], Sequence[Path]]) -> bool:
        trial_id = rows[0].trial_id
        old = self._known.get(trial_id)
        if old is not None and old.digest == digest:
            return False
        with mapped(f"trial {trial_id} was not mirrored to MLflow"):
            self._known[trial_id] = _Run(self._write(rows, files(), digest), digest)
            if old is not None:  # only now: a crash leaves both, and the next load keeps the one with a digest
                self._delete(old.run_id)
        return True

    def log_report(
        self, folder: Path, board: list[dict[str, Any]], summary: Sequence[dict[str, Any]] = (), digest: str = ""
    ) -> str:
        """Replace the files of the experiment's leaderboard run by a report, and return the id of the run.

        Args:
            folder: The files of the report.
            board: Records of the leaderboard, which MLflow shows as a table.
            summary: The same averaged over data sets; each mean becomes a run.
            digest: Digest of the report, which `has_report` recognizes.
        """
        with mapped("the leaderboard was not mirrored to MLflow"):
            run_id = self._report_run()
            if run_id:
                self._clear(run_id)
            else:
                run_id = self._create("leaderboard", {KIND: "leaderboard"}).info.run_id
            self.client.log_artifacts(run_id, str(folder))
            if board:
                self.client.log_dict(run_id, table_of(board), TABLE)
                self.client.set_tag(run_id, "mlflow.loggedArtifacts", table_tag(TABLE))
            self._mirror_means(summary)
            self.client.set_terminated(run_id)
            self.write_views(run_id)
            self.client.set_tag(run_id, DIGEST, digest)
        return str(run_id)

    def has_report(self, digest: str) -> bool:
        """Return whether the report with this digest is the mirrored one."""
        with mapped("the leaderboard in MLflow cannot be read"):
            runs = self._search("leaderboard")
        return bool(digest) and any(run.data.tags.get(DIGEST) == digest for run in runs)

    def _report_run(self) -> str:
        runs = self._search("leaderboard")
        return str(runs[0].info.run_id) if runs else ""

    def _mirror_means(self, summary: Sequence[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        known, means = self._load("mean"), means_of(summary)
        for name, (metrics, params) in means.items():
            digest = _digest_of([metrics, params])
            if name in known and known[name].digest == digest:
                continue
            tags = {KIND: "mean", TRIAL: name, "mlflow.note.content": "Mean over data sets and seeds."}
            run_id = self._create(name, tags).info.run_id
            now = int(1000 * time.time())
            values = [Metric(key, value, now, 0) for key, value in metrics.items()]
            texts = [Param(key, value) for key, value in params.items()]
            self.client.log_batch(run_id, values, texts, [RunTag(DIGEST, digest)])
            self.client.set_terminated(run_id)
            if name in known:
                self._delete(known[name].run_id)
        for name in known.keys() - means.keys():
            self._delete(known[name].run_id)

    def sync(self, store: ResultStore, progress: Callable[[int, int], None] = lambda done, total: None) -> Synced:
        """Make the mirror equal to the rows of a store.

        A trial that MLflow refuses is named, and the others are mirrored. `PATIENCE` consecutive failures for another
        reason (no connection, a full disk) end the attempt. Damaged files are not mirrored; a trial with damaged rows
        keeps its run (see `store.damaged`).

        Args:
            store: The store.
            progress: Called with the numbers of mirrored and of missing trials after each trial that was missing.
        """
        trials = store.trials()
        missing = self.missing(trials)
        problems, consecutive = list[str](), 0
        for number, trial_id in enumerate(missing, 1):
            try:
                of_trial = trials[trial_id]
                self._mirror(of_trial, _digest(of_trial), partial(store.prediction_files, of_trial))
                consecutive = 0
            except TrackingError as error:
                problems.append(str(error))
                consecutive += not _refused(error)
                if consecutive == PATIENCE:
                    raise
            progress(number, len(missing))
        damaged = {damage.trial_id for damage in store.damaged.values()}
        with mapped("runs of removed trials were not removed from MLflow"):
            for trial_id in self._known.keys() - trials.keys() - damaged:
                self._delete(self._known.pop(trial_id).run_id)
        return Synced(len(trials) - len(problems), problems)

    def _open(self, location: str | None, own: bool) -> str:
        """Return the id of this storage's experiment; create it if needed.

        An experiment belongs to one storage, which its tag `farebox.storage` names. In an MLflow store that several
        storages share, the name of a further experiment includes the storage's folder, or its id as well. MLflow fixes
        the artifact folder of an experiment when it is created: one whose folder is gone, or is elsewhere although the
        MLflow store is in this storage, is renamed, as the storage was moved or copied.
        """
        plain = self.experiment
        for name in (plain, f"{plain} in {self.root.parent}", f"{plain} of {self.owner}"):
            self.experiment = fit_value(name, LONGEST_NAME)
            old = self._find()
            if old is None:
                break
            here = location in (None, old.artifact_location)
            if here and (own or old.tags.get(OWNER, self.owner) == self.owner):
                self.client.set_experiment_tag(old.experiment_id, OWNER, self.owner)
                return str(old.experiment_id)
            if own or (not here and is_gone(old.artifact_location)):
                self.client.rename_experiment(old.experiment_id, f"{self.experiment} (moved, {old.experiment_id})")
                self.client.delete_experiment(old.experiment_id)
                break
        else:
            raise TrackingError(f"experiment {self.experiment} belongs to another storage")
        self.root.mkdir(parents=True, exist_ok=True)
        experiment_id = str(self.client.create_experiment(self.experiment, artifact_location=location))
        for key, value in ((OWNER, self.owner), ("mlflow.experimentKind", "custom_model_development")):
            self.client.set_experiment_tag(experiment_id, key, value)
        return experiment_id

    def _find(self) -> Any:
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        return experiment

    def _search(self, kind: str) -> list[Any]:
        runs, token = [], None
        query = f"tags.`{KIND}` = '{kind}'"
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            runs += [run for run in page if run.data.tags.get(ROOT) == str(self.root)]
            token = page.token
            if not token:
                return runs

    def _load(self, kind: str) -> dict[str, _Run]:
        known: dict[str, _Run] = {}
        for run in self._search(kind):
            mine = _Run(run.info.run_id, run.data.tags.get(DIGEST, ""))
            other = known.get(run.data.tags[TRIAL])
            if other is not None:  # a crash between a new run and the removal of the old one
                worse, mine = sorted((other, mine), key=lambda r: bool(r.digest))
                self._delete(worse.run_id)
            known[run.data.tags[TRIAL]] = mine
        return known

    def _create(self, name: str, tags: dict[str, str], start: int | None = None) -> Any:
        common = {ROOT: str(self.root), "mlflow.source.name": "farebox"}
        return self.client.create_run(self.experiment_id, start_time=start, tags=common | tags, run_name=name)

    def _write(self, rows: Sequence[ResultRow], files: Sequence[Path], digest: str) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        source = rows[0]
        end = milliseconds(source.created)
        tags = {TRIAL: source.trial_id, KIND: "trial", "mlflow.note.content": description_of(rows)}
        tags |= system_of(source) | _commit(source) | {"mlflow.loggedArtifacts": table_tag(BILL)}
        run = self._create(name_of(source), tags, end - int(1000 * (source.seconds or 0)))
        run_id = str(run.info.run_id)
        self._log_files(run, rows, files)
        metrics = [Metric(key, value, end, step) for key, value, step in metrics_of(rows)]
        params = [Param(key, value) for key, value in params_of(source).items()]
        data = Dataset(fit_value(source.dataset, LONGEST_NAME), source.split_digest[:36], "farebox", "{}")
        inputs = [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
        self.client.log_inputs(run_id, inputs)
        while len(metrics) > 800 or len(params) > 100:  # what one call of MLflow takes: 1,000 with params and tags
            self.client.log_batch(run_id, metrics[:800], params[:100], [])
            metrics, params = metrics[800:], params[100:]
        self.client.log_batch(run_id, metrics, params, [RunTag(DIGEST, digest)])
        self.client.set_terminated(run_id, "FINISHED" if source.status in FINISHED else "FAILED", end)
        return run_id

    def _log_files(self, run: Any, rows: Sequence[ResultRow], files: Sequence[Path]) -> None:
        """Write the artifacts of a trial's run: into its folder, or through one folder of a server's upload."""
        contents = {"rows.json": [asdict(row) for row in rows], "config.json": json.loads(rows[0].config)}
        contents[BILL] = bill_of(rows[0])
        place = urlparse(run.info.artifact_uri)
        if self.local and place.scheme == "file":
            write_files(Path(unquote(place.path)), contents, files)
            return
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), contents, files)
            self.client.log_artifacts(run.info.run_id, folder)

    def _clear(self, run_id: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with contextlib.suppress(NotImplementedError):  # a remote store that only overwrites
            get_artifact_repository(self.client.get_run(run_id).info.artifact_uri).delete_artifacts()

    def _delete(self, run_id: str) -> None:
        self._clear(run_id)
        self.client.delete_run(run_id)

    def write_views(self, run_id: str = "") -> None:
        """Write the experiment's description and the views of MLflow's pages that it links to."""
        run_id = run_id or self._report_run()
        note = experiment_note(self.experiment, self.experiment_id, run_id)
        with mapped("the views were not written to MLflow"):
            self.client.set_experiment_tag(self.experiment_id, "mlflow.note.content", note)
        for name, view in VIEWS.items():
            with contextlib.suppress(Exception):
                self.client.set_experiment_tag(self.experiment_id, SHARED + name, strict_json(view))


def _commit(row: ResultRow) -> dict[str, str]:
    """Return tags with the git commit of a trial, if the present code is the code that ran it."""
    return git_tags() if row.code_digest == code_digest() else {}


def _refused(error: TrackingError) -> bool:
    """Return whether MLflow or this module refused the content of one trial, rather than MLflow not working."""
    return error.__cause__ is None or getattr(error.__cause__, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _digest(rows: Sequence[ResultRow]) -> str:
    return _digest_of([asdict(row) for row in rows])


def _digest_of(content: Any) -> str:
    return hashlib.sha256(f"{FORMAT} {strict_json(content, sort_keys=True)}".encode()).hexdigest()
