"""The short form of long.py: a small sweep through kills that are drawn anew at each run.

KILL_SEED=N python -m pytest tests/faults/test_random_kills.py repeats one, as far as a clock can.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.faults.long import disturb, sweep_words, undisturbed

KILLS, RUNS = 5, 3
"""Kills aimed at in a run, which may end before; runs at most."""


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.slow
def test_the_result_is_the_same_after_random_kills(card: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 10**6)
    words = [*sweep_words("fake", card, quick=True), "checkpoint_s=0.1"]
    quiet = undisturbed(words, tmp_path, "fake")
    kills = 0
    for turn in range(RUNS):
        run = disturb("fake", words, random.Random(f"{seed}/{turn}"), KILLS, quiet, tmp_path)
        assert (run.differs, run.hung) == ([], False), f"repeat it with KILL_SEED={seed}"
        kills += run.kills.total()
        if kills >= KILLS - 1:
            return
    raise AssertionError(f"{kills} kills in {RUNS} runs, KILL_SEED={seed}")
