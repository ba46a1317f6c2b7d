"""Draw the measurements behind the claims as PNG; error bars are 95% confidence intervals over seeds (Student's t)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.claims import cbbt, craft, taskres
from pipeline.claims.evidence import Evidence
from pipeline.claims.gradients import DIRECTIONS, STEPS
from pipeline.claims.measured import Measured
from pipeline.results.drawing import png
from pipeline.results.palette import colour

PARTS = {
    "bbt": "prompt alone (bbt)",
    "logit_head": "refiner alone (logit_head)",
    "craft_no_kl": "without consistency loss",
    "craft_sequential": "prompt first, then refiner",
    "craft": "CraFT",
    "craft_second_ask": "CraFT as released (second ask)",
    "coop": "CoOp, white box",
}


def draw(papers: Collection[str], evidence: Evidence) -> dict[str, bytes]:
    """Return the figures of these papers, by file name."""
    figures = {}
    if "craft" in papers:
        figures["craft_parts.png"] = png(_parts(evidence))
    if "taskres" in papers:
        figures["taskres_alpha.png"] = png(_alpha(evidence))
    if "cbbt" in papers:
        figures["cbbt_gradients.png"] = png(_gradients(evidence))
    return figures


def _parts(e: Evidence) -> Figure:
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    ax = figure.add_subplot()
    for i, (method, text) in enumerate(PARTS.items()):
        measured = e.gain(craft.SWEEP, method, "zero_shot")
        ax.barh(i, measured.value, color=colour(method) if method in ("bbt", "craft") else "#b8c4cc", height=0.65)
        ax.errorbar(measured.value, i, xerr=_bars([measured]), color="black", capsize=3)
        ax.text(0.2, i, text, va="center", fontsize=8)
    ax.set_yticks([])
    ax.invert_yaxis()
    ax.set_xlabel("points over zero-shot, mean of the data sets; 16 shots, 8,000 requests")
    ax.set_title("CraFT's parts", fontsize=10)
    _style(ax)
    return figure


def _alpha(e: Evidence) -> Figure:
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, kind, title in zip(axes, ("source", "shift"), ("own test sets", "shift test sets"), strict=True):
        for shots, dashes in ((16, "-"), (1, "--")):
            measured = [
                e.gain(taskres.SWEEP, name, "zero_shot", shots=shots, kind=kind) for name in taskres.ALPHAS.values()
            ]
            _line(ax, list(taskres.ALPHAS), measured, f"{shots} shots" if shots > 1 else "1 shot", dashes)
        unit = [e.gain(taskres.SWEEP, name, "zero_shot", kind=kind) for name in taskres.UNIT_ALPHAS.values()]
        _line(ax, list(taskres.UNIT_ALPHAS), unit, "16 shots, unit-length text", ":")
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set_xlabel("alpha")
        ax.set_title(title, fontsize=10)
        _style(ax)
    axes[0].set_ylabel("points over zero-shot")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _gradients(e: Evidence) -> Figure:
    values = cbbt.gradients(e)
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, points, axis in ((left, DIRECTIONS, "by_directions"), (right, STEPS, "by_step")):
        measured = [Measured.over_seeds(values[axis][str(x)]) for x in points]
        _line(ax, points, measured, "measured", "-")
        ax.set_xscale("log", base=4 if ax is left else 10)
        ax.set_ylim(0, 1)
        _style(ax)
    d = values["d"]
    left.plot(
        DIRECTIONS, [(q / (q + d + 1)) ** 0.5 for q in DIRECTIONS], ":", color="black", label="sqrt(Q / (Q + d + 1))"
    )
    left.set_xticks(DIRECTIONS, [str(q) for q in DIRECTIONS])
    left.set_xlabel(f"directions Q at h = 1/d, d = {d}")
    right.set_xlabel(f"h in units of 1/d, {DIRECTIONS[-1]} directions")
    left.set_ylabel("cosine to the true gradient")
    left.legend(frameon=False, fontsize=8)
    return figure


def _line(ax: Axes, x: Sequence[float], measured: Sequence[Measured], label: str, dashes: str) -> None:
    ax.errorbar(
        x, [m.value for m in measured], yerr=_bars(measured), label=label, linestyle=dashes, marker="o", capsize=3
    )


def _bars(measured: Sequence[Measured]) -> list[list[float]]:
    """Return the lengths of the error bars below and above each value, 0 without an interval."""
    below = [m.value - (m.value if m.low is None else m.low) for m in measured]
    return [below, [(m.value if m.high is None else m.high) - m.value for m in measured]]


def _style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
