"""The ledger: nothing passes a limit, nothing is paid twice, whatever is repeated, reordered, shared or killed.

With FAREBOX_TEST_LEDGER set to the URL of a PostgreSQL database, the tests run there; its ledger tables are dropped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from methods.base import Bill
from pipeline.budget import BUDGETED_PHASES, UNITS, Limits, Phase, paid, row_columns
from pipeline.errors import BudgetExceeded, ConfigError, FareboxError, LedgerError
from pipeline.ledger import batch as ledger_batch
from pipeline.ledger.checksum import CHECKSUM
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import AccountRecord, Charge, Receipt
from pipeline.ledger.schema import REFUND, metadata
from tests.support.ledgers import MEMORY, SERVER, empty, tamper

ONE = Bill(requests=1, images=10, prompts=5, outputs=50)


sqlite_only = pytest.mark.skipif(SERVER is not None, reason="is about a SQLite file")


def ask(call: int, digest: str = "d", phase: Phase = Phase.ADAPT, trial: str = "t", bill: Bill = ONE) -> Charge:
    return Charge("s", trial, call, digest, phase, bill)


def statuses(answers: list[Receipt | BudgetExceeded]) -> list[str]:
    return [a.status if isinstance(a, Receipt) else f"{a.account}: {a.unit}" for a in answers]


def account(ledger: Ledger, name: str) -> AccountRecord:
    return next(a for a in ledger.accounts() if a.name == name)


# --- reservation ---------------------------------------------------------------------------------------------------


def test_a_reservation_is_taken_from_all_accounts_or_from_none(ledger: Ledger) -> None:
    ledger.open_account("sweep", Limits(requests=100))
    ledger.open_account("team", Limits(requests=10))
    with pytest.raises(BudgetExceeded) as refused:
        ledger.reserve("s", "t", ["sweep", "team"], Limits(requests=11))
    assert (refused.value.account, refused.value.asked, refused.value.limit) == ("team", 11, 10)
    assert account(ledger, "sweep").committed == Bill()
    ledger.reserve("s", "t", ["sweep", "team"], Limits(requests=10))
    assert [a.reserved.requests for a in ledger.accounts()] == [10, 10]


def test_trials_are_reserved_together_or_not_at_all_and_released_together(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=10))
    ledger.reserve("s", "t0", ["a"], Limits(requests=1))
    with pytest.raises(BudgetExceeded, match="5 requests asked of account 'a', which has 4 left"):
        ledger.reserve_all("s", {"t0": Limits(requests=1), "t1": Limits(requests=5), "t2": Limits(requests=5)}, ["a"])
    assert [t.trial for t in ledger.trials()] == ["t0"] and account(ledger, "a").reserved.requests == 1
    ledger.reserve_all("s", {f"t{i}": Limits(requests=3 if i else 1) for i in range(4)}, ["a"])
    assert account(ledger, "a").reserved.requests == 10 and all(t.open for t in ledger.trials())
    ledger.charge([ask(0, trial="t1")])
    with pytest.raises(LedgerError, match="no trial other of s"):
        ledger.release_all("s", ["t0", "other"])
    assert all(t.open for t in ledger.trials())
    for _ in range(2):
        assert ledger.release_all("s", ["t3", "t1", "t0"]) == {"t3": Bill(), "t1": ONE, "t0": Bill()}
    assert [t.trial for t in ledger.trials() if t.open] == ["t2"]
    assert (account(ledger, "a").reserved.requests, account(ledger, "a").spent) == (3, ONE)
    assert ledger.verify() == []


@pytest.mark.parametrize("unit", ["requests", "images"])
def test_an_account_is_filled_to_its_limit_exactly(ledger: Ledger, unit: str) -> None:
    ledger.open_account("a", Limits(**{unit: 10}))
    ledger.reserve("s", "t1", ["a"], Limits(6, 6))
    ledger.reserve("s", "t2", ["a"], Limits(4, 4))
    with pytest.raises(BudgetExceeded, match=f"1 {unit} asked of account 'a', which has 0 left"):
        ledger.reserve("s", "t3", ["a"], Limits(1, 1))


def test_reserving_again_changes_nothing(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=10))
    for _ in range(3):
        ledger.reserve("s", "t", ["a", "a"], Limits(requests=10))
    assert account(ledger, "a").reserved.requests == 10
    with pytest.raises(LedgerError, match="is open with"):
        ledger.reserve("s", "t", ["a"], Limits(requests=9))


def test_settling_gives_back_what_was_not_spent_once(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=10))
    ledger.reserve("s", "t", ["a"], Limits(requests=10))
    ledger.charge([ask(0), ask(1, phase=Phase.VALIDATE), ask(2, phase=Phase.EVALUATE)])
    for _ in range(2):
        assert ledger.release("s", "t") == ONE * 2
    after = account(ledger, "a")
    assert (after.reserved, after.spent, after.charged, after.trials) == (Bill(), ONE * 2, ONE * 2, 1)
    ledger.reserve("s", "t2", ["a"], Limits(requests=8))


def test_a_settled_trial_pays_nothing_more_but_is_still_evaluated(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=10))
    ledger.reserve("s", "t", ["a"], Limits(requests=10))
    ledger.charge([ask(0)])
    ledger.release("s", "t")
    answers = ledger.charge([ask(0), ask(1), ask(2, phase=Phase.EVALUATE), ask(3, phase=Phase.CURVE)])
    assert statuses(answers) == ["replayed", "trial t: requests", "charged", "charged"]


def test_a_reopened_trial_takes_only_what_it_has_not_spent(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=10))
    ledger.reserve("s", "t", ["a"], Limits(requests=10))
    ledger.charge([ask(n) for n in range(4)])
    ledger.release("s", "t")
    ledger.reserve("s", "other", ["a"], Limits(requests=1))
    with pytest.raises(BudgetExceeded, match="6 requests asked of account 'a', which has 5 left"):
        ledger.reserve("s", "t", ["a"], Limits(requests=10))
    ledger.release("s", "other")
    ledger.reserve("s", "t", ["a"], Limits(requests=10))
    assert statuses(ledger.charge([ask(n) for n in range(11)])) == (
        ["replayed"] * 4 + ["charged"] * 6 + ["trial t: requests"]
    )
    assert ledger.release("s", "t").requests == 10
    assert account(ledger, "a").spent.requests == 10
    with pytest.raises(LedgerError, match="has spent"):
        ledger.reserve("s", "t", ["a"], Limits(requests=9))


def test_the_phase_tune_is_paid_from_the_allotment_and_diverges_as_the_others(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=3))
    ledger.reserve("s", "t", ["a"], Limits(requests=2))
    answers = ledger.charge([ask(0, phase=Phase.TUNE), ask(1), ask(2, phase=Phase.TUNE), ask(0, "x", Phase.TUNE)])
    assert statuses(answers) == ["charged", "charged", "trial t: requests", "diverged"]
    bills = ledger.trial_bill("s", "t")
    assert (bills[Phase.TUNE], bills[Phase.ADAPT], bills[Phase.REPLAY]) == (ONE, ONE, ONE)
    assert paid(bills) == ONE * 2


def test_a_ledger_of_an_earlier_version_gets_the_columns_of_the_phase_tune(url: str) -> None:
    first = Ledger(url)
    first.open_account("a", Limits(requests=3))
    first.reserve("s", "t", ["a"], Limits(requests=3))
    first.charge([ask(0)])
    first.close()
    for unit in UNITS:
        tamper(url, f"ALTER TABLE ledger_trial DROP COLUMN tune_{unit}")
    again = Ledger(url)
    assert again.verify() == [] and again.trial_bill("s", "t")[Phase.ADAPT] == ONE
    again.charge([ask(1, phase=Phase.TUNE)])
    assert again.verify() == [] and again.trial_bill("s", "t")[Phase.TUNE] == ONE
    tamper(url, "UPDATE ledger_trial SET tune_requests = 0, tune_images = 0, tune_prompts = 0, tune_outputs = 0")
    with pytest.raises(LedgerError, match="damaged: record ledger_trial"):
        again.trial_bill("s", "t")
    again.close()


def test_an_account_named_later_takes_over_the_whole_bill(ledger: Ledger) -> None:
    ledger.open_account("a", Limits())
    ledger.reserve("s", "t", ["a"], Limits(requests=10))
    ledger.charge([ask(0), ask(0, "other")])
    ledger.open_account("late", Limits(requests=11))
    ledger.reserve("s", "t", ["late"], Limits(requests=10))
    assert account(ledger, "late").committed.requests == 11
    ledger.release("s", "t")
    assert account(ledger, "late").spent == account(ledger, "a").spent == ONE * 2


def test_an_endless_allotment_needs_endless_accounts(ledger: Ledger) -> None:
    ledger.open_account("free", Limits())
    ledger.open_account("a", Limits(images=5))
    with pytest.raises(ConfigError, match=r"set budget\.images"):
        ledger.reserve("s", "t", ["free", "a"], Limits(requests=10))
    ledger.reserve("s", "t", ["free"], Limits())
    assert statuses(ledger.charge([ask(n) for n in range(3)])) == ["charged"] * 3
    with pytest.raises(LedgerError, match="1 open trials on it have no such limit"):
        ledger.set_limits("free", Limits(requests=100))
    ledger.release("s", "t")
    ledger.set_limits("free", Limits(requests=100))
    assert account(ledger, "free").spent == ONE * 3


def test_limits_change_but_never_below_what_is_committed(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=10))
    ledger.reserve("s", "t", ["a"], Limits(requests=7))
    ledger.set_limits("a", Limits(requests=7))
    with pytest.raises(LedgerError, match="cannot be limited to 6 requests: 7 are charged or reserved"):
        ledger.set_limits("a", Limits(requests=6))
    assert account(ledger, "a").limits == Limits(requests=7)
    ledger.set_limits("a", Limits())
    assert account(ledger, "a").limits == Limits()
    with pytest.raises(LedgerError, match="no account named 'b'"):
        ledger.set_limits("b", Limits(requests=1))


@pytest.mark.parametrize("limits", [Limits(), Limits(requests=4), Limits(requests=10, images=5)])
def test_opening_an_account_again_keeps_its_limits(ledger: Ledger, limits: Limits) -> None:
    assert ledger.open_account("a", Limits(requests=10)) == Limits(requests=10)
    assert ledger.open_account("a", limits) == Limits(requests=10)
    assert account(ledger, "a").limits == Limits(requests=10)


def test_what_does_not_exist_is_named(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="no account named 'nobody'"):
        ledger.reserve("s", "t", ["nobody"], Limits(requests=1))
    with pytest.raises(LedgerError, match="no trial t of s"):
        ledger.release("s", "t")
    assert ledger.trials() == []
    assert ledger.trial_bill("s", "t") == {phase: Bill() for phase in Phase}


# --- charges -------------------------------------------------------------------------------------------------------


def test_the_same_call_is_paid_once_and_another_under_its_number_is_a_replay(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=12))
    ledger.reserve("s", "t", ["a"], Limits(requests=10))
    assert statuses(ledger.charge([ask(0), ask(0)])) == ["charged", "replayed"]
    answers = ledger.charge([ask(0, "b"), ask(0, "b"), ask(0), ask(0, "c"), ask(0, "e")])
    assert statuses(answers) == ["diverged", "replayed", "replayed", "diverged", "a: requests"]
    assert ledger.trial_bill("s", "t") == {phase: Bill() for phase in Phase} | {
        Phase.ADAPT: ONE,
        Phase.REPLAY: ONE * 2,
    }
    now = account(ledger, "a")
    assert (now.reserved.requests, now.spent, now.charged) == (10, ONE * 2, ONE * 3)


def test_each_charge_of_a_batch_is_decided_on_its_own(ledger: Ledger) -> None:
    ledger.open_account("a", Limits())
    ledger.reserve("s", "t", ["a"], Limits(requests=3, images=25))
    ledger.reserve("s", "u", ["a"], Limits(requests=1))
    answers = ledger.charge([ask(0), ask(1, bill=ONE * 2), ask(0, trial="u"), ask(2), ask(1, trial="u"), ask(3)])
    no_images = "trial t: images"
    assert statuses(answers) == ["charged", no_images, "charged", "charged", "trial u: requests", no_images]
    refused = answers[1]
    assert isinstance(refused, BudgetExceeded)
    assert (refused.asked, refused.spent, refused.limit) == (20, 10, 25)


def test_evaluation_and_curve_are_recorded_and_never_limited(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(0, 0))
    ledger.reserve("s", "t", ["a"], Limits(0, 0))
    free = [ask(0, phase=Phase.EVALUATE), ask(1, phase=Phase.CURVE), ask(0, "other", Phase.EVALUATE)]
    assert statuses(ledger.charge(free)) == ["charged", "charged", "diverged"]
    bills = ledger.trial_bill("s", "t")
    assert [bills[p] for p in (Phase.EVALUATE, Phase.CURVE, Phase.REPLAY)] == [ONE] * 3
    assert paid(bills) == account(ledger, "a").charged == Bill()


def test_a_trial_that_never_reserved_has_an_allotment_of_nothing(ledger: Ledger) -> None:
    assert statuses(ledger.charge([ask(0), ask(1, phase=Phase.EVALUATE)])) == ["trial t: requests", "charged"]


def test_one_id_with_two_bills_is_an_error_and_charges_nothing(ledger: Ledger) -> None:
    ledger.open_account("a", Limits())
    ledger.reserve("s", "t", ["a"], Limits())
    ledger.charge([ask(0)])
    with pytest.raises(LedgerError, match="was made with"):
        ledger.charge([ask(1), ask(0, bill=ONE * 2)])
    assert paid(ledger.trial_bill("s", "t")) == ONE


def test_a_refund_leaves_a_trace_and_frees_its_call(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=3))
    ledger.reserve("s", "t", ["a"], Limits(requests=2))
    ledger.charge([ask(0), ask(1), ask(0, "b")])
    for _ in range(2):
        ledger.refund([ask(0).id, ask(0, "b").id, ask(9).id, ask(0, trial="nobody").id])
    assert ledger.trial_bill("s", "t")[Phase.REPLAY] == Bill()
    assert paid(ledger.trial_bill("s", "t")) == ONE
    assert statuses(ledger.charge([ask(0, "c"), ask(0)])) == ["charged", "diverged"]
    trace = [(r.charge.call, r.charge.digest, r.diverged, r.refunded) for r in ledger.charges("s", "t")]
    refunded = [(0, "d", False, True), (0, "b", True, True)]
    assert sorted(trace) == sorted([*refunded, (0, "c", False, False), (0, "d", True, False), (1, "d", False, False)])


def test_a_refund_after_settling_goes_back_to_the_accounts(ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=2))
    ledger.reserve("s", "t", ["a"], Limits(requests=2))
    ledger.charge([ask(0), ask(1)])
    ledger.release("s", "t")
    ledger.refund([ask(1).id])
    assert account(ledger, "a").spent == ledger.release("s", "t") == ONE


def test_batches_of_any_size(ledger: Ledger) -> None:
    ledger.open_account("a", Limits())
    trials = [f"t{n}" for n in range(100)]
    for trial in trials:
        ledger.reserve("s", trial, ["a"], Limits(requests=30))
    batch = [ask(call, trial=trial) for call in range(30) for trial in trials]
    assert ledger.charge([]) == []
    assert set(statuses(ledger.charge(batch))) == {"charged"}
    assert set(statuses(ledger.charge(batch))) == {"replayed"}
    assert account(ledger, "a").charged == ONE * 3000


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ask(0, phase=Phase.REPLAY),
        lambda: ask(0, bill=Bill(requests=-1)),
        lambda: ask(0, trial="a/b"),
        lambda: ask(0, digest="a/b"),
    ],
)
def test_an_impossible_charge_cannot_be_made(wrong: Any) -> None:
    with pytest.raises(ValueError):
        wrong()


@pytest.mark.parametrize("limit", [-1, 2**63])
def test_an_impossible_limit_cannot_be_made(limit: int) -> None:
    with pytest.raises(ConfigError, match="invalid limit of"):
        Limits(requests=limit)


def test_a_storage_id_may_hold_slashes(ledger: Ledger) -> None:
    charge = Charge("runs/demo", "t", 0, "d", Phase.EVALUATE, ONE)
    ledger.charge([charge])
    ledger.refund([charge.id])
    assert ledger.charges("runs/demo", "t")[0].refunded


# --- durability ----------------------------------------------------------------------------------------------------


def test_everything_is_on_disk_when_a_call_returns(url: str, ledger: Ledger) -> None:
    ledger.open_account("a", Limits(requests=5))
    ledger.reserve("s", "t", ["a"], Limits(requests=5))
    ledger.charge([ask(0)])
    other = Ledger(url)
    assert (other.accounts(), other.trials("s")) == (ledger.accounts(), ledger.trials())
    assert statuses(other.charge([ask(0)])) == ["replayed"]
    other.close()


def test_a_transaction_that_is_cut_off_leaves_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise InterruptedError

    ledger.open_account("a", Limits(requests=5))
    ledger.reserve("s", "t", ["a"], Limits(requests=5))
    ledger.charge([ask(0)])
    before = (ledger.accounts(), ledger.trials(), ledger.charges("s", "t"))
    for verb, call in (
        ("save_trials", lambda: ledger.charge([ask(1)])),  # after the charges, before the totals
        ("save_accounts", lambda: ledger.charge([ask(1), ask(0, "b")])),
        ("save_accounts", lambda: ledger.refund([ask(0).id])),
        ("save_accounts", lambda: ledger.release("s", "t")),
        ("save_accounts", lambda: ledger.reserve("s", "u", ["a"], Limits(requests=0))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.ledger.rows.{verb}", cut)
            with pytest.raises(InterruptedError):
                call()
        assert (ledger.accounts(), ledger.trials(), ledger.charges("s", "t")) == before


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("sqlite:////nowhere/at/all/ledger.db", "unable to open"),
        ("mysql://me:secret@host/db", "expected sqlite"),
        ("not a url", "not parse"),
    ],
)
def test_a_ledger_that_cannot_be_used_says_so_in_one_line(bad: str, says: str) -> None:
    with pytest.raises(LedgerError, match=says) as error:
        Ledger(bad)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_damaged_file_is_a_ledger_error(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    file.write_bytes(b"this is no database" * 100)
    with pytest.raises(LedgerError, match=r"ledger\.db cannot be used: file is not a database .*restore a backup"):
        Ledger(f"sqlite:///{file}")


@sqlite_only
def test_damage_in_the_middle_of_the_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{file}")
    ledger.charge([ask(n, phase=Phase.EVALUATE) for n in range(500)])
    assert ledger.verify() == []
    ledger.close()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(8192) + whole[len(whole) // 2 + 8192 :])
    with pytest.raises(LedgerError, match=r"malformed .*restore a backup"):
        Ledger(f"sqlite:///{file}").verify()


@sqlite_only
def test_a_full_disk_is_told_and_room_lets_the_same_charges_go_on(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    calls = [ask(n, phase=Phase.EVALUATE) for n in range(2000)]
    ledger.charge(calls[:100])
    before = ledger.trials()
    with ledger._store.write() as db:
        db.exec_driver_sql("PRAGMA max_page_count = 1")  # the file cannot grow any more
    with pytest.raises(LedgerError, match=r"database or disk is full: make room.*the same command again"):
        ledger.charge(calls)
    assert ledger.trials() == before
    ledger.close()  # the limit belonged to the connection
    assert statuses(ledger.charge(calls)) == ["replayed"] * 100 + ["charged"] * 1900
    assert ledger.verify() == []
    ledger.close()


def test_a_ledger_of_another_schema_is_refused(url: str) -> None:
    Ledger(url).close()
    tamper(url, "UPDATE ledger_meta SET value = '99'")
    with pytest.raises(ConfigError, match=r"schema 99, .* another version made it"):
        Ledger(url)


def test_a_ledger_in_memory_serves_a_notebook() -> None:
    ledger = Ledger("sqlite://")
    ledger.open_account("a", Limits(requests=1))
    ledger.reserve("s", "t", ["a"], Limits(requests=1))
    assert statuses(ledger.charge([ask(0), ask(1)])) == ["charged", "trial t: requests"]
    assert ledger.verify() == []
    ledger.close()


# --- verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE ledger_charge SET images = images - 1 WHERE call = 0", "trial s/t: adapt images: 20 stored, 19 by"),
        ("UPDATE ledger_charge SET phase = 'evaluate' WHERE call = 0", "trial s/t: adapt requests: 2 stored, 1 by"),
        ("UPDATE ledger_charge SET phase = 'gift' WHERE call = 0", "unknown phase 'gift'"),
        ("UPDATE ledger_charge SET diverged = false WHERE digest = 'b'", "call 0 was paid more than once"),
        pytest.param(  # PostgreSQL does not let it happen
            "UPDATE ledger_charge SET trial_no = 77 WHERE call = 1",
            "a trial number 77 that does not exist",
            marks=sqlite_only,
        ),
        ("DELETE FROM ledger_charge WHERE call = 1", "trial s/t: adapt requests: 2 stored, 1 by its charges"),
        ("UPDATE ledger_trial SET adapt_requests = 1", "trial s/t: adapt requests: 1 stored, 2 by its charges"),
        ("UPDATE ledger_trial SET limit_requests = 1", "2 requests are spent of an allotment of 1"),
        ("UPDATE ledger_account SET held_requests = 4", "account 'a': reserved requests: 4 stored, 5 by"),
        ("UPDATE ledger_account SET spent_outputs = 0", "account 'a': spent outputs: 0 stored, 50 by"),
        ("UPDATE ledger_account SET limit_requests = 5", "6 requests are charged or reserved of 5"),
    ],
)
def test_verify_names_what_was_tampered_with(url: str, statement: str, says: str) -> None:
    ledger = Ledger(url)
    ledger.open_account("a", Limits(requests=10))
    ledger.reserve("s", "t", ["a"], Limits(requests=5))
    ledger.charge([ask(0), ask(1), ask(0, "b"), ask(2, phase=Phase.EVALUATE)])
    assert ledger.verify() == []
    tamper(url, statement, reseal=True)
    assert any(says in problem for problem in ledger.verify()), ledger.verify()
    tamper(url, "UPDATE ledger_trial SET checksum = checksum + 1")
    assert [problem.split()[:3] for problem in ledger.verify()] == [["damaged", "record", "ledger_trial"]]
    ledger.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a ledger with records in every table."""
    file = tmp_path_factory.mktemp("finished") / "ledger.db"
    ledger = Ledger(f"sqlite:///{file}")
    ledger.open_account("a", Limits(requests=50))
    ledger.register("s", "/runs/demo", "here")
    for trial in ("t", "u", "v"):
        ledger.reserve("s", trial, ["a"], Limits(requests=12))
        ledger.charge([ask(n, trial=trial, phase=Phase.ADAPT if n < 9 else Phase.EVALUATE) for n in range(30)])
    ledger.charge([ask(0, "b")])
    ledger.refund([ask(3).id])
    ledger.release("s", "u")
    ledger.money.open("s", "a", 1000)
    for n in range(20):
        ledger.money.pay("s", "t", f"call {n}", 10)
    ledger.money.settle("s", "call 0", 7)
    ledger.money.reserve("s", 500)
    assert ledger.verify() == []
    ledger.close()
    return file.read_bytes()


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def uses(ledger: Ledger, table: str) -> object:
    """Read the records of a table as a run or a command does."""
    if table == "ledger_charge":
        return ledger.charges("s", "t"), ledger.charge([ask(n, "b" if n == 0 else "d") for n in (0, 1, 0)])
    if table == "ledger_refund":
        return ledger.charges("s", "t")
    if table == "ledger_storage":
        return ledger.storage("s")
    if table == "ledger_payment":
        return ledger.money.payments("s")
    if table in ("ledger_purse", "ledger_part"):
        return ledger.money.pay("s", "t", "another call", 10)
    return ledger.accounts(), ledger.release("s", "t"), ledger.charge([ask(99)])


@sqlite_only
def test_a_changed_value_in_any_column_is_named_and_never_used(finished: bytes, memory: Path) -> None:
    hidden = {"ledger_charge": ("trial_no", "call"), "ledger_refund": ("trial_no",)}
    hidden |= dict.fromkeys(("ledger_storage", "ledger_payment", "ledger_part"), ("storage",))
    columns = [column for table in metadata.sorted_tables if CHECKSUM in table.c for column in table.c]
    for number, column in enumerate(c for c in columns if (c.table is REFUND, c.name) != (True, "no")):
        table, file = column.table.name, memory / f"{number}.db"
        file.write_bytes(finished)
        value = f"{column.name} || 'x'" if isinstance(column.type, sa.Text) else f"coalesce({column.name}, 0) + 100"
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            db.execute(f"UPDATE {table} SET {column.name} = {value}")
        with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
            problems = ledger.verify()
            assert problems and all(line.startswith(f"damaged record {table} ") for line in problems), column
            calls = [lambda ledger=ledger: ledger.check("s")]
            if column.name not in hidden.get(table, ()):  # else a look-up misses it: a run's start finds it
                calls.append(lambda ledger=ledger, table=table: uses(ledger, table))
            for call in calls:
                with pytest.raises(LedgerError, match="damaged") as error:
                    call()
                assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


@sqlite_only
def test_a_damaged_byte_anywhere_never_changes_a_figure(finished: bytes, memory: Path) -> None:
    def figures(ledger: Ledger) -> object:
        trials = ledger.accounts(), ledger.trials("s"), ledger.reservations(), ledger.charges("s", "t")
        return trials, ledger.money.purses(), ledger.money.payments("s")

    rng, refused, file = random.Random(1), 0, memory / "ledger.db"
    file.write_bytes(finished)
    with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
        whole = figures(ledger)
    for _ in range(100):
        damaged, at = bytearray(finished), rng.randrange(len(finished))
        damaged[at] ^= rng.randrange(1, 256)
        for part in memory.iterdir():
            part.unlink()
        file.write_bytes(damaged)
        problems: list[str] = []
        with contextlib.ExitStack() as stack:
            try:
                ledger = stack.enter_context(contextlib.closing(Ledger(f"sqlite:///{file}")))
                problems = ledger.verify()
                assert figures(ledger) == whole or problems, at
            except (LedgerError, ConfigError) as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) <= 300, at
    assert refused > 10


def test_verify_compares_result_rows_with_the_books(ledger: Ledger) -> None:
    ledger.open_account("a", Limits())
    ledger.reserve("s", "t", ["a"], Limits())
    ledger.charge([ask(0), ask(1, phase=Phase.VALIDATE), ask(2, phase=Phase.EVALUATE), ask(3, phase=Phase.EVALUATE)])
    columns = {"trial_id": "t", **row_columns(ledger.trial_bill("s", "t"))}
    assert (columns["requests"], columns["adapt_requests"], columns["evaluate_images"]) == (2, 1, 20)
    per_test_set = columns | {f"evaluate_{unit}": n for unit, n in vars(ONE).items()}
    assert ledger.verify([per_test_set, per_test_set]) == []  # two test sets: one bill, and an evaluation each
    assert ledger.verify([{"trial_id": "t", "requests": 2, "images": 20, "evaluate_requests": None}]) == []
    assert ledger.verify([columns | {"images": 21}]) == ["trial t: its row says 21 images, the ledger 20"]
    assert ledger.verify([per_test_set]) != []
    assert ledger.verify([{"trial_id": "unfunded", "requests": 0}]) == []
    assert ledger.verify([{"trial_id": "unknown", "requests": 1}]) != []
    ledger.charge([Charge("s2", "t", 0, "d", Phase.EVALUATE, ONE)])
    assert "2 storages" in ledger.verify([columns])[0]
    assert ledger.verify([columns], storage="s") == []


# --- any order, any repetition, any process ------------------------------------------------------------------------

TRIALS = st.sampled_from(["t1", "t2"])
ACCOUNTS = st.sampled_from([["sweep"], ["sweep", "team"], ["sweep", "team"], ["team"], ["late"]])
BILLS = st.sampled_from([Bill(1, 10, 5, 50), Bill(2, 5, 10, 25), Bill(0, 7, 0, 7), Bill(3, 0, 15, 15)])
AMOUNT = st.none() | st.integers(0, 12)
LIMITS = st.builds(Limits, AMOUNT, st.none() | st.integers(0, 120))
ALLOTMENTS = st.sampled_from([Limits(8, 80), Limits(8, 80), Limits(4, 60), Limits(8, None), Limits(None, 80), Limits()])
CALLS = st.tuples(
    TRIALS,
    st.integers(0, 4),
    st.sampled_from(["x", "x", "y"]),
    st.sampled_from([Phase.ADAPT, Phase.ADAPT, Phase.VALIDATE, Phase.EVALUATE, Phase.CURVE]),
)


def killed(save: Callable[[Any], None]) -> Callable[[Any], None]:
    """A batch's `save` after which its process is no more."""

    def saved(batch: Any) -> None:
        save(batch)
        os.kill(os.getpid(), signal.SIGKILL)

    return saved


class Books(RuleBasedStateMachine):
    """Two ledgers on one file against a plain model that adds up its whole history for every question."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = "s"
        self.named = {"sweep": "sweep", "team": "team", "late": "late"}
        """Present names of the accounts."""
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.url = empty(Path(self.folder.name))
        self.time = time.time
        self.ledgers = [Ledger(self.url), Ledger(self.url)]
        self.limits = {"sweep": Limits(requests=14), "team": Limits(images=150)}
        for name, limits in self.limits.items():
            self.ledgers[0].open_account(name, limits)
        self.opened = {"t1": True}
        self.allotment = {"t1": Limits(8, 80)}
        self.on = {"t1": {"sweep"}}
        self.ledgers[0].reserve(self.storage, "t1", ["sweep"], Limits(8, 80))
        self.bills: dict[tuple[str, int, str, Phase], Bill] = {}  # one payload, one price
        self.live: dict[tuple[str, int, str], tuple[Phase, Bill, bool]] = {}

    def teardown(self) -> None:
        time.time = self.time
        for ledger in self.ledgers:
            ledger.close()
        self.folder.cleanup()

    def spent(self, trial: str) -> Bill:
        return sum(
            (b for (t, _, _), (p, b, d) in self.live.items() if t == trial and p in BUDGETED_PHASES and not d), Bill()
        )

    def replays(self, trial: str) -> Bill:
        return sum(
            (b for (t, _, _), (p, b, d) in self.live.items() if t == trial and p in BUDGETED_PHASES and d), Bill()
        )

    def committed(self, name: str) -> Bill:
        mine = [t for t, names in self.on.items() if name in names]
        return sum((self.allotment[t].bill if self.opened[t] else self.spent(t) for t in mine), Bill()) + sum(
            (self.replays(t) for t in mine), Bill()
        )

    @staticmethod
    def _endless(allotment: Limits, limits: Limits) -> bool:
        units = ("requests", "images")
        return any(getattr(limits, u) is not None and getattr(allotment, u) is None for u in units)

    @rule(which=st.integers(0, 1), name=st.sampled_from(["sweep", "team", "late"]), limits=LIMITS)
    def open_account(self, which: int, name: str, limits: Limits) -> None:
        """A sweep joins a budget: it makes it, or leaves its limits alone."""
        name = self.named[name]
        assert self.ledgers[which].open_account(name, limits) == self.limits.setdefault(name, limits)

    @rule(which=st.integers(0, 1), name=st.sampled_from(["sweep", "team", "late"]), limits=LIMITS)
    def set_limits(self, which: int, name: str, limits: Limits) -> None:
        name = self.named[name]
        if name not in self.limits:
            with pytest.raises(LedgerError, match="no account named"):
                self.ledgers[which].set_limits(name, limits)
            return
        endless = any(
            name in names and self.opened[t] and self._endless(self.allotment[t], limits)
            for t, names in self.on.items()
        )
        try:
            self.ledgers[which].set_limits(name, limits)
        except LedgerError:
            assert endless or limits.exceeded_unit(self.committed(name), Bill())
        else:
            assert not endless and not limits.exceeded_unit(self.committed(name), Bill())
            self.limits[name] = limits

    @rule(
        which=st.integers(0, 1),
        trial=TRIALS,
        names=ACCOUNTS,
        allotment=ALLOTMENTS,
        same=st.sampled_from([True, True, False]),
    )
    def reserve(self, which: int, trial: str, names: list[str], allotment: Limits, same: bool) -> None:
        names = [self.named.get(name, name) for name in names]
        allotment = self.allotment.get(trial, allotment) if same else allotment
        before = (dict(self.opened), dict(self.allotment), {t: set(n) for t, n in self.on.items()})
        contradicts = (self.opened.get(trial) and self.allotment[trial] != allotment) or allotment.exceeded_unit(
            self.spent(trial), Bill()
        )
        repeated = self.opened.get(trial, False) and self.on[trial].issuperset(names)
        all_names = self.on.get(trial, set()).union(names)
        self.opened[trial], self.allotment[trial], self.on[trial] = True, allotment, all_names
        fits = all_names <= set(self.limits) and not any(
            self.limits[n].exceeded_unit(self.committed(n), Bill()) or self._endless(allotment, self.limits[n])
            for n in all_names
        )
        try:
            self.ledgers[which].reserve(self.storage, trial, names, allotment)
        except FareboxError:
            assert contradicts or not fits
            self.opened, self.allotment, self.on = before
        else:
            assert not contradicts and (fits or repeated)

    @precondition(lambda self: any(self.opened.values()))
    @rule(which=st.integers(0, 1), trial=TRIALS)
    def settle(self, which: int, trial: str) -> None:
        try:
            assert self.ledgers[which].release(self.storage, trial) == self.spent(trial)
        except LedgerError:
            assert trial not in self.opened
        else:
            if trial in self.opened:
                self.opened[trial] = False

    @rule(which=st.integers(0, 1), calls=st.lists(CALLS, min_size=2, max_size=8), bill=BILLS)
    def charge(self, which: int, calls: list[tuple[str, int, str, Phase]], bill: Bill) -> None:
        charges = []
        for trial, call, digest, phase in calls:
            price = self.bills.setdefault((trial, call, digest, phase), bill)
            charges.append(Charge(self.storage, trial, call, f"{digest}{phase.value}", phase, price))
        for c, answer in zip(charges, self.ledgers[which].charge(charges), strict=True):
            assert self._predict(c) == (answer.status if isinstance(answer, Receipt) else "refused")

    @rule(which=st.integers(0, 1), trial=TRIALS, first=st.integers(0, 4), n=st.integers(1, 3))
    def fit(self, which: int, trial: str, first: int, n: int) -> None:
        """A method at work: the next calls of one trial."""
        self.charge(which, [(trial, call, "x", Phase.ADAPT) for call in range(first, first + n)], Bill(1, 5, 5, 25))

    @precondition(lambda self: self.opened)
    @rule(which=st.integers(0, 1), data=st.data())
    def resume(self, which: int, data: st.DataObject) -> None:
        """The same command again: every trial is reserved as it was."""
        trial = data.draw(st.sampled_from(sorted(self.opened)))
        self.reserve(which, trial, sorted(self.on[trial]), self.allotment[trial], True)

    def _predict(self, c: Charge) -> str:
        key = (c.trial, c.call, c.digest)
        if key in self.live:
            return "replayed"
        diverged = any(t == c.trial and n == c.call and not d for (t, n, _), (_, _, d) in self.live.items())
        if c.phase in BUDGETED_PHASES and diverged:
            if any(self.limits[a].exceeded_unit(self.committed(a), c.bill) for a in self.on.get(c.trial, ())):
                return "refused"
        elif c.phase in BUDGETED_PHASES:
            spent = self.spent(c.trial)
            left = self.allotment[c.trial] if self.opened.get(c.trial) else Limits(spent.requests, spent.images)
            if left.exceeded_unit(spent, c.bill):
                return "refused"
        self.live[key] = (c.phase, c.bill, diverged)
        self.opened.setdefault(c.trial, False)
        self.allotment.setdefault(c.trial, Limits(0, 0))
        self.on.setdefault(c.trial, set())
        return "diverged" if diverged else "charged"

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 1), data=st.data())
    def refund(self, which: int, data: st.DataObject) -> None:
        trial, call, digest = key = data.draw(st.sampled_from(sorted(self.live)))
        for _ in range(2):
            self.ledgers[which].refund([f"{self.storage}/{trial}/{call}/{digest}"])
        del self.live[key]

    @rule(which=st.integers(0, 1))
    def release(self, which: int) -> None:
        """The storage was deleted: what its open trials reserve is given back."""
        ledger = self.ledgers[which]
        reservations = {r.storage: r.trials for r in ledger.reservations()}
        assert reservations.get(self.storage, 0) == sum(self.opened.values()) == sum(reservations.values())
        for trial in [t.trial for t in ledger.trials(self.storage) if t.open]:
            ledger.release(self.storage, trial)
        self.opened = dict.fromkeys(self.opened, False)
        assert all(a.reserved == Bill() for a in ledger.accounts()) and ledger.reservations() == []

    @rule(which=st.integers(0, 1))
    def copy(self, which: int) -> None:
        """The storage is copied with its own ledger: trials and ceiling get the new id, and nothing else changes."""
        old, new = self.named["sweep"], {"sweep": "ceiling", "ceiling": "sweep"}[self.named["sweep"]]
        storage = {"s": "copy", "copy": "s"}[self.storage]
        for _ in range(2):
            self.ledgers[which].rename_storage(self.storage, storage, {old: new})
        self.storage, self.named["sweep"] = storage, new
        self.limits[new] = self.limits.pop(old)
        self.on = {trial: {new if name == old else name for name in names} for trial, names in self.on.items()}
        self.ledgers[which].register(storage, "/runs/copy", "here")
        place = self.ledgers[1 - which].storage(storage)
        assert place is not None and (place.path, place.host) == ("/runs/copy", "here")

    @rule(which=st.integers(0, 1))
    def crash(self, which: int) -> None:
        """The object is gone with all that it had in memory."""
        self.ledgers[which].close()
        self.ledgers[which] = Ledger(self.url)

    @precondition(lambda self: self.opened)
    @rule(calls=st.lists(CALLS, min_size=2, max_size=8), bill=BILLS)
    def kill(self, calls: list[tuple[str, int, str, Phase]], bill: Bill) -> None:
        """A process is killed with a transaction's every statement done and nothing committed."""
        charges = [
            Charge(self.storage, t, n, f"{d}{p.value}", p, self.bills.get((t, n, d, p), bill))
            for t, n, d, p in dict.fromkeys(calls)
        ]
        child = os.fork()
        if not child:
            try:
                ledger_batch.Batch.save = killed(ledger_batch.Batch.save)  # type: ignore[method-assign]
                Ledger(self.url).charge(charges)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    @rule(seconds=st.sampled_from([-4e7, -1.0, 1.0, 4e7]))
    def clock(self, seconds: float) -> None:
        """The machine's clock is set."""
        now = time.time
        time.time = lambda: now() + seconds

    @invariant()
    def the_books_are_right(self) -> None:
        first, second = self.ledgers
        assert first.verify() == []
        assert {a.name: (a.limits, a.trials) for a in second.accounts()} == {
            name: (limits, sum(name in names for names in self.on.values())) for name, limits in self.limits.items()
        }
        for record in second.accounts():
            model = self.committed(record.name)
            assert (record.committed.requests, record.committed.images) == (model.requests, model.images)
            assert record.limits.exceeded_unit(record.committed, Bill()) is None
            assert record.limits.exceeded_unit(record.charged, Bill()) is None
        for trial in self.opened:
            bills = first.trial_bill(self.storage, trial)
            assert paid(bills) == self.spent(trial)
            mine = [bill for (t, _, _), (_, bill, _) in self.live.items() if t == trial]
            assert sum(bills.values(), Bill()) == sum(mine, Bill())


Books.TestCase.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestBooks = Books.TestCase


# A server that has imported torch once and forks the workers.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pipeline.ledger.ledger", "pytest", "hypothesis.stateful"])


def _spend(url: str, seed: int, rounds: int) -> None:
    """What a replica does: batches of calls of shared trials, each sent by two processes, and one that diverges."""
    ledger = Ledger(url)
    for n in range(rounds):
        shared = [ask(n, trial=f"t{k}") for k in range(3) if k != seed]
        answers = ledger.charge([*shared, ask(n, trial=f"own{seed}"), ask(n, f"other{seed}", trial=f"t{seed}")])
        assert len(answers) == 4
    ledger.release("s", f"own{seed}")


def test_processes_share_one_file(url: str) -> None:
    rounds, allotment, replays = 50, 40, 20
    limit = 3 * allotment + 3 * rounds + replays
    ledger = Ledger(url)
    ledger.open_account("a", Limits(requests=limit))
    for k in range(3):
        ledger.reserve("s", f"t{k}", ["a"], Limits(requests=allotment))
        ledger.reserve("s", f"own{k}", ["a"], Limits(requests=rounds))
    workers = [PROCESSES.Process(target=_spend, args=(url, seed, rounds)) for seed in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert account(ledger, "a").committed.requests <= limit
        time.sleep(0.05)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert ledger.verify() == []
    bills = {t.trial: t.bills for t in ledger.trials()}
    assert [paid(bills[f"t{k}"]).requests for k in range(3)] == [allotment] * 3
    assert [paid(bills[f"own{k}"]).requests for k in range(3)] == [rounds] * 3
    assert sum(bills[f"t{k}"][Phase.REPLAY].requests for k in range(3)) == replays  # of over a hundred that were tried
    assert account(ledger, "a").committed.requests == limit
    ledger.close()


def test_a_killed_process_loses_no_charge_and_doubles_none(url: str) -> None:
    ledger = Ledger(url)
    ledger.open_account("a", Limits())
    for trial in ("t0", "t1", "t2", "own0"):
        ledger.reserve("s", trial, ["a"], Limits())
    worker = PROCESSES.Process(target=_spend, args=(url, 0, 100_000))
    worker.start()
    until = time.monotonic() + 60
    while (done := len(ledger.charges("s", "t1"))) < 20 and time.monotonic() < until:
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert ledger.verify() == []
    stored = len(ledger.charges("s", "t1"))
    assert stored >= done >= 20
    answers = ledger.charge([ask(n, trial="t1") for n in range(stored + 5)])
    assert statuses(answers) == ["replayed"] * stored + ["charged"] * 5
    ledger.close()


def test_processes_may_open_a_new_file_at_once(url: str) -> None:
    workers = [PROCESSES.Process(target=_open, args=(url,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4


def _open(url: str) -> None:
    Ledger(url).open_account("a", Limits(requests=1))
