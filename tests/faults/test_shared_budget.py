"""Sweeps that share a budget, killed at random; storages that are copied, moved and deleted. No Ray here.

A sweep runs in a forked process as `farebox run` does, and kills itself with SIGKILL at a drawn call of the ledger. The
limit must hold at every moment, nothing may stay reserved, and each result must be that of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from methods.base import Bill
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.config.compose import compose
from pipeline.errors import ConfigError
from pipeline.ledger.ledger import Ledger
from pipeline.results.store import ResultStore
from pipeline.sweep import reservations, storage_id
from pipeline.sweep.run_ledger import open_ledger, sweep_account
from pipeline.sweep.storage import alone
from pipeline.sweep.storage_id import read_id
from pipeline.trials.plan import SweepPlan, make_plan
from pipeline.trials.rows import failed_row, spec_columns
from pipeline.trials.trial import run_trial
from tests.support.command import here
from tests.support.lab import outcome

MEMORY = Path("/dev/shm")
KILLABLE = ("reserve", "reserve_all", "charge", "release", "release_all", "register", "rename_storage")


class Sweep:
    """A sweep in a storage of its own; `words` are its overrides."""

    def __init__(self, folder: Path, endpoint: Endpoint, card: Path, *words: str) -> None:
        self.folder, self.endpoint = folder, endpoint
        fixed = (
            "sweep=smoke",
            "model=fake",
            f"datasets=[{card}]",
            "views=2",
            "shots=2",
            "seeds=[1]",
            "methods=[zero_shot,craft]",
        )
        self.words = (*fixed, "budget.requests=20", "method.craft.popsize=4", *words)

    @property
    def plan(self) -> SweepPlan:
        """Its plan, in the present folder."""
        return make_plan(compose([*self.words, f"storage={self.folder}"]))

    def at(self, folder: Path) -> Sweep:
        """The same sweep in another folder."""
        other = Sweep.__new__(Sweep)
        other.folder, other.endpoint, other.words = folder, self.endpoint, self.words
        return other

    def run(self, plan: SweepPlan | None = None) -> list[str]:
        """Run it to its end in this process; the lines that it prints."""
        said, plan, store = list[str](), plan or self.plan, ResultStore(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder):
            todo, _ = reservations.pending(plan, store)
            ledger, storage = open_ledger(plan.config, said.append)
            with contextlib.closing(ledger):
                reservations.release_left_over(ledger, storage.id, todo)
                funded, unfunded = reservations.reserve(ledger, plan, todo, storage.id)
                for spec in (t for t in todo if t.trial_id in unfunded):
                    why = unfunded[spec.trial_id]
                    store.write([failed_row(spec, why, spec_columns(spec), status="unfunded")])
                pool = LocalPool(self.endpoint, ledger)
                for spec in funded:
                    run_trial(spec, pool, storage.id, store, checkpoint_s=0)
                    ledger.release(storage.id, spec.account)
                reservations.close_trials(ledger, storage.id, funded, store)
                said += [line for line in reservations.problems(plan, store, ledger, storage) if "unfunded" not in line]
        return said

    def start(self, die_at: int | None) -> int:
        """Run it in a forked process that kills itself after `die_at` calls of the ledger; the process id."""
        plan = self.plan
        if child := os.fork():
            return child
        code = 1
        try:
            if die_at is not None:
                kill_after(die_at)
            code = 0 if (said := self.run(plan)) == [] else 2
            print(*said, sep="\n")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def killed(self, die_at: int) -> None:
        """Run it until it is killed."""
        assert ended(self.start(die_at)) == -signal.SIGKILL

    def rows(self) -> dict[str, dict[str, Any]]:
        """What must not depend on who was killed or copied, by method and seed."""
        store = ResultStore(self.folder)
        found = [row for path in store.results.glob("*.arrow") for row in store.rows_of(path.stem)]
        return {f"{row.method} {row.seed}": outcome(row) for row in found}


def kill_after(calls: int) -> None:
    """Kill this process before or after the call of the ledger with this number."""
    left = calls

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and calls % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for name in KILLABLE:
        setattr(Ledger, name, dying(getattr(Ledger, name)))


def ended(process: int) -> int:
    """Wait for the end of a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a run waits for the disk hundreds of times."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder).resolve()


@pytest.fixture
def url(place: Path) -> str:
    return f"sqlite:///{place / 'team.db'}"


@pytest.fixture
def make(place: Path, fake: Endpoint, card: Path, url: str) -> Callable[..., Sweep]:
    """Make a sweep on the budget `team` of the shared ledger."""
    common = (f"budget.global.url={url}", "budget.global.name=team", "budget.global.requests=1000")
    return lambda name, *words: Sweep(place / name, fake, card, *common, *words)


@pytest.fixture
def quiet(place: Path, make: Callable[..., Sweep]) -> dict[str, dict[str, Any]]:
    """The rows of an undisturbed run."""
    sweep = make("quiet", f"budget.global.url=sqlite:///{place / 'quiet.db'}")
    assert sweep.run() == []
    return sweep.rows()


def reserved(url: str) -> dict[str, Bill]:
    """What each account reserves; the ledger must add up."""
    with contextlib.closing(Ledger(url)) as ledger:
        assert ledger.verify() == []
        return {a.name: a.reserved for a in ledger.accounts()}


def spent(url: str, name: str = "team") -> int:
    """Requests spent from an account."""
    with contextlib.closing(Ledger(url)) as ledger:
        return next(a.spent.requests for a in ledger.accounts() if a.name == name)


def test_the_limit_holds_for_two_sweeps_that_are_killed_at_random(make: Callable[..., Sweep], url: str) -> None:
    rng, words = random.Random(1), ("budget.partial=true", "seeds=[1,2]", "budget.global.requests=50")
    sweeps = [make("first", *words), make("second", *words)]
    running = {sweep.start(rng.randint(1, 30)): sweep for sweep in sweeps}
    kills = 0
    while running:
        ended = [(process, status) for process, status in (os.waitpid(p, os.WNOHANG) for p in running) if process]
        with contextlib.closing(Ledger(url)) as ledger:  # closed before a fork: SQLite's locks belong to one process
            for account in ledger.accounts():
                assert account.limits.exceeded_unit(account.committed, Bill()) is None
                assert account.limits.exceeded_unit(account.charged, Bill()) is None
        time.sleep(0.02)
        for process, status in ended:
            sweep, code = running.pop(process), os.waitstatus_to_exitcode(status)
            assert code in (0, -signal.SIGKILL)
            if code:
                kills += 1
                running[sweep.start(rng.randint(1, 40) if kills < 5 else None)] = sweep
    assert kills >= 2
    assert set(reserved(url).values()) == {Bill()}
    assert spent(url) <= 50
    rows = [row for sweep in sweeps for row in sweep.rows().values()]
    assert {row["status"] for row in rows} == {"done", "unfunded"}  # the limit pays for a part, and cuts none short
    assert spent(url) == sum(row["requests"] for row in rows)


def test_a_copied_storage_does_not_close_the_trials_of_the_original(
    make: Callable[..., Sweep], url: str, quiet: dict[str, Any], place: Path
) -> None:
    original = make("original")
    original.killed(12)  # zero_shot is done, craft in mid-work
    before = reserved(url)
    assert before["team"] != Bill() and list((original.folder / "checkpoints").glob("*.ckpt"))
    copy = original.at(place / "copy")
    shutil.copytree(original.folder, copy.folder)
    (said,) = copy.run()
    ids = [read_id(sweep.folder).id for sweep in (original, copy)]
    assert said.startswith(f"{copy.folder} is a copy of the storage {ids[0]} at {original.folder} on ")
    assert said.endswith(
        f"its id is now {ids[1]}; the checkpoints of 1 unfinished trials are removed: these trials start again"
    )
    assert reserved(url)["team"] == before["team"]
    assert copy.rows() == quiet
    assert original.run() == []
    assert original.rows() == quiet
    assert set(reserved(url).values()) == {Bill()}
    for sweep in (original, copy):
        record = json.loads(here("ledger", f"storage={sweep.folder}", f"budget.global.url={url}", "--json"))
        assert record["problems"] == [] and record["trials"] == 2
        assert record["copied_trials"] == (sweep is copy)
    assert copy.run() == []  # it is no copy any more


def test_a_copy_of_a_storage_with_its_own_ledger_continues_under_a_new_id(
    fake: Endpoint, card: Path, quiet: dict[str, Any], place: Path
) -> None:
    original = Sweep(place / "own", fake, card, "budget.sweep.requests=100")
    original.killed(12)
    shutil.copytree(original.folder, place / "copy")
    copy = original.at(place / "copy")
    copy.killed(2)  # while the entries are renamed
    assert copy.run() == []
    assert copy.rows() == quiet
    name = read_id(copy.folder).id
    assert name != read_id(original.folder).id
    with contextlib.closing(Ledger(f"sqlite:///{copy.folder / 'ledger.db'}")) as ledger:
        assert ledger.verify() == []
        assert {t.storage for t in ledger.trials()} == {name}
        assert [(a.name, a.reserved, a.limits.requests) for a in ledger.accounts()] == [
            (sweep_account(name), Bill(), 100)
        ]
        assert ledger.accounts()[0].spent.requests == quiet["craft 1"]["requests"]  # what the original paid is replayed
    assert original.run() == [] and original.rows() == quiet


def test_a_moved_storage_keeps_its_id_and_continues(
    make: Callable[..., Sweep], url: str, quiet: dict[str, Any], place: Path
) -> None:
    sweep = make("before")
    sweep.killed(12)
    name = read_id(sweep.folder).id
    moved = sweep.at(place / "after")
    sweep.folder.rename(moved.folder)
    assert moved.run() == [f"{moved.folder} was moved: it was {sweep.folder} on {storage_id.host_name()}"]
    assert read_id(moved.folder).id == name
    assert moved.rows() == quiet
    assert set(reserved(url).values()) == {Bill()}
    assert spent(url) == quiet["craft 1"]["requests"]  # nothing was paid twice
    assert moved.run() == []


def test_release_affects_deleted_storages_and_no_running_one(
    make: Callable[..., Sweep], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps = {name: make(name) for name in ("deleted", "stopped", "running")}
    for sweep in sweeps.values():
        sweep.killed(12)
    ids = {name: read_id(sweep.folder).id for name, sweep in sweeps.items()}
    shutil.rmtree(sweeps["deleted"].folder)
    with alone(sweeps["running"].folder):
        shown = json.loads(here("budget", "show", f"url={url}", "--json"))
        assert {r["storage"]: r["state"] for r in shown["reservations"]} == {ids[name]: name for name in ids}
        here("budget", "release", ids["running"], f"url={url}", expect=2)
        assert "a run is using storage" in capsys.readouterr().err
        text = here("budget", "release", f"url={url}")
        assert (
            text.startswith(f"released: 1 open trials of storage {ids['deleted']} at ") and text.count("\nkept: ") == 2
        )
        here("budget", "release", ids["stopped"], f"url={url}")
        (left,) = json.loads(here("budget", "show", f"url={url}", "--json"))["reservations"]
        assert (left["storage"], left["open_trials"]) == (ids["running"], 1)
    assert reserved(url)["team"].requests == sweeps["running"].plan.trials[1].predicted.requests
    for name in ("stopped", "running"):
        assert sweeps[name].run() == []
    assert set(reserved(url).values()) == {Bill()}
    assert "nothing released" in here("budget", "release", f"url={url}")


def test_a_second_run_in_the_same_storage_is_refused(make: Callable[..., Sweep], url: str) -> None:
    sweep = make("one")
    sweep.killed(12)
    before = reserved(url)
    with alone(sweep.folder), pytest.raises(ConfigError, match="another `farebox run` is running"):
        sweep.run()
    assert reserved(url) == before
    assert sweep.run() == []


def test_an_original_that_was_unmounted_while_its_copy_took_its_id_gets_another(
    make: Callable[..., Sweep], url: str, place: Path
) -> None:
    sweep = make("disk")
    sweep.killed(12)
    copy = sweep.at(place / "copy")
    shutil.copytree(sweep.folder, copy.folder)
    sweep.folder.rename(place / "away")  # as a disk that is not mounted
    assert copy.run()[0].startswith(f"{copy.folder} was moved")
    (place / "away").rename(sweep.folder)
    assert "is a copy of the storage" in sweep.run()[0]
    assert read_id(sweep.folder).id != read_id(copy.folder).id
    assert set(reserved(url).values()) == {Bill()}


def test_a_storage_of_another_machine_is_released_only_some_time_after_its_last_charge(
    make: Callable[..., Sweep], url: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make("shared")
    sweep.killed(12)
    name = read_id(sweep.folder).id
    shutil.copytree(sweep.folder, place / "copy")
    monkeypatch.setattr(storage_id, "host_name", lambda: "other")
    monkeypatch.setattr("pipeline.commands.budget.host_name", lambda: "other")
    (record,) = json.loads(here("budget", "show", f"url={url}", "--json"))["reservations"]
    assert record["state"] == "elsewhere"
    here("budget", "release", name, f"url={url}", expect=2)  # it was charged a moment ago
    assert json.loads(here("budget", "release", f"url={url}", "--json"))["released"] == []
    assert "is a copy of the storage" in sweep.at(place / "copy").run()[0]
    assert sweep.run()[0].startswith(f"{sweep.folder} was moved")  # both machines mount it: the folder is the same
    assert read_id(sweep.folder).id == name
    assert set(reserved(url).values()) == {Bill()}
    sweep.folder.rename(place / "gone")
    monkeypatch.setattr("pipeline.commands.budget.RECENT_S", 0.0)
    here("budget", "release", name, f"url={url}", expect=2)  # it has no open trials
