"""The text tower against the papers' loop (77 tokens, candidates one by one), and against truncation only.

10, 100 and 1,000 classes, 4 context tokens, a population of 8 in one call. Class names are those of Oxford Flowers (the
first 100) and of ImageNet. The model is ViT-B/32's text tower with random weights, on one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.base import SoftPrompts
from pipeline.bench import reference
from pipeline.bench.harness import (
    BenchResult,
    PairedTiming,
    bench,
    machine,
    paired,
    random_card,
    seconds_of,
)
from pipeline.blackbox.model import OpenClipModel
from pipeline.blackbox.text_tower import SharedPrefixTower
from pipeline.blackbox.weights import imagenet_names
from pipeline.console import Echo
from pipeline.trials.isolation import torch_threads

CONTEXT, POPULATION, WIDTH = 4, 8, 512
FLOWERS = (Path(__file__).parent / "flowers.txt").read_text().splitlines()


@bench("text_tower")
def text_tower(echo: Echo) -> BenchResult:
    """Soft prompts in the text tower against one candidate at a time at 77 tokens, and against truncation only."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(1), torch.inference_mode():
        model = OpenClipModel(random_card(Path(folder)))
        thousand = imagenet_names()
        main, at_100 = _measure(model, FLOWERS, POPULATION, 1, echo)
        _, at_10 = _measure(model, FLOWERS[:10], POPULATION, 1, echo)
        _, at_1000 = _measure(model, thousand, 1, 20, echo)
        echo(f"1,000 classes, all {POPULATION} candidates once")
        (whole_s,) = seconds_of(lambda: _tower(model).encode(_call(thousand, POPULATION)))
        detail = {
            "100 classes": at_100,
            "10 classes": at_10,
            "1,000 classes": at_1000 | {f"s for {POPULATION} candidates, once": whole_s},
            "text tower": f"{POPULATION} candidates in one call; 1 at 1,000 classes, where a tile takes one",
            "baseline": "one candidate, multiplied; at 1,000 classes every 20th class of it",
            "model": f"ViT-B/32 text tower, random weights, fp32; {CONTEXT} context tokens",
            **machine(),
        }
    return BenchResult("text_tower", **main.spread(), detail=detail)


def _measure(
    model: OpenClipModel, names: Sequence[str], population: int, every: int, echo: Echo
) -> tuple[PairedTiming, dict[str, Any]]:
    """Time a call against the loops on one candidate with every n-th class, multiplied."""
    echo(f"{len(names):,} classes, {population} candidates")
    call, part, tower = _call(names, population), _call(names[::every], 1), _tower(model)
    times = population * len(names) / len(part.classnames)
    features: dict[str, Tensor] = {}

    def fast() -> None:
        features["fast"] = tower.encode(call)[0, ::every]

    def slow() -> None:
        features["slow"] = reference.encode_77(model.net, model.tokenizer, part)[0]

    def truncated() -> None:
        reference.encode_truncated(model.net, model.tokenizer, part)

    loop, truncation = paired(slow, fast, 5, echo, times), paired(truncated, fast, 3, echo, times)
    tokens = CONTEXT + 1 + sum(len(model.tokenizer.encode(name + call.suffix)) + 1 for name in names)
    return loop, {
        "ratio": loop.ratio,
        "low": loop.low,
        "high": loop.high,
        "token ratio": len(names) * model.net.context_length / tokens,
        "over truncation": truncation.ratio,
        "largest difference": float((features["fast"] - features["slow"]).abs().max()),
        "s per candidate": loop.fast_s / population,
        "s of the loop": loop.slow_s / population,
        "s truncated": truncation.slow_s / population,
    }


def _tower(model: OpenClipModel) -> SharedPrefixTower:
    assert model.text is not None
    return model.text


def _call(names: Sequence[str], population: int) -> SoftPrompts:
    """Return random contexts of the size of token embeddings. The first candidate is always the same."""
    ctx_PLE = 0.02 * torch.randn(population, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(0))
    return SoftPrompts(ctx_PLE, tuple(names))
