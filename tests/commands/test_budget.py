"""`farebox budget`: what it shows, sets and refuses. Releases are also in tests/faults/test_shared_budget.py."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from methods.base import Bill
from pipeline.budget import Limits, Phase
from pipeline.cli import main
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import Charge
from pipeline.sweep.storage_id import new_id, write_id
from tests.support.command import here


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    """A ledger with a budget, a sweep's ceiling, and one open trial of a storage that no run registered."""
    with contextlib.closing(Ledger(url)) as ledger:
        ledger.open_account("team", Limits(requests=100))
        ledger.open_account("sweep:abc", Limits())
        ledger.reserve("abc", "t", ["team", "sweep:abc"], Limits(requests=30, images=900))
        yield ledger
        assert ledger.verify() == []


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["budget", *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) <= 300
    return line


def test_show_lists_accounts_and_who_reserves(ledger: Ledger, url: str) -> None:
    text = here("budget", "show", f"url={url}")
    assert text.splitlines() == [
        f"ledger {url}",
        "ceiling of sweep abc: limit none; 30 requests and 900 images reserved; 0 requests and 0 images spent",
        "  30 requests and 900 images reserved by 1 open trials of storage abc, no charge yet (unknown)",
        "budget team: limit 100 requests; 30 requests and 900 images reserved; 0 requests and 0 images spent",
        "  30 requests and 900 images reserved by 1 open trials of storage abc, no charge yet (unknown)",
    ]
    ledger.charge([Charge("abc", "t", 0, "d", Phase.ADAPT, Bill(1, 10))])
    record = json.loads(here("budget", "show", f"url={url}", "--json"))
    assert [a["name"] for a in record["accounts"]] == ["sweep:abc", "team"]
    (reservation,) = record["reservations"]
    assert reservation["open_trials"] == 1 and reservation["last_charge"] > 1e9 and reservation["path"] is None


def test_set_changes_the_limits_that_it_names(ledger: Ledger, url: str) -> None:
    assert here("budget", "set", "team", "images=5000", f"url={url}") == (
        "budget team: limit 100 requests and 5,000 images; before: 100 requests\n"
    )
    here("budget", "set", "team", "requests=none", f"url={url}")
    assert ledger.limits("team") == Limits(images=5000)
    assert here("budget", "set", "new", "requests=7", f"url={url}") == "created budget new: limit 7 requests\n"
    record = json.loads(here("budget", "set", "new", "requests=8", f"url={url}", "--json"))
    assert (record["created"], record["before"]["requests"], record["limits"]["requests"]) == (False, 7, 8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("set", "team", "requests=29"), "cannot be limited to 29 requests: 30 are charged or reserved already"),
        (("set", "team", "requests=010"), "requests=010: expected a whole number in decimal digits, or none"),
        (("set", "team", "requests=1e3"), "requests=1e3: expected a whole number"),
        (("set", "team", "requests=-1"), "requests=-1: expected a whole number"),
        (("set", "team", "requests=1_000"), "requests=1_000: expected a whole number"),
        (("set", "team", "requests="), "requests=: expected a whole number"),
        (("set", "team", "requests=9999999999999999999"), "invalid limit of 9,999,999,999,999,999,999 requests"),
        (("set", "team", f"requests={'9' * 5000}"), "expected a whole number"),
        (("set", "team", "requests=٣"), "expected a whole number in decimal digits"),
        (("set", "team", "prompts=5"), "no key named 'prompts' (known: requests, images, usd, url"),
        (("set", "team"), "expected NAME requests=N images=N"),
        (("set", "requests=5"), "expected NAME requests=N images=N"),
        (("set", "a", "b", "requests=5"), "expected NAME requests=N images=N"),
        (("set", "sweep:abc", "requests=50"), "'sweep:abc': names that begin with 'sweep:' are those of single sweeps"),
        (("set", "team", "requests=50", "requests=60"), "requests is given twice"),
        (("set", "two\nlines", "requests=50"), "expected 1 to 60 printable characters"),
        (("set", " ", "requests=50"), "expected 1 to 60 printable characters"),
        (("set", "\udc80", "requests=50"), "expected 1 to 60 printable characters"),
        (("set", "x" * 5000, "requests=50"), "expected 1 to 60 printable characters"),
        (("show", "team"), "'team' is not KEY=VALUE"),
        (("show", "requests=5"), "no key named 'requests'"),
        (("release", "nobody"), "no open trials of a storage 'nobody'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    ledger: Ledger, url: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    before = ledger.accounts()
    assert says in refused(capsys, *words, f"url={url}")
    assert ledger.accounts() == before


def test_a_ledger_that_does_not_exist_is_refused_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name a ledger with url=URL, storage=DIR or sweep=NAME" in refused(capsys, "show")
    assert "no ledger at " in refused(capsys, "show", f"storage={tmp_path / 'none'}")
    assert "no ledger at " in refused(capsys, "set", "team", "requests=5", f"url=sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["foo", "mysql://me:secret@host/db", "sqlite://"])
def test_a_url_of_no_ledger_is_refused(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    line = refused(capsys, "show", f"url={bad}")
    assert "secret" not in line


def test_no_figure_of_a_damaged_ledger_is_printed(
    ledger: Ledger, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_id(tmp_path, new_id(tmp_path))
    assert main(["ledger", f"storage={tmp_path}"]) == 0
    capsys.readouterr()
    change = "UPDATE ledger_account SET spent_requests = spent_requests + ? WHERE name = 'team'"
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as db, db:
        db.execute(change, [7])
    for words in (
        ["ledger", f"storage={tmp_path}"],
        ["budget", "show", f"url={url}"],
        ["status", f"storage={tmp_path}"],
    ):
        assert main(words) == 3
        out, err = capsys.readouterr()
        assert "record ledger_account name=team" in err and err.count("\n") == 1 and len(err) <= 300 + len(url)
        assert "7" not in out.replace(str(tmp_path), "")
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as db, db:
        db.execute(change, [-7])


def test_an_unregistered_storage_is_released_by_its_id_some_time_after_its_last_charge(
    ledger: Ledger, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here("budget", "release", f"url={url}").startswith("nothing released\nkept: 1 open trials of storage abc")
    ledger.charge([Charge("abc", "t", 0, "d", Phase.ADAPT, Bill(1, 10))])
    assert "a run may be using it" in refused(capsys, "release", "abc", f"url={url}")
    monkeypatch.setattr("pipeline.commands.budget.RECENT_S", 0.0)
    assert here("budget", "release", "abc", f"url={url}").startswith("released: 1 open trials of storage abc")
    (team,) = (a for a in ledger.accounts() if a.name == "team")
    assert (team.reserved, team.spent.requests) == (Bill(), 1)
