"""The real command line, end to end: a sweep of several methods and a shift pair on the toy model, run once and shared.

What it shows: the leaderboard and its files, MLflow's copy, the ledger, and that a second run does nothing twice. One
run is on Ray; further ones have their trials in this process.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.sweep.storage_id import read_id
from tests.support.command import charges, farebox, here, ledger_record, records
from tests.support.without_ray import without_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

METHODS = ("zero_shot", "taskres", "logit_head", "craft", "cbbt")
KEYS = (
    *("trial_id", "method", "dataset", "shots", "seed", "model", "status", "test_set", "accuracy"),
    *("requests", "images", "prompts", "outputs", "evaluate_requests", "seconds", "trainable_params", "client_bytes"),
)
ALLOTMENT = 100


class Swept(NamedTuple):
    """A sweep that was run."""

    storage: Path
    words: tuple[str, ...]
    plan: list[dict[str, Any]]
    run: subprocess.CompletedProcess[str]
    records: list[dict[str, Any]]
    ledger: dict[str, Any]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="session")
def swept(folder: Path) -> Swept:
    """Five methods, two seeds, icons and its shift."""
    storage = folder / "first"
    words = (
        *("sweep=smoke", f"storage={storage}", "datasets=[icons]", f"methods=[{','.join(METHODS)}]", "seeds=[1,2]"),
        *("views=2", f"budget.requests={ALLOTMENT}", "method.craft.popsize=12", "replicas=1", "concurrency=1"),
    )
    plan = json.loads(here("plan", *words, "--json"))
    assert not storage.exists()
    run = farebox("run", *words)
    return Swept(storage, words, plan, run, records(storage), ledger_record(storage))


@pytest.fixture(scope="session")
def other(folder: Path, swept: Swept) -> tuple[Path, str]:
    """Another storage beside the first (the features are shared), whose limit pays for a part only; its errors."""
    storage = folder / "second"
    words = (*swept.words, f"storage={storage}", "methods=[taskres,craft]", "seeds=[1]")
    limit = ("budget.sweep.requests=5", "budget.partial=true", "concurrency=1")
    with without_ray(), contextlib.redirect_stderr(io.StringIO()) as err:
        here("run", *words, *limit, expect=3)
    return storage, err.getvalue()


def test_a_run_ends_with_the_table_and_the_paths_of_its_files(swept: Swept) -> None:
    out, err = swept.run.stdout, swept.run.stderr
    assert "Traceback" not in out + err
    assert "10 trials to run, 0 done before" in out
    assert "The toy model" not in out, "a label of two methods' sweep does not describe five"
    for method in METHODS:
        assert method in out
    screen = out.split("requests predicted\n\n")[1].splitlines()
    assert len(screen) <= 24 and screen[0].startswith("smoke: icons, 1 shot, 2 seeds, ")
    for name in ("leaderboard.html", "more: farebox leaderboard"):
        assert name in out
    assert err.splitlines()[-1].startswith("10/10 trials   ")  # progress, for a pipe: whole lines


def test_a_run_leaves_its_files_only(swept: Swept) -> None:
    found = {path.name for path in swept.storage.iterdir()} - {"ledger.db-wal", "ledger.db-shm", "checkpoints"}
    assert not list((swept.storage / "checkpoints").glob("*"))
    stores = {"ledger.db", "mlflow", "mlflow.db", "plan.json", "predictions", "published.json", "results", "rows.arrow"}
    assert found == {".lock", "leaderboard", "log.jsonl", "storage_id"} | stores
    assert {path.suffix for path in (swept.storage / "leaderboard").rglob("*") if path.is_file()} >= {".html", ".csv"}
    assert not list(swept.storage.parent.rglob("*.tmp"))


def test_the_log_has_a_line_for_each_run_and_for_each_trials_start_and_end(swept: Swept) -> None:
    lines = [json.loads(line) for line in (swept.storage / "log.jsonl").read_text().splitlines()]
    rows = {r["trial_id"]: r for r in records(swept.storage)}
    assert lines[0]["event"] == "run started" and lines[0]["trials"] <= len(rows)
    assert {line["event"] for line in lines} >= {"run started", "trial started", "trial ended", "run ended"}
    ended = {line["trial"]: line for line in lines if line["event"] == "trial ended"}
    assert ended.keys() == rows.keys() == {line["trial"] for line in lines if line["event"] == "trial started"}
    for trial, line in ended.items():
        assert (line["status"], line["requests"]) == (rows[trial]["status"], rows[trial]["requests"])
        assert rows[trial]["method"] in line["name"]


def test_raw_records_have_the_promised_keys_and_every_trial_is_done(swept: Swept) -> None:
    assert all(tuple(record)[: len(KEYS)] == KEYS for record in swept.records)
    assert json.loads(farebox("leaderboard", f"storage={swept.storage}", "--raw", "--format", "json").stdout)
    assert {r["status"] for r in swept.records} == {"done"}
    assert len(swept.records) == len(METHODS) * 2 * 2
    assert {(r["dataset"], r["test_set"]) for r in swept.records} == {("icons", "icons"), ("icons", "icons_outline")}
    assert {r["method"] for r in swept.records} == set(METHODS)


def test_no_bill_is_above_its_allotment_and_each_is_the_planned_one(swept: Swept) -> None:
    planned = {t["trial_id"]: t for t in swept.plan}
    for record in swept.records:
        assert record["requests"] <= ALLOTMENT
        for unit in ("requests", "images", "prompts", "outputs"):
            assert record[unit] == planned[record["trial_id"]][f"predicted_{unit}"]


def test_ledger_and_rows_agree(swept: Swept) -> None:
    own = [r for r in swept.records if r["test_set"] == r["dataset"]]
    phases = swept.ledger["phases"]
    for unit in ("requests", "images", "prompts", "outputs"):
        assert phases["adapt"][unit] + phases["validate"][unit] == sum(r[unit] for r in own)
    assert phases["evaluate"]["requests"] == sum(r["evaluate_requests"] for r in swept.records)
    assert phases["replay"]["requests"] == phases["curve"]["requests"] == 0
    assert swept.ledger["trials"] == 10
    assert swept.ledger["open_trials"] == 0
    (account,) = swept.ledger["accounts"]
    assert account["reserved"]["requests"] == 0
    assert account["spent"]["requests"] == sum(r["requests"] for r in own)
    assert "verified: charges add up, match the rows" in farebox("ledger", f"storage={swept.storage}").stdout


@pytest.mark.parametrize("form", ["table", "csv", "json", "md", "latex", "html"])
def test_the_leaderboard_is_printed_in_every_format(swept: Swept, form: str) -> None:
    out = here("leaderboard", f"storage={swept.storage}", "--format", form)
    assert "craft" in out and "icons" in out
    if form == "csv":
        board = json.loads(here("leaderboard", f"storage={swept.storage}", "--format", "json"))
        assert len(list(csv.DictReader(io.StringIO(out)))) == len(board)
    if form == "html":
        assert out.startswith("<!doctype html") and "smoke</title>" in out and "<svg" in out
    if form == "latex":
        assert r"\begin{tabular}" in out
    if form == "md":
        assert "|" in out


MIRRORED = """
import json, sys
from mlflow import MlflowClient
found = []
for path in sys.argv[1:]:
    client = MlflowClient(tracking_uri=f"sqlite:///{path}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "farebox/smoke"]
    found.append([
        {"tags": r.data.tags, "metrics": r.data.metrics, "params": r.data.params,
         "artifacts": [a.path for a in client.list_artifacts(r.info.run_id)]}
        for r in client.search_runs([experiment.experiment_id], max_results=1000)
    ])
print(json.dumps(found))
"""
"""In a process of its own: MLflow keeps a store open for good, even one that was deleted."""


def _mirrored(*databases: Path) -> list[list[dict[str, Any]]]:
    """The sweep's runs in each of MLflow's databases, through MLflow's own client."""
    command = [sys.executable, "-c", MIRRORED, *map(str, databases)]
    found: list[list[dict[str, Any]]] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return found


def _trials(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The trials' runs, by trial id."""
    (board,) = [r for r in runs if r["tags"]["farebox.kind"] == "leaderboard"]
    assert {"leaderboard.html", "leaderboard.csv", "figures"} <= set(board["artifacts"])
    trials = {r["tags"]["farebox.trial_id"]: r for r in runs if r["tags"]["farebox.kind"] == "trial"}
    assert len(trials) == len([r for r in runs if r["tags"]["farebox.kind"] not in ("leaderboard", "mean")])
    for run in trials.values():
        assert {"bill.json", "rows.json", "config.json", "predictions"} <= set(run["artifacts"])
    return trials


def _assert_mirrored(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    runs = _trials(found)
    assert set(runs) == {r["trial_id"] for r in rows}
    for row in rows:
        metrics, params = runs[row["trial_id"]]["metrics"], runs[row["trial_id"]]["params"]
        prefix = "" if row["test_set"] == row["dataset"] else f"shift/{row['test_set']}/"
        assert metrics[f"{prefix}accuracy"] == pytest.approx(row["accuracy"], abs=1e-3)
        assert (metrics["requests"], metrics["images"]) == (row["requests"], row["images"])
        assert (params["method"], params["seed"], params["trial/status"]) == (
            row["method"],
            str(row["seed"]),
            row["status"],
        )


def test_mlflow_has_the_same_numbers_and_sync_writes_them_again(swept: Swept, tmp_path: Path) -> None:
    database = swept.storage / "mlflow.db"
    database.rename(tmp_path / "before.db")
    said = farebox("sync", f"storage={swept.storage}").stdout
    assert f"{len({r['trial_id'] for r in records(swept.storage)})} trials are in MLflow" in said
    for runs in _mirrored(tmp_path / "before.db", database):
        _assert_mirrored(runs, swept.records)


def test_an_unreachable_mlflow_is_reported_in_one_line(swept: Swept) -> None:
    done = farebox("sync", f"storage={swept.storage}", "mlflow=http://127.0.0.1:9", expect=3)
    assert done.stderr.startswith("farebox: MLflow at http://127.0.0.1:9 cannot be opened")
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_second_run_runs_nothing_and_a_new_seed_only_its_trials(swept: Swept) -> None:
    assert "nothing to run: all 10 trials of this sweep are done" in here("run", *swept.words)
    assert ledger_record(swept.storage) == swept.ledger
    assert records(swept.storage) == swept.records
    with without_ray():
        wider = here("run", *swept.words, "seeds=[1,2,3]")
    assert "5 trials to run, 10 done before" in wider
    rows = records(swept.storage)
    assert [r for r in rows if r["seed"] != 3] == swept.records
    spent = sum(r["requests"] for r in rows if r["seed"] == 3 and r["test_set"] == "icons")
    (before,), (after,) = swept.ledger["accounts"], ledger_record(swept.storage)["accounts"]
    assert after["spent"]["requests"] - before["spent"]["requests"] == spent
    _assert_mirrored(_mirrored(swept.storage / "mlflow.db")[0], rows)


def test_unfunded_trials_are_listed(other: tuple[Path, str]) -> None:
    storage, err = other
    (line,) = [line for line in err.splitlines() if line.startswith("unfunded (no budget): ")]
    assert line.startswith("unfunded (no budget): craft on icons, 1 shots, seed 1, 100 requests: ")
    assert {(r["method"], r["status"]) for r in records(storage)} == {("taskres", "done"), ("craft", "unfunded")}
    assert ledger_record(storage)["accounts"][0]["spent"]["requests"] <= 5


def test_sweeps_never_mix_and_share_image_features_only(swept: Swept, other: tuple[Path, str]) -> None:
    from pipeline.results.row import to_rows
    from pipeline.results.store import ResultStore

    rows = to_rows(ResultStore(other[0]).read())
    (mine,) = [r for r in rows if r.method == "taskres" and r.test_set == "icons"]
    (theirs,) = [r for r in swept.records if r["trial_id"] == mine.trial_id and r["test_set"] == "icons"]
    assert (mine.accuracy, mine.requests, mine.images) == (theirs["accuracy"], theirs["requests"], theirs["images"])
    assert mine.images > 0  # billed in full ...
    assert mine.computed_images == 0  # ... and computed by the first sweep
    assert read_id(swept.storage).id != read_id(other[0]).id
    assert charges(other[0]) < charges(swept.storage)


@pytest.mark.parametrize(
    ("verb", "keys", "names"),
    [
        ("methods", {"access", "paper"}, {"zero_shot", "tip_adapter_f", "bbt", *METHODS}),
        ("datasets", {"classes", "train", "test", "licence", "shift_of"}, {"icons", "icons_outline", "digits"}),
        ("models", {"grant", "licence"}, {"fake", "tiny", "rn50", "vit_b32", "vit_b16"}),
    ],
)
def test_methods_data_sets_and_models_are_listed(verb: str, keys: set[str], names: set[str]) -> None:
    found = json.loads(here(verb, "--json"))
    assert {r[verb.removesuffix("s")] for r in found} >= names
    assert all(keys <= set(r) for r in found)
    assert all(name in here(verb) for name in names)


def test_the_plan_is_a_table_and_sends_no_request(swept: Swept, tmp_path: Path) -> None:
    out = here("plan", *swept.words, f"storage={tmp_path}/none")
    assert out.splitlines()[0].split()[:2] == ["method", "data"]
    assert out.splitlines()[-1].startswith("total")
    assert not (tmp_path / "none").exists()


# --- what the papers claim -----------------------------------------------------------------------------------------


def test_claims_run_what_is_missing_once_and_are_written_with_their_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("claims", "cbbt", f"storage={tmp_path}", "model=fake", "datasets=[icons]", "seeds=[1,2]", "views=1")
    words = (*words, "budget.requests=200", "curve=3", "--json")
    with without_ray():
        found = json.loads(here(*words))
    assert "16 trials to run" in capsys.readouterr().err
    assert json.loads(here(*words)) == found
    assert "nothing to run: all 16 trials" in capsys.readouterr().err
    assert {r["paper"] for r in found} == {"cbbt"} and len(found) == 8
    (near,) = [r for r in found if r["claim"] == "approximation"]
    low, high = near["measured"]["low"], near["measured"]["high"]
    assert (near["verdict"] == "reproduced") == (low > 0.5) and low <= high
    (grid,) = [r for r in found if r["claim"] == "eleven_data_sets"]
    assert grid["verdict"] == "not testable" and grid["command"] == "farebox plan sweep=cbbt_paper"
    written = json.loads((tmp_path / "claims.json").read_text())
    assert written["claims"] == found and written["environment"]["date"]
    assert (tmp_path / "cbbt_gradients.png").read_bytes().startswith(b"\x89PNG")
    assert "| " in (tmp_path / "claims.md").read_text()
    assert "did you mean 'taskres'" in farebox("claims", "taskrse", expect=2).stderr
