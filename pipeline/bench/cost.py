"""Seconds and memory of one trial alone in a process of its own: figures to quote, as a row's are not.

`farebox bench cost METHOD [key=value ...]`: the words are those of `farebox run` and must leave one trial. It runs with
its endpoint and ledger in the one process, without Ray; nothing is stored before. Seconds are the whole trial's (fit
and scores); memory is the process's peak, and what it held before the trial began, the model loaded.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.bench.harness import Figure, Say, bench, machine, threads
from pipeline.blackbox.bill import Limits
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.ledger import Ledger
from pipeline.blackbox.local import LocalPool
from pipeline.config import Config, compose
from pipeline.errors import ConfigError, FareboxError
from pipeline.plan import TrialSpec, make_plan
from pipeline.results import Store
from pipeline.trial import run_trial

DEFAULTS = ("model=tiny", "datasets=[digits]", "shots=16", "seeds=1", "shift=false")
RUNS = 5
"""At most; a trial that takes long is run fewer times."""
PATIENCE_S = 120


@bench("cost")
def cost(say: Say, method: str, *words: str) -> Figure:
    """Seconds and peak memory of one trial run alone."""
    spec, _ = one_trial(method, words, "unused")
    say(f"{spec.name}, {spec.model.name}")
    found: list[dict[str, Any]] = []
    began = time.monotonic()
    while len(found) < RUNS and (not found or time.monotonic() - began < PATIENCE_S):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(alone, method, words).result())
        say(f"  run {len(found)}: {found[-1]['seconds']:.4g} s, {found[-1]['peak']:.4g} GiB")
    seconds = [run["seconds"] for run in found]
    with threads(found[0]["threads"]):
        detail = {
            "trial": spec.name,
            "model": spec.model.name,
            "fit alone, s": median(run["fit"] for run in found),
            "peak memory, GiB": max(run["peak"] for run in found),
            "before the trial, GiB": max(run["before"] for run in found),
            "requests": spec.predicted.requests,
            "accuracy": found[0]["accuracy"],
            **machine(),
        }
    return Figure("cost", min(seconds), max(seconds), len(found), detail, value=median(seconds), unit="s/trial")


def one_trial(method: str, words: tuple[str, ...], storage: str) -> tuple[TrialSpec, Config]:
    """The trial that the words leave; ConfigError when they leave several."""
    if "=" in method:
        raise ConfigError(f"bench cost: found {method!r}, wanted a method first, as in: farebox bench cost taskres")
    trials = make_plan(compose(["sweep=smoke", *DEFAULTS, f"methods=[{method}]", f"storage={storage}", *words]))
    if len(trials.trials) != 1:
        raise ConfigError(f"bench cost: {len(trials.trials)} trials, wanted one: give one value each, as in shots=16")
    return trials.trials[0], trials.config


def alone(method: str, words: tuple[str, ...]) -> dict[str, Any]:
    """What a trial took in this process: seconds, fit, peak and earlier memory (GiB), accuracy, threads."""
    with tempfile.TemporaryDirectory() as folder:
        spec, config = one_trial(method, words, str(Path(folder) / "storage"))
        torch.set_num_threads(config.threads)
        store = Store(config.storage)
        config.storage.mkdir(parents=True)
        ledger = Ledger(config.ledger_url)
        ledger.open_account("ceiling", Limits())
        ledger.reserve("bench", spec.account, ["ceiling"], spec.reserved)
        pool = LocalPool(Endpoint(config.model, config.features), ledger)
        before, began = _peak(), time.perf_counter()
        row = run_trial(spec, pool, "bench", store, config.checkpoint_s, config.threads)[0]
        seconds = time.perf_counter() - began
        ledger.close()
        if row.status == "failed":
            raise FareboxError(f"bench cost: the trial failed: {row.error}")
        return {
            "seconds": seconds,
            "fit": row.seconds,
            "before": before,
            "peak": _peak(),
            "accuracy": row.accuracy,
            "threads": config.threads,
        }


def _peak() -> float:
    """GiB of memory that this process held at most; getrusage counts bytes on macOS, kibibytes elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
