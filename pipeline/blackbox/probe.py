"""Probe an endpoint: ask fixed questions repeatedly, alone and in other batches and orders, and compare the answers.

It uses a black box only, whether its endpoint is in this process or remote. Shapes: B images, C classes, D feature
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from methods.base import Access, BlackBox, ImageSet, TextPrompts
from pipeline.errors import EndpointRefused

WORDS = ("red", "green", "small", "round", "old", "new", "left", "high", "soft", "plain", "warm", "late")
"""Words of the long texts, in turn."""
MOST_WORDS = 1024
"""Length up to which the end of a text is looked for, in words."""


class Arrangement(NamedTuple):
    """A way to ask for the same values."""

    batches: tuple[tuple[int, ...], ...]
    """Images of each call."""
    prompts: tuple[int, ...]
    """Order of the prompts in each call."""


@dataclass
class Differences:
    """Absolute differences between the values of an arrangement and those of the first one."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, values: Tensor, first: Tensor) -> None:
        """Add the differences of two tensors where both are finite: other values are not told."""
        told = torch.isfinite(values) & torch.isfinite(first)
        difference = (values[told].double() - first[told].double()).abs()
        if len(difference):
            self.largest = max(self.largest, float(difference.max()))
            self.total, self.count = self.total + float(difference.sum()), self.count + len(difference)

    @property
    def mean(self) -> float:
        """Mean absolute difference."""
        return self.total / self.count if self.count else 0.0


@dataclass
class NoiseFloor:
    """How much equal questions differ in their answers."""

    scores: Differences = field(default_factory=Differences)
    features: Differences | None = None
    """Of image and text features; None where they are not granted."""
    n_images: int = 0
    changed: int = 0
    """Images whose best class differs in some arrangement."""


class TextEnd(NamedTuple):
    """The longest text that has an effect as a whole."""

    words: int | None
    """Its number of words; None if texts of `MOST_WORDS` words have one."""
    refused: bool
    """Whether longer texts are refused; otherwise their end is ignored."""


def arrangements(b: int, c: int) -> Iterator[Arrangement]:
    """Yield ways to ask for B images and C prompts; the first is one call in the given order, and so is the second."""
    forward, backward = tuple(range(b)), tuple(reversed(range(c)))
    shuffled = tuple(int(i) for i in np.random.default_rng(0).permutation(b))
    yield Arrangement((forward,), backward[::-1])
    yield Arrangement((forward,), backward[::-1])
    yield Arrangement(tuple((i,) for i in forward), backward[::-1])
    yield Arrangement((forward[: b // 2 : -1], forward[b // 2 :: -1]), backward)
    yield Arrangement(tuple(shuffled[i : i + 3] for i in range(0, b, 3)), backward)


def measure(
    floor: NoiseFloor, box: BlackBox, images: ImageSet, texts: Sequence[str], forget: Callable[[], None]
) -> None:
    """Add the differences between the answers about these images and texts to a noise floor.

    Args:
        floor: receives the differences. Features are asked for if it has a place for them.
        box: the black box.
        images: the images.
        texts: one prompt for each class.
        forget: lets the endpoint compute answers again that it has stored.
    """
    b, c = len(images), len(texts)
    changed, first = torch.zeros(b, dtype=torch.bool), dict[str, Tensor]()
    for arrangement in arrangements(b, c):
        forget()
        prompts = TextPrompts((tuple(texts[i] for i in arrangement.prompts),))
        values = {"scores": torch.empty(b, c)}
        if floor.features is not None:
            values |= {"image": torch.empty(b, box.feature_dim), "text": torch.empty(c, box.feature_dim)}
            values["text"][list(arrangement.prompts)] = box.text_features(prompts)[0]
        for batch in map(list, arrangement.batches):
            scores_BC = torch.empty(len(batch), c)
            scores_BC[:, list(arrangement.prompts)] = box.scores(images[batch], prompts)[0]
            values["scores"][batch] = scores_BC
            if floor.features is not None:
                values["image"][batch] = box.image_features(images[batch])
        first = first or values
        floor.scores.add(values["scores"], first["scores"])
        changed |= values["scores"].argmax(1) != first["scores"].argmax(1)
        if floor.features is not None:
            for name in ("image", "text"):
                floor.features.add(values[name], first[name])
    floor.n_images, floor.changed = floor.n_images + b, floor.changed + int(changed.sum())


def text_end(box: BlackBox, access: Access, image: ImageSet, noise: float) -> TextEnd | None:
    """Find how many words of a text have an effect, by bisection: first on refusals, then on the last word's effect.

    Args:
        box: the black box.
        access: what it grants.
        image: one image, whose scores are asked for where features are not granted.
        noise: differences up to this number are none. Infinity: only refusals are looked for.

    Returns:
        The end of a text; None where nothing is refused and the answers do not show the effect of a word.
    """

    def texts(n: int) -> list[str]:
        """Return a text of n words, and the same with other last words."""
        start = [WORDS[i % len(WORDS)] for i in range(n - 1)]
        return [" ".join([*start, WORDS[(n - 1 + j) % len(WORDS)]]) for j in range(5)]

    def effect(n: int) -> float | None:
        """Return the largest difference that the last of n words makes; None if such texts are refused."""
        first, *others = texts(n)
        try:
            if access.covers(Access.FEATURES):
                values = box.text_features(TextPrompts(((first, *others),)))[0]
                return float((values[1:] - values[0]).abs().max())
            values = box.scores(image, TextPrompts(tuple((first, other) for other in others)))[:, 0]
            return float((values[:, 1] - values[:, 0]).abs().max())
        except EndpointRefused:
            return None

    accepted = _last(lambda n: effect(n) is not None)
    shown = access.covers(Access.TOPK) and box.top_k > 1 and noise < math.inf
    counted = _last(lambda n: n <= accepted and (effect(n) or 0.0) > noise) if shown else accepted
    if counted == MOST_WORDS:
        return TextEnd(None, False) if shown else None
    return TextEnd(counted, refused=counted == accepted)


def _last(holds: Callable[[int], bool]) -> int:
    """Return the last number up to `MOST_WORDS` for which a condition holds; it holds up to some number."""
    if holds(MOST_WORDS):
        return MOST_WORDS
    low, high = 0, MOST_WORDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
