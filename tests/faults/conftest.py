"""Fixtures for tests that kill processes of a small sweep: its overrides, and the result of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.long import facts, sweep_words
from tests.support.lab import run_here


@pytest.fixture(scope="session")
def words(card: Path) -> list[str]:
    """A sweep of a few seconds that writes a checkpoint every tenth of a second."""
    return [*sweep_words("fake", card, quick=True), "checkpoint_s=0.1"]


@pytest.fixture(scope="session")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The facts of a run in this process in which nothing is killed."""
    storage = tmp_path_factory.mktemp("undisturbed")
    run_here(*words, f"storage={storage}", f"features={storage / 'features'}")
    return facts(storage)
