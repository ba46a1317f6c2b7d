"""Draw the average ranks of an access class with their intervals and critical difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pipeline.console import plain
from pipeline.results.comparison import CLASSES
from pipeline.results.palette import MARKERS, colour
from pipeline.results.panels import add_title, bare
from pipeline.results.plot_labels import LONGEST_NAME
from pipeline.results.ranking import critical_difference, not_separated

CAPTION = (
    "Average rank over data sets, 1 is best; bars are 95% bootstrap intervals over seeds and test images. Grey lines "
    "join methods that Nemenyi's test does not separate at 5%: their ranks differ by less than the critical difference "
    "CD, which depends on the numbers of methods and data sets alone."
)


def rank_figure(records: Sequence[dict[str, Any]], title: str) -> Figure | None:
    """Draw one panel per access class with two or more ranked methods; None if there is none.

    Args:
        records: Records over data sets, at one number of shots and one allotment.
        title: Title of the figure.
    """
    ranked = {
        name: sorted((r for r in records if r["access_class"] == name and r["ranked"]), key=lambda r: r["rank"])
        for name in CLASSES
    }
    ranked = {name: some for name, some in ranked.items() if len(some) > 1}
    if not ranked:
        return None
    heights = [len(some) + 1.2 for some in ranked.values()]
    figure = Figure(figsize=(5.8, 1.3 + 0.26 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(ranked), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, some) in zip(axes, ranked.items(), strict=True):
        difference = critical_difference(len(some), some[0]["datasets"])
        for y, r in enumerate(some):
            low, high = (r["rank"] if r[end] is None else r[end] for end in ("rank_low", "rank_high"))
            bar = [[max(0.0, r["rank"] - low)], [max(0.0, high - r["rank"])]]
            marker = MARKERS.get(r["access"], "*")
            ax.errorbar(r["rank"], y, xerr=bar, fmt=marker, color=colour(r["label"]), ms=5, lw=1.6, capsize=2.5)
        groups = not_separated([r["rank"] for r in some], difference)
        for i, (first, last) in enumerate(groups):
            x = len(some) + 0.6 + 0.03 * len(some) * i
            ax.plot([x, x], [first - 0.2, last + 0.2], color="#777777", lw=2.2, solid_capstyle="round", clip_on=False)
        ax.set_yticks(range(len(some)), [plain(r["label"], LONGEST_NAME) for r in some])
        ax.set_ylim(len(some) - 0.4, -0.6)
        ax.set_xlim(0.7, len(some) + 0.9 + 0.03 * len(some) * len(groups))
        ax.grid(axis="x", color="#e6e6e6")
        sets = some[0]["datasets"]
        what = f"{name}: {len(some)} methods, {sets} data set{'s' * (sets > 1)}, CD = {difference:.1f}"
        ax.set_title(what, fontsize=9, loc="left")
        bare(ax)
    axes[-1].set_xlabel("average rank (1 is best)", fontsize=8.5)
    add_title(figure, title)
    return figure
