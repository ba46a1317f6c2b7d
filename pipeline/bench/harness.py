"""Benchmark harness: results, paired timing, and discovery of benchmarks.

A benchmark is a function in the module of its name, registered by `@bench(name)`, that returns a `BenchResult`. Prefer
ratios of interleaved pairs: unlike absolute times, they hardly depend on the machine.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline import bench as package
from pipeline.cards import ModelCard
from pipeline.console import Echo
from pipeline.errors import ConfigError, did_you_mean

PARTS = {"actors", "harness", "peer_loops", "reference"}
"""Modules of the package that are not benchmarks."""
ON_REQUEST = {"cost", "peers", "scale"}
"""Benchmarks that run only when they are named: they need arguments or many minutes."""


@dataclass(frozen=True)
class BenchResult:
    """Result of a benchmark: either a ratio, or a value with its unit."""

    name: str
    low: float
    high: float
    """Minimum and maximum over the pairs, or over the repetitions where nothing is compared."""
    pairs: int
    detail: dict[str, Any]
    """Absolute times, further results, shapes, and `machine()`."""
    ratio: float | None = None
    value: float | None = None
    unit: str = ""
    """Unit of `value`, such as charges/s, s/trial or GiB."""

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.value is None):
            raise ValueError(f"benchmark {self.name!r}: give either a ratio or a value")

    def record(self) -> dict[str, Any]:
        """Return the result for JSON: name, ratio or value with unit, low, high, pairs, detail."""
        main = {"ratio": self.ratio} if self.ratio is not None else {"value": self.value, "unit": self.unit}
        return {"name": self.name, **main, "low": self.low, "high": self.high, "pairs": self.pairs} | {
            "detail": self.detail
        }

    def table(self) -> str:
        """Return the result as text: ratio or value on the first line, then the details, aligned."""
        ratio = self.ratio is not None
        main, unit, kind = (self.ratio, "x", "pairs") if ratio else (self.value, f" {self.unit}".rstrip(), "runs")
        spread = f"({_text(self.low)} to {_text(self.high)}, {self.pairs} {kind})"
        rows = [(label, _text(value)) for label, value in self.detail.items()]
        width = max((len(label) for label, _ in rows), default=0)
        return "\n".join(
            [f"{self.name}  {_text(main)}{unit}  {spread}", *(f"  {label.ljust(width)}  {v}" for label, v in rows)]
        )


@dataclass(frozen=True)
class PairedTiming:
    """Interleaved timing of two functions: median, minimum and maximum of slow / fast over pairs, median seconds."""

    ratio: float
    low: float
    high: float
    slow_s: float
    fast_s: float
    pairs: int

    def spread(self) -> dict[str, Any]:
        """Return the fields that it shares with BenchResult."""
        return {"ratio": self.ratio, "low": self.low, "high": self.high, "pairs": self.pairs}


Benchmark = Callable[..., BenchResult]
REGISTRY: dict[str, Benchmark] = {}


def bench(name: str) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark: a function (echo, *arguments) -> BenchResult in the module of that name."""

    def register(function: Benchmark) -> Benchmark:
        REGISTRY[name] = function
        return function

    return register


def names() -> list[str]:
    """Return the names of all benchmarks, without importing them."""
    return sorted({module.name for module in pkgutil.iter_modules(package.__path__)} - PARTS)


def load(name: str) -> Benchmark:
    """Import a benchmark. Raises ConfigError when it does not exist."""
    if name not in names():
        raise ConfigError(did_you_mean("benchmark", name, names()))
    importlib.import_module(f"{package.__name__}.{name}")
    return REGISTRY[name]


def run(name: str, arguments: Sequence[str], echo: Echo) -> BenchResult:
    """Run a benchmark. Raises ConfigError, before it starts, when it takes other arguments."""
    function = load(name)
    signature = inspect.signature(function)
    try:
        signature.bind(echo, *arguments)
    except TypeError:
        _, *parameters = signature.parameters.values()
        usage = [f"[{p.name} ...]" if p.kind is p.VAR_POSITIONAL else p.name.upper() for p in parameters]
        given = " ".join(arguments) or "nothing"
        raise ConfigError(
            f"bench {name}: got {given!r}, expected {' '.join(usage) or 'no arguments'}: farebox bench "
            + " ".join([name, *usage])
        ) from None
    return function(echo, *arguments)


def paired(
    slow: Callable[[], Any],
    fast: Callable[[], Any],
    pairs: int = 5,
    echo: Echo | None = None,
    times: float = 1.0,
    parts: Sequence[tuple[Callable[[], Any], float]] = (),
) -> PairedTiming:
    """Time two functions in pairs, in alternating order, after one warm-up of each.

    Args:
        slow: the baseline, or one part of it (such as one candidate of many).
        fast: what is compared with the baseline.
        pairs: number of pairs.
        echo: prints a line after each pair.
        times: factor of the time of `slow`: how often the baseline does it.
        parts: further parts of the baseline, each with its factor.
    """
    slow_parts = [(slow, times), *parts]

    def slow_seconds() -> float:
        return sum(n * _seconds(part) for part, n in slow_parts)

    slow_seconds(), fast()
    timings: list[tuple[float, float]] = []
    for i in range(pairs):
        if i % 2 == 0:
            slow_s, fast_s = slow_seconds(), _seconds(fast)
        else:
            fast_s, slow_s = _seconds(fast), slow_seconds()
        timings.append((slow_s, fast_s))
        if echo:
            echo(f"  pair {i + 1} of {pairs}: {slow_s:.4g} s against {fast_s:.4g} s")
    ratios = [s / f for s, f in timings]
    slow_s, fast_s = (median(side) for side in zip(*timings, strict=True))
    return PairedTiming(median(ratios), min(ratios), max(ratios), slow_s, fast_s, pairs)


def random_card(folder: Path, arch: str = "ViT-B-32") -> ModelCard:
    """Write random weights to a folder and return the card of the model, which grants all access."""
    from pipeline.blackbox.weights import write_random_weights

    path = folder / f"{arch}.pt"
    if not path.exists():
        write_random_weights(arch, path)
    return ModelCard(
        name=f"random {arch}", kind="open_clip", arch=arch, weights=str(path), grant="SOFT+FEATURES+GRADIENTS"
    )


def machine() -> dict[str, Any]:
    """Return the details of this machine, with the number of threads that is set."""
    from pipeline.data.decode import cores
    from pipeline.trials.rows import cpu_name

    details = {"cpu": cpu_name(), "cores": cores(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return details | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def seconds_of(run: Callable[[], Any], times: int = 1) -> list[float]:
    """Return the seconds of each of some runs."""
    return [_seconds(run) for _ in range(times)]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels still queued belong to this run
    return time.perf_counter() - start


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
