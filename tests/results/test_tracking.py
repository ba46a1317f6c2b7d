"""The MLflow mirror, read back through MLflow's own client from a real sqlite store."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import webbrowser
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.commands import mirror as mirror_command
from pipeline.config.compose import compose
from pipeline.errors import FareboxError, TrackingError
from pipeline.results import report, tracking
from pipeline.results.report import write_report
from pipeline.results.row import ResultRow, to_rows
from pipeline.results.store import ResultStore
from pipeline.results.tracking import TRIAL, Mirror, Synced
from pipeline.results.tracking_names import main_means, mean_name, name_of
from pipeline.results.tracking_store import ui_command
from pipeline.results.tracking_views import VIEWS
from pipeline.source_code import code_digest
from tests.support.command import free_port
from tests.support.synthetic import make, report_of, sweep, write_store

MakeMirror = Callable[[], Mirror]


@pytest.fixture(scope="session")
def empty_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database: making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("mlflow")
    mirror = Mirror(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts", "template")
    mirror.client.delete_experiment(mirror.experiment_id)
    with sqlite3.connect(folder / "mlflow.db") as db:
        db.execute("pragma wal_checkpoint(truncate)")
    return folder / "mlflow.db"


@pytest.fixture
def opened(tmp_path: Path, empty_db: Path) -> MakeMirror:
    """Opens the mirror of this test's storage; again and again if need be."""
    shutil.copy(empty_db, tmp_path / "mlflow.db")
    return lambda: Mirror(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlflow", "farebox/test")


def runs(mirror: Mirror, query: str = "tags.`farebox.kind` = 'trial'") -> list[Any]:
    return list(mirror.client.search_runs([mirror.experiment_id], query))


def artifacts(mirror: Mirror, run_id: str, path: str = "") -> list[str]:
    return sorted(f.path for f in mirror.client.list_artifacts(run_id, path))


def trial(method: str = "craft") -> list[ResultRow]:
    return next(sweep(methods=(method,), shots=(16,), budgets=((8000, None),)))


def test_a_trial_is_one_finished_flat_run(opened: MakeMirror, tmp_path: Path) -> None:
    mirror, rows = opened(), trial()
    (tmp_path / "icons.arrow").write_bytes(b"predictions")
    assert mirror.mirror(rows, [tmp_path / "icons.arrow"])
    (run,) = runs(mirror)
    assert run.info.status == "FINISHED" and run.info.end_time - run.info.start_time == 12500
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.data.params["method"] == "craft" and run.data.params["trial/config.popsize"] == "20"
    assert run.data.metrics["accuracy"] == pytest.approx(rows[0].accuracy, abs=1e-3)
    assert run.data.metrics["requests"] == rows[0].requests and not any(k.startswith("bill") for k in run.data.metrics)
    assert run.data.metrics["shift/icons_outline/accuracy"] == pytest.approx(rows[1].accuracy, abs=1e-3)
    curve = mirror.client.get_metric_history(run.info.run_id, "curve/accuracy")
    assert [(m.step, m.value) for m in curve] == [(p[0], p[2]) for p in json.loads(rows[0].curve)]
    assert artifacts(mirror, run.info.run_id) == ["bill.json", "config.json", "predictions", "rows.json"]
    assert artifacts(mirror, run.info.run_id, "predictions") == ["predictions/icons.arrow"]
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path)  # not in the folder we are in


def test_new_classes_stand_beside_the_base_classes_of_the_same_run(opened: MakeMirror, tmp_path: Path) -> None:
    base, new = (
        make(method="bbt", kind=kind, test_set=f"icons:{kind}", accuracy=accuracy)
        for kind, accuracy in (("base", 70.0), ("new", 40.0))
    )
    (tmp_path / "icons%3Anew.arrow").write_bytes(b"predictions")
    mirror = opened()
    assert mirror.mirror([base, new], [tmp_path / "icons%3Anew.arrow"])
    (run,) = runs(mirror)
    assert run.data.metrics["accuracy"] == 70.0 and run.data.metrics["new/icons:new/accuracy"] == 40.0
    assert artifacts(mirror, run.info.run_id, "predictions") == ["predictions/icons%3Anew.arrow"]


def test_the_same_rows_again_change_nothing_and_other_rows_replace_the_run(opened: MakeMirror) -> None:
    mirror, rows = opened(), trial()
    mirror.mirror(rows)
    (first,) = runs(mirror)
    assert not mirror.mirror(rows) and not opened().mirror(rows)
    assert opened().mirror([replace(rows[0], accuracy=1.0), *rows[1:]])
    (second,) = runs(mirror)
    assert second.info.run_id != first.info.run_id and second.data.metrics["accuracy"] == 1.0


def test_a_run_left_half_written_is_replaced(opened: MakeMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, rows = opened(), trial()

    def die(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(mirror.client, "log_batch", die)
    with pytest.raises(TrackingError, match=f"trial {rows[0].trial_id} was not mirrored to MLflow: OSError: disk full"):
        mirror.mirror(rows)
    assert len(runs(mirror)) == 1
    assert opened().mirror(rows)
    (run,) = runs(opened())
    assert run.data.metrics["accuracy"] == pytest.approx(rows[0].accuracy, abs=1e-3)


def test_failed_and_unfunded_trials_are_runs_too(opened: MakeMirror) -> None:
    mirror = opened()
    mirror.mirror([make(status="failed", error="EndpointLost: replica 1 died")])
    mirror.mirror([make(seed=2, status="unfunded")])
    mirror.mirror([make(seed=3, status="budget_exhausted", accuracy=30.0)])
    assert sorted((r.info.status, r.data.params["trial/status"]) for r in runs(mirror)) == [
        ("FAILED", "failed"),
        ("FAILED", "unfunded"),
        ("FINISHED", "budget_exhausted"),
    ]


def test_sync_makes_the_mirror_equal_to_the_store(opened: MakeMirror, tmp_path: Path) -> None:
    store = write_store(tmp_path, methods=("zero_shot", "craft"), shots=(16,), seeds=(1, 2), budgets=((8000, None),))
    mirror = opened()
    mirror.mirror([make(trial_id="gone")])
    assert mirror.sync(store) == Synced(12, [])
    assert {r.data.tags["farebox.trial_id"] for r in runs(mirror)} == set(store.finished())
    by_id = {r.data.tags["farebox.trial_id"]: r.info.run_id for r in runs(mirror)}
    shifted = trial("craft")[0].trial_id
    assert len(artifacts(mirror, by_id[shifted], "predictions")) == 2
    assert opened().sync(store) == Synced(12, [])
    assert {r.info.run_id for r in runs(mirror)} == set(by_id.values())


def test_sync_leaves_damaged_files_out_and_keeps_the_run_of_damaged_rows(opened: MakeMirror, tmp_path: Path) -> None:
    store = write_store(tmp_path, methods=("zero_shot", "craft"), shots=(16,), seeds=(1,), budgets=((8000, None),))
    rows = to_rows(store.read())
    shifted, digits = (next(r for r in rows if (r.method, r.dataset) == ("craft", d)) for d in ("icons", "digits"))
    path = store.predictions_path(shifted.trial_id, "icons")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    mirror = opened()
    assert mirror.sync(store).mirrored == 6
    by_id = {r.data.tags["farebox.trial_id"]: r.info.run_id for r in runs(mirror)}
    assert artifacts(mirror, by_id[shifted.trial_id], "predictions") == ["predictions/icons_outline.arrow"]
    (store.results / f"{digits.trial_id}.arrow").write_bytes(b"damage")
    assert mirror.sync(store).mirrored == 5
    assert {r.info.run_id for r in runs(mirror)} == set(by_id.values())
    assert {d.trial_id for d in store.damaged.values()} == {shifted.trial_id, digits.trial_id}


def test_the_leaderboard_is_one_run_whose_files_are_replaced(opened: MakeMirror, tmp_path: Path) -> None:
    store = write_store(tmp_path, methods=("zero_shot", "craft"), shots=(16,), seeds=(1,), budgets=((8000, None),))
    report = report_of(store.read(), store.read_predictions)
    folder, board = write_report(report, tmp_path), report.board.to_pylist()
    (folder / "old.txt").write_text("old")
    mirror = opened()
    first = mirror.log_report(folder, board)
    (folder / "old.txt").unlink()
    assert opened().log_report(folder, board) == first
    (run,) = runs(mirror, "tags.`farebox.kind` = 'leaderboard'")
    names = artifacts(mirror, first)
    assert {"leaderboard.html", "leaderboard.csv", "leaderboard_table.json", "figures"} <= set(names)
    assert "old.txt" not in names and "figures/gain_over_zero_shot.png" in artifacts(mirror, first, "figures")
    table = json.loads(
        Path(mirror.client.download_artifacts(first, "leaderboard_table.json", str(tmp_path))).read_text()
    )
    assert table["columns"][:3] == ["label", "test_set", "accuracy"] and len(table["data"]) == 10
    tags = mirror.client.get_experiment(mirror.experiment_id).tags
    assert f"/runs/{first}/artifacts/leaderboard.html" in tags["mlflow.note.content"]
    assert {n: json.loads(tags[f"mlflow.sharedViewState.{n}"]) for n in VIEWS} == VIEWS
    assert run.info.status == "FINISHED"


def test_two_storages_share_one_mlflow_without_touching_each_other(opened: MakeMirror, tmp_path: Path) -> None:
    mine = opened()
    mine.mirror(trial())
    other = Mirror(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "elsewhere" / "mlflow", "farebox/test")
    assert other.mirror(trial())
    (run,) = runs(other)
    assert str(tmp_path / "elsewhere") in run.info.artifact_uri
    other.sync(ResultStore(tmp_path / "elsewhere"))
    assert len(runs(opened())) == 1 and not opened().mirror(trial())


def test_a_moved_storage_gets_a_new_experiment(tmp_path: Path, empty_db: Path) -> None:
    def mirror(folder: Path) -> Mirror:
        return Mirror(f"sqlite:///{folder / 'mlflow.db'}", folder / "mlflow", "farebox/test")

    (tmp_path / "old").mkdir()
    shutil.copy(empty_db, tmp_path / "old" / "mlflow.db")
    mirror(tmp_path / "old").mirror(trial())
    (tmp_path / "old").rename(tmp_path / "new")
    moved = mirror(tmp_path / "new")
    assert moved.mirror(trial())
    (run,) = runs(moved)
    assert str(tmp_path / "new") in run.info.artifact_uri and not (tmp_path / "old").exists()


def test_a_copied_storage_writes_artifacts_into_its_own_folder(tmp_path: Path, empty_db: Path) -> None:
    def mirror(folder: Path) -> Mirror:
        return Mirror(f"sqlite:///{folder / 'mlflow.db'}", folder / "mlflow", "farebox/test")

    (tmp_path / "old").mkdir()
    shutil.copy(empty_db, tmp_path / "old" / "mlflow.db")
    mirror(tmp_path / "old").mirror(trial())
    before = sorted((tmp_path / "old").rglob("*.json"))
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    copied = mirror(tmp_path / "copy")
    assert copied.mirror(trial())
    (run,) = runs(copied)
    assert str(tmp_path / "copy") in run.info.artifact_uri
    assert sorted((tmp_path / "old").rglob("*.json")) == before
    assert not mirror(tmp_path / "copy").mirror(trial()) and not mirror(tmp_path / "old").mirror(trial())


def test_the_store_is_in_wal_mode(opened: MakeMirror, tmp_path: Path) -> None:
    opened()
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert db.execute("pragma journal_mode").fetchone() == ("wal",)


def test_every_failure_of_mlflow_is_a_tracking_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database, though it is long enough to be one" * 9)
    with pytest.raises(TrackingError, match="cannot be opened"):
        Mirror(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlflow", "farebox/test")
    assert issubclass(TrackingError, FareboxError)


def test_the_ui_command_serves_this_store_on_this_machine_and_shows_no_password() -> None:
    words, environment = ui_command("postgresql://me:secret@host/runs", 5001)
    assert words[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert " ".join(words[4:]) == "--host 127.0.0.1 --port 5001 --workers 1"
    assert environment == {"MLFLOW_BACKEND_STORE_URI": "postgresql://me:secret@host/runs"}


def test_any_name_is_fitted_to_mlflow_and_different_names_stay_different(opened: MakeMirror) -> None:
    names = ["my set, v2 (50%)", "my set, v2 [50%]", "..", "a/../b", "x" * 300, "x" * 299 + "y", "\x00\n", "数据", " "]
    source = make(
        accuracy=50.0,
        method="=m" * 200,
        dataset="d" * 300,
        test_set="d" * 300,
        template="t\x00" * 4000,
        notes=json.dumps({f"note {i}, (%)\x1b": "v" * 9000 for i in range(150)}),
        error="e" * 20000,
    )
    rows = [source, *(replace(source, kind="shift", test_set=n, accuracy=float(i)) for i, n in enumerate(names))]
    mirror = opened()
    assert mirror.mirror(rows)
    (run,) = runs(mirror)
    found = [v for k, v in run.data.metrics.items() if k.startswith("shift/") and k.endswith("/accuracy")]
    assert sorted(found) == [float(i) for i in range(len(names))]
    assert run.data.metrics["shift/数据/accuracy"] == 7.0  # what MLflow takes is kept as it is
    assert sum(k.startswith("trial/notes.note") for k in run.data.params) == 150
    assert max(map(len, run.data.params.values())) <= 5000 and len(run.info.run_name) <= 250
    rows_json = mirror.client.download_artifacts(run.info.run_id, "rows.json")
    assert [r["test_set"] for r in json.loads(Path(rows_json).read_text())][1:] == names


def test_a_prediction_file_whose_name_decodes_to_a_path_is_stored_under_a_plain_name(
    opened: MakeMirror, tmp_path: Path
) -> None:
    file = tmp_path / "..%2F..%2Fetc%2Fpasswd.arrow"
    file.write_bytes(b"predictions")
    mirror = opened()
    mirror.mirror(trial(), [file])
    (run,) = runs(mirror)
    (name,) = artifacts(mirror, run.info.run_id, "predictions")
    assert name.startswith("predictions/_.._etc_passwd-") and name.endswith(".arrow")


def test_a_param_tells_the_rows_of_two_templates_apart(opened: MakeMirror) -> None:
    mirror = opened()
    mirror.mirror([make(trial_id="a", accuracy=1.0, template="A {}", data_digest="d", classnames_digest="c")])
    (run,) = runs(mirror)
    assert {run.data.params[f"trial/{k}"] for k in ("template", "data_digest", "classnames_digest")} == {
        "A {}",
        "d",
        "c",
    }


def test_one_trial_that_mlflow_does_not_take_does_not_stop_the_others(
    opened: MakeMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path, methods=("zero_shot", "craft"), shots=(16,), seeds=(1, 2), budgets=((8000, None),))
    mirror, write = opened(), Mirror._write
    bad = sorted(store.finished())[:5]

    def refuse(self: Mirror, rows: list[ResultRow], *others: Any) -> str:
        if rows[0].trial_id in bad:
            from mlflow.exceptions import MlflowException

            raise MlflowException.invalid_parameter_value("no such name")
        return write(self, rows, *others)

    monkeypatch.setattr(Mirror, "_write", refuse)
    mirrored, problems = mirror.sync(store)
    assert mirrored == 7 and [p.split()[1] for p in problems] == bad and "no such name" in problems[0]
    monkeypatch.setattr(Mirror, "_write", write)
    assert mirror.sync(store) == Synced(12, [])


def test_a_batch_takes_two_transactions_and_its_runs_are_those_of_single_calls(
    opened: MakeMirror, tmp_path: Path
) -> None:
    import sqlalchemy

    store = write_store(tmp_path, methods=("zero_shot", "craft"), shots=(16,), seeds=(1, 2), budgets=((8000, None),))
    mirror, commits = opened(), list[Any]()
    engine = mirror.client._tracking_client.store.engine
    sqlalchemy.event.listen(engine, "commit", commits.append)
    trials = [(rows, partial(store.prediction_files, rows)) for rows in store.trials().values()]
    assert mirror.mirror_all(trials) == len(trials) == 12 and len(commits) == 2
    assert mirror.mirror_all(trials) == 0 and len(commits) == 2

    def content(runs: list[Any]) -> dict[str, Any]:
        kept = {run.data.tags[TRIAL]: run for run in runs}
        return {t: (r.data.metrics, r.data.params, r.data.tags, r.info.status) for t, r in kept.items()}

    batch = content(runs(mirror))
    for run in runs(mirror):
        mirror._delete(run.info.run_id)
    single = opened()
    for rows, files in trials:
        assert single.mirror(rows, files())
    assert content(runs(single)) == batch and len(batch) == 12


def test_a_batch_that_fails_leaves_no_run(opened: MakeMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = opened()
    log_batch = mirror.client.log_batch
    calls = iter(range(9))

    def die(*content: Any) -> None:
        if next(calls) == 2:
            raise OSError("disk full")
        log_batch(*content)

    monkeypatch.setattr(mirror.client, "log_batch", die)
    trials = [([make(trial_id=name)], list) for name in "abcd"]
    with pytest.raises(TrackingError, match="disk full"):
        mirror.mirror_all(trials)
    assert not runs(mirror) and not [p for p in mirror.root.rglob("*") if p.is_file()]
    assert mirror.mirror_all(trials) == 4 and len(runs(mirror)) == 4


def test_an_mlflow_that_does_not_work_is_given_up_after_three_trials(
    opened: MakeMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path, methods=("craft",), shots=(16,), seeds=(1, 2), budgets=((8000, None),))
    tries: list[str] = []

    def away(self: Mirror, rows: list[ResultRow], *others: Any) -> str:
        tries.append(rows[0].trial_id)
        raise ConnectionError("refused")

    monkeypatch.setattr(Mirror, "_write", away)
    with pytest.raises(TrackingError, match="ConnectionError: refused"):
        opened().sync(store)
    assert len(tries) == 3


def test_sync_follows_no_path_of_a_row_and_writes_the_leaderboard(
    opened: MakeMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened()
    storage = tmp_path / "runs"
    store = write_store(storage, methods=("craft",), shots=(16,), seeds=(1,), budgets=((8000, None),))
    (storage / "storage_id").write_text("abc\n")
    (storage / "leaderboard").mkdir()
    (storage / "leaderboard" / "leaderboard.csv").write_text("a\n")
    bad = sorted(store.finished())[0]
    rows = [replace(row, predictions_file="../../secret") for row in store.rows_of(bad)]
    (tmp_path / "secret").write_text("outside")
    store.write(rows)
    words = [f"storage={storage}", f"mlflow=sqlite:///{tmp_path / 'mlflow.db'}"]
    assert main(["sync", *words]) == 0
    assert "3 trials are in MLflow" in capsys.readouterr().out
    mirror = Mirror(f"sqlite:///{tmp_path / 'mlflow.db'}", storage / "mlflow", "farebox/synthetic")
    assert len(runs(mirror)) == 3 and len(runs(mirror, "tags.`farebox.kind` = 'leaderboard'")) == 1
    assert not list(storage.rglob("mlflow/**/secret"))


def test_dataset_method_seed_and_shots_stand_first_among_the_params(opened: MakeMirror) -> None:
    mirror = opened()
    mirror.mirror([replace(trial()[0], notes='{"a": 1}', cpu="EPYC", torch_version="2.6")])
    (run,) = runs(mirror)
    assert sorted(run.data.params)[:4] == ["dataset", "method", "seed", "shots"]
    assert {"trial/config.popsize", "trial/notes.a", "trial/model"} <= set(run.data.params)
    assert (run.data.tags["system.cpu"], run.data.tags["system.torch"]) == ("EPYC", "2.6")
    assert not {"cpu", "trial/cpu"} & set(run.data.params)


def test_a_run_names_its_split_and_describes_its_outcome(opened: MakeMirror) -> None:
    mirror, row = opened(), trial()[0]
    mirror.mirror([row])
    (run,) = runs(mirror)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == (row.dataset, row.split_digest[:36])
    note = run.data.tags["mlflow.note.content"]
    assert f"{row.accuracy:.1f}%" in note and f"{row.requests:,} requests" in note


def test_the_bill_is_one_table_with_a_row_per_phase(opened: MakeMirror) -> None:
    mirror, row = opened(), trial()[0]
    mirror.mirror([row])
    (run,) = runs(mirror)
    table = json.loads(Path(mirror.client.download_artifacts(run.info.run_id, "bill.json")).read_text())
    bill = {phase: dict(zip(table["columns"][1:], units, strict=True)) for phase, *units in table["data"]}
    assert bill["adapt"]["requests"] == row.adapt_requests > 0
    assert bill["evaluate"]["images"] == row.evaluate_images and bill["paid"]["outputs"] == row.outputs
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "bill.json", "type": "table"}]


def test_run_names_differ_between_budgets() -> None:
    budgets = [(None, None), (1000, None), (8000, None), (None, 8000), (8000, 256000)]
    names = [name_of(make(budget_requests=requests, budget_images=images)) for requests, images in budgets]
    assert len(set(names)) == len(budgets) and names[-1].endswith("-8000requests-256000images")


def test_the_commit_is_named_only_if_the_present_code_ran_the_trial(
    opened: MakeMirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "git_tags", lambda: {"mlflow.source.git.commit": "c0ffee"})
    mirror = opened()
    mirror.mirror([make(trial_id="mine", code_digest=code_digest())])
    mirror.mirror([make(trial_id="other", code_digest="other")])
    commits = {r.data.tags["farebox.trial_id"]: r.data.tags.get("mlflow.source.git.commit") for r in runs(mirror)}
    assert commits == {"mine": "c0ffee", "other": None}


def test_means_of_methods_are_runs_that_change_with_the_report(opened: MakeMirror, tmp_path: Path) -> None:
    store = write_store(tmp_path, methods=("zero_shot", "craft"), shots=(4, 16), seeds=(1,), budgets=((8000, None),))
    report = report_of(store.read())
    folder = write_report(report, tmp_path)
    mirror, summary = opened(), report.summary.to_pylist()
    mirror.log_report(folder, [], summary, "first")
    means = runs(mirror, "tags.`farebox.kind` = 'mean'")
    assert sorted((r.data.params["method"], r.data.params["shots"]) for r in means) == [
        *(("craft", "16"), ("craft", "4"), ("zero_shot", "16"), ("zero_shot", "4"))
    ]
    of_craft = next(r for r in summary if (r["label"], r["shots"], r["kind"]) == ("craft", 16, "source"))
    (craft,) = [r for r in means if (r.data.params["method"], r.data.params["shots"]) == ("craft", "16")]
    assert craft.data.metrics["accuracy"] == pytest.approx(of_craft["accuracy"], abs=1e-3)
    assert "shift/accuracy" in craft.data.metrics and mirror.has_report("first") and not mirror.has_report("second")
    compared = runs(mirror, VIEWS["methods"]["searchFilter"])  # only those of the most shots
    assert sorted((r.data.params["method"], r.data.params["shots"]) for r in compared) == [
        *(("craft", "16"), ("zero_shot", "16"))
    ]
    mirror.log_report(folder, [], [r for r in summary if r["label"] == "craft"], "second")
    kept = runs(mirror, VIEWS["methods"]["searchFilter"])
    assert {r.data.params["method"] for r in kept} == {"craft"} and mirror.has_report("second")
    assert craft.info.run_id in {r.info.run_id for r in kept}


def test_methods_are_compared_at_the_most_shots_and_the_largest_allotment() -> None:
    which = {"methods": ("zero_shot", "craft"), "seeds": (1,), "shots": (4, 16)}
    trials = [*sweep(**which, budgets=((8000, None), (8000, 25600), (100, None)))]
    summary = report_of([row for trial in trials for row in trial]).summary.to_pylist()
    assert len({mean_name(r) for r in summary}) == 12
    assert main_means(summary) == {f"{name}-mean-16shot-8000requests-tiny-fp32" for name in which["methods"]}
    assert main_means([]) == set()


def test_storages_of_equal_paths_on_two_machines_do_not_share_an_experiment(opened: MakeMirror, tmp_path: Path) -> None:
    opened()
    shared = tmp_path / "shared.db"
    shutil.copy(tmp_path / "mlflow.db", shared)
    mine, other, again = (
        Mirror(f"sqlite:///{shared}", tmp_path / "runs" / "mlflow", "farebox/test", storage_id)
        for storage_id in ("mine", "other", "mine")
    )
    assert mine.mirror(trial()) and other.mirror(trial())
    assert mine.experiment_id == again.experiment_id != other.experiment_id


def test_a_second_sync_writes_nothing_and_draws_no_figure(
    opened: MakeMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened()
    store = write_store(tmp_path, methods=("craft",), shots=(16,), seeds=(1,), budgets=((8000, None),))
    (tmp_path / "storage_id").write_text("abc\n")
    write_report(report_of(store.read(), store.read_predictions), tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert main(["sync", f"storage={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert "mirrored 3 of 3 trials" in said.err and "MLFLOW_TRACKING_URI is ignored" in said.err
    for name in ("_write", "log_report"):
        monkeypatch.setattr(Mirror, name, lambda *_: pytest.fail("written again"))
    assert main(["sync", f"storage={tmp_path}"]) == 0
    assert "mirrored" not in capsys.readouterr().err


def test_an_unchanged_report_is_published_once_and_a_changed_or_incomplete_one_again(
    opened: MakeMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened()
    store = write_store(tmp_path, methods=("craft",), shots=(16,), seeds=(1,), budgets=((8000, None),))
    config, published = compose([f"storage={tmp_path}"]), Counter[str]()
    write = report._write_and_mirror

    def counted(*arguments: Any) -> None:
        published["times"] += 1
        write(*arguments)

    def times(change: Callable[[], object] = lambda: None) -> int:
        change()
        printed: list[str] = []
        assert report.publish(config, printed.append) == [] and "craft" in printed[-1]
        return published["times"]

    monkeypatch.setattr(report, "_write_and_mirror", counted)
    monkeypatch.setattr(report.Report, "figures", {})  # drawing takes seconds
    assert [times(), times()] == [1, 1]
    page = tmp_path / "leaderboard/leaderboard.html"
    assert [times(page.unlink), times()] == [2, 2] and page.exists()
    assert [times(lambda: (tmp_path / "published.json").write_text("{}")), times()] == [3, 3]
    assert [times(lambda: store.write(trial("zero_shot"))), times()] == [4, 4]
    assert [times((tmp_path / "mlflow.db").unlink), times()] == [5, 5]


def test_ui_prints_both_addresses_and_opens_no_browser_on_a_pipe(
    opened: MakeMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened()
    write_store(tmp_path, methods=("craft",), shots=(16,), seeds=(1,), budgets=((8000, None),))
    (tmp_path / "storage_id").write_text("abc\n")
    executed: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: executed.extend(command))
    monkeypatch.setattr(mirror_command, "_open_when_served", lambda *_: pytest.fail("a browser on a pipe"))
    assert main(["ui", f"storage={tmp_path}", "--port", str(free_port())]) == 0
    said = capsys.readouterr()
    assert "compareRunsMode=CHART&viewStateShareKey=methods" in said.out and "viewStateShareKey=leaderboard" in said.out
    assert "3 of 3 trials are not in MLflow" in said.err and "server" in executed


@pytest.mark.parametrize(("words", "opens"), [([], True), (["--no-browser"], False)])
def test_ui_opens_the_pages_of_a_server_without_its_password(
    opened: MakeMirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    opens: bool,
) -> None:
    mirror = opened()
    write_store(tmp_path, methods=("craft",), shots=(16,), seeds=(1,), budgets=((8000, None),))
    (tmp_path / "storage_id").write_text("abc\n")
    pages: list[str] = []
    monkeypatch.setenv("MLFLOW_AT", "http://me:secret@host:5000")
    monkeypatch.setattr(mirror_command, "open_mirror", lambda config: mirror)
    monkeypatch.setattr(mirror_command, "_can_show_pages", lambda: True)
    monkeypatch.setattr(webbrowser, "open", pages.append)
    assert main(["ui", f"storage={tmp_path}", "mlflow=${oc.env:MLFLOW_AT}", *words]) == 0
    assert "compare methods:  http://host:5000/#/experiments/" in capsys.readouterr().out
    assert [page.startswith("http://host:5000/#/") for page in pages] == ([True] if opens else [])
