"""Time and memory of one trial that runs alone; the times in result rows include other trials' load.

`farebox bench cost METHOD [steps=N] [arch=NAME] [key=value ...]`: the overrides are those of `farebox run` and must
select one trial. It runs without Ray, with the ledger in the client's process and the endpoint in another one, so that
their memory is measured separately. No image features are stored before it. Memory is the increase of a process's peak:
in the client since the trial began, in the endpoint since before it loaded the model.

`steps=N` runs the first N steps without a score. `arch=NAME` uses an open_clip architecture with random weights, whose
time per step and memory are those of trained weights.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from methods.base import FewShotTask
from pipeline.bench.harness import BenchResult, bench, machine, random_card
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.facts import feature_dim
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.request import ModelInfo, Request, Response
from pipeline.budget import Limits, Phase
from pipeline.cards import ModelCard
from pipeline.config.compose import Config, compose
from pipeline.console import Echo
from pipeline.errors import ConfigError
from pipeline.ledger.ledger import Ledger
from pipeline.trials.boundary import Session
from pipeline.trials.evaluate import eval_labels, metrics, predict
from pipeline.trials.isolation import torch_threads
from pipeline.trials.local_handle import opened
from pipeline.trials.plan import TrialSpec, make_plan
from pipeline.trials.supervisor import Supervisor
from pipeline.trials.trial import few_shot_task

DEFAULTS = ("model=tiny", "datasets=digits", "shots=16", "seeds=1", "eval_shift=false")
RUNS = 5
"""Maximum number of runs."""
LIMIT_S = 120
"""No run starts after so many seconds."""


@bench("cost")
def cost(echo: Echo, method: str, *overrides: str) -> BenchResult:
    """Time and peak memory of one trial that runs alone; with steps=N, time per step."""
    keys = ("steps=", "arch=")
    own = dict(override.split("=", 1) for override in overrides if override.startswith(keys))
    rest = tuple(override for override in overrides if not override.startswith(keys))
    cost_spec = CostSpec(method, rest, _steps(own.get("steps")), own.get("arch"))
    spec, _ = one_trial(cost_spec, Path("unused"))
    model = f"{cost_spec.arch}, random weights" if cost_spec.arch else spec.model.name
    echo(f"{spec.name}, {model}")
    runs: list[Cost] = []
    start = time.monotonic()
    while len(runs) < RUNS and (not runs or time.monotonic() - start < LIMIT_S):
        runs.append(measure(cost_spec))
        echo(f"  run {len(runs)}: {runs[-1].seconds:.4g} s")
    seconds = [run.seconds for run in runs]
    with torch_threads(runs[0].threads):
        detail = {
            "trial": spec.name,
            "model": model,
            "start, s": median(run.start_s for run in runs),
            "steps": runs[0].steps,
            "step, s": median(run.step_s for run in runs),
            "client's memory, MiB": max(run.client_mib for run in runs),
            "endpoint's memory, MiB": max(run.endpoint_mib for run in runs),
            "fitted method, bytes": runs[0].client_bytes,
            "requests": runs[0].requests,
            "accuracy": runs[0].accuracy,
            **machine(),
        }
    unit = "s/trial" if cost_spec.steps is None else "s for start and steps"
    return BenchResult("cost", min(seconds), max(seconds), len(runs), detail, value=median(seconds), unit=unit)


class CostSpec(NamedTuple):
    """A trial to measure."""

    method: str
    overrides: tuple[str, ...] = ()
    """As for `farebox run`."""
    steps: int | None = None
    """Number of steps to run; None for the whole trial with its scores."""
    arch: str | None = None
    """Architecture with random weights; None for the model of the overrides."""


class Cost(NamedTuple):
    """Time and memory of one trial."""

    seconds: float
    start_s: float
    steps: int
    step_s: float
    """Median over the steps."""
    client_mib: float
    """Increase of the client's peak memory since before the trial."""
    endpoint_mib: float
    """Increase of the endpoint's peak memory since before it loaded the model."""
    client_bytes: int
    """Size of the fitted method's tensors."""
    requests: int
    accuracy: float | None
    threads: int


def measure(cost_spec: CostSpec) -> Cost:
    """Run the trial in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, cost_spec).result()


def one_trial(cost_spec: CostSpec, folder: Path) -> tuple[TrialSpec, Config]:
    """Return the one trial of the overrides and its configuration. Raises ConfigError when there are several."""
    if "=" in cost_spec.method:
        raise ConfigError(
            f"bench cost: got {cost_spec.method!r}, expected a method first, as in farebox bench cost taskres"
        )
    if cost_spec.arch:
        feature_dim(ModelCard(name=cost_spec.arch, kind="open_clip", arch=cost_spec.arch))  # raises for an unknown one
    methods, storage = f"methods={cost_spec.method}", f"storage={folder / 'storage'}"
    plan = make_plan(compose(["sweep=smoke", *DEFAULTS, methods, storage, *cost_spec.overrides]))
    if len(plan.trials) != 1:
        raise ConfigError(f"bench cost: {len(plan.trials)} trials, expected one: set one value each, as in shots=16")
    if plan.trials[0].choice.tuning is not None:
        raise ConfigError(
            f"bench cost: {cost_spec.method} is tuned, expected a method with one fit: name the plain one"
        )
    return plan.trials[0], plan.config


def _steps(value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isdecimal() or not int(value):
        raise ConfigError(f"bench cost: got steps={value}, expected a whole number of 1 or more, as in steps=3")
    return int(value)


def _measure(cost_spec: CostSpec) -> Cost:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec, config = one_trial(cost_spec, folder)
        torch.set_num_threads(config.threads)
        config.storage.mkdir(parents=True)
        ledger = Ledger(config.ledger_url)
        ledger.open_account("ceiling", Limits())
        ledger.reserve("bench", spec.account, ["ceiling"], spec.reserved)
        card = random_card(folder, cost_spec.arch) if cost_spec.arch else config.model
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            endpoint = EndpointProcess(process, card, config.features, config.threads)
            box = MeteredBox(
                LocalPool(endpoint, ledger), "bench", spec.account, spec.choice.info.access, spec.allotment
            )
            result = _run_trial(cost_spec, spec, box, config.threads)
            endpoint_mib = endpoint.peak() - endpoint.before
        ledger.close()
        return result._replace(endpoint_mib=endpoint_mib)


def _run_trial(cost_spec: CostSpec, spec: TrialSpec, metered: MeteredBox, n_threads: int) -> Cost:
    info = spec.choice.info
    session = Session(metered, spec.choice.name, predicted=spec.predicted, uses_text_norm=info.uses_text_norm)
    with session, opened(session, spec.local) as local:
        task = replace(few_shot_task(spec), local=local)
        return _run_supervised(cost_spec, spec, task, Supervisor(session, info.cls, spec.seed), n_threads)


def _run_supervised(
    cost_spec: CostSpec, spec: TrialSpec, given: FewShotTask, supervisor: Supervisor, n_threads: int
) -> Cost:
    method, task, box = spec.choice.build(), supervisor.task(given), supervisor.session.method_box
    before, start = _reset_peak(), time.perf_counter()
    supervisor.call("start", method.begin, task, box, np.random.default_rng(spec.seed))
    start_s, steps, running = time.perf_counter() - start, list[float](), True
    while running and (cost_spec.steps is None or len(steps) < cost_spec.steps):
        step_start = time.perf_counter()
        running = supervisor.call("step", method.step, box)
        steps.append(time.perf_counter() - step_start)
    accuracy = None
    if cost_spec.steps is None:
        test = spec.eval_sets[0]
        logits_BC, _ = predict(method, supervisor, test, test.classes, Phase.EVALUATE)
        accuracy = metrics(logits_BC, eval_labels(test, Counter()))["accuracy"]
    seconds = time.perf_counter() - start
    size = sum(t.numel() * t.element_size() for t in method.deployed().values())
    client_mib, requests = _peak() - before, supervisor.session.box.meter.paid.requests
    return Cost(seconds, start_s, len(steps), median(steps), client_mib, 0, size, requests, accuracy, n_threads)


class EndpointProcess:
    """An endpoint in a process of its own, for a `LocalPool`."""

    def __init__(self, process: ProcessPoolExecutor, card: ModelCard, features: Path, n_threads: int) -> None:
        self.process = process
        self.before: float = process.submit(_reset_peak).result()
        self._info: ModelInfo = process.submit(_load, card, features, n_threads).result()

    @property
    def info(self) -> ModelInfo:
        """See Endpoint.info."""
        return self._info

    def peak(self) -> float:
        """Return the peak memory of its process so far, in MiB."""
        return self.process.submit(_peak).result()

    def check(self, request: Request) -> None:
        """See Endpoint.check."""
        self.process.submit(_check, request).result()

    def compute(self, request: Request) -> Response:
        """See Endpoint.compute."""
        return self.process.submit(_compute, request).result()

    def embed_text(self, text: str) -> np.ndarray:
        """See Endpoint.embed_text."""
        return self.process.submit(_embed_text, text).result()


_ENDPOINT: list[Endpoint] = []
"""The endpoint of an EndpointProcess, in its process."""


def _load(card: ModelCard, features: Path, n_threads: int) -> ModelInfo:
    torch.set_num_threads(n_threads)
    _ENDPOINT.append(Endpoint(card, features))
    return _ENDPOINT[0].info


def _check(request: Request) -> None:
    _ENDPOINT[0].check(request)


def _compute(request: Request) -> Response:
    return _ENDPOINT[0].compute(request)


def _embed_text(text: str) -> np.ndarray:
    return _ENDPOINT[0].embed_text(text)


def _peak() -> float:
    """Return the peak memory of this process in MiB: since `_reset_peak` on Linux, else since its start."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)[0]) / 2**10
    # getrusage counts bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _reset_peak() -> float:
    """Reset the peak to the present memory where the system can; return the peak in MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()
