"""Overhead of a trial: the time of trivial trials through the whole command.

A trial is zero-shot with the toy model on the digits' 973 test images, whose features are stored. Commands of 1 and
of 41 trials alternate; the result is the difference of their times divided by 40. So it includes what each trial
needs (Ray Tune, the ledger, predictions, row, MLflow), and not what a command needs once (starting Ray, the report).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from pipeline.bench.harness import BenchResult, bench, machine, seconds_of
from pipeline.console import Echo
from pipeline.errors import FareboxError

TRIALS, PAIRS = 40, 5


@bench("trials")
def trials(echo: Echo) -> BenchResult:
    """Seconds that one more trivial trial adds to a sweep, everything included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_trials(folder, "first", 1)  # stores the image features and fills the disk's cache
        timings = []
        for i in range(PAIRS):
            (one,) = seconds_of(partial(run_trials, folder, f"one{i}", 1))
            (more,) = seconds_of(partial(run_trials, folder, f"more{i}", 1 + TRIALS))
            timings.append((one, more))
            echo(f"  pair {i + 1} of {PAIRS}: {one:.4g} s with 1 trial, {more:.4g} s with {1 + TRIALS}")
    seconds = [(more - one) / TRIALS for one, more in timings]
    detail = {
        "trial": "zero_shot, the toy model, digits (973 test images, stored); ledger, Arrow row and MLflow in SQLite",
        "trials in total": TRIALS * PAIRS,
        "command of 1 trial, s": median(one for one, _ in timings),
        f"command of {1 + TRIALS} trials, s": median(more for _, more in timings),
        **machine(),
    }
    return BenchResult("trials", min(seconds), max(seconds), PAIRS, detail, value=median(seconds), unit="s/trial")


def run_trials(folder: Path, name: str, n: int) -> None:
    """Call `farebox run` for n trials in a new storage; image features are shared."""
    overrides = ["sweep=smoke", "methods=zero_shot", "datasets=digits", f"seeds={list(range(n))}"]
    overrides.append(f"storage={folder / name}")
    command = [sys.executable, "-m", "pipeline.cli", "run", *(override.replace(" ", "") for override in overrides)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FareboxError(f"farebox run ended with {done.returncode}: {done.stderr.strip()[-300:]}")
