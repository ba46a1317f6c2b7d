"""Seconds and memory of one trial alone: figures to quote, as a row's are not.

`farebox bench cost METHOD [steps=N] [arch=NAME] [key=value ...]`: the words are those of `farebox run` and must leave
one trial. It runs without Ray, its ledger in the client's process, its endpoint in another, so that each side's memory
is told apart; nothing is stored before. Memory is what a process held at its peak beyond what it held before: the
client before the trial began, the endpoint before it loaded the model. Of a white-box method the endpoint's is what its
user would hold.

`steps=N` makes the first N steps and scores nothing; `arch=NAME` takes an open_clip architecture with weights that were
never trained: for models that are not at hand, or take hours, time a step and memory are all the same.
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
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.bench.harness import BenchResult, Say, bench, machine, random_card, threads
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint, ModelInfo, Request, Response
from pipeline.blackbox.facts import feature_dim
from pipeline.blackbox.local_pool import LocalPool
from pipeline.budget import Limits, Phase
from pipeline.cards import ModelCard
from pipeline.config.compose import Config, compose
from pipeline.errors import ConfigError
from pipeline.ledger.ledger import Ledger
from pipeline.trials.boundary import Session
from pipeline.trials.evaluate import metrics, predict, test_labels
from pipeline.trials.plan import TrialSpec, make_plan
from pipeline.trials.supervisor import Supervisor
from pipeline.trials.trial import few_shot_task

DEFAULTS = ("model=tiny", "datasets=[digits]", "shots=16", "seeds=1", "eval_shift=false")
RUNS = 5
"""At most; a trial that takes long is run fewer times."""
PATIENCE_S = 120


@bench("cost")
def cost(say: Say, method: str, *words: str) -> BenchResult:
    """Seconds and peak memory of one trial run alone; with steps=N, seconds of one of its steps."""
    mine = ("steps=", "arch=")
    own = dict(word.split("=", 1) for word in words if word.startswith(mine))
    rest = tuple(word for word in words if not word.startswith(mine))
    asked = CostSpec(method, rest, _steps(own.get("steps")), own.get("arch"))
    spec, _ = one_trial(asked, Path("unused"))
    model = f"{asked.arch}, random weights" if asked.arch else spec.model.name
    say(f"{spec.name}, {model}")
    found: list[Cost] = []
    began = time.monotonic()
    while len(found) < RUNS and (not found or time.monotonic() - began < PATIENCE_S):
        found.append(of(asked))
        say(f"  run {len(found)}: {found[-1].seconds:.4g} s")
    seconds = [run.seconds for run in found]
    with threads(found[0].threads):
        detail = {
            "trial": spec.name,
            "model": model,
            "start, s": median(run.start_s for run in found),
            "steps": found[0].steps,
            "a step, s": median(run.step_s for run in found),
            "client's memory, MiB": max(run.client_mib for run in found),
            "endpoint's memory, MiB": max(run.endpoint_mib for run in found),
            "kept by the client, bytes": found[0].client_bytes,
            "requests": found[0].requests,
            "accuracy": found[0].accuracy,
            **machine(),
        }
    unit = "s/trial" if asked.steps is None else "s for start and steps"
    return BenchResult("cost", min(seconds), max(seconds), len(found), detail, value=median(seconds), unit=unit)


class CostSpec(NamedTuple):
    """A trial whose cost is wanted."""

    method: str
    words: tuple[str, ...] = ()
    steps: int | None = None
    """The first so many; None: the whole trial, with its scores."""
    arch: str | None = None
    """Of random weights; None: the model that the words name."""


class Cost(NamedTuple):
    """What a trial took in processes of its own."""

    seconds: float
    start_s: float
    steps: int
    step_s: float
    """Median of the steps."""
    client_mib: float
    """Peak memory of the client beyond what it held before the trial."""
    endpoint_mib: float
    """Peak memory of the endpoint beyond what it held before it loaded the model."""
    client_bytes: int
    """What the fitted method keeps."""
    requests: int
    accuracy: float | None
    threads: int


def of(asked: CostSpec) -> Cost:
    """Run it in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_alone, asked).result()


def one_trial(asked: CostSpec, folder: Path) -> tuple[TrialSpec, Config]:
    """The trial that the words leave; ConfigError when they leave several."""
    if "=" in asked.method:
        raise ConfigError(
            f"bench cost: found {asked.method!r}, wanted a method first, as in: farebox bench cost taskres"
        )
    if asked.arch:
        feature_dim(ModelCard(name=asked.arch, kind="open_clip", arch=asked.arch))  # refuses an unknown one
    words = ["sweep=smoke", *DEFAULTS, f"methods=[{asked.method}]", f"storage={folder / 'storage'}", *asked.words]
    trials = make_plan(compose(words))
    if len(trials.trials) != 1:
        raise ConfigError(f"bench cost: {len(trials.trials)} trials, wanted one: give one value each, as in shots=16")
    return trials.trials[0], trials.config


def _steps(word: str | None) -> int | None:
    if word is None:
        return None
    if not word.isdecimal() or not int(word):
        raise ConfigError(f"bench cost: found steps={word}, wanted a number of 1 or more, as in steps=3")
    return int(word)


def _alone(asked: CostSpec) -> Cost:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec, config = one_trial(asked, folder)
        torch.set_num_threads(config.threads)
        config.storage.mkdir(parents=True)
        ledger = Ledger(config.ledger_url)
        ledger.open_account("ceiling", Limits())
        ledger.reserve("bench", spec.account, ["ceiling"], spec.reserved)
        card = random_card(folder, asked.arch) if asked.arch else config.model
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            there = EndpointProcess(process, card, config.features, config.threads)
            box = MeteredBox(LocalPool(there, ledger), "bench", spec.account, spec.choice.info.access, spec.allotment)
            found = _run(asked, spec, box, config.threads)
            endpoint_mib = there.peak() - there.before
        ledger.close()
        return found._replace(endpoint_mib=endpoint_mib)


def _run(asked: CostSpec, spec: TrialSpec, metered: MeteredBox, n_threads: int) -> Cost:
    with Session(metered, spec.choice.name) as session:
        return _measured(asked, spec, Supervisor(session, spec.choice.info.cls, spec.seed), n_threads)


def _measured(asked: CostSpec, spec: TrialSpec, supervisor: Supervisor, n_threads: int) -> Cost:
    method, task, box = spec.choice.build(), supervisor.task(few_shot_task(spec)), supervisor.session.method_box
    before, began = _forget_peak(), time.perf_counter()
    supervisor.call("start", method.start, task, box, np.random.default_rng(spec.seed))
    start_s, steps, going_on = time.perf_counter() - began, list[float](), True
    while going_on and (asked.steps is None or len(steps) < asked.steps):
        step_began = time.perf_counter()
        going_on = supervisor.call("step", method.step, box)
        steps.append(time.perf_counter() - step_began)
    accuracy = None
    if asked.steps is None:
        test = spec.tests[0]
        logits_BC, _ = predict(method, supervisor, test, test.classes, Phase.EVALUATE)
        accuracy = metrics(logits_BC, test_labels(test, Counter()))["accuracy"]
    seconds = time.perf_counter() - began
    kept = sum(t.numel() * t.element_size() for t in method.deployed().values())
    client_mib, requests = _peak() - before, supervisor.session.box.meter.paid.requests
    return Cost(seconds, start_s, len(steps), median(steps), client_mib, 0, kept, requests, accuracy, n_threads)


class EndpointProcess:
    """An endpoint in a process of its own, for a `LocalPool`."""

    def __init__(self, process: ProcessPoolExecutor, card: ModelCard, features: Path, n_threads: int) -> None:
        self.process = process
        self.before: float = process.submit(_forget_peak).result()
        self._info: ModelInfo = process.submit(_load, card, features, n_threads).result()

    @property
    def info(self) -> ModelInfo:
        """As the endpoint's."""
        return self._info

    def peak(self) -> float:
        """MiB that its process held at most so far."""
        return self.process.submit(_peak).result()

    def check(self, request: Request) -> None:
        """As the endpoint's."""
        self.process.submit(_call, "check", request).result()

    def compute(self, request: Request) -> Response:
        """As the endpoint's."""
        answer: Response = self.process.submit(_call, "compute", request).result()
        return answer

    def embed_text(self, text: str) -> np.ndarray:
        """As the endpoint's."""
        embedded: np.ndarray = self.process.submit(_call, "embed_text", text).result()
        return embedded


_ENDPOINT: list[Endpoint] = []
"""The one of the process that serves it."""


def _load(card: ModelCard, features: Path, n_threads: int) -> ModelInfo:
    torch.set_num_threads(n_threads)
    _ENDPOINT.append(Endpoint(card, features))
    return _ENDPOINT[0].info


def _call(verb: str, argument: Any) -> Any:
    return getattr(_ENDPOINT[0], verb)(argument)


def _peak() -> float:
    """MiB of memory that this process held at most, since `_forget_peak` where Linux can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)[0]) / 2**10
    # getrusage counts bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _forget_peak() -> float:
    """Let the peak be what is held now; MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()
