"""Mirror the rows of a sweep to MLflow, which is imported lazily, as that takes seconds.

The experiment has one run per trial, written in batches by one process, one per mean of a method, and one with the
leaderboard's files; the tag `farebox.kind` tells which. Results are never read back from MLflow. A run is found by its
tag `farebox.trial_id`. It is kept if its tag `farebox.digest` matches, else replaced; the digest is set last, so an
incomplete run has none. Every failure of MLflow is a TrackingError, which a sweep survives. `Mirror.sync` rebuilds the
mirror.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import TrackingError
from pipeline.files import strict_json
from pipeline.results.row import FINISHED, ResultRow
from pipeline.results.store import ResultStore
from pipeline.results.tracking_names import (
    LONGEST_NAME,
    bill_of,
    description_of,
    fit_value,
    main_means,
    means_of,
    metrics_of,
    milliseconds,
    name_of,
    params_of,
    system_of,
    table_of,
    table_tag,
)
from pipeline.results.tracking_store import (
    digest_of,
    git_tags,
    is_gone,
    log_files,
    mapped,
    one_transaction,
    open_client,
    refused,
    remove_files,
    rows_digest,
)
from pipeline.results.tracking_views import MAIN, SHARED, VIEWS, experiment_note
from pipeline.source_code import code_digest

TRIAL, DIGEST, ROOT, KIND = "farebox.trial_id", "farebox.digest", "farebox.root", "farebox.kind"
OWNER = "farebox.storage"
TABLE, BILL = "leaderboard_table.json", "bill.json"
BATCH = 32
"""Maximum number of trials that one transaction writes."""
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
        digests = {trial: run.digest for trial, run in self._known.items()}
        return [trial for trial, rows in trials.items() if digests.get(trial) != rows_digest(rows)]

    def mirror(self, rows: Sequence[ResultRow], files: Sequence[Path] = ()) -> bool:
        """Mirror the rows of one trial (the source test set first) and its files; return False if it is mirrored."""
        return self.mirror_all([(rows, lambda: files)]) == 1

    def mirror_all(self, trials: Sequence[tuple[Sequence[ResultRow], Callable[[], Sequence[Path]]]]) -> int:
        """Mirror trials as `mirror` does, in one batch: all or none. Return how many were not mirrored before."""
        digests = [rows_digest(rows) for rows, _ in trials]
        old = [self._known.get(rows[0].trial_id, _Run("", "")) for rows, _ in trials]
        new = [i for i, digest in enumerate(digests) if old[i].digest != digest]
        if not new:
            return 0
        run_ids = list[str]()
        try:
            with mapped(f"trial {trials[new[0]][0][0].trial_id} was not mirrored to MLflow"):
                with one_transaction(self.client):
                    writing = [self._write(*trials[i], digests[i]) for i in new]
                    run_ids += [next(run) for run in writing]
                with one_transaction(self.client):
                    for run in writing:
                        next(run, None)
                for i in new:
                    self._known[trials[i][0][0].trial_id] = _Run(run_ids.pop(0), digests[i])
                for i in new:
                    if old[i].run_id:  # only now: a crash leaves both, and the next load keeps the one with a digest
                        self._delete(old[i].run_id)
        except TrackingError:
            with contextlib.suppress(Exception):
                for run_id in run_ids if len(new) > 1 else ():  # not complete; their trials are tried one by one
                    self._delete(run_id)
            raise
        return len(new)

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
                remove_files(self.client, run_id)
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

        known, means, main = self._load("mean"), means_of(summary), main_means(summary)
        for name, (metrics, params) in means.items():
            is_main = str(name in main).lower()
            digest = digest_of([metrics, params, is_main])
            if name in known and known[name].digest == digest:
                continue
            tags = {KIND: "mean", MAIN: is_main, TRIAL: name, "mlflow.note.content": "Mean over data sets and seeds."}
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
            progress: Called with the numbers of mirrored and of missing trials after each batch of missing ones.
        """
        trials = store.trials()
        missing = self.missing(trials)
        problems, consecutive, number = list[str](), 0, 0
        batches = [missing[i : i + BATCH] for i in range(0, len(missing), BATCH)]
        while batches:
            some = batches.pop(0)
            try:
                self.mirror_all([(trials[t], partial(store.prediction_files, trials[t])) for t in some])
                consecutive = 0
            except TrackingError as error:
                consecutive += not refused(error)
                if consecutive == PATIENCE:
                    raise
                if len(some) > 1:
                    batches = [[trial_id] for trial_id in some] + batches
                    continue
                problems.append(str(error))
            number += len(some)
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

    def _write(self, rows: Sequence[ResultRow], files: Callable[[], Sequence[Path]], digest: str) -> Iterator[str]:
        """Create the run of a trial and yield its id; when continued, write its content, the digest last."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        source = rows[0]
        end = milliseconds(source.created)
        tags = {TRIAL: source.trial_id, KIND: "trial", "mlflow.note.content": description_of(rows)}
        commit = git_tags() if source.code_digest == code_digest() else {}  # else other code ran the trial
        tags |= system_of(source) | commit | {"mlflow.loggedArtifacts": table_tag(BILL)}
        run = self._create(name_of(source), tags, end - int(1000 * (source.seconds or 0)))
        yield (run_id := str(run.info.run_id))
        contents = {"rows.json": [asdict(row) for row in rows], "config.json": json.loads(source.config)}
        log_files(self.client, run, self.local, contents | {BILL: bill_of(source)}, files())
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

    def _delete(self, run_id: str) -> None:
        remove_files(self.client, run_id)
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
