"""Which model answers: its fingerprint is how it scores four generated images under four words.

The fingerprint is 16 numbers, cosines or probabilities, in units of 1e-4. A card or a file of records holds it as
base64 of 16 two-byte integers. Numbers that differ by at most 1e-3 are those of the same model, since servers round
differently.
"""

from __future__ import annotations

import base64

import numpy as np
from PIL import Image

WORDS = ("a photo of a dog", "a red circle", "text on white paper", "stripes")
"""Texts of the probes."""
UNIT = 1e-4
TOLERANCE = 10
"""Largest difference of two fingerprints of one model, in units; 1e-3."""


def pictures(size: int) -> list[Image.Image]:
    """Return four images [size, size], made of whole numbers, so that they are equal everywhere."""
    row, column = np.mgrid[0:size, 0:size]
    ramp = (column * 255 // max(1, size - 1)).astype(np.uint8)
    board = (((row * 8 // size) + (column * 8 // size)) % 2 * 255).astype(np.uint8)
    disc = ((2 * row - size + 1) ** 2 + (2 * column - size + 1) ** 2 < size * size // 2).astype(np.uint8) * 255
    lines = (row * 16 // size % 2 * 200).astype(np.uint8)
    planes = [
        (ramp, ramp // 2, 255 - ramp),
        (board, board, board),
        (disc, disc // 8, disc // 8),
        (lines, 255 - lines, lines),
    ]
    return [Image.fromarray(np.dstack(colours)) for colours in planes]


def fingerprint(values: np.ndarray) -> str:
    """Return the fingerprint of 16 numbers [4, 4], which are cosines or probabilities."""
    units = np.rint(np.asarray(values, np.float64) / UNIT).clip(-32768, 32767)
    return base64.b64encode(units.astype("<i2").tobytes()).decode()


def difference(one: str, other: str) -> float:
    """Return the largest difference of two fingerprints."""
    a, b = (np.frombuffer(base64.b64decode(text), "<i2").astype(np.int64) for text in (one, other))
    return float(np.abs(a - b).max()) * UNIT


def same_model(one: str, other: str) -> bool:
    """Return whether two fingerprints are those of one model: a number may be rounded to the next unit in each."""
    return difference(one, other) <= (TOLERANCE + 1.5) * UNIT
