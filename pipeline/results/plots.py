"""Draw the leaderboard's figures: gain over zero-shot, accuracy by shots, budget and answers, and during the fit.

Figures have one panel per access class (rows) and data set (columns). A method has the same colour everywhere; the
marker shows its access, and its name is drawn beside its line. References are black or grey. Bars with caps are 95%
confidence intervals over three or more seeds (Student's t), bars without caps the range over two seeds.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.console import plain
from pipeline.results.answers_plot import CAPTION as ANSWERS_CAPTION
from pipeline.results.answers_plot import answers_figure, answers_title, drawn_records
from pipeline.results.budget_plot import CAPTION as BUDGET_CAPTION
from pipeline.results.budget_plot import budget_figure
from pipeline.results.comparison import CLASSES, FULL, answers_order, cells
from pipeline.results.drawing import Drawing, drawing
from pipeline.results.ladder import compared
from pipeline.results.palette import DASHES, MARKERS, colour
from pipeline.results.panels import (
    WIDE,
    access_legend,
    accuracy_range,
    add_title,
    bare,
    by_label,
    grid,
    number_ticks,
    series,
)
from pipeline.results.panels import seeds as seeds_text
from pipeline.results.plot_labels import LONGEST_NAME, Point, draw_labels
from pipeline.results.rank_plot import CAPTION as RANK_CAPTION
from pipeline.results.rank_plot import rank_figure
from pipeline.results.spread import spread
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
MAIN = "main_gain_over_zero_shot"
"""Name of the figure that holds the first kind of test set only, small enough to stand beside a table."""
BARS = "Bars with caps: 95% confidence interval over seeds; bars without caps: both values of two seeds."


class Sketch(NamedTuple):
    """A figure that is not rendered yet, with its texts."""

    figure: Figure
    title: str
    caption: str


def draw(board: pa.Table, summary: pa.Table, rows: pa.Table) -> dict[str, Drawing]:
    """Draw the figures of a leaderboard.

    Args:
        board: The leaderboard by test set.
        summary: The leaderboard over data sets.
        rows: The rows of both, which hold the accuracies during the fit.

    Returns:
        Figures by name, one set for each model. Figures without data are left out.
    """
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a name is not a formula
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # drawn as an empty box
        sketches = sketch(board, summary, rows)
        return {name: drawing(s.figure, name, s.title, s.caption) for name, s in sketches.items()}


def sketch(board: pa.Table, summary: pa.Table, rows: pa.Table) -> dict[str, Sketch]:
    """Return the figures of `draw` before they are rendered."""
    everything, pooled, fits = board.to_pylist(), summary.to_pylist(), _fits(rows)
    models = sorted({(r["model"], r["model_digest"], r["precision"]) for r in everything})
    sketches: dict[str, Sketch] = {}
    for i, model in enumerate(models):
        board_of, summary_of, fits_of = ([r for r in some if _model(r) == model] for some in (everything, pooled, fits))
        suffix = "" if len(models) == 1 else "_" + re.sub(r"[^\w-]", "_", f"{model[0]}_{i + 1}")
        name = "" if len(models) == 1 else f"; {plain(model[0], LONGEST_NAME)} {model[2]}"
        of_model = _of_model(board_of, summary_of, fits_of, name)
        sketches |= {f"{key}{suffix}": s for key, s in of_model.items()}
    return sketches


def _of_model(everything: list[Record], pooled: list[Record], fits: list[Record], model: str) -> dict[str, Sketch]:
    kinds = sorted({r["answers"] for r in everything}, key=answers_order)
    by_answers: dict[str, Sketch] = {}
    if len(kinds) > 1 and (own := drawn_records(pooled)):
        at = _at_one_point(own)
        title, more = answers_title(at) + model, _others(own, at, "other shots and allotments")
        figure = answers_figure(at, kinds, title)
        by_answers["accuracy_by_answers"] = Sketch(figure, title, f"{ANSWERS_CAPTION} {BARS}{more}")
    if kinds != [FULL]:
        model += f"; answers: {kinds[0]}"
        alike = ([r for r in some if r["answers"] == kinds[0]] for some in (everything, pooled, fits))
        everything, pooled, fits = alike
    return by_answers | _of_answers(everything, pooled, fits, model)


def _of_answers(everything: list[Record], pooled: list[Record], fits: list[Record], model: str) -> dict[str, Sketch]:
    board = [r for r in everything if r["accuracy"] is not None and r["kind"] == "source"]
    overall = [r for r in pooled if r["gain_zero_shot"] is not None]
    sketches: dict[str, Sketch] = {}
    if overall:
        kinds = [k for k in WHERE if any(r["kind"] == k for r in _at_one_point(overall))]
        sketches["gain_over_zero_shot"] = _gains(overall, everything, kinds, model)
        if len(kinds) > 1:
            sketches = {MAIN: _gains(overall, everything, kinds[:1], model), **sketches}
    if sources := [r for r in pooled if r["kind"] in ("source", "harmonic")]:
        at = _at_one_point(sources)
        title = f"Average ranks, {at[0]['shots']} shots, {allotment(at[0])}{model}"
        if (figure := rank_figure(at, title)) is not None:
            sketches["average_ranks"] = Sketch(figure, title, RANK_CAPTION)
    if len({r["shots"] for r in board}) > 1:
        sketches["accuracy_by_shots"] = _by_shots(board, model)
    sketches |= _by_budget(everything, pooled, model)
    if fits:
        sketches["accuracy_during_fit"] = _during_fit(fits, model)
    return sketches


def _by_shots(board: list[Record], model: str) -> Sketch:
    records = _largest_budget(board)
    shots = sorted({r["shots"] for r in records})

    def panel(ax: Axes, in_panel: list[Record]) -> None:
        lines = by_label(in_panel)
        points = []
        for i, (label, line) in enumerate(lines.items()):
            nudge = 2 ** (0.035 * (i - len(lines) / 2))  # so that spreads do not hide each other
            series(ax, label, [r["shots"] * nudge for r in line], line)
            points.append(Point(line[-1]["shots"] * nudge, line[-1]["accuracy"], label))
        draw_labels(ax, points, [*shots, *(p.x for p in points), *(p.x * shots[0] / shots[-1] for p in points)])
        ax.set_xticks(shots, [str(s) for s in shots])
        ax.minorticks_off()

    title = f"Accuracy by labelled images per class, {allotment(records[0])}, {seeds_text(records)}{model}"
    left_out = _others(board, records, "other allotments")
    caption = f"Accuracy on the data sets' own test sets with more labelled images per class. {BARS}{left_out}"
    return Sketch(grid(records, panel, accuracy_range, title, "labelled images per class"), title, caption)


def _by_budget(everything: list[Record], pooled: list[Record], model: str) -> dict[str, Sketch]:
    """Return a figure of the mean over data sets, unless there is one, and a figure of each data set."""
    records = compared(everything, pooled)
    shots = max((r["shots"] for r in records), default=0)
    at = [r for r in records if r["shots"] == shots]
    sketches = {}
    for i, name in enumerate(dict.fromkeys(r["test_set"] for r in at)):
        of_set = [r for r in at if r["test_set"] == name]
        several = len({(r["budget_requests"], r["budget_images"]) for r in of_set}) > 1
        how = "a line joins a method's allotments" if several else f"one point per method: {allotment(of_set[0])}"
        where = f"mean of {of_set[0]['datasets']} data sets" if name == "all" else plain(name, LONGEST_NAME)
        title = f"Accuracy by the bill of fitting, {where}, {shots} shots, {how}, {seeds_text(of_set)}{model}"
        if (figure := budget_figure(of_set, title)) is not None:
            suffix = "_" + re.sub(r"[^\w-]", "_", f"{i}_{name}") if i else ""
            caption = BUDGET_CAPTION + _others(records, at, "other shots")
            sketches[f"accuracy_by_budget{suffix}"] = Sketch(figure, title, caption)
    return sketches


def _fits(rows: pa.Table) -> list[Record]:
    """Return one record for each trial whose accuracy during the fit was recorded (`curve=N`)."""
    if not any(text != "[]" for text in rows["curve"].to_pylist()):
        return []
    records = []
    for section, methods in cells(rows).items():
        for label, of_label in methods.items():
            for row in of_label:
                curve = json.loads(row["curve"]) if section.kind in ("source", "base") else []
                if curve:
                    records.append(section._asdict() | {k: row[k] for k in ("access", "seed")} | {"label": label})
                    records[-1]["curve"] = curve
    return records


def _during_fit(fits: list[Record], model: str) -> Sketch:
    records = _at_one_point(fits)
    limits = records[0]["budget_requests"], records[0]["budget_images"]
    unit = "images" if limits[0] is None and limits[1] is not None else "requests"
    column = ("requests", "images").index(unit)
    spent = [point[column] for r in records for point in r["curve"]]

    def panel(ax: Axes, in_panel: list[Record]) -> None:
        ends = []
        for label, trials in by_label(in_panel).items():
            for r in trials:
                x, y = [point[column] for point in r["curve"]], [point[2] for point in r["curve"]]
                ax.plot(x, y, marker=MARKERS.get(r["access"], "*"), ms=3, lw=1, color=colour(label), alpha=0.8)
            last = max(trials, key=lambda r: r["curve"][-1][column])["curve"][-1]
            ends.append(Point(last[column], last[2], label))
        draw_labels(ax, ends, spent, both_sides=True)
        number_ticks(ax, spent)

    what = {"requests": "requests", "images": "image rows"}[unit]
    title = f"Accuracy during the fit, {records[0]['shots']} shots, {allotment(records[0])}{model}"
    caption = (
        "Test accuracy of copies of the method during the fit (`curve`), one line per seed. It is a diagnostic: no "
        f"method sees it, and no number of the table depends on it.{_others(fits, records, 'other trials')}"
    )
    return Sketch(grid(records, panel, lambda r: [p[2] for p in r["curve"]], title, what, WIDE), title, caption)


def _gains(overall: list[Record], board: list[Record], kinds: Sequence[str], model: str) -> Sketch:
    records = [r for r in _at_one_point(overall) if r["kind"] in kinds]
    shots = records[0]["shots"]
    key = ("label", "model", "model_digest", "shots", "budget_requests", "budget_images", "access_class", "kind")
    classes = [c for c in CLASSES if any(r["access_class"] == c for r in records)]
    order = {c: _best_last([r for r in records if r["access_class"] == c]) for c in classes}
    heights = [len(order[c]) + 0.8 for c in classes]
    wide = 4.8 if len(kinds) == 1 else 1.2 + 4.4 * len(kinds)
    figure = Figure(figsize=(wide, 1.5 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(classes), len(kinds), squeeze=False, sharex=True, height_ratios=heights)
    for row, name in enumerate(classes):
        for column, kind in enumerate(kinds):
            ax, labels = axes[row][column], order[name]
            of_label = {r["label"]: r for r in records if r["access_class"] == name and r["kind"] == kind}
            ax.axvline(0, color="black", dashes=DASHES["zero_shot"], lw=1)
            for y, r in [(y, of_label[label]) for y, label in enumerate(labels) if label in of_label]:
                each = [b["gain_zero_shot"] for b in board if all(b[k] == r[k] for k in key)]
                _gain(ax, y, r, [gain for gain in each if gain is not None])
            shown = [plain(label, LONGEST_NAME) for label in labels] if column == 0 else [""] * len(labels)
            ax.set_yticks(range(len(labels)), shown)
            ax.set_ylim(-0.6, len(labels) - 0.2)
            ax.grid(axis="x", color="#e6e6e6")
            ax.set_title(f"{name}: {WHERE[kind]}", fontsize=9, loc="left")
            bare(ax)
    for ax in axes[-1]:
        ax.set_xlabel("gain over zero-shot in points (ticks: single test sets)", fontsize=8.5)
    title = f"Gain over zero-shot, {shots} shots, {allotment(records[0])}, {seeds_text(records)}{model}"
    add_title(figure, title)
    access_legend(figure, records)
    caption = (
        "Accuracy minus that of zero-shot, in percentage points; best method on top. Small ticks: single test sets. "
        f"{BARS}{_others([r for r in overall if r['kind'] in kinds], records, 'other shots and allotments')}"
    )
    if len(kinds) > 1:
        title = title.replace("Gain over zero-shot", "Gain over zero-shot on each kind of test set", 1)
    return Sketch(figure, title, caption)


def _gain(ax: Axes, y: int, r: Record, single: list[float]) -> None:
    paint, around, mean = colour(r["label"]), spread(r, "gain_zero_shot"), r["gain_zero_shot"]
    ax.plot(single, [y + 0.28] * len(single), "|", color=paint, ms=7, alpha=0.7)
    bar = None if around is None else [[mean - around.low], [around.high - mean]]
    caps = 3 if around is not None and around.is_interval else 0
    ax.errorbar(mean, y, xerr=bar, fmt=MARKERS.get(r["access"], "*"), color=paint, ms=6, lw=2, capsize=caps)


def _model(r: Record) -> tuple[str, str, str]:
    return r["model"], r["model_digest"], r["precision"]


def _others(everything: Sequence[Record], shown: Sequence[Record], which: str) -> str:
    """Return a sentence about what a figure leaves out."""
    return f" Not shown: {which}; the table has them." if len(everything) > len(shown) else ""


def _largest_budget(records: list[Record]) -> list[Record]:
    def size(r: Record) -> tuple[bool, float, float]:
        return r["budget_requests"] is not None, r["budget_requests"] or 0, r["budget_images"] or np.inf

    top = max(size(r) for r in records)
    return [r for r in records if size(r) == top]


def _at_one_point(records: list[Record]) -> list[Record]:
    """Return the records with the largest allotment, and of these the ones with the most shots."""
    largest = _largest_budget(records)
    return [r for r in largest if r["shots"] == max(r["shots"] for r in largest)]


def _best_last(records: list[Record]) -> list[str]:
    gains: dict[str, list[float]] = defaultdict(list)
    for r in records:
        if r["kind"] == "source" or not any(o["kind"] == "source" for o in records):
            gains[r["label"]].append(r["gain_zero_shot"])
    return sorted(gains, key=lambda label: float(np.mean(gains[label])))
