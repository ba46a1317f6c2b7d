"""What every bench stands on: its result, timing of two sides in pairs, and how benches are found.

A bench is a function in the module of its name, registered by `@bench(name)`. It times what it is about, on this
machine, and returns a `BenchResult`; absolute times depend on the machine, ratios of interleaved pairs hardly.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline import bench as package
from pipeline.cards import ModelCard
from pipeline.errors import ConfigError, did_you_mean

PARTS = {"actors", "harness", "reference"}
"""Modules of the package that are no benches."""
ON_REQUEST = {"cost"}
"""Benches that need arguments: they run when they are named."""

Say = Callable[[str], None]
"""Takes a line about progress."""


@dataclass(frozen=True)
class BenchResult:
    """What a bench found: a ratio, or a value with its unit."""

    name: str
    low: float
    high: float
    """The least and the greatest of the pairs (or of the repetitions, where there is one side)."""
    pairs: int
    detail: dict[str, Any]
    """Absolute figures, further figures, shapes, `machine()`."""
    ratio: float | None = None
    value: float | None = None
    unit: str = ""
    """Of `value`, as in charges/s, s/trial, GiB."""

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.value is None):
            raise ValueError(f"bench {self.name!r}: give either a ratio or a value")

    def record(self) -> dict[str, Any]:
        """For JSON: name, ratio or value with unit, low, high, pairs, detail."""
        main = {"ratio": self.ratio} if self.ratio is not None else {"value": self.value, "unit": self.unit}
        return {"name": self.name, **main, "low": self.low, "high": self.high, "pairs": self.pairs} | {
            "detail": self.detail
        }

    def table(self) -> str:
        """For people: the figure on the first line, then its detail, aligned."""
        ratio = self.ratio is not None
        main, unit, runs = (self.ratio, "x", "pairs") if ratio else (self.value, f" {self.unit}".rstrip(), "times")
        spread = f"({_words(self.low)} to {_words(self.high)}, {self.pairs} {runs})"
        rows = [(label, _words(value)) for label, value in self.detail.items()]
        width = max((len(label) for label, _ in rows), default=0)
        return "\n".join(
            [f"{self.name}  {_words(main)}{unit}  {spread}", *(f"  {label.ljust(width)}  {v}" for label, v in rows)]
        )


@dataclass(frozen=True)
class PairedTiming:
    """Two sides timed in turn: the median of slow / fast over the pairs, their least and greatest, median seconds."""

    ratio: float
    low: float
    high: float
    slow_s: float
    fast_s: float
    pairs: int

    def spread(self) -> dict[str, Any]:
        """The fields that a Figure has too."""
        return {"ratio": self.ratio, "low": self.low, "high": self.high, "pairs": self.pairs}


Run = Callable[..., BenchResult]
REGISTRY: dict[str, Run] = {}


def bench(name: str) -> Callable[[Run], Run]:
    """Register a bench: a function (say, *arguments) -> Figure in the module of that name."""

    def register(function: Run) -> Run:
        REGISTRY[name] = function
        return function

    return register


def names() -> list[str]:
    """Every bench, found by its module; nothing is imported."""
    return sorted({module.name for module in pkgutil.iter_modules(package.__path__)} - PARTS)


def load(name: str) -> Run:
    """The bench of that name; ConfigError when there is none."""
    if name not in names():
        raise ConfigError(did_you_mean("bench", name, names()))
    importlib.import_module(f"{package.__name__}.{name}")
    return REGISTRY[name]


def run(name: str, words: Sequence[str], say: Say) -> BenchResult:
    """Run a bench with the words after its name. ConfigError when it takes other words, before anything runs."""
    function = load(name)
    signature = inspect.signature(function)
    try:
        signature.bind(say, *words)
    except TypeError:
        _, *wanted = signature.parameters.values()
        usage = [f"[{p.name} ...]" if p.kind is p.VAR_POSITIONAL else p.name.upper() for p in wanted]
        found = " ".join(words) or "nothing"
        raise ConfigError(
            f"bench {name}: found {found!r}, wanted {' '.join(usage) or 'no words'}: farebox bench "
            + " ".join([name, *usage])
        ) from None
    return function(say, *words)


def paired(
    slow: Callable[[], Any],
    fast: Callable[[], Any],
    pairs: int = 5,
    say: Say | None = None,
    times: float = 1.0,
    parts: Sequence[tuple[Callable[[], Any], float]] = (),
) -> PairedTiming:
    """Time two sides in pairs, after one run of each that is not counted; who goes first alternates.

    `times`: how often the slow side's work is really done, where `slow` does one part of it (one candidate of many);
    `parts`: its further parts, each with how often it is done.
    """
    sides = [(slow, times), *parts]

    def slowly() -> float:
        return sum(n * _seconds(part) for part, n in sides)

    slowly(), fast()
    taken: list[tuple[float, float]] = []
    for i in range(pairs):
        if i % 2 == 0:
            slow_s, fast_s = slowly(), _seconds(fast)
        else:
            fast_s, slow_s = _seconds(fast), slowly()
        taken.append((slow_s, fast_s))
        if say:
            say(f"  pair {i + 1} of {pairs}: {taken[-1][0]:.4g} s against {fast_s:.4g} s")
    ratios = [s / f for s, f in taken]
    slow_s, fast_s = (median(side) for side in zip(*taken, strict=True))
    return PairedTiming(median(ratios), min(ratios), max(ratios), slow_s, fast_s, pairs)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Torch's thread count within, as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_card(folder: Path, arch: str = "ViT-B-32") -> ModelCard:
    """The card of a model whose weights were never trained, written to a folder; all of its access is granted."""
    from pipeline.blackbox.weights import write_random_weights

    path = folder / f"{arch}.pt"
    if not path.exists():
        write_random_weights(arch, path)
    return ModelCard(
        name=f"random {arch}", kind="open_clip", arch=arch, weights=str(path), grant="SOFT+FEATURES+GRADIENTS"
    )


def machine() -> dict[str, Any]:
    """What the figures were taken on; call it with the thread count of the bench in force."""
    from pipeline.data.decode import cores
    from pipeline.trials.trial import cpu_name

    found = {"cpu": cpu_name(), "cores": cores(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def seconds_of(run: Callable[[], Any], times: int = 1) -> list[float]:
    """The seconds of each of some runs, for a bench with one side."""
    return [_seconds(run) for _ in range(times)]


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was only queued is work of this run
    return time.perf_counter() - began


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
