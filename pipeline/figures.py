"""The leaderboard's figures as PNG: accuracy by shots, accuracy against the bill, gain over zero-shot.

One panel for each access class (rows) and data set (columns). A method has one colour everywhere, its marker says what
access it has, its name stands beside its line; references are black or grey. Bars are Student 95 % intervals over
seeds; a bar that ends at a panel's edge goes on beyond it.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from matplotlib import patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from pipeline.comparison import CLASSES
from pipeline.identity import Selection, select
from pipeline.leaderboard import leaderboard, summary
from pipeline.palette import DASHES, MARKERS, colour, shown
from pipeline.render import budget_words

Record = dict[str, Any]

HALO: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=2.5, foreground="white")]
WHERE = {
    "source": "mean over the data sets' own test sets",
    "shift": "mean over shift test sets",
    "transfer": "mean over transfer sets",
    "base": "base classes",
    "new": "new classes",
    "harmonic": "harmonic mean of base and new",
}
"""What each kind of test set is, above its panel."""
COLUMNS = 4
"""Panels side by side; more data sets go to a further line."""


class Point(NamedTuple):
    """What a label names, in data coordinates."""

    x: float
    y: float
    label: str
    colour: str


def draw(rows: pa.Table | Selection) -> dict[str, bytes]:
    """Figures by name, as PNG; those that the rows cannot fill are left out. Names are never read as math."""
    selection = rows if isinstance(rows, Selection) else select(rows)
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # drawn as an empty box
        return _draw(selection)


def _draw(rows: Selection) -> dict[str, bytes]:
    everything = leaderboard(rows).to_pylist()
    board = [r for r in everything if r["accuracy"] is not None and r["kind"] == "source"]
    overall = [r for r in summary(rows).to_pylist() if r["gain_zero_shot"] is not None]
    made = {}
    if len({r["shots"] for r in board}) > 1:
        made["accuracy_by_shots"] = _by_shots(board)
    for unit in ("requests", "images"):
        if any(r[unit] for r in board):
            made[f"accuracy_by_{unit}"] = _by_bill(board, unit)
    if overall:
        made["gain_over_zero_shot"] = _gains(overall, everything)
    return {name: png(figure) for name, figure in made.items()}


def _by_shots(board: list[Record]) -> Figure:
    records = _largest_budget(board)

    def panel(ax: Axes, found: list[Record]) -> None:
        lines = _grouped(found)
        ax.set_xscale("log", base=2)
        for i, (label, line) in enumerate(lines.items()):
            nudge = 2 ** (0.035 * (i - len(lines) / 2))  # so that intervals do not hide each other
            _series(ax, label, [r["shots"] * nudge for r in line], line)
        shots = sorted({r["shots"] for r in records})
        ax.set_xlim(shots[0] / 1.3, shots[-1] * (shots[-1] / shots[0]) ** 0.6 * 1.3)
        ax.set_xticks(shots, [str(s) for s in shots])
        ax.xaxis.set_minor_locator(NullLocator())
        _name(ax, [Point(line[-1]["shots"] * 1.07, line[-1]["accuracy"], m, colour(m)) for m, line in lines.items()])

    return _grid(
        records, panel, f"Accuracy by shots, {budget_words(records[0])}, {_seeds(records)}", "labelled images a class"
    )


def _by_bill(board: list[Record], unit: str) -> Figure:
    limited = [r for r in board if r[f"budget_{unit}"] is not None] or board
    shots = max(r["shots"] for r in limited)
    records = [r for r in limited if r["shots"] == shots]
    low, top = min(r[unit] for r in records if r[unit]) / 2, max(r[unit] for r in records)
    ticks = [10.0**k for k in range(13) if low <= 10.0**k <= 2 * top]

    def panel(ax: Axes, found: list[Record]) -> None:
        ax.set_xscale("log")
        ax.set_xlim(low / (top / low) ** 0.6, top * (top / low) ** 0.85)  # room for names on both sides
        points = []
        for label, line in _grouped(found).items():
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
        _name(ax, points)

    return _grid(
        records,
        panel,
        f"Accuracy against {unit} paid for fitting, {shots} shots, {_seeds(records)}",
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
            found = {r["label"]: r for r in records if r["access_class"] == name and r["kind"] == kind}
            ax.axvline(0, color="black", dashes=DASHES["zero_shot"], lw=1)
            for y, r in [(y, found[label]) for y, label in enumerate(labels) if label in found]:
                paint, marker, bar = colour(r["label"]), MARKERS.get(r["access"], "*"), r["gain_zero_shot_half"] or 0
                each = [b["gain_zero_shot"] for b in board if all(b[k] == r[k] for k in key)]
                single = [gain for gain in each if gain is not None]
                ax.plot(single, [y + 0.28] * len(single), "|", color=paint, ms=7, alpha=0.7)
                ax.errorbar(r["gain_zero_shot"], y, xerr=bar, fmt=marker, color=paint, ms=6, lw=2, capsize=3)
            ax.set_yticks(range(len(labels)), [*map(shown, labels)] if column == 0 else [""] * len(labels))
            ax.set_ylim(-0.6, len(labels) - 0.2)
            ax.grid(axis="x", color="#e6e6e6")
            ax.set_title(f"{name}: {WHERE[kind]}", fontsize=9, loc="left")
            _plain(ax)
    for ax in axes[-1]:
        ax.set_xlabel("points over zero-shot (ticks: single test sets)", fontsize=8.5)
    figure.suptitle(f"Gain over zero-shot, {shots} shots, {budget_words(records[0])}, {_seeds(records)}", fontsize=11)
    _marker_legend(figure, records)
    return figure


def _grid(records: list[Record], panel: Callable[[Axes, list[Record]], None], title: str, xlabel: str) -> Figure:
    """A row of panels for each access class (more when there are many data sets), all on the same axes."""
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
            found = [r for r in records if r["access_class"] == name and r["dataset"] == some[column]]
            spread = [r["accuracy"] for r in records if r["dataset"] == some[column]]
            ax.set_ylim(min(spread) - 4, max(spread) + 4)  # a data set has one scale in all access classes
            ax.set_title(f"{shown(some[column])}   ({name})", fontsize=9.5, loc="left")
            ax.set_xlabel(xlabel, fontsize=8.5)
            ax.grid(color="#ececec")
            ax.set_axisbelow(True)
            if column == 0:
                ax.set_ylabel("accuracy (%)", fontsize=8.5)
            _plain(ax)
            filled.append((ax, found))
    figure.suptitle(title, fontsize=11)
    _marker_legend(figure, records)
    figure.draw_without_rendering()  # fixes the panels' sizes, so that labels can be kept apart in pixels
    figure.set_layout_engine("none")
    for ax, found in filled:
        panel(ax, found)
    return figure


def _series(ax: Axes, label: str, x: list[float], line: list[Record]) -> None:
    y, bars = [r["accuracy"] for r in line], [r["accuracy_half"] or 0.0 for r in line]
    marker = MARKERS.get(line[0]["access"], "*")
    style = (0, DASHES[label]) if label in DASHES else "-"
    ax.errorbar(x, y, bars, fmt="none", elinewidth=1, capsize=2, color=colour(label), alpha=0.5)
    ax.plot(x, y, marker=marker, ms=4.5, lw=1.3, color=colour(label), ls=style)


def _name(ax: Axes, points: list[Point]) -> None:
    """Each label beside its point, with a thin line to it. Labels of points at about the same x are pushed apart; those
    on the left of a panel stand on the left of their points, where no other point is.
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
            ax.text(x2, y2, f" {shown(name.label)} ", color=name.colour, **style)


def spread_out(ys: Iterable[float], gap: float, low: float, high: float) -> list[float]:
    """The same heights, moved as little as needed to lie `gap` apart, in their order, within [low, high]."""
    wanted = np.asarray(list(ys), dtype=float)
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed = wanted[order]
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


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5)


def _short(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"


def png(figure: Figure) -> bytes:
    """The picture as a file's bytes."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
