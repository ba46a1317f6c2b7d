"""Finds pictures that are nearly the same drawing, whatever its size and place on the canvas.

Pictures are compared before the jitter, composited on white, as grey 16x16 thumbnails. Each has two: one cropped
to the box of its ink, one placed by the ink's moments (centre and spread), which survives resampling better. The
distance of two pictures is the root mean square difference of their thumbnails, the least over both placements and
over shifts of one thumbnail pixel each way; below a threshold (``settings.NEAR_*``) they count as the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from tools.embedded.drawings import Drawings, on_white
from tools.embedded.settings import NEAR_CORPUS, THUMB

BY_BOX, BY_MOMENTS = 0, 1  # the two placements, an axis of the thumbnails
SPREAD = 4.2  # root mean square distance of the ink from its centre, in thumbnail pixels
INK = 0.06  # a pixel this much darker or lighter than the ground belongs to the drawing
SHIFTS = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
BLOCK = 2048


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """RGBA pictures [N, 64, 64, 4] as aligned grey thumbnails [N, 2, 16, 16]: 0 is the ground, 1 full ink."""
    thumbs = np.zeros((len(pixels), 2, THUMB, THUMB), np.float32)
    for row, picture in enumerate(pixels):
        ink = 1 - on_white(picture).mean(-1)
        # Pale drawings have little ink, but their alpha still tells where they are.
        body = np.maximum(ink, picture[..., 3] / 255)
        thumbs[row, BY_BOX] = _reduced(_squared(ink, body > INK))
        thumbs[row, BY_MOMENTS] = _by_moments(ink, body)
    return thumbs


def _by_moments(ink: np.ndarray, body: np.ndarray) -> np.ndarray:
    mass = body.sum()
    if mass < 1:
        return np.zeros((THUMB, THUMB), np.float32)
    x, y = (np.arange(length) + 0.5 for length in reversed(body.shape))
    columns, rows = body.sum(0) / mass, body.sum(1) / mass
    middle = np.array([columns @ x, rows @ y])
    spread = np.sqrt(columns @ (x - middle[0]) ** 2 + rows @ (y - middle[1]) ** 2)
    fine = 4  # samples a thumbnail pixel and axis
    step = max(float(spread), 1.0) / SPREAD / fine
    left, top = middle - step * THUMB * fine / 2
    image = Image.fromarray(ink.astype(np.float32), "F")
    data = (step, 0, left, 0, step, top)
    side = THUMB * fine
    sampled = image.transform((side, side), Image.Transform.AFFINE, data, resample=Image.Resampling.BILINEAR)
    thumb: np.ndarray = np.asarray(sampled).reshape(THUMB, fine, THUMB, fine).mean((1, 3))
    return thumb


def _squared(ink: np.ndarray, seen: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if len(rows) == 0:
        return ink
    crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = crop.shape
    side = max(height, width)
    square = np.zeros((side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = crop
    return square


def _reduced(square: np.ndarray) -> np.ndarray:
    inner = THUMB - 2  # a border of one pixel, so that a shift loses nothing
    small = Image.fromarray(square.astype(np.float32), "F").resize((inner, inner), Image.Resampling.BOX)
    return np.pad(np.asarray(small), 1)


def near_pairs(a: np.ndarray, b: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs (row of a, row of b) of thumbnails below the threshold."""
    for start in range(0, len(a), BLOCK):
        least = distances(a[start : start + BLOCK], b)
        for i, j in zip(*torch.nonzero(least < threshold, as_tuple=True), strict=True):
            yield start + int(i), int(j)


def distances(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
    """Distance of every picture of ``a`` from every one of ``b``, the least over placements and shifts."""
    least = torch.full((len(a), len(b)), float("inf"))
    for placement in range(a.shape[1]):
        right = torch.from_numpy(b[:, placement].reshape(len(b), -1))
        for shift in SHIFTS:
            left = torch.from_numpy(np.roll(a[:, placement], shift, axis=(1, 2)).reshape(len(a), -1))
            least = torch.minimum(least, torch.cdist(left, right))
    return least / THUMB


def rows_near(a: np.ndarray, b: np.ndarray, threshold: float) -> set[int]:
    """Rows of ``a`` that have a near-duplicate in ``b``."""
    return {i for i, _ in near_pairs(a, b, threshold)}


def keep_distinct(thumbs: np.ndarray, groups: Sequence[str], threshold: float) -> list[int]:
    """Rows that remain when, of two near-duplicates from different groups, the later one goes.

    Pictures of one group may look alike: they never part over two splits.
    """
    clash: dict[int, list[int]] = {}
    for i, j in near_pairs(thumbs, thumbs, threshold):
        if j < i and groups[i] != groups[j]:
            clash.setdefault(i, []).append(j)
    kept: set[int] = set()
    for row in range(len(thumbs)):
        if not any(j in kept for j in clash.get(row, [])):
            kept.add(row)
    return sorted(kept)


def apart_from(corpus: Drawings, held_out: Drawings) -> Drawings:
    """The corpus without pictures that nearly match any held-out drawing, used in a dataset or not.

    Compared by the box only. What the other placement finds besides is dropped from the datasets, not from here.
    """
    ours, theirs = (thumbnails(d.pixels)[:, [BY_BOX]] for d in (corpus, held_out))
    near = rows_near(ours, theirs, NEAR_CORPUS)
    return corpus.take([row for row in range(len(corpus.records)) if row not in near])
