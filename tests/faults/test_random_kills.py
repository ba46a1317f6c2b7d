"""The short form of long.py: one small sweep through kills that are drawn anew at each run of the suite.

KILL_SEED=N python -m pytest tests/faults/test_random_kills.py repeats one, as far as a clock can.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.faults.long import disturb, sweep_words, undisturbed

KILLS = 5


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_ends_alike_through_random_kills(card: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 10**6)
    words = [*sweep_words("fake", card, quick=True), "checkpoint_s=0.1"]
    quiet = undisturbed(words, tmp_path, "fake")
    run = disturb("fake", words, random.Random(seed), KILLS, quiet, tmp_path)
    assert (run.differs, run.hung) == ([], False), f"repeat it with KILL_SEED={seed}"
    assert run.kills.total() >= KILLS - 1, f"{run.kills}, KILL_SEED={seed}"
