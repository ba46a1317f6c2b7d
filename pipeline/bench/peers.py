"""What a user would run instead: loops like the papers' released code, and Ray Serve in place of replicas.

A trial is 16 shots of the digits with the embedded model and 1,000 requests, on one thread, from image files to
accuracy: both sides load the model, encode, fit and evaluate. Here it also reserves and charges its bill, and writes
its row and predictions. "Cold" has no stored image features, "warm" has those of an earlier trial on the same images.
The result is the ratio for five seeds of all methods, of which the first trial is cold; the loop's seeds take equally
long, so one is timed and multiplied.

The Ray Serve side is one deployment of the same model with one replica. It needs the extra packages of `ray[serve]`,
and is left out without them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.bench import actors
from pipeline.bench.harness import BenchResult, bench, machine, paired
from pipeline.bench.peer_loops import LOOPS
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.ray_pool import RayPool
from pipeline.blackbox.request import Request
from pipeline.config.compose import compose
from pipeline.console import Echo
from pipeline.ledger.records import Charge
from pipeline.sweep.in_process import run_single
from pipeline.trials.isolation import torch_threads
from pipeline.trials.plan import SweepPlan, make_plan

PAIRS, SEEDS = 3, 5
Timings = list[tuple[float, float]]
"""Seconds and accuracy in percent of each round."""
WORDS = ("model=tiny", "datasets=digits", "shots=16", "eval_shift=false", "budget.requests=1000", "threads=1")
CLIENTS, EACH = (1, 8), 12


@bench("peers")
def peers(echo: Echo, *methods: str) -> BenchResult:
    """Trials from images to accuracy against plain loops like the released code, and replicas against Ray Serve."""
    with tempfile.TemporaryDirectory() as name, torch_threads(1):
        measured = {method: compare(method, Path(name), echo) for method in methods or LOOPS}
    rounds = []
    for of_methods in zip(*(five_seeds(m) for m in measured.values()), strict=True):
        loops, ours = map(sum, zip(*of_methods, strict=True))
        rounds.append(loops / ours)
    detail: dict[str, Any] = {method: summary(m) for method, m in measured.items()}
    detail |= {
        "trial": "tiny, digits, 16 shots, 1,000 requests, from image files to accuracy, one thread",
        "five seeds": "the first cold, the others warm, against five loops; new views in every epoch of a loop",
        "Ray Serve": against_serve(echo),
        **machine(),
    }
    return BenchResult("peers", min(rounds), max(rounds), PAIRS, detail, ratio=median(rounds))


def compare(method: str, folder: Path, echo: Echo) -> dict[str, Timings]:
    """Run a loop, a cold trial and a warm trial of a method in turn, in changing order."""
    trial(method, folder, f"first-{method}", "shared")  # stores the features of the warm trials
    plan = plan_of(method, folder, "loop", "none")
    found: dict[str, Timings] = {"loop": [], "cold": [], "warm": []}
    for i in range(PAIRS):
        for side in list(found)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            if side == "loop":
                accuracy = LOOPS[method](plan.config.model, plan.trials[0])
            else:
                name = f"{side}-{method}-{i}"
                accuracy = trial(method, folder, name, "shared" if side == "warm" else name)
            found[side].append((time.perf_counter() - start, accuracy))
        took = ", ".join(f"{side} {timings[-1][0]:.3g} s" for side, timings in found.items())
        echo(f"  {method}, round {i + 1} of {PAIRS}: {took}")
    return found


def five_seeds(measured: dict[str, Timings]) -> list[tuple[float, float]]:
    """Return the seconds of the loop's seeds and of ours, for each round."""
    rounds = zip(*(seconds(measured[side]) for side in ("loop", "cold", "warm")), strict=True)
    return [(SEEDS * loop, cold + (SEEDS - 1) * warm) for loop, cold, warm in rounds]


def summary(measured: dict[str, Timings]) -> dict[str, Any]:
    """Return the ratios of a method with their range, and medians of seconds and accuracies."""
    loop = seconds(measured["loop"])
    pairs = {side: list(zip(loop, seconds(measured[side]), strict=True)) for side in ("cold", "warm")}
    found: dict[str, Any] = {}
    for name, timings in (pairs | {"five seeds": five_seeds(measured)}).items():
        ratios = [slow / fast for slow, fast in timings]
        found[name] = f"{median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    for side, of_side in measured.items():
        found |= {f"{side}, s": median(seconds(of_side)), f"{side}, %": median(accuracy for _, accuracy in of_side)}
    return found


def seconds(timings: Timings) -> list[float]:
    """Return the seconds without the accuracies."""
    return [taken for taken, _ in timings]


def plan_of(method: str, folder: Path, storage: str, features: str) -> SweepPlan:
    """Return the plan of one trial."""
    places = (f"storage={folder / storage}", f"features={folder / 'features' / features}")
    return make_plan(compose(["sweep=smoke", f"methods={method}", "seeds=1", *WORDS, *places]))


def trial(method: str, folder: Path, storage: str, features: str) -> float:
    """Run a trial as a sweep does, without Ray; return its accuracy in percent."""
    (row,) = run_single(plan_of(method, folder, storage, features), lambda line: None)
    assert row.accuracy is not None
    return row.accuracy


# --- Ray Serve -----------------------------------------------------------------------------------------------------


def against_serve(echo: Echo) -> dict[str, str] | str:
    """Compare one replica with a Ray Serve deployment of the same endpoint; say what is missing if it is not there."""
    try:
        from ray import serve
    except ImportError as error:
        return f"left out ({error.msg.partition('.')[0]}): pip install 'ray[serve]'"
    found = {}
    with actors.cluster() as cluster:
        (replica,) = cluster.replicas(1, Endpoint)
        serve.start(proxy_location="Disabled")

        @serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
        class Served:
            """The endpoint of the toy model, without a meter."""

            def __init__(self, folder: str) -> None:
                from pipeline.config.card_files import model_card

                self.endpoint = Endpoint(model_card("fake"), Path(folder))

            def __call__(self, request: Request) -> Any:
                return self.endpoint.compute(request).values

        handle = serve.run(Served.bind(str(cluster.folder / "served")))  # type: ignore[attr-defined]
        for clients in CLIENTS:
            pools = [RayPool([replica]) for _ in range(clients)]
            here = cluster.workload(pools, EACH)
            width, charges = pools[0].info.token_dim, cluster.charges(clients)

            def there(width: int = width, charges: Sequence[Charge] = charges) -> None:
                def client(charge: Charge) -> None:
                    for _ in range(EACH):
                        request = Request("text_features", None, actors.population(width), charge)
                        handle.remote(request).result()

                with ThreadPoolExecutor(len(charges)) as threads:
                    list(threads.map(client, charges))

            timing = paired(there, here, PAIRS, echo)
            found[f"{clients} clients"] = f"{timing.ratio:.2f}x ({timing.low:.2f} to {timing.high:.2f})"
        serve.shutdown()
    return found
