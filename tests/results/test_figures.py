"""The figures, by the geometry of what is drawn: nothing covers a marker, nothing leaves its panel or the figure."""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from pipeline.results.palette import COLOURS, SPARE, TEXT_CONTRAST, contrast, text_colour
from pipeline.results.plot_labels import spread_out
from pipeline.results.plots import Sketch, sketch
from pipeline.results.row import ResultRow
from pipeline.results.stats import mean_ci95
from tests.support.synthetic import make, report_of, sweep

FULL: dict[str, Any] = {"seeds": (1, 2, 3), "shots": (4, 16)}
SWEEPS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "two seeds": {"seeds": (1, 2), "shots": (1, 16), "budgets": ((1000, None),)},
    "one seed": {"seeds": (1,), "shots": (16,)},
    "limited in images": {"seeds": (1, 2), "shots": (16,), "budgets": ((8000, None), (8000, 25600))},
    "ladder": {},
    "no limit": {"seeds": (1, 2), "shots": (16,), "budgets": ((None, None),)},
}


def rows_of(**which: Any) -> list[ResultRow]:
    return [row for trial in sweep(**which) for row in trial]


def sketches(rows: list[ResultRow]) -> dict[str, Sketch]:
    """The figures by name, not rendered: lines and limits are final, positions of texts are not."""
    report = report_of(rows)
    with rc_context({"text.parse_math": False}):
        return sketch(report.board, report.summary, report.selection.rows)


def rendered(sketches: dict[str, Sketch]) -> dict[str, Sketch]:
    for one in sketches.values():
        FigureCanvasAgg(one.figure)
        one.figure.draw_without_rendering()
    return sketches


@pytest.fixture(scope="module")
def ladder() -> dict[str, Sketch]:
    return sketches(ladder_rows())


@pytest.fixture(scope="module", params=SWEEPS)
def drawn(request: pytest.FixtureRequest, ladder: dict[str, Sketch]) -> dict[str, Sketch]:
    which = SWEEPS[request.param]
    return rendered(sketches(rows_of(**which)) if which else ladder)


def markers(ax: Axes) -> Iterator[Bbox]:
    """The boxes of all markers of a panel, in pixels."""
    for line in ax.lines:
        if line.get_marker() not in ("None", None, "", "|", "_"):
            radius = line.get_markersize() / 2 * ax.figure.dpi / 72
            for x, y in ax.transData.transform(np.column_stack(line.get_data())):
                yield Bbox([[x - radius, y - radius], [x + radius, y + radius]])


def overlap(one: Bbox, other: Bbox) -> bool:
    return bool(one.x0 < other.x1 and other.x0 < one.x1 and one.y0 + 1 < other.y1 and other.y0 + 1 < one.y1)


def test_names_cover_neither_markers_nor_each_other(drawn: dict[str, Sketch]) -> None:
    for name, one in drawn.items():
        for ax in one.figure.axes:
            names = [text.get_window_extent() for text in ax.texts]
            assert not any(overlap(a, b) for a, b in itertools.product(names, markers(ax))), name
            assert not any(overlap(a, b) for a, b in itertools.combinations(names, 2)), name
            assert names or "gain" in name


def test_everything_drawn_lies_in_its_panel_and_all_text_in_the_figure(drawn: dict[str, Sketch]) -> None:
    for name, one in drawn.items():
        page = one.figure.bbox
        for ax in one.figure.axes:
            box = ax.get_window_extent().padded(1)
            bars = [b.get_window_extent() for b in ax.collections]
            for inner in [*markers(ax), *bars, *(t.get_window_extent() for t in ax.texts)]:
                assert box.x0 <= inner.x0 and inner.x1 <= box.x1 and box.y0 <= inner.y0 and inner.y1 <= box.y1, name
            for text in [*ticks(ax), ax._left_title, ax.xaxis.label, ax.yaxis.label]:
                if text.get_text() and text.get_visible():
                    assert inside(text.get_window_extent(), page), (name, text.get_text())
        assert one.figure._suptitle is not None and inside(one.figure._suptitle.get_window_extent(), page), name


def ticks(ax: Axes) -> list[Text]:
    """The numbers and names at both axes; those beyond the limits are not drawn."""
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    x = [text for text in ax.get_xticklabels() if x0 <= text.get_position()[0] <= x1]
    return x + [text for text in ax.get_yticklabels() if y0 <= text.get_position()[1] <= y1]


def test_a_wide_interval_ends_inside_its_panel() -> None:
    rows = [make(accuracy=40.0, shots=shots) for shots in (4, 16)]
    rows += [
        make(method="bbt", access="SOFT+SCORES", shots=shots, seed=seed, accuracy=30.0 + 10 * seed)
        for shots in (4, 16)
        for seed in (1, 2, 3)
    ]
    (ax,) = sketches(rows)["accuracy_by_shots"].figure.axes
    ends = [y for bars in ax.collections for path in bars.get_paths() for y in path.vertices[:, 1]]
    half_width = mean_ci95([40.0, 50.0, 60.0])[1]
    assert half_width is not None and min(ends) == pytest.approx(50 - half_width)
    assert ax.get_ylim()[0] < min(ends) and max(ends) < ax.get_ylim()[1]


def inside(inner: Bbox, outer: Bbox) -> bool:
    return bool(inner.x0 >= -1 and inner.y0 >= -1 and inner.x1 <= outer.x1 + 1 and inner.y1 <= outer.y1 + 1)


def numbers(figure: Figure) -> list[str]:
    """The numbers below the lowest panels."""
    axes = figure.axes[-1]
    low, high = axes.get_xlim()
    return [t.get_text() for t in axes.get_xticklabels() if t.get_text() and low <= t.get_position()[0] <= high]


def test_a_figure_of_one_panel_has_its_whole_title_and_axis_numbers() -> None:
    for bill in (1, 3, 35, 984, 7950):
        rows = [make(accuracy=40.0, budget_requests=8000, budget_images=256000)]
        for seed in (1, 2, 3):
            paid = {"requests": bill, "adapt_requests": bill, "images": 9 * bill, "adapt_images": 9 * bill}
            rows.append(make(method="bbt", access="SOFT+SCORES", seed=seed, accuracy=50.0 + seed, **paid))
        rows = [replace(row, budget_requests=8000, budget_images=256000) for row in rows]
        figures = rendered(sketches(rows))
        panels = {name: len(one.figure.axes) for name, one in figures.items()}
        assert panels == {"gain_over_zero_shot": 1, "accuracy_by_budget": 2}
        for name, one in figures.items():
            assert numbers(one.figure), (name, bill)
            assert " ".join(one.figure._suptitle.get_text().split()) == one.title
            assert inside(one.figure._suptitle.get_window_extent(), one.figure.bbox), (name, bill)


def test_a_method_has_a_point_for_each_allotment_and_a_single_allotment_is_named() -> None:
    some = {"methods": ("zero_shot", "craft", "bbt"), "shots": (16,), "seeds": (1,)}
    several = sketches(rows_of(**some))["accuracy_by_budget"]
    assert "a line joins a method's allotments" in several.title
    points = {
        line.get_color(): len(line.get_xdata()) for line in several.figure.axes[0].lines if line.get_marker() == "s"
    }
    assert points[COLOURS["craft"]] == points[COLOURS["bbt"]] == 2
    one = sketches(rows_of(**some, budgets=((1000, None),)))["accuracy_by_budget"]
    assert "one point per method: allotment 1,000 requests" in one.title


def ladder_rows() -> list[ResultRow]:
    """Search methods with six allotments, of which the last changes nothing for one, and others with the largest."""
    rungs = tuple((n, None) for n in (100, 250, 1000, 4000, 8000, 32000))
    some: dict[str, Any] = {"shots": (16,), "seeds": (1, 2, 3)}
    rows = rows_of(methods=("craft", "bbt", "cbbt"), budgets=rungs, **some)
    rows += rows_of(methods=("zero_shot", "logit_head", "taskres", "tip_adapter_f"), budgets=rungs[-1:], **some)
    at_most = {r.dataset: r for r in rows if (r.method, r.budget_requests) == ("cbbt", 8000)}
    saturated = ("requests", "images", "adapt_requests", "adapt_images")
    return [
        replace(r, **{name: getattr(at_most[r.dataset], name) for name in saturated})
        if (r.method, r.budget_requests) == ("cbbt", 32000)
        else r
        for r in rows
    ]


def test_accuracy_by_budget_is_drawn_for_the_mean_and_each_data_set_in_both_units(ladder: dict[str, Sketch]) -> None:
    drawn = {name: one for name, one in ladder.items() if "by_budget" in name}
    where = {"": "mean of 3 data sets", "_1_digits": "digits", "_2_emoji": "emoji", "_3_icons": "icons"}
    assert {name: one.title.split(", ")[1] for name, one in drawn.items()} == {
        f"accuracy_by_budget{suffix}": what for suffix, what in where.items()
    }
    for one in drawn.values():
        titles = [ax.get_title(loc="left") for ax in one.figure.axes]
        assert titles == [f"{unit}   ({of})" for of in ("scores", "features") for unit in ("requests", "image rows")]
        by_requests, by_images = one.figure.axes[:2]
        assert by_requests.get_ylim() == by_images.get_ylim()
        (line,) = (ln for ln in by_images.lines if ln.get_color() == COLOURS["craft"] and ln.get_marker() == "s")
        assert list(line.get_xdata()) == [160 * n for n in (100, 250, 1000, 4000, 8000, 32000)]


def test_a_bill_that_a_larger_allotment_does_not_change_is_a_level_from_there_on(ladder: dict[str, Sketch]) -> None:
    scores, _, features, _ = ladder["accuracy_by_budget"].figure.axes

    def levels(ax: Axes, label: str) -> list[tuple[float, float]]:
        """The first and last bill of the levels of a method."""
        lines = [ln for ln in ax.lines if ln.get_color() == COLOURS[label] and ln.get_marker() == "None"]
        assert all(len(set(ln.get_ydata())) == 1 for ln in lines)
        return [(min(ln.get_xdata()), max(ln.get_xdata())) for ln in lines]

    assert levels(features, "taskres") == levels(scores, "logit_head") == [(2, 32000)]
    assert levels(features, "cbbt") == [(8000, 32000)]
    assert levels(scores, "craft") == levels(scores, "bbt") == []  # more requests would be spent
    assert levels(scores, "zero_shot") == [(2, 32000)]  # free of charge
    ((points,),) = [[ln for ln in features.lines if ln.get_color() == COLOURS["cbbt"] and ln.get_marker() == "D"]]
    assert list(points.get_xdata()) == [100, 250, 1000, 4000, 8000]


def test_the_bands_of_a_line_are_its_intervals_over_seeds(ladder: dict[str, Sketch]) -> None:
    scores = ladder["accuracy_by_budget_1_digits"].figure.axes[0]
    found = {tuple(np.round(colour[:3], 3)) for band in scores.collections for colour in band.get_facecolor()}
    assert len(found) == 2  # craft and bbt
    rows = [r for r in ladder_rows() if (r.method, r.test_set, r.budget_requests) == ("craft", "digits", 1000)]
    mean, half = mean_ci95([r.accuracy for r in rows if r.accuracy is not None])
    assert half is not None
    ends = {tuple(np.round(xy, 6)) for band in scores.collections for p in band.get_paths() for xy in p.vertices}
    assert {(1000, round(mean - half, 6)), (1000, round(mean + half, 6))} <= ends


def test_two_seeds_are_drawn_without_an_interval() -> None:
    def caps(seeds: tuple[int, ...]) -> int:
        figure = sketches(rows_of(methods=("zero_shot", "craft"), shots=(16,), seeds=seeds))[
            "gain_over_zero_shot"
        ].figure
        return sum(line.get_marker() == "|" and line.get_markersize() == 6 for ax in figure.axes for line in ax.lines)

    assert caps((1, 2)) == 0 < caps((1, 2, 3))


def test_the_curve_of_a_fit_is_drawn_only_if_it_was_recorded() -> None:
    rows = rows_of(seeds=(1, 2), shots=(16,), budgets=((8000, None),), methods=("zero_shot", "craft", "bbt"))
    figure = sketches(rows)["accuracy_during_fit"].figure
    recorded = json.loads(next(r for r in rows if r.method == "craft" and r.test_set == r.dataset == "digits").curve)
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "s"]
    assert len(lines) == 4 and [list(p) for p in zip(*lines[0].get_data(), strict=True)] in [
        [[requests, accuracy] for requests, _, accuracy in json.loads(r.curve)] for r in rows
    ]
    assert len(recorded) == 2
    assert "accuracy_during_fit" not in sketches([replace(r, curve="[]") for r in rows])


def test_each_model_has_figures_of_its_own() -> None:
    rows = rows_of(seeds=(1, 2, 3), shots=(16,), budgets=((8000, None),), methods=("zero_shot", "craft"))
    other = [replace(r, model="vit/b", trial_id=f"other{r.trial_id}", accuracy=(r.accuracy or 0) / 2) for r in rows]
    figures = sketches([*rows, *other])
    assert {"gain_over_zero_shot_tiny_1", "gain_over_zero_shot_vit_b_2"} < set(figures)
    assert figures["gain_over_zero_shot_vit_b_2"].title.endswith("; vit/b fp32")


def test_files_are_pngs_of_a_readable_size_and_svgs_with_text_and_ids_of_their_own() -> None:
    rows = rows_of(seeds=(1,), shots=(4, 16), methods=("zero_shot", "craft", "tip_adapter_f"))
    figures = report_of(rows).figures
    assert set(figures) == {
        *("main_gain_over_zero_shot", "gain_over_zero_shot", "accuracy_by_shots", "accuracy_by_budget"),
        *(f"accuracy_by_budget_{name}" for name in ("1_digits", "2_emoji", "3_icons")),
        "accuracy_during_fit",
    }
    ids: list[str] = []
    for name, one in figures.items():
        assert one.png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", one.png[16:24])
        assert 400 <= width <= 2000 and 200 <= height <= 3000
        assert ">tip_adapter_f<" in re.sub(r"\s*(?=<)|(?<=>)\s*", "", one.svg) or "during" in name
        assert "http" not in one.svg and f"<title id={name}-title>" in one.svg and f"<desc id={name}-desc>" in one.svg
        mine = re.findall(r'\bid="?([^" >]+)', one.svg)
        ids += mine
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', one.svg)
        assert used and {a or b for a, b in used} <= set(mine)
    assert len(ids) == len(set(ids))
    again = report_of(rows).figures
    assert {name: one.svg for name, one in again.items()} == {name: one.svg for name, one in figures.items()}


def test_there_is_no_figure_without_numbers() -> None:
    assert report_of([]).figures == {} == report_of([make(status="failed")]).figures
    assert set(report_of([make(accuracy=40.0)]).figures) == set()
    small = rows_of(shots=(16,), budgets=((8000, None),), methods=("zero_shot", "craft"), seeds=(1,))
    assert "accuracy_by_shots" not in report_of(small).figures  # one number of shots is no line


def test_names_in_figures_are_readable_on_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )
    labels = [*COLOURS, *(f"method {i}" for i in range(40))]
    assert all(contrast(text_colour(label), "#ffffff") >= TEXT_CONTRAST for label in labels)
    assert text_colour("craft") == COLOURS["craft"] and len({text_colour(f"method {i}") for i in range(40)}) == len(
        SPARE
    )


def test_labels_are_moved_apart_in_their_order_and_stay_inside() -> None:
    assert spread_out([10, 50], 5, 0, 100) == [10, 50]
    placed = spread_out([99, 50, 50, 50, 98], 5, 0, 100)
    assert placed[4] < placed[0] <= 100
    assert np.diff(sorted(placed)).min() > 4.9
    assert max(spread_out(list(range(40)), 5, 0, 100)) <= 100.01
