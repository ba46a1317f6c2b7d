"""Fixtures of the tests of the endpoint and of its client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.budget import Limits
from pipeline.ledger.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger with one account without limits, `ceiling`; it must verify at the end."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.open_account("ceiling", Limits())
    yield ledger
    assert ledger.verify() == []
    ledger.close()
