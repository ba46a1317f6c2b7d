"""Parts that figures share: a grid of panels by access class and data set, series, titles, ticks and legends."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from pipeline.console import plain
from pipeline.results.comparison import CLASSES, access_words
from pipeline.results.palette import DASHES, MARKERS, colour
from pipeline.results.plot_labels import LINE, LONGEST_NAME
from pipeline.results.spread import spread

Record = dict[str, Any]

WIDEST = {"few": 13, "many": 18}
"""Width of a figure in inches, for up to four data sets and for more; further data sets continue on the next line."""
PANEL = (4.4, 3.1)
"""Size of a panel in inches; it is higher if its names need more room."""
WIDE = 5.8
"""Width of panels with names on both sides, in inches."""


def grid(
    records: Sequence[Record],
    panel: Callable[[Axes, list[Record]], None],
    heights: Callable[[Record], Iterable[float]],
    title: str,
    xlabel: str,
    width: float = PANEL[0],
) -> Figure:
    """Draw panels by access class and data set; those of a data set share the y axis.

    Args:
        records: What is drawn; each has `dataset`, `access_class`, `access` and `label`.
        panel: Draws the records of one panel.
        heights: Values of a record that the y axis has to contain.
        title: Title of the figure.
        xlabel: Label of the x axis.
        width: Width of a panel in inches.
    """
    sets = list(dict.fromkeys(r["dataset"] for r in records))
    classes = [c for c in CLASSES if any(r["access_class"] == c for r in records)]
    wide = min(int(WIDEST["few" if len(sets) <= 4 else "many"] / width), len(sets))
    lines = [(c, sets[i : i + wide]) for c in classes for i in range(0, len(sets), wide)]
    names = {c: len({r["label"] for r in records if r["access_class"] == c}) for c in classes}
    high = [max(PANEL[1], 0.9 + 1.1 * LINE * names[c]) for c, _ in lines]
    figure = Figure(figsize=(0.8 + width * wide, 1.3 + sum(high)))
    axes = figure.subplots(len(lines), wide, squeeze=False, height_ratios=high)
    filled = []
    for row, (name, some) in enumerate(lines):
        for column in range(wide):
            ax = axes[row][column]
            if column >= len(some):
                ax.remove()
                continue
            in_panel = [r for r in records if r["access_class"] == name and r["dataset"] == some[column]]
            values = [v for r in records if r["dataset"] == some[column] for v in heights(r)]
            room = 2 + 0.04 * (max(values) - min(values))
            ax.set_ylim(min(values) - room, max(values) + room)
            ax.set_title(f"{plain(some[column], LONGEST_NAME)}   ({name})", fontsize=9.5, loc="left")
            ax.set_xscale("log")
            ax.set_xlabel(xlabel, fontsize=8.5)
            ax.grid(color="#ececec")
            ax.set_axisbelow(True)
            if column == 0:
                ax.set_ylabel("accuracy (%)", fontsize=8.5)
            bare(ax)
            filled.append((ax, in_panel))
    add_title(figure, title)
    access_legend(figure, records)
    ConstrainedLayoutEngine().execute(figure)  # fixes the panels' sizes: names are kept apart in pixels
    for ax, in_panel in filled:
        panel(ax, in_panel)
    return figure


def series(ax: Axes, label: str, x: Sequence[float], line: Sequence[Record]) -> None:
    """Draw a method's accuracies as a line with the spread of each: bars with caps for intervals, plain for ranges."""
    paint = colour(label)
    for at, record in zip(x, line, strict=True):
        around = spread(record, "accuracy")
        if around is not None:
            bars = [[record["accuracy"] - around.low], [around.high - record["accuracy"]]]
            caps = 2 if around.is_interval else 0
            ax.errorbar(
                [at], [record["accuracy"]], bars, fmt="none", elinewidth=1, capsize=caps, color=paint, alpha=0.5
            )
    style = (0, DASHES[label]) if label in DASHES else "-"
    marker = MARKERS.get(line[0]["access"], "*")
    ax.plot(x, [r["accuracy"] for r in line], marker=marker, ms=4.5, lw=1.3, color=paint, ls=style)


def accuracy_range(record: Record) -> list[float]:
    """Return the accuracy of a record and the ends of its spread."""
    around = spread(record, "accuracy")
    return [record["accuracy"], *((around.low, around.high) if around else ())]


def number_ticks(ax: Axes, values: Sequence[float]) -> None:
    """Put ticks at powers of ten within the values, or at multiples of these if there are fewer than two."""
    low, high = min(values) / 1.05, max(values) * 1.05
    powers = [10.0**k for k in range(13)]
    some: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        some = [p * s for p in powers for s in steps if low <= p * s <= high]
        if len(some) > 1:
            break
    some = some or [float(np.median(values))]
    apart = 0.45 * ax.figure.dpi
    pixels = ax.transData.transform([(x, 0) for x in some])[:, 0]
    while len(some) > 1 and np.diff(pixels).min() < apart:
        some, pixels = some[::2], pixels[::2]
    ax.set_xticks(some, [_short(x) for x in some])
    ax.xaxis.set_minor_locator(NullLocator())


def by_label(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records of each method, from few to many labelled images."""
    lines: dict[str, list[Record]] = defaultdict(list)
    for r in sorted(records, key=lambda r: (r["shots"], r["label"])):
        lines[r["label"]].append(r)
    return lines


def add_title(figure: Figure, title: str) -> None:
    """Add a title, in as many lines of about equal length as the width of the figure needs."""
    longest = int(10.5 * figure.get_figwidth())
    n = len(textwrap.wrap(title, longest))
    width = next(w for w in range(len(title) // n, longest + 1) if len(textwrap.wrap(title, w)) == n)
    figure.suptitle(textwrap.fill(title, width), fontsize=11)


def access_legend(figure: Figure, records: Sequence[Record]) -> None:
    """Explain the markers below the figure."""
    kinds = sorted({r["access"] for r in records}, key=lambda a: list(MARKERS).index(a) if a in MARKERS else 99)
    markers: dict[str, str] = {}
    for access in kinds:
        words = access_words(access)
        marker = MARKERS.get(access, "*")
        markers[marker] = f"{markers[marker]}; {words}" if marker in markers else words
    handles = [Line2D([], [], ls="", marker=m, color="#555555", label=words) for m, words in markers.items()]
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.9)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def bare(ax: Axes) -> None:
    """Remove the frame on two sides and make the numbers small."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5)


def seeds(records: Iterable[Record]) -> str:
    """Return the number of seeds as text."""
    most = max(r["seeds"] for r in records)
    return f"{most} seeds" if most > 1 else "1 seed"


def _short(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"
