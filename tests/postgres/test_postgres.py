"""Sweeps whose ledger is a PostgreSQL server: a killed one, and two that share money (`make test-postgres`)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipeline.ledger.ledger import Ledger
from pipeline.ledger.schema import metadata
from pipeline.remote.call_log import total_of
from pipeline.results.store import ResultStore
from tests.faults.test_kills import rows_of, undisturbed, words
from tests.support.command import ROOT, Running, farebox, here, ledger_record
from tests.support.patience import patience
from tests.support.service import fake_card, serving

__all__ = ["undisturbed", "words"]

SERVER = os.environ.get("FAREBOX_TEST_LEDGER", "")
TYPED = "${oc.env:FAREBOX_TEST_LEDGER}"
"""The URL on a command line, where a password is refused."""

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.ray,
    pytest.mark.skipif(not SERVER, reason="FAREBOX_TEST_LEDGER names no PostgreSQL server"),
]


def test_a_sweep_on_a_server_ends_alike_through_a_killed_driver(
    words: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    url = sa.make_url(SERVER)
    engine = sa.create_engine(url)
    metadata.drop_all(engine)
    ledger = f"budget.global.url={TYPED}"
    words = (*words, f"storage={tmp_path}", "replicas=2", "concurrency=2", ledger)
    run = Running(*words)
    run.wait_for(lambda: list((tmp_path / "checkpoints").glob("*.ckpt")), "a checkpoint")
    run.kill()
    before = ledger_record(tmp_path, ledger)
    said = farebox(*words).stdout
    after = ledger_record(tmp_path, ledger)

    quiet = ledger_record(undisturbed)
    assert before["open_trials"] > 0 and before["phases"] != quiet["phases"]  # it was struck in mid-work
    assert rows_of(tmp_path) == rows_of(undisturbed)
    assert [after[k] for k in ("phases", "trials", "open_trials")] == [
        quiet[k] for k in ("phases", "trials", "open_trials")
    ]
    assert not (tmp_path / "ledger.db").exists()
    with engine.connect() as db:
        assert db.execute(sa.text("select count(*) from ledger_charge")).scalar_one() > 0
    engine.dispose()
    written = [said, *(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())]
    assert url.password and not [text for text in written if url.password in text]


PATIENT = ("batch: {images: 1}", "retry: {first_s: 0.01, most_s: 0.05, tries: 20}")


def test_two_sweeps_at_once_never_spend_more_than_their_money(tmp_path: Path, card: Path) -> None:
    """A hundred images cost 0.1 dollars. Faults make lost calls, which are paid with their upper bound."""
    engine = sa.create_engine(sa.make_url(SERVER))
    metadata.drop_all(engine)
    engine.dispose()
    shared = (f"budget.global.url={TYPED}", "budget.global.name=team")
    sweep = ("sweep=smoke", f"datasets=[{card}]", "views=2", "shots=4", "methods=[gda,score_ridge]", "eval_shift=false")
    with serving("model=fake", "fault.drop_every=3") as url:
        (tmp_path / "api.yaml").write_text(fake_card(url, *PATIENT))
        words = (*sweep, f"model={tmp_path / 'api.yaml'}", *shared)
        limit, ends = 0.4, list[str]()
        for _ in range(20):
            here("budget", "set", "team", f"usd={limit:.2f}", f"url={TYPED}")
            both = [_start(*words, f"seeds={n}", f"storage={tmp_path}/{n}", f"records={tmp_path}/r{n}") for n in "12"]
            while any(sweep.poll() is None for sweep in both):
                assert _spent() <= limit * 1e6
                time.sleep(0.2)
            said = [sweep.communicate(timeout=patience())[0] for sweep in both]
            if [sweep.returncode for sweep in both] == [0, 0]:
                break
            assert {sweep.returncode for sweep in both} <= {0, 3} and "asked of account 'team'" in "".join(said), said
            ends += said
            limit += 0.4
        else:
            raise AssertionError("the sweeps do not end")
    assert ends, "the limit was reached at least once"
    sent = [total_of(tmp_path / n) for n in "12"]
    assert 0 < _spent() == sum(bill.micro_usd for bill in sent) <= limit * 1e6 and all(bill.uncertain for bill in sent)
    for n in "12":
        rows = ResultStore(tmp_path / n).read().to_pylist()
        assert [row["status"] for row in rows] == ["done", "done"]
        record = ledger_record(tmp_path / n, *shared)
        assert {purse["name"] for purse in record["money"]} >= {"team"}
    password = sa.make_url(SERVER).password
    written = [*ends, *(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())]
    assert password and not [text for text in written if password in text]


def _start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.http.drive", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _spent() -> int:
    """Return the micro-dollars of the shared budget: settled, and the upper bounds of calls under way."""
    ledger = Ledger(SERVER)
    (team,) = (purse for purse in ledger.money.purses() if purse.name == "team")
    ledger.close()
    return team.spent
