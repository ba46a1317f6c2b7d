"""Fixtures of the tests of the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.ledger.ledger import Ledger
from tests.support.ledgers import empty


@pytest.fixture
def url(tmp_path: Path) -> str:
    return empty(tmp_path)


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger(url)
    yield ledger
    assert ledger.verify() == []
    ledger.close()
