"""`import farebox`: plan, run one trial, open a black box, and read results from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import farebox
from methods.base import Bill
from pipeline.errors import AccessDenied, BudgetExceeded, ConfigError
from pipeline.results.row import ResultRow
from tests.support.command import ROOT, here
from tests.support.lab import Lab
from tests.support.plugin import MEAN_METHOD

pytestmark = pytest.mark.usefixtures("registry")
TRIAL = ("sweep=smoke", "model=fake", "views=2", "shots=4", "seeds=1", "eval_shift=false")


def silent(line: str) -> None:
    """Print nothing."""


def trial(card: Path, storage: Path, *overrides: str) -> list[ResultRow]:
    return farebox.run_trial(*TRIAL, f"datasets=[{card}]", f"storage={storage}", *overrides, echo=silent)


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in farebox.__all__:
        assert getattr(farebox, name).__doc__, name


def test_the_import_loads_no_large_package() -> None:
    script = (
        "import farebox, sys; print([m for m in ('torch', 'ray', 'mlflow', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_lists_the_trials_and_their_bills(card: Path, tmp_path: Path) -> None:
    plan = farebox.plan(*TRIAL, f"datasets=[{card}]", f"storage={tmp_path}", "methods=[zero_shot,taskres]")
    assert [t.choice.name for t in plan.trials] == ["zero_shot", "taskres"]
    assert plan.trials[0].predicted == Bill() and plan.trials[1].predicted.requests == 2


def test_a_single_trial_gives_the_rows_of_a_sweep_and_is_not_run_twice(card: Path, tmp_path: Path, lab: Lab) -> None:
    (row,) = trial(card, tmp_path / "one", "methods=[craft]", "budget.requests=40")
    (expected,) = lab.run(lab.spec("craft", "budget.requests=40"))
    same = ("trial_id", "accuracy", "predictions_digest", "requests", "images", "evaluate_images", "config")
    assert [getattr(row, name) for name in same] == [getattr(expected, name) for name in same]
    assert trial(card, tmp_path / "one", "methods=[craft]", "budget.requests=40") == [row]
    assert "verified" in here("ledger", f"storage={tmp_path / 'one'}", "sweep=smoke")


def test_an_exception_of_the_method_propagates_and_its_calls_are_replayed(card: Path, tmp_path: Path) -> None:
    file, storage = tmp_path / "mean.py", tmp_path / "storage"
    file.write_text(MEAN_METHOD.replace("mean_CD = ", "raise ZeroDivisionError('a bug'); mean_CD = "))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        trial(card, storage, f"methods=[{file}]")
    with pytest.raises(ZeroDivisionError):
        trial(card, storage, f"methods=[{file}]")
    ledger = here("ledger", f"storage={storage}", "sweep=smoke", "--json")
    assert '"problems": []' in ledger
    assert farebox.load_results(storage).empty


def test_more_than_one_trial_is_refused_before_anything_is_written(card: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one trial, found 2 .*name one method"):
        trial(card, tmp_path / "many", "methods=[zero_shot,taskres]")
    assert not (tmp_path / "many").exists()


def test_a_budget_that_cannot_pay_the_trial_is_refused(card: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded):
        trial(card, tmp_path / "poor", "methods=[taskres]", "budget.sweep.requests=1")


def test_results_have_every_column_and_the_reason_why_a_row_is_left_out(card: Path, tmp_path: Path) -> None:
    for method in ("zero_shot", "taskres"):
        trial(card, tmp_path, f"methods=[{method}]")
    results = farebox.load_results(tmp_path)
    assert set(ResultRow.__dataclass_fields__) | {"left_out"} == set(results.columns)
    assert list(results["left_out"]) == ["", ""]
    board = farebox.leaderboard(tmp_path)
    assert set(board["method"]) == {"zero_shot", "taskres"}
    gain = board.set_index("method").loc["taskres"]
    accuracy = results.set_index("method")["accuracy"]
    assert gain["accuracy"] == pytest.approx(accuracy["taskres"])


def test_damaged_rows_are_left_out_with_a_warning(card: Path, tmp_path: Path) -> None:
    (row,) = trial(card, tmp_path, "methods=[zero_shot]")
    path = tmp_path / "results" / f"{row.trial_id}.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=row.trial_id):
        assert farebox.load_results(tmp_path).empty


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    for load in (farebox.load_results, farebox.leaderboard):
        with pytest.raises(ConfigError, match=r"no results in .*runs/demo"):
            load(tmp_path / "nothing")


def test_an_open_box_bills_calls_and_refuses_what_the_budget_does_not_pay(card: Path) -> None:
    overrides = ("sweep=smoke", "model=fake", "shots=4", "seeds=1", "views=1")
    task = farebox.few_shot_task(*overrides, f"datasets=[{card}]")
    n = len(task.train.images)
    with farebox.open_box(*overrides, "budget.requests=2", f"budget.images={n}") as box:
        features = box.image_features(task.train.images)
        assert features.shape == (n, box.feature_dim) and box.meter.paid.images == n
        with pytest.raises(BudgetExceeded):
            box.image_features(task.train.images)
        assert box.meter.paid == Bill.image_features(n, box.feature_dim)


def test_a_task_has_the_local_model_that_is_named(card: Path) -> None:
    overrides = ("sweep=smoke", "model=fake", "shots=2", "seeds=1", f"datasets=[{card}]")
    assert farebox.few_shot_task(*overrides).local is None
    task = farebox.few_shot_task(*overrides, "local=tiny_local")
    assert task.local is not None
    assert task.local.features(task.train.images).shape == (10, task.local.feature_dim)


def test_an_open_box_gives_the_answers_of_its_configuration(card: Path) -> None:
    overrides = ("sweep=smoke", "model=fake", "shots=4", "seeds=1", f"datasets=[{card}]")
    task = farebox.few_shot_task(*overrides)
    with farebox.open_box(*overrides, "answers={scores: topk, k: 2}") as box:
        told = box.scores(task.train.images, task.classes.prompts())
        assert box.top_k == 2 and set(told.isfinite().sum(-1).flatten().tolist()) == {2}
        with pytest.raises(AccessDenied):
            box.image_features(task.train.images)
    with (
        pytest.raises(ConfigError, match="expected one kind of answers, found 2"),
        farebox.open_box("answers=topk,label"),
    ):
        pass


def test_a_task_must_be_one(card: Path) -> None:
    with pytest.raises(ConfigError, match="expected one task, found 2"):
        farebox.few_shot_task("sweep=smoke", "model=fake", f"datasets=[{card}]", "shots=[2,4]", "seeds=1")
