"""What a trial costs beside its method: 200 cells that do almost nothing, through the whole command.

A cell is zero-shot of the toy model on the digits' 973 test images, which are stored. Two commands in turn, of 1 and of
41 cells: what 40 more take, divided by 40. So all is in it that a cell needs (Ray Tune, reservation, charges and
settlement in the ledger, predictions, row, MLflow), and what a command needs once (Ray's start, the page) is not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from pipeline.bench.harness import BenchResult, Say, bench, machine, seconds_of
from pipeline.errors import FareboxError

CELLS, PAIRS = 40, 5


@bench("trials")
def trials(say: Say) -> BenchResult:
    """Seconds that one more trivial cell adds to a sweep, everything included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_cells(folder, "first", 1)  # stores the images, warms the disk's cache
        taken = []
        for i in range(PAIRS):
            (one,) = seconds_of(partial(run_cells, folder, f"one{i}", 1))
            (more,) = seconds_of(partial(run_cells, folder, f"more{i}", 1 + CELLS))
            taken.append((one, more))
            say(f"  pair {i + 1} of {PAIRS}: {one:.4g} s with 1 cell, {more:.4g} s with {1 + CELLS}")
    cells = [(more - one) / CELLS for one, more in taken]
    detail = {
        "a cell": "zero_shot, the toy model, digits (973 test images, stored); ledger, Arrow row and MLflow in SQLite",
        "cells in all": CELLS * PAIRS,
        "a command of 1 cell, s": median(one for one, _ in taken),
        f"of {1 + CELLS} cells, s": median(more for _, more in taken),
        **machine(),
    }
    return BenchResult("trials", min(cells), max(cells), PAIRS, detail, value=median(cells), unit="s/cell")


def run_cells(folder: Path, name: str, cells: int) -> None:
    """`farebox run` of that many cells in a storage folder of their own; the image features are shared."""
    words = ["sweep=smoke", "methods=[zero_shot]", "datasets=[digits]", f"seeds={list(range(cells))}"]
    words.append(f"storage={folder / name}")
    command = [sys.executable, "-m", "pipeline.cli", "run", *(word.replace(" ", "") for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FareboxError(f"farebox run ended with {done.returncode}: {done.stderr.strip()[-300:]}")
