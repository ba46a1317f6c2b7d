"""The short form of `make test-damage`: a finished sweep, damaged at random, shows no number that is not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import damage
from tests.faults.forked import forked
from tests.support.patience import patience

ROOT = Path(__file__).resolve().parents[2]
FLIPS = 11


@pytest.mark.slow
def test_no_damage_changes_a_displayed_number() -> None:
    # a process of its own: it forks, which a process with Ray's threads must not
    words = [sys.executable, "-m", "tests.faults.damage", "--flips", str(FLIPS), "--seed", "5"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=patience(850), check=False)
    assert done.returncode == 0, done.stderr
    columns, *lines = done.stdout.splitlines()
    counts = dict(zip(columns.split(), map(int, lines[len(damage.FILES)].split()[1:]), strict=True))
    assert counts["damages"] == FLIPS and counts["detected"] > FLIPS / 2
    assert sum(counts[name] for name in damage.BAD) == 0
    assert all(line.split()[-7] == "1" for line in lines[: len(damage.FILES)])


def test_a_changed_number_is_counted_as_silent_unless_a_problem_is_stated() -> None:
    rows = '[{"trial_id": "a", "test_set": "b", "accuracy": 1.0}]'
    raw = "leaderboard --raw --format json"
    before = {"leaderboard": (0, "1.0", ""), raw: (0, rows, "")}
    assert damage.compare(before, before) == ("harmless", "")
    assert damage.compare(before, before | {"leaderboard": (0, "2.0", "")})[0] == "silent"
    assert damage.compare(before, before | {"leaderboard": (3, "2.0", "")})[0] == "silent"
    assert damage.compare(before, before | {"leaderboard": (3, "", "farebox: a is damaged")})[0] == "detected"
    assert damage.compare(before, before | {raw: (3, rows.replace("1.0", "2.0"), "farebox: x")})[0] == "silent"
    assert damage.compare(before, before | {raw: (3, "[]", "farebox: x")})[0] == "detected"
    assert damage.compare(before, before | {raw: (1, "", "Traceback ...")})[0] == "traceback"


def test_the_end_of_a_forked_process_is_seen() -> None:
    assert forked(lambda: [1]) == ("done", [1])
    assert forked(lambda: os.kill(os.getpid(), signal.SIGKILL)) == ("crash", "SIGKILL")
    assert forked(lambda: os._exit(0)) == ("crash", "no answer")
    outcome, text = forked(lambda: 1 // 0)
    assert outcome == "traceback" and "ZeroDivisionError" in text
