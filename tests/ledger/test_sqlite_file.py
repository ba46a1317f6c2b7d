"""The file of a SQLite URL is the one that SQLAlchemy opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.ledger.ledger import Ledger
from pipeline.ledger.sqlite_file import sqlite_file


@pytest.mark.parametrize(
    "form",
    ["sqlite:///{}", "sqlite+pysqlite:///{}?timeout=3", "sqlite:///file:{}?uri=true", "sqlite:///file://{}?uri=true"],
)
def test_the_ledger_is_written_to_the_file_of_its_url(form: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    url = form.format(path)
    assert sqlite_file(url) == path
    Ledger(url).close()
    assert path.is_file()


def test_a_prefix_of_a_uri_is_part_of_the_name_unless_the_url_says_that_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sqlite_file("sqlite:///file:ledger.db") == Path("file:ledger.db")
    Ledger("sqlite:///file:ledger.db").close()
    assert (tmp_path / "file:ledger.db").is_file()


@pytest.mark.parametrize(
    "url",
    [
        *("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true"),
        *("sqlite:///file:x?mode=memory&uri=true", "postgresql://me@host/ledger", "ledger.db", ""),
    ],
)
def test_a_url_without_a_file_has_none(url: str) -> None:
    assert sqlite_file(url) is None
