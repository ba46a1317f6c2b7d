"""Draw the accuracy of each method by what the endpoint answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator

from pipeline.results.comparison import is_native
from pipeline.results.panels import access_legend, accuracy_range, add_title, bare, by_label, seeds, series
from pipeline.results.plot_labels import Point, draw_labels
from pipeline.results.tables import allotment

Record = dict[str, Any]

CAPTION = (
    "Accuracy on the data sets' own test sets by what the endpoint answers, from full scores to labels. A line ends "
    "where the method cannot use the answers."
)


def drawn_records(pooled: Sequence[Record]) -> list[Record]:
    """Return the records over the data sets' own test sets, each reference in its own access class only."""
    own = [r for r in pooled if r["accuracy"] is not None and r["kind"] == "source"]
    return [r for r in own if is_native(r, r["access_class"])]


def answers_title(records: Sequence[Record]) -> str:
    """Return the title of the figure of records with one number of shots and one allotment."""
    n_sets = max(r["datasets"] for r in records)
    about = f"{records[0]['shots']} shots, {allotment(records[0])}, {seeds(records)}"
    return f"Accuracy by what the endpoint answers, mean of {n_sets} data set{'s' * (n_sets > 1)}, {about}"


def answers_figure(records: Sequence[Record], answers: Sequence[str], title: str) -> Figure:
    """Draw one panel with a line for each method.

    Args:
        records: Records over data sets, at one number of shots and one allotment.
        answers: Kinds of answers, in their order on the x axis.
        title: Title of the figure.
    """
    figure = Figure(figsize=(8.5, 5.6))
    ax = figure.subplots()
    heights = [value for r in records for value in accuracy_range(r)]
    ax.set_ylim(min(heights) - 2, max(heights) + 2)
    ax.set_xscale("log")  # as `draw_labels` expects; the positions are powers of ten
    at = {text: 10.0**i for i, text in enumerate(answers)}
    ax.set_xticks(list(at.values()), [text.replace(", ", ",\n") for text in at])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("accuracy (%)", fontsize=8.5)
    ax.grid(color="#ececec")
    ax.set_axisbelow(True)
    bare(ax)
    add_title(figure, title)
    access_legend(figure, records)
    ConstrainedLayoutEngine().execute(figure)  # fixes the panel's size: names are kept apart in pixels
    ends = []
    for label, of_label in by_label(records).items():
        line = sorted(of_label, key=lambda r: at[r["answers"]])
        series(ax, label, [at[r["answers"]] for r in line], line)
        ends.append(Point(at[line[-1]["answers"]], line[-1]["accuracy"], label))
    draw_labels(ax, ends, list(at.values()))
    return figure
