"""Draw the names of methods beside their lines, in columns of their own that no marker reaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from pipeline.console import plain
from pipeline.results.palette import text_colour

LONGEST_NAME = 40
"""Characters of a name; longer names are cut."""
LONGEST_LABEL = 26
"""Characters of a name beside a line."""
LINE = 9.5 / 72
"""Height of a label in inches."""
_SIZE = 8


class Point(NamedTuple):
    """A labelled point in data coordinates: the end of a method's line."""

    x: float
    y: float
    label: str


def draw_labels(ax: Axes, points: Sequence[Point], xs: Sequence[float], both_sides: bool = False) -> None:
    """Draw each label beside its point, with a thin line to it, and set the limits of the logarithmic x axis.

    The labels are in a column to the right of everything that is drawn. They are moved apart so that they do not
    overlap.

    Args:
        ax: Axes whose size on the page and y limits are final.
        points: The labelled points.
        xs: All x that are drawn.
        both_sides: Draw the labels of points in the left half in a column on the left.
    """
    dots = ax.figure.dpi
    box = ax.get_window_extent()
    first, last = np.log10(min(xs)), np.log10(max(xs))
    span = max(last - first, 0.3)
    left = [p for p in points if both_sides and np.log10(p.x) < first + 0.4 * span]
    right = [p for p in points if p not in left]
    gap = LINE * dots
    widths = [max((_width(ax, p.label) for p in side), default=0.0) for side in (left, right)]
    before, after = ((width + 2.8 * gap) if width else gap for width in widths)
    unit = span / max(box.width - before - after, 0.25 * box.width)  # decades per pixel
    middle = (first + last) / 2
    low, high = middle - span / 2 - before * unit, middle + span / 2 + after * unit
    ax.set_xlim(10**low, 10**high)
    for side, members in (("left", left), ("right", right)):
        if not members:
            continue
        sign, edge = (-1, middle - span / 2) if side == "left" else (1, middle + span / 2)
        bend, text = (10 ** (edge + sign * n * gap * unit) for n in (1.1, 2.2))
        heights = [ax.transData.transform((p.x, p.y))[1] for p in members]
        margin = gap / 2
        placed = spread_out(heights, gap, box.y0 + margin, box.y1 - margin)
        for p, height in zip(members, placed, strict=True):
            y = ax.transData.inverted().transform((0, height))[1]
            ax.plot([p.x, bend, text], [p.y, y, y], lw=0.5, color="#999999", zorder=0.5)
            align = "right" if side == "left" else "left"
            name = f" {plain(p.label, LONGEST_LABEL)} "
            ax.text(text, y, name, color=text_colour(p.label), fontsize=_SIZE, va="center", ha=align)


def _width(ax: Axes, label: str) -> float:
    """Return the width of a label in pixels."""
    text = ax.text(0, 0, f" {plain(label, LONGEST_LABEL)} ", fontsize=_SIZE, transform=ax.transAxes)
    width = text.get_window_extent().width
    text.remove()
    return float(width)


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
