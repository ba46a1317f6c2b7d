"""Draw the names of methods beside their lines, moved apart so that they do not overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes

from pipeline.console import plain

HALO: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=2.5, foreground="white")]
LONGEST_NAME = 40
"""Characters of a name; longer names are cut."""


class Point(NamedTuple):
    """A labelled point in data coordinates."""

    x: float
    y: float
    label: str
    colour: str


def draw_labels(ax: Axes, points: list[Point]) -> None:
    """Draw each label beside its point, with a thin line to it.

    Labels of points at about the same x are moved apart. In the left part of a panel, labels are drawn to the left of
    their points.
    """
    pixels = ax.transData.transform([(p.x, p.y) for p in points])
    (left, low), (right, high) = ax.transAxes.transform([(0, 0.02), (1, 0.98)])
    gap = 9.5 * 100 / 72  # a line of text at matplotlib's 100 dots per inch
    columns: dict[float, list[int]] = defaultdict(list)
    for i in np.argsort(-pixels[:, 0]):  # from the right: a column is as wide as a name
        home = next((x for x in columns if x - pixels[i][0] < 8 * gap), float(pixels[i][0]))
        columns[home].append(int(i))
    for x, members in columns.items():
        side, align = (-1, "right") if x < left + 0.4 * (right - left) else (1, "left")
        for i, y in zip(members, spread_out([pixels[i][1] for i in members], gap, low, high), strict=True):
            (x1, y1), (x2, y2) = ax.transData.inverted().transform([(x + side * g * gap, y) for g in (0.8, 1.7)])
            name = points[i]
            ax.plot([name.x, x1, x2], [name.y, y1, y2], lw=0.5, color="#999999")
            style: Any = {"fontsize": 8, "va": "center", "ha": align, "path_effects": HALO}
            ax.text(x2, y2, f" {plain(name.label, LONGEST_NAME)} ", color=name.colour, **style)


def spread_out(ys: Iterable[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights as little as needed to lie `gap` apart within [low, high], in the same order."""
    heights = np.asarray(list(ys), dtype=float)
    order = np.argsort(heights, kind="stable")
    gap = min(gap, (high - low) / max(1, len(heights) - 1))
    placed = heights[order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 0:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
        placed = np.clip(placed, low + gap * np.arange(len(placed)), high - gap * np.arange(len(placed))[::-1])
    out = np.empty_like(placed)
    out[order] = placed
    return [float(y) for y in out]
