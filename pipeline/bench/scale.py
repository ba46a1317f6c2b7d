"""Growth with the number of trials: time, memory and disk of one storage with many trivial trials.

A trial is zero-shot with the toy model on the icons' 539 test images, whose features are stored. For each number of
trials a new storage is filled by one command; then the commands that read it are run. Seconds of a trial are the
difference to a command of one trial, so that starting Ray is not counted. Every command is a process; its seconds are
of wall clock and, in brackets, of its own CPU time, which other work on the machine changes less.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.bench.harness import BenchResult, bench, machine
from pipeline.console import Echo
from pipeline.errors import ConfigError, FareboxError

READERS = ("leaderboard", "status", "ledger")
MEASURED = """
import json, resource, sys
from pipeline.cli import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print("\\n" + json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10]), file=sys.stderr)
"""
"""Runs a command; prints its exit code, its CPU seconds, and its peak memory in MiB (Linux)."""


class Cost(NamedTuple):
    """What one command took."""

    wall_s: float
    cpu_s: float
    memory_mib: float

    @property
    def text(self) -> str:
        """Wall and CPU seconds."""
        return f"{self.wall_s:.2f} ({self.cpu_s:.2f})"


@bench("scale")
def scale(echo: Echo, *trials: str) -> BenchResult:
    """Time, memory and disk of one storage with many trivial trials: farebox bench scale 100 1000."""
    if not trials or not all(n.isdecimal() and int(n) > 1 for n in trials):
        raise ConfigError(f"bench scale: got {' '.join(trials) or 'nothing'}, expected numbers of trials above 1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        farebox(folder / "first", 1)  # stores the image features
        one = farebox(folder / "one", 1)
        measured = {n: of_storage(folder / str(n), n, one, echo) for n in map(int, trials)}
    seconds = [record["s per trial"] for record in measured.values()]
    detail: dict[str, Any] = {f"{n:,} trials": record for n, record in measured.items()}
    detail |= {"command of 1 trial, s": one.text, **machine()}
    return BenchResult("scale", min(seconds), max(seconds), len(seconds), detail, value=seconds[-1], unit="s/trial")


def of_storage(storage: Path, n: int, one: Cost, echo: Echo) -> dict[str, Any]:
    """Fill a storage with n trials and return what that and reading it takes."""
    run = farebox(storage, n)
    echo(f"  {n:,} trials: {run.text} s")
    again = farebox(storage, n)
    readers = {f"{verb}, s": measured(verb, f"storage={storage}").text for verb in READERS}
    return {
        "s per trial": (run.wall_s - one.wall_s) / (n - 1),
        "driver's CPU s per trial": (run.cpu_s - one.cpu_s) / (n - 1),
        "driver's memory, MiB": run.memory_mib,
        "nothing to do, s": again.text,
        **readers,
        **disk(storage),
    }


def disk(storage: Path) -> dict[str, Any]:
    """Return the number of files in a storage and their MiB, for MLflow and for all else."""
    size = {True: 0, False: 0}
    files = {True: 0, False: 0}
    for path in storage.rglob("*"):
        if path.is_file():
            tracking = path.relative_to(storage).parts[0].startswith("mlflow")
            files[tracking] += 1
            size[tracking] += path.stat().st_size if path.stat().st_nlink == 1 or not tracking else 0  # linked: once
    return {
        "files": files[False],
        "MiB": size[False] / 2**20,
        "files of MLflow": files[True],
        "MiB of MLflow": size[True] / 2**20,
    }


def farebox(storage: Path, n: int) -> Cost:
    """Call `farebox run` for n trials in a storage; image features are shared."""
    seeds = ",".join(map(str, range(n)))
    overrides = ("sweep=smoke", "methods=zero_shot", "datasets=icons", f"seeds=[{seeds}]", "eval_shift=false")
    return measured("run", *overrides, f"storage={storage}")


def measured(*words: str) -> Cost:
    """Run a command to its end."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - start
    try:
        code, cpu_s, memory_mib = json.loads(done.stderr.strip().splitlines()[-1])
    except (IndexError, ValueError):
        code = done.returncode or 1
    if code:
        raise FareboxError(f"farebox {words[0]} ended with {code}: {done.stderr.strip()[-300:]}")
    return Cost(wall_s, cpu_s, memory_mib)
