"""Draw the leaderboard's figures as PNG: accuracy by shots, accuracy by bill, gain over zero-shot.

Figures have one panel per access class (rows) and data set (columns). A method has the same colour everywhere; the
marker shows its access, and its name is drawn beside its line. References are black or grey. Error bars are 95%
confidence intervals over seeds (Student's t); a bar that ends at the edge of a panel continues beyond it.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from pipeline.console import plain
from pipeline.results.comparison import CLASSES
from pipeline.results.palette import DASHES, MARKERS, colour
from pipeline.results.plot_labels import LONGEST_NAME, Point, draw_labels
from pipeline.results.tables import allotment

Record = dict[str, Any]

WHERE = {
    "source": "mean over the data sets' own test sets",
    "shift": "mean over shift test sets",
    "transfer": "mean over transfer sets",
    "base": "base classes",
    "new": "new classes",
    "harmonic": "harmonic mean of base and new",
}
"""Title of the panel of each kind of test set."""
COLUMNS = 4
"""Panels per line; further data sets continue on the next line."""


def draw(board: pa.Table, summary: pa.Table) -> dict[str, bytes]:
    """Draw the figures of a leaderboard.

    Args:
        board: The leaderboard by test set.
        summary: The leaderboard over data sets.

    Returns:
        PNG files by name. Figures without data are left out.
    """
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a name is not a formula
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # drawn as an empty box
        return _draw(board.to_pylist(), summary.to_pylist())


def _draw(everything: list[Record], pooled: list[Record]) -> dict[str, bytes]:
    board = [r for r in everything if r["accuracy"] is not None and r["kind"] == "source"]
    overall = [r for r in pooled if r["gain_zero_shot"] is not None]
    figures = {}
    if len({r["shots"] for r in board}) > 1:
        figures["accuracy_by_shots"] = _by_shots(board)
    for unit in ("requests", "images"):
        if any(r[unit] for r in board):
            figures[f"accuracy_by_{unit}"] = _by_bill(board, unit)
    if overall:
        figures["gain_over_zero_shot"] = _gains(overall, everything)
    return {name: png(figure) for name, figure in figures.items()}


def _by_shots(board: list[Record]) -> Figure:
    records = _largest_budget(board)

    def panel(ax: Axes, in_panel: list[Record]) -> None:
        lines = _grouped(in_panel)
        ax.set_xscale("log", base=2)
        for i, (label, line) in enumerate(lines.items()):
            nudge = 2 ** (0.035 * (i - len(lines) / 2))  # so that intervals do not hide each other
            _series(ax, label, [r["shots"] * nudge for r in line], line)
        shots = sorted({r["shots"] for r in records})
        ax.set_xlim(shots[0] / 1.3, shots[-1] * (shots[-1] / shots[0]) ** 0.6 * 1.3)
        ax.set_xticks(shots, [str(s) for s in shots])
        ax.xaxis.set_minor_locator(NullLocator())
        draw_labels(
            ax, [Point(line[-1]["shots"] * 1.07, line[-1]["accuracy"], m, colour(m)) for m, line in lines.items()]
        )

    return _grid(
        records, panel, f"Accuracy by shots, {allotment(records[0])}, {_seeds(records)}", "labelled images per class"
    )


def _by_bill(board: list[Record], unit: str) -> Figure:
    limited = [r for r in board if r[f"budget_{unit}"] is not None] or board
    shots = max(r["shots"] for r in limited)
    records = [r for r in limited if r["shots"] == shots]
    low, top = min(r[unit] for r in records if r[unit]) / 2, max(r[unit] for r in records)
    ticks = [10.0**k for k in range(13) if low <= 10.0**k <= 2 * top]

    def panel(ax: Axes, in_panel: list[Record]) -> None:
        ax.set_xscale("log")
        ax.set_xlim(low / (top / low) ** 0.6, top * (top / low) ** 0.85)  # room for names on both sides
        points = []
        for label, line in _grouped(in_panel).items():
            paid = sorted((r for r in line if r[unit]), key=lambda r: r[unit])
            if paid:
                _series(ax, label, [r[unit] for r in paid], paid)
                points.append(Point(paid[-1][unit], paid[-1]["accuracy"], label, colour(label)))
            else:  # free to fit: a level, not a point
                level = [line[0]["accuracy"]] * 2
                ax.plot([low, top], level, color=colour(label), dashes=DASHES.get(label, (3, 2)), lw=1, zorder=1)
                points.append(Point(top, line[0]["accuracy"], label, colour(label)))
        ax.set_xticks(ticks, [_short(x) for x in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        draw_labels(ax, points)

    return _grid(
        records,
        panel,
        f"Accuracy by {unit} billed for fitting, {shots} shots, {_seeds(records)}",
        f"{unit} (log scale)",
    )


def _gains(overall: list[Record], board: list[Record]) -> Figure:
    records = _largest_budget(overall)
    shots = max(r["shots"] for r in records)
    records = [r for r in records if r["shots"] == shots]
    key = ("label", "model", "model_digest", "shots", "budget_requests", "budget_images", "access_class", "kind")
    kinds = [k for k in WHERE if any(r["kind"] == k for r in records)]
    classes = [c for c in CLASSES if any(r["access_class"] == c for r in records)]
    order = {c: _best_last([r for r in records if r["access_class"] == c]) for c in classes}
    heights = [len(order[c]) + 0.8 for c in classes]
    figure = Figure(figsize=(1.2 + 4.4 * len(kinds), 1.5 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(classes), len(kinds), squeeze=False, sharex=True, height_ratios=heights)
    for row, name in enumerate(classes):
        for column, kind in enumerate(kinds):
            ax, labels = axes[row][column], order[name]
            by_label = {r["label"]: r for r in records if r["access_class"] == name and r["kind"] == kind}
            ax.axvline(0, color="black", dashes=DASHES["zero_shot"], lw=1)
            for y, r in [(y, by_label[label]) for y, label in enumerate(labels) if label in by_label]:
                paint, marker, bar = colour(r["label"]), MARKERS.get(r["access"], "*"), r["gain_zero_shot_ci95"] or 0
                each = [b["gain_zero_shot"] for b in board if all(b[k] == r[k] for k in key)]
                single = [gain for gain in each if gain is not None]
                ax.plot(single, [y + 0.28] * len(single), "|", color=paint, ms=7, alpha=0.7)
                ax.errorbar(r["gain_zero_shot"], y, xerr=bar, fmt=marker, color=paint, ms=6, lw=2, capsize=3)
            ax.set_yticks(
                range(len(labels)),
                [plain(label, LONGEST_NAME) for label in labels] if column == 0 else [""] * len(labels),
            )
            ax.set_ylim(-0.6, len(labels) - 0.2)
            ax.grid(axis="x", color="#e6e6e6")
            ax.set_title(f"{name}: {WHERE[kind]}", fontsize=9, loc="left")
            _style(ax)
    for ax in axes[-1]:
        ax.set_xlabel("gain over zero-shot in points (ticks: single test sets)", fontsize=8.5)
    figure.suptitle(f"Gain over zero-shot, {shots} shots, {allotment(records[0])}, {_seeds(records)}", fontsize=11)
    _marker_legend(figure, records)
    return figure


def _grid(records: list[Record], panel: Callable[[Axes, list[Record]], None], title: str, xlabel: str) -> Figure:
    """Draw panels by access class and data set. Panels share the x axis, those of a data set the y axis."""
    sets = sorted({r["dataset"] for r in records})
    classes = [c for c in CLASSES if any(r["access_class"] == c for r in records)]
    wide = min(COLUMNS, len(sets))
    lines = [(c, sets[i : i + wide]) for c in classes for i in range(0, len(sets), wide)]
    figure = Figure(figsize=(0.8 + 4.4 * wide, 1.3 + 3.1 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), wide, squeeze=False)
    filled = []
    for row, (name, some) in enumerate(lines):
        for column in range(wide):
            ax = axes[row][column]
            if column >= len(some):
                ax.remove()
                continue
            in_panel = [r for r in records if r["access_class"] == name and r["dataset"] == some[column]]
            spread = [r["accuracy"] for r in records if r["dataset"] == some[column]]
            ax.set_ylim(min(spread) - 4, max(spread) + 4)  # a data set has one scale in all access classes
            ax.set_title(f"{plain(some[column], LONGEST_NAME)}   ({name})", fontsize=9.5, loc="left")
            ax.set_xlabel(xlabel, fontsize=8.5)
            ax.grid(color="#ececec")
            ax.set_axisbelow(True)
            if column == 0:
                ax.set_ylabel("accuracy (%)", fontsize=8.5)
            _style(ax)
            filled.append((ax, in_panel))
    figure.suptitle(title, fontsize=11)
    _marker_legend(figure, records)
    figure.draw_without_rendering()  # fixes the panels' sizes, so that labels can be kept apart in pixels
    figure.set_layout_engine("none")
    for ax, in_panel in filled:
        panel(ax, in_panel)
    return figure


def _series(ax: Axes, label: str, x: list[float], line: list[Record]) -> None:
    y, bars = [r["accuracy"] for r in line], [r["accuracy_ci95"] or 0.0 for r in line]
    marker = MARKERS.get(line[0]["access"], "*")
    style = (0, DASHES[label]) if label in DASHES else "-"
    ax.errorbar(x, y, bars, fmt="none", elinewidth=1, capsize=2, color=colour(label), alpha=0.5)
    ax.plot(x, y, marker=marker, ms=4.5, lw=1.3, color=colour(label), ls=style)


def _seeds(records: list[Record]) -> str:
    most = max(r["seeds"] for r in records)
    return f"{most} seeds" if most > 1 else "1 seed (no interval)"


def _largest_budget(records: list[Record]) -> list[Record]:
    def size(r: Record) -> tuple[bool, float, float]:
        return r["budget_requests"] is not None, r["budget_requests"] or 0, r["budget_images"] or np.inf

    top = max(size(r) for r in records)
    return [r for r in records if size(r) == top]


def _best_last(records: list[Record]) -> list[str]:
    gains: dict[str, list[float]] = defaultdict(list)
    for r in records:
        if r["kind"] == "source" or not any(o["kind"] == "source" for o in records):
            gains[r["label"]].append(r["gain_zero_shot"])
    return sorted(gains, key=lambda label: float(np.mean(gains[label])))


def _grouped(records: list[Record]) -> dict[str, list[Record]]:
    lines: dict[str, list[Record]] = defaultdict(list)
    for r in sorted(records, key=lambda r: (r["shots"], r["label"])):
        lines[r["label"]].append(r)
    return lines


def _marker_legend(figure: Figure, records: list[Record]) -> None:
    kinds = sorted({r["access"] for r in records}, key=lambda a: list(MARKERS).index(a) if a in MARKERS else 99)
    handles = [
        Line2D([], [], ls="", marker=MARKERS.get(a, "*"), color="#555555", label=a or "no access") for a in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def _style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5)


def _short(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
