"""Reservations of a run are released, and every trial gets a row, also when its worker was lost. Without Ray."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.budget import Limits
from pipeline.errors import BudgetExceeded, ConfigError
from pipeline.results.row import ResultRow, account_name
from pipeline.sweep.reservations import (
    close_trials,
    finished,
    pending,
    problems,
    release_left_over,
    remove_checkpoints,
    reserve,
)
from pipeline.sweep.run_ledger import open_ledger, sweep_account
from pipeline.sweep.storage_id import new_id
from pipeline.trials.rows import failed_row, spec_columns
from pipeline.trials.trial import run_trial
from tests.support.lab import STORAGE, Lab, encoded, outcome, write_card, write_source


def verified(lab: Lab, rows: list[ResultRow]) -> bool:
    """Return whether the ledger is consistent and agrees with these rows."""
    accounts = [account_name(r.trial_id, r.method_digest, r.code_digest) for r in rows]
    stated = [asdict(r) | {"trial_id": account} for r, account in zip(rows, accounts, strict=True)]
    return lab.ledger.verify(stated, STORAGE) == []


def test_an_image_damaged_during_a_trial_fails_the_trial_with_its_bill_and_it_is_pending_again(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.dataset.check_readable", lambda *_: None)  # it broke after the plan had looked
    good = encoded(Image.effect_noise((32, 32), 50), "JPEG")
    images = [good] * 11 + [good[: len(good) // 2]]  # its header is whole: only decoding it tells
    source = write_source(
        tmp_path / "cut.parquet", images, [0, 1] * 6, ["train"] * 4 + ["val"] * 4 + ["test"] * 4, ["cat", "dog"]
    )
    card = write_card(tmp_path, source, classes=2, train=4, val=4, test=4)
    plan = lab.plan("methods=[craft]", f"datasets=[{card}]", "shots=1", "budget.requests=100")
    (spec,) = plan.trials
    reserve(lab.ledger, plan, plan.trials, STORAGE)
    (row,) = run_trial(spec, lab.pool, STORAGE, lab.store, checkpoint_s=0)
    close_trials(lab.ledger, STORAGE, [spec], lab.store)
    assert row.status == "failed"
    assert row.error is not None and row.error.startswith("DataError: ") and "is not a readable image" in row.error
    (row,) = lab.store.rows_of(spec.trial_id)
    assert row.requests == spec.predicted.requests  # its fit was answered and stays paid; the last call was refunded
    assert row.evaluate_requests == 0
    assert verified(lab, [row])
    assert [t.open for t in lab.ledger.trials()] == [False]
    assert pending(plan, lab.store) == ([spec], {})
    assert list((lab.folder / "checkpoints").glob("*.ckpt"))  # from which the same command goes on


def test_a_trial_that_lost_all_its_workers_gets_a_failed_row_with_its_bill(lab: Lab) -> None:
    plan = lab.plan("methods=[taskres]")
    (spec,) = plan.trials
    reserve(lab.ledger, plan, plan.trials, STORAGE)
    run_trial(spec, lab.pool, STORAGE, lab.store)
    (lab.store.results / f"{spec.trial_id}.arrow").unlink()  # as if it had died before this file was written
    close_trials(lab.ledger, STORAGE, [spec], lab.store)
    (row,) = lab.store.rows_of(spec.trial_id)
    assert (row.status, row.requests) == ("failed", lab.paid(spec).requests)
    assert row.error is not None and "its worker died" in row.error
    assert verified(lab, [row])
    assert not finished(lab.store, spec)


def test_a_failed_recomputation_of_damaged_predictions_keeps_the_rows_of_every_test_set(lab: Lab) -> None:
    plan = lab.plan("methods=[zero_shot]", "protocol=base_to_new")
    (spec,) = plan.trials
    reserve(lab.ledger, plan, plan.trials, STORAGE)
    rows = run_trial(spec, lab.pool, STORAGE, lab.store)
    close_trials(lab.ledger, STORAGE, [spec], lab.store)
    assert len(rows) == 2
    lab.store.predictions_path(spec.trial_id, rows[1].test_set).write_bytes(b"damaged")

    assert pending(plan, lab.store) == ([spec], {})
    reserve(lab.ledger, plan, [spec], STORAGE)
    lab.store.write([failed_row(spec, "a bug", spec_columns(spec))])
    close_trials(lab.ledger, STORAGE, [spec], lab.store)
    assert lab.store.rows_of(spec.trial_id) == rows
    assert pending(plan, lab.store) == ([spec], {}), "it is not finished: the same command tries again"


def test_reservations_of_a_killed_run_for_removed_cells_are_released(lab: Lab) -> None:
    plan = lab.plan("methods=[taskres,craft]", "budget.requests=100", "budget.sweep.requests=150")
    reserve(lab.ledger, plan, plan.trials, STORAGE)  # and the run is killed
    fewer = lab.plan("methods=[taskres]", "budget.requests=100", "budget.sweep.requests=150").trials
    release_left_over(lab.ledger, STORAGE, fewer)
    assert [t.trial for t in lab.ledger.trials() if t.open] == [fewer[0].account]
    reserved = next(a.reserved for a in lab.ledger.accounts() if a.name == sweep_account(STORAGE))
    assert reserved.requests == fewer[0].predicted.requests


def test_a_ceiling_that_cannot_pay_all_trials_reserves_nothing_unless_partial(lab: Lab) -> None:
    words = ("methods=[taskres,craft]", "budget.requests=100", "budget.sweep.requests=50")
    plan = lab.plan(*words)
    with pytest.raises(BudgetExceeded, match="requests asked of account"):
        reserve(lab.ledger, plan, plan.trials, STORAGE)
    assert not [t for t in lab.ledger.trials() if t.open]
    plan = lab.plan(*words, "budget.partial=true")
    funded, unfunded = reserve(lab.ledger, plan, plan.trials, STORAGE)
    assert [t.choice.name for t in funded] == ["taskres"]
    assert list(unfunded) == [plan.trials[1].trial_id]


def test_a_ceiling_below_the_spent_amount_is_refused(lab: Lab) -> None:
    plan = lab.plan("methods=[craft]", "budget.requests=100")
    reserve(lab.ledger, plan, plan.trials, STORAGE)
    lowered = lab.plan("methods=[craft]", "budget.requests=100", "budget.sweep.requests=5")
    with pytest.raises(ConfigError, match="are charged or reserved already; raise the ceiling"):
        reserve(lab.ledger, lowered, lowered.trials, STORAGE)


TEAM = ("methods=[craft]", "budget.requests=100", "budget.global.name=team")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ((), None),
        (("budget.global.requests=200",), None),
        (("budget.global.requests=200", "budget.global.images=40000"), None),
        (
            ("budget.global.requests=201",),
            "limited to 200 requests and 40,000 images, and this sweep states 201 requests",
        ),
        (("budget.global.images=1",), r"farebox budget set team images=1 url=URL"),
    ],
)
def test_a_sweep_that_joins_a_budget_does_not_change_its_limits(
    lab: Lab, limits: tuple[str, ...], says: str | None
) -> None:
    wanted = Limits(requests=200, images=40000)
    lab.ledger.open_account("team", wanted)
    plan = lab.plan(*TEAM, *limits)
    with contextlib.nullcontext() if says is None else pytest.raises(ConfigError, match=says):
        reserve(lab.ledger, plan, plan.trials, STORAGE)
    assert lab.ledger.limits("team") == wanted
    assert len([t for t in lab.ledger.trials() if t.open]) == (says is None)


def test_the_first_sweep_of_a_budget_states_its_limit(lab: Lab) -> None:
    plan = lab.plan(*TEAM)
    with pytest.raises(ConfigError, match=r"no budget named 'team' .*known: ceiling\): .*budget\.global\.requests=N"):
        reserve(lab.ledger, plan, plan.trials, STORAGE)
    assert lab.ledger.limits("team") is None
    plan = lab.plan(*TEAM, "budget.global.images=50000")
    reserve(lab.ledger, plan, plan.trials, STORAGE)
    assert lab.ledger.limits("team") == Limits(images=50000)
    other = lab.plan(*TEAM[:2], f"budget.global.name={sweep_account('other')}", "budget.global.images=5")
    with pytest.raises(ConfigError, match="those of single sweeps"):
        reserve(lab.ledger, other, other.trials, STORAGE)


def test_the_limit_of_a_budget_holds_for_a_sweep_that_does_not_state_it(lab: Lab) -> None:
    lab.ledger.open_account("team", Limits(requests=5))
    plan = lab.plan(*TEAM)
    with pytest.raises(BudgetExceeded, match="of account 'team', which has 5 left"):
        reserve(lab.ledger, plan, plan.trials, STORAGE)


def test_problems_lists_differences_between_rows_and_ledger(lab: Lab) -> None:
    plan = lab.plan("methods=[taskres]")
    (spec,) = plan.trials
    reserve(lab.ledger, plan, plan.trials, STORAGE)
    (row,) = run_trial(spec, lab.pool, STORAGE, lab.store)
    close_trials(lab.ledger, STORAGE, [spec], lab.store)
    storage = replace(new_id(lab.folder), id=STORAGE)
    assert problems(plan, lab.store, lab.ledger, storage) == ()
    billed = {"requests": row.requests - 1, "adapt_requests": row.adapt_requests - 1}
    lab.store.write([replace(row, **billed, evaluate_requests=row.evaluate_requests + 1)])
    lines = problems(plan, lab.store, lab.ledger, storage)
    assert [line.partition(": its row says ")[2] for line in lines] == [
        f"{row.requests - 1} requests, the ledger {row.requests}",
        f"{row.adapt_requests - 1} adapt_requests, the ledger {row.adapt_requests}",
        f"{row.evaluate_requests + 1} evaluate_requests, the ledger {row.evaluate_requests}",
    ]
    lab.store.write([row])


def test_a_run_refuses_a_ledger_in_memory(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="a database in memory"):
        lab.plan("methods=[zero_shot]", "budget.global.url=sqlite://")


def test_a_run_refuses_a_damaged_ledger_before_it_charges(lab: Lab, tmp_path: Path) -> None:
    config = lab.plan("methods=[zero_shot]").config
    url = f"sqlite:///{tmp_path / 'other.db'}"
    config = replace(config, global_budget=replace(config.global_budget, url=url))
    ledger, _ = open_ledger(config, print)
    ledger.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as db, db:
        db.execute("UPDATE ledger_storage SET path = '/elsewhere'")
    with pytest.raises(ConfigError, match="is damaged: record ledger_storage"):
        open_ledger(config, print)


def test_a_rerun_of_a_finished_trial_is_free_and_reserves_nothing_new(lab: Lab) -> None:
    spec = lab.spec("taskres")
    first = lab.run(spec)
    lab.ledger.open_account("ceiling", Limits(requests=lab.paid(spec).requests))
    assert [r.predictions_digest for r in lab.run(spec)] == [r.predictions_digest for r in first]


def test_a_trial_with_a_damaged_row_runs_again_for_free(lab: Lab) -> None:
    plan = lab.plan("methods=[taskres]")
    (spec,) = plan.trials
    wanted, bills = [outcome(r) for r in lab.run(spec)], lab.bills(spec)
    path = lab.store.results / f"{spec.trial_id}.arrow"
    path.write_bytes(path.read_bytes()[:100])
    assert pending(plan, lab.store) == ([spec], {})
    assert path in lab.store.damaged
    assert [outcome(r) for r in lab.run(spec)] == wanted
    assert lab.bills(spec) == bills


def test_a_leftover_checkpoint_is_removed_when_its_trial_is_finished(lab: Lab) -> None:
    plan = lab.plan("methods=[craft]", "budget.requests=60")
    (spec,) = plan.trials
    folder = lab.folder / "checkpoints"
    folder.mkdir()
    (left := folder / f"{spec.account}.ckpt").write_bytes(b"")
    remove_checkpoints(lab.store, plan.trials)
    assert left.exists()  # its cell is to be run
    lab.run(spec)
    left.write_bytes(b"")
    remove_checkpoints(lab.store, plan.trials)
    assert not left.exists()
