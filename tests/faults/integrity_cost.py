"""Measure what integrity checks cost: the same sweep with and without them, in turn, in forked processes.

    python -m tests.faults.integrity_cost --pairs 9

A sweep of the embedded model runs in this process, without Ray, then its leaderboard is computed. "Without" replaces
the checksums of files, features, records of the ledger and embedded data by constants. The figure is CPU time, which
other processes on the machine change little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip  # noqa: F401 (imported before the forks)

import pipeline.blackbox.architecture
import pipeline.blackbox.feature_store
import pipeline.data.source
import pipeline.ledger.checksum
import pipeline.ledger.rows
import pipeline.results.published
import pipeline.results.releases
from pipeline import cli, files
from pipeline.config.card_files import dataset_card
from pipeline.config.compose import compose
from pipeline.sweep.in_process import run_all
from pipeline.trials.plan import make_plan
from tests.faults.forked import forked

DATASETS = ("icons", "icons_outline", "digits")
WORDS = ("sweep=smoke", "model=tiny", "datasets=icons,digits", "shots=1,4", "seeds=1,2", "budget.requests=500")
METHODS = "methods=zero_shot,logit_head,taskres,tip_adapter,bbt"


class _NoHash:
    """A hash object that reads nothing."""

    def __init__(self, data: Any = b"") -> None: ...

    def update(self, data: Any) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64


def without_checks() -> None:
    """Replace every checksum by a constant, in this process."""
    digests = {card.file: card.sha256 for card in map(dataset_card, DATASETS)}
    files.hashlib = SimpleNamespace(sha256=_NoHash, file_digest=hashlib.file_digest)  # type: ignore[attr-defined]
    pipeline.data.source.file_sha256 = digests.get  # type: ignore[attr-defined]
    for module in (pipeline.blackbox.architecture, pipeline.results.published, pipeline.results.releases):
        module.verified = lambda path: path
    for module in (pipeline.ledger.checksum, pipeline.ledger.rows):
        module.checksum = lambda table, values: 0
    pipeline.blackbox.feature_store._sum = lambda key, feature_D: 0


def seconds(folder: Path, prepare: Callable[[], None]) -> float:
    """Run the sweep and its leaderboard; return the CPU seconds of this process."""
    os.environ["FAREBOX_CACHE"] = str(folder.parent / "cache")  # files without checksums must not stay
    prepare()
    before = _cpu()
    run_all(make_plan(compose([*WORDS, METHODS, f"storage={folder}"])), lambda line: None)
    assert cli.main(["leaderboard", f"storage={folder}"]) == 0
    return _cpu() - before


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the CPU seconds of both sides and the ratio of each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = []
    for _ in range(parser.parse_args().pairs):
        sides = []
        for prepare in (lambda: None, without_checks):
            with tempfile.TemporaryDirectory() as folder:  # features are computed in each run
                outcome, value = forked(lambda: seconds(Path(folder) / "s", prepare))  # noqa: B023
            assert outcome == "done", value
            sides.append(float(value))
        pairs.append(sides)
    costs = sorted(100 * (with_checks / without - 1) for with_checks, without in pairs)
    print(json.dumps({"with_s": [round(a, 2) for a, _ in pairs], "without_s": [round(b, 2) for _, b in pairs]}))
    print(f"integrity checks cost {statistics.median(costs):.2f}% of CPU time ({costs[0]:.2f} to {costs[-1]:.2f})")


if __name__ == "__main__":
    main()
