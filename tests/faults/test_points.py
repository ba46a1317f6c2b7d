"""The real command, killed at named points and on a full disk: each time the same rows, leaderboard and ledger.

points.py lists the points. The undisturbed run has no MLflow to talk to, which changes nothing either.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from methods.base import Bill
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.budget import Phase
from pipeline.config.card_files import model_card
from pipeline.ledger.ledger import Ledger
from pipeline.results.store import ResultStore
from pipeline.sweep.reservations import pending, tidy
from pipeline.trials.trial import run_trial, spec_columns, write_failure
from tests.faults.long import Quiet, facts, leftovers, sweep_words
from tests.faults.points import FULL, Faults
from tests.faults.soak import soak
from tests.support.command import farebox, here
from tests.support.lab import STORAGE, Lab, outcome, plain_bill

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

AWAY = "mlflow=http://127.0.0.1:9"
STRUCK = {
    **{"replica.before_charge": 3, "replica.after_charge": 6, "replica.after_compute": 9},
    **{"ledger.before_commit": 8, "ledger.after_commit": 12, "trial.at_a_call": 9, "trial.between_renames": 1},
    **{"trial.row_written": 1, "trial.after_row": 1, "driver.reserving": 1, "driver.closing": 1},
}
"""Points of the default suite, and the how-manieth passing is struck. The long mode draws from all."""


@pytest.fixture(scope="session")
def words(card: Path) -> list[str]:
    return [*sweep_words("fake", card, quick=True), "checkpoint_s=0.1"]


@pytest.fixture(scope="session")
def quiet(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    """A run in which nobody dies; its MLflow is away."""
    storage, began = tmp_path_factory.mktemp("quiet"), time.monotonic()
    said = farebox("run", *words, AWAY, f"storage={storage}", f"features={storage / 'features'}").stdout
    assert "not mirrored to MLflow" in said and "later: farebox sync" in said
    assert "2 trials are in MLflow" in here("sync", f"storage={storage}")
    return Quiet(time.monotonic() - began, facts(storage))


def test_the_same_command_ends_alike_whichever_point_is_struck(words: list[str], quiet: Quiet, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    faults = Faults(tmp_path / "marks", storage)
    for point, nth in STRUCK.items():
        faults.at(point, nth)
    for _ in range(2 * len(STRUCK)):
        done = farebox(
            *("run", *words, f"storage={storage}", f"features={tmp_path / 'features'}"),
            env=faults.environment,
            expect=None,
        )
        assert "Traceback" not in done.stdout + done.stderr
        if done.returncode == 0:
            break
        assert done.returncode == -9 or "its worker died again and again" in done.stderr, done.stderr
    assert faults.happened == {f"{point}.{nth}" for point, nth in STRUCK.items()}
    assert facts(storage) == quiet.facts
    assert leftovers(storage) == []


def test_a_full_disk_stops_the_run_in_one_line_and_room_lets_it_go_on(
    words: list[str], quiet: Quiet, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    faults = Faults(tmp_path / "marks", storage)
    for name, fault in FULL.items():
        faults.add({"name": name, **fault})
    command = ("run", *words, f"storage={storage}", f"features={tmp_path / 'features'}")
    for place, says in {
        "checkpoint": f"{storage}/checkpoints/",
        "ledger": "database or disk is full: make room",
        "row": f"{storage}/results/",
    }.items():
        faults.full(place)
        done = farebox(*command, env=faults.environment, expect=3)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("farebox: ")]
        assert says in line and "make room" in line, line
        assert "Traceback" not in done.stdout + done.stderr
    faults.full(None)
    farebox(*command, env=faults.environment)
    assert facts(storage) == quiet.facts
    assert leftovers(storage) == []


def test_the_ledger_under_load_kills_and_clock_steps() -> None:
    found = soak(20_000, seed=3)
    assert found["problems"] == []
    assert found["charges"] >= 20_000


# Below: without Ray.


def test_an_orphaned_replica_charges_nothing_twice(lab: Lab, features: Path) -> None:
    """A replica of a former run, with a ledger client of its own, goes on beside the one that took its trial over."""
    spec = lab.spec("craft", "budget.requests=60")
    lab.reserve(spec)
    orphan = Ledger(f"sqlite:///{lab.folder / 'ledger.db'}")
    pool, store = LocalPool(Endpoint(model_card("fake"), features), orphan), ResultStore(lab.folder / "orphan")
    with ThreadPoolExecutor(2) as both:
        late = both.submit(run_trial, spec, pool, STORAGE, store)
        (row,) = both.submit(run_trial, spec, lab.pool, STORAGE, lab.store).result()
    assert [outcome(r) for r in late.result()] == [outcome(row)]
    assert lab.paid(spec) == plain_bill(row) == spec.predicted
    assert lab.bills(spec)[Phase.REPLAY] == Bill()
    lab.ledger.settle(STORAGE, spec.account)
    (again,) = run_trial(spec, pool, STORAGE, store)  # dead for a day, and all of it is asked again
    orphan.close()
    assert outcome(again) == outcome(row) and lab.paid(spec) == spec.predicted


def test_a_late_failure_of_an_orphan_leaves_a_finished_trial_as_it_is(lab: Lab) -> None:
    spec = lab.spec("taskres")
    rows = lab.run(spec)
    write_failure(spec, RuntimeError("its replicas are gone"), lab.store, spec_columns(spec))
    assert lab.store.rows_of(spec.trial_id) == rows


def test_a_damaged_row_is_named_and_its_cell_is_run_again_for_free(lab: Lab) -> None:
    plan = lab.plan("methods=[taskres]")
    (spec,) = plan.trials
    wanted, bills = [outcome(r) for r in lab.run(spec)], lab.bills(spec)
    path = lab.store.results / f"{spec.trial_id}.arrow"
    path.write_bytes(path.read_bytes()[:100])
    assert pending(plan, lab.store) == ([spec], {})
    assert path in lab.store.damaged
    assert [outcome(r) for r in lab.run(spec)] == wanted
    assert lab.bills(spec) == bills


def test_a_checkpoint_that_its_worker_could_not_remove_goes_when_the_cell_is_done(lab: Lab) -> None:
    plan = lab.plan("methods=[craft]", "budget.requests=60")
    (spec,) = plan.trials
    folder = lab.folder / "checkpoints"
    folder.mkdir()
    (left := folder / f"{spec.account}.ckpt").write_bytes(b"")
    tidy(lab.store, plan.trials)
    assert left.exists()  # its cell is to be run
    lab.run(spec)
    left.write_bytes(b"")
    tidy(lab.store, plan.trials)
    assert not left.exists()
