"""Measure `text_norm`: the mean length of a text tower's output before normalisation.

Some papers add a learned vector to text features that keep this length; the endpoint returns features of unit length.
"""

from __future__ import annotations

from typing import NamedTuple

from methods.base import Classes
from pipeline.blackbox.model import Model

TEMPLATE = "a photo of a {}."
NAMES = (
    *("airplane", "apple", "ball", "banana", "bear", "bed", "bicycle", "bird", "boat", "book", "bottle", "bridge"),
    *("bus", "cake", "camera", "car", "cat", "chair", "church", "clock", "cloud", "coat", "cow", "cup"),
    *("desert", "dog", "door", "elephant", "field", "fish", "flower", "forest", "fork", "frog", "guitar", "hammer"),
    *("hat", "horse", "house", "key", "knife", "lamp", "lion", "map", "monkey", "mountain", "mouse", "pizza"),
    *("river", "road", "sheep", "ship", "shoe", "snake", "spoon", "sun", "table", "tiger", "train", "tree"),
    *("truck", "umbrella", "window", "wolf"),
)
"""Names that are measured in `TEMPLATE`. A change of either changes results on models whose card has no `text_norm`."""


class TextNorm(NamedTuple):
    """Length of a text tower's outputs over the prompts of `NAMES`."""

    value: float
    """Mean, to four significant digits, so that it does not depend on the processor and can be copied to a card."""
    lowest: float
    highest: float


def measure(model: Model) -> TextNorm:
    """Measure the length of a model's text outputs. NaN if the tower returns values that are not finite."""
    norms_N = model.text_norms(Classes(NAMES, TEMPLATE).prompts())[0].double()
    return TextNorm(float(f"{float(norms_N.mean()):.4g}"), float(norms_N.min()), float(norms_N.max()))
