"""Money in the ledger: no limit is passed and no call is paid twice, whatever is repeated, shared or killed.

With FAREBOX_TEST_LEDGER set to the URL of a PostgreSQL database, the tests run there; its ledger tables are dropped.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.errors import BudgetExceeded, LedgerError, dollars
from pipeline.ledger import money_rows
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import PurseRecord
from tests.support.ledgers import MEMORY, empty, tamper


def purse(ledger: Ledger, name: str = "sweep") -> PurseRecord:
    return next(purse for purse in ledger.money.purses() if purse.name == name)


def test_a_call_is_paid_once_and_settled_once(ledger: Ledger) -> None:
    ledger.money.open("s", "sweep", 100)
    for _ in range(2):
        ledger.money.pay("s", "t", "c1", 60)
    assert (purse(ledger).settled, purse(ledger).unsettled) == (0, 60)
    with pytest.raises(BudgetExceeded) as refused:
        ledger.money.pay("s", "t", "c2", 41)
    assert (refused.value.asked, refused.value.spent, refused.value.limit) == (41, 60, 100)
    assert str(refused.value) == (
        "$0.000041 asked of account 'sweep', which has $0.00004 left ($0.00006 of $0.0001 spent or reserved)"
    )
    for _ in range(2):
        ledger.money.settle("s", "c1", 25)
    assert (purse(ledger).settled, purse(ledger).unsettled, purse(ledger).spent) == (25, 0, 25)
    ledger.money.pay("s", "t", "c1", 60)  # paid, and over
    ledger.money.pay("s", "", "c2", 75)
    assert purse(ledger).spent == 100
    assert [(p.call_id, p.trial, p.upper, p.price) for p in ledger.money.payments("s")] == [
        ("c1", "t", 60, 25),
        ("c2", "", 75, None),
    ]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda m: m.pay("s", "t", "c1", 9), "was paid with 10, and is repeated with 9"),
        (lambda m: m.pay("s", "t", "c2", -1), "expected 0 to"),
        (lambda m: m.pay("other", "t", "c2", 1), "storage other has no money"),
        (lambda m: m.settle("s", "nothing", 1), "it was not paid"),
        (lambda m: m.settle("s", "c1", 11), "expected 0 to 10"),
        (lambda m: (m.settle("s", "c1", 3), m.settle("s", "c1", 4)), "was settled at 3, and is repeated with 4"),
        (lambda m: m.set_limit("sweep", 9), "cannot be limited to \\$0.000009: \\$0.00001 are spent or reserved"),
    ],
)
def test_what_contradicts_an_earlier_payment_is_refused(ledger: Ledger, wrong: object, says: str) -> None:
    ledger.money.open("s", "sweep", 100)
    ledger.money.pay("s", "t", "c1", 10)
    with pytest.raises(LedgerError, match=says):
        wrong(ledger.money)  # type: ignore[operator]


def test_a_reservation_is_taken_from_all_purses_or_from_none(ledger: Ledger) -> None:
    for storage in ("s1", "s2"):
        ledger.money.open(storage, f"sweep {storage}", 1000)
        assert ledger.money.open(storage, "team", 100) == 100
    ledger.money.reserve("s1", 70)
    with pytest.raises(BudgetExceeded, match="asked of account 'team'"):
        ledger.money.reserve("s2", 31)
    assert purse(ledger, "sweep s2").reserved == 0
    ledger.money.reserve("s2", 30)
    with pytest.raises(BudgetExceeded):
        ledger.money.pay("s2", "t", "c1", 31)
    ledger.money.pay("s2", "t", "c2", 30)  # out of its reservation
    assert (purse(ledger, "team").spent, purse(ledger, "team").reserved) == (30, 70)
    ledger.money.release("s1")
    ledger.money.pay("s2", "t", "c3", 70)


def test_a_reservation_is_beyond_what_was_spent_and_replaces_the_earlier_one(ledger: Ledger) -> None:
    ledger.money.open("s", "sweep", 100)
    ledger.money.pay("s", "t", "c1", 40)
    ledger.money.reserve("s", 60)
    ledger.money.reserve("s", 50)
    assert (purse(ledger).spent, purse(ledger).reserved) == (40, 50)
    with pytest.raises(BudgetExceeded, match=r"which has \$0.00006 left"):
        ledger.money.reserve("s", 61)


def test_a_purse_that_is_joined_later_takes_the_whole_bill(ledger: Ledger) -> None:
    ledger.money.open("s", "sweep", None)
    ledger.money.pay("s", "t", "c1", 40)
    ledger.money.settle("s", "c1", 30)
    ledger.money.pay("s", "t", "c2", 5)
    ledger.money.open("s", "team", 50)
    assert (purse(ledger, "team").settled, purse(ledger, "team").unsettled) == (30, 5)
    ledger.money.settle("s", "c2", 1)
    assert purse(ledger, "team").spent == purse(ledger, "sweep").spent == 31


def test_limits_change_but_never_below_what_is_committed(ledger: Ledger) -> None:
    ledger.money.set_limit("team", 10)
    assert ledger.money.open("s", "team", 99) == 10 == ledger.money.limit("team")
    ledger.money.set_limit("team", None)
    ledger.money.pay("s", "t", "c", 11)
    with pytest.raises(LedgerError, match="cannot be limited"):
        ledger.money.set_limit("team", 10)
    ledger.money.set_limit("team", 11)
    assert ledger.money.limit("team") == 11 and ledger.money.limit("nobody") is None


def test_a_renamed_storage_keeps_its_money(ledger: Ledger) -> None:
    ledger.money.open("old", "sweep:old", 100)
    ledger.money.open("old", "team", None)
    ledger.money.pay("old", "t", "c1", 40)
    ledger.rename_storage("old", "new", {"sweep:old": "sweep:new"})
    assert [p.name for p in ledger.money.purses()] == ["sweep:new", "team"]
    ledger.money.settle("new", "c1", 4)
    assert [p.spent for p in ledger.money.purses()] == [4, 4] and ledger.money.payments("old") == []


def test_amounts_are_printed_in_dollars() -> None:
    assert [dollars(n) for n in (0, 1, 10_000, 1_500_000, 1_234_500_000)] == [
        "$0.00",
        "$0.000001",
        "$0.01",
        "$1.50",
        "$1,234.50",
    ]


# --- the tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE ledger_payment SET price = 26 WHERE call_id = 'c1'", "are stored for storage s"),
        ("UPDATE ledger_payment SET price = NULL", "are stored for storage s"),
        ("DELETE FROM ledger_payment WHERE call_id = 'c2'", "are stored for storage s"),
        ("UPDATE ledger_part SET settled = 1", "are stored for storage s"),
        ("UPDATE ledger_purse SET limit_micro_usd = 30", "$0.000035 are spent or reserved of $0.00003"),
        ("DELETE FROM ledger_purse", "purse 'sweep', from which storages pay, is missing"),
        ("DELETE FROM ledger_part", "payments of storage s, which has no purse"),
    ],
)
def test_verify_names_what_was_tampered_with(url: str, statement: str, says: str) -> None:
    ledger = Ledger(url)
    ledger.money.open("s", "sweep", 100)
    ledger.money.pay("s", "t", "c1", 40)
    ledger.money.settle("s", "c1", 25)
    ledger.money.pay("s", "t", "c2", 10)
    assert ledger.verify() == []
    tamper(url, statement, reseal=True)
    assert any(says in line for line in ledger.verify()), ledger.verify()
    ledger.close()


def drop(url: str, *statements: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as db:
        for statement in statements:
            db.execute(sa.text(statement))
    engine.dispose()


TABLES = ("DROP TABLE ledger_purse", "DROP TABLE ledger_part", "DROP TABLE ledger_payment")


def test_a_ledger_of_an_earlier_version_gets_the_tables_once(url: str) -> None:
    Ledger(url).close()
    drop(url, *TABLES, "DELETE FROM ledger_meta WHERE key = 'money'")
    ledger = Ledger(url)
    ledger.money.open("s", "sweep", 10)
    assert ledger.verify() == []
    ledger.close()
    drop(url, *TABLES)
    with pytest.raises(LedgerError, match="has no table ledger_part, ledger_payment, ledger_purse"):
        Ledger(url)


# --- any order, any repetition, any process ------------------------------------------------------------------------

STORAGES = st.sampled_from(["s1", "s2"])
CALLS = st.sampled_from([f"c{n}" for n in range(8)])
PURSES = st.sampled_from(["s1", "s2", "team"])
AMOUNTS = st.integers(0, 30)


class Purses(RuleBasedStateMachine):
    """Two ledgers on one file against a plain model that adds up all payments for every question."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.url = empty(Path(self.folder.name))
        self.ledgers = [Ledger(self.url), Ledger(self.url)]
        self.limits: dict[str, int | None] = {"s1": 80, "s2": None, "team": 100}
        self.members = {("s1", "s1"), ("s2", "s2"), ("s1", "team")}
        self.reserved: dict[tuple[str, str], int] = {}
        self.paid: dict[tuple[str, str], tuple[int, int | None]] = {}
        for storage, name in sorted(self.members):
            self.ledgers[0].money.open(storage, name, self.limits[name])

    def teardown(self) -> None:
        for ledger in self.ledgers:
            ledger.close()
        self.folder.cleanup()

    def spent(self, storage: str) -> int:
        paid = [payment for (s, _), payment in self.paid.items() if s == storage]
        return sum(upper if price is None else price for upper, price in paid)

    def committed(self, name: str) -> int:
        mine = [storage for storage, purse in self.members if purse == name]
        return sum(max(self.spent(storage), self.reserved.get((storage, name), 0)) for storage in mine)

    def fits(self) -> bool:
        return all(limit is None or self.committed(name) <= limit for name, limit in self.limits.items())

    @rule(which=st.integers(0, 1), storage=STORAGES, call=CALLS, upper=AMOUNTS)
    def pay(self, which: int, storage: str, call: str, upper: int) -> None:
        known = self.paid.get((storage, call))
        upper = known[0] if known else upper
        if not known:
            self.paid[storage, call] = (upper, None)
        try:
            self.ledgers[which].money.pay(storage, "t", call, upper)
        except BudgetExceeded:
            assert not known and not self.fits()
            del self.paid[storage, call]
        else:
            assert self.fits()

    @rule(which=st.integers(0, 1), storage=STORAGES, call=CALLS, share=st.integers(0, 3))
    def settle(self, which: int, storage: str, call: str, share: int) -> None:
        known = self.paid.get((storage, call))
        if known is None:
            with pytest.raises(LedgerError, match="was not paid"):
                self.ledgers[which].money.settle(storage, call, 1)
            return
        price = known[0] * share // 3 if known[1] is None else known[1]
        self.ledgers[which].money.settle(storage, call, price)
        self.paid[storage, call] = (known[0], price)

    @rule(which=st.integers(0, 1), storage=STORAGES, amount=AMOUNTS)
    def reserve(self, which: int, storage: str, amount: int) -> None:
        before = dict(self.reserved)
        for s, name in self.members:
            if s == storage:
                self.reserved[s, name] = self.spent(storage) + amount
        try:
            self.ledgers[which].money.reserve(storage, amount)
        except BudgetExceeded:
            assert not self.fits()
            self.reserved = before
        else:
            assert self.fits()

    @rule(which=st.integers(0, 1), storage=STORAGES)
    def release(self, which: int, storage: str) -> None:
        self.ledgers[which].money.release(storage)
        self.reserved = {key: n for key, n in self.reserved.items() if key[0] != storage}

    @rule(which=st.integers(0, 1), name=PURSES, limit=st.none() | st.integers(0, 120))
    def set_limit(self, which: int, name: str, limit: int | None) -> None:
        fits = limit is None or self.committed(name) <= limit
        try:
            self.ledgers[which].money.set_limit(name, limit)
        except LedgerError:
            assert not fits
        else:
            assert fits
            self.limits[name] = limit

    @rule(which=st.integers(0, 1))
    def crash(self, which: int) -> None:
        """The object is gone with all that it had in memory."""
        self.ledgers[which].close()
        self.ledgers[which] = Ledger(self.url)

    @rule(storage=STORAGES, call=CALLS, verb=st.sampled_from(["pay", "settle", "reserve"]))
    def kill(self, storage: str, call: str, verb: str) -> None:
        """A process is killed with a transaction's every statement done and nothing committed."""
        if verb == "settle" and (storage, call) not in self.paid:
            return
        child = os.fork()
        if not child:
            try:
                save = money_rows.save

                def killed(*arguments: object) -> None:
                    save(*arguments)  # type: ignore[arg-type]
                    os.kill(os.getpid(), signal.SIGKILL)

                money_rows.save = killed  # type: ignore[assignment]
                money = Ledger(self.url).money
                {
                    "pay": lambda: money.pay(storage, "t", call, self.paid.get((storage, call), (0, None))[0]),
                    "settle": lambda: money.settle(storage, call, 0),
                    "reserve": lambda: money.reserve(storage, 1),
                }[verb]()
            except (LedgerError, BudgetExceeded):
                pass
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        known = self.paid.get((storage, call))
        if (verb == "pay" and known is None) or (verb == "settle" and known is not None and known[1] is None):
            assert code == -signal.SIGKILL

    @invariant()
    def the_sums_are_right(self) -> None:
        first, second = self.ledgers
        assert first.verify() == []
        records = {purse.name: purse for purse in second.money.purses()}
        assert records.keys() == self.limits.keys()
        for name, record in records.items():
            assert record.limit == self.limits[name]
            assert record.spent + record.reserved == self.committed(name)
            assert record.limit is None or record.spent + record.reserved <= record.limit
        for storage in ("s1", "s2"):
            found = {p.call_id: (p.upper, p.price) for p in second.money.payments(storage)}
            assert found == {call: payment for (s, call), payment in self.paid.items() if s == storage}


Purses.TestCase.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestPurses = Purses.TestCase

# A server that has imported torch once and forks the workers.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pipeline.ledger.ledger", "pytest", "hypothesis.stateful"])
LIMIT = 2_000


def _spend(url: str, seed: int, rounds: int) -> None:
    """What a client does: pay, send, settle; now and then the call has no known end."""
    money, rng = Ledger(url).money, random.Random(seed)
    for n in range(rounds):
        upper = rng.randrange(1, 40)
        try:
            money.pay("s", "t", f"{seed}/{n}", upper)
        except BudgetExceeded:
            continue
        if rng.random() < 0.8:
            money.settle("s", f"{seed}/{n}", rng.randrange(upper + 1))


def test_processes_share_a_limit_and_killed_ones_lose_no_payment(url: str) -> None:
    ledger = Ledger(url)
    ledger.money.open("s", "sweep", LIMIT)
    ledger.money.open("s", "team", LIMIT - 100)
    workers = [PROCESSES.Process(target=_spend, args=(url, seed, 10_000)) for seed in range(3)]
    for worker in workers:
        worker.start()
    until = time.monotonic() + 90
    while (spent := purse(ledger).spent) < LIMIT // 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert workers[0].pid is not None
    os.kill(workers[0].pid, signal.SIGKILL)
    while (now := purse(ledger).spent) < LIMIT - 150 and time.monotonic() < until:
        assert now <= LIMIT - 100
        time.sleep(0.02)
    for worker in workers:
        worker.kill()
        worker.join()
    assert ledger.verify() == []
    assert LIMIT // 2 <= spent <= purse(ledger).spent <= LIMIT - 100
    assert purse(ledger, "team").spent == purse(ledger).spent
    ledger.close()
