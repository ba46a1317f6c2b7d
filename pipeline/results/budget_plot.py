"""Draw accuracy by the bill of fitting in both units, for the mean over data sets or for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.results.ladder import NAMES, is_complete, points
from pipeline.results.palette import DASHES, MARKERS, colour
from pipeline.results.panels import WIDE, accuracy_range, grid, number_ticks, series
from pipeline.results.plot_labels import Point, draw_labels
from pipeline.results.spread import spread

Record = dict[str, Any]

CAPTION = (
    "Accuracy on the data sets' own test sets and what fitting cost. A line joins a method's allotments; a horizontal "
    "line starts where a method would spend no more of a larger one. Bands and bars with caps: 95% confidence interval "
    "over seeds; of two seeds: their range."
)


def budget_figure(records: Sequence[Record], title: str) -> Figure | None:
    """Draw the records of one test set, or the means over all: panels by unit and access class.

    Returns:
        The figure; None if nothing was billed.
    """
    units = [unit for unit in NAMES if any(r[unit] for r in records)]
    in_units = [r | {"dataset": NAMES[unit], "bill": r[unit]} for unit in units for r in records]
    paid = {NAMES[unit]: [r[unit] for r in records if r[unit]] for unit in units}

    def panel(ax: Axes, in_panel: list[Record]) -> None:
        xs, ends = paid[in_panel[0]["dataset"]], []
        for label, line in points(in_panel, "bill").items():
            billed = [r for r in line if r["bill"]]
            if billed:
                _line(ax, label, billed, max(xs))
            else:  # free to fit: a level, not a point
                ax.plot([min(xs), max(xs)], [line[0]["accuracy"]] * 2, dashes=DASHES.get(label, (3, 2)), **_thin(label))
            end = max(xs) if not billed or is_complete(billed[-1]) else billed[-1]["bill"]
            ends.append(Point(end, line[-1]["accuracy"], label))
        draw_labels(ax, ends, xs, both_sides=True)
        number_ticks(ax, xs)

    return grid(in_units, panel, accuracy_range, title, "billed for fitting (logarithmic)", WIDE) if units else None


def _line(ax: Axes, label: str, line: Sequence[Record], end: float) -> None:
    """Draw a method's points with their spread, and its level up to `end` if a larger allotment changes nothing."""
    bills = [r["bill"] for r in line]
    spreads = [spread(r, "accuracy") for r in line]
    around = [s for s in spreads if s is not None]
    if len(line) > 1 and len(around) == len(line):
        low, high = [s.low for s in around], [s.high for s in around]
        ax.fill_between(bills, low, high, color=colour(label), alpha=0.13, lw=0, zorder=0.7)
        style = (0, DASHES[label]) if label in DASHES else "-"
        marker = MARKERS.get(line[0]["access"], "*")
        ax.plot(bills, [r["accuracy"] for r in line], marker=marker, ms=4.5, lw=1.3, color=colour(label), ls=style)
    else:
        series(ax, label, bills, line)
    if is_complete(line[-1]):
        ax.plot([bills[-1], end], [line[-1]["accuracy"]] * 2, **_thin(label))


def _thin(label: str) -> dict[str, Any]:
    return {"color": colour(label), "lw": 1, "zorder": 1}
