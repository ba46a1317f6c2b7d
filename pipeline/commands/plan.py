"""`farebox plan`: the predicted bills of a sweep."""

from __future__ import annotations

from methods.base import Bill
from pipeline.budget import Limits, total
from pipeline.cards import FULL_ANSWERS
from pipeline.trials.estimate import SweepEstimate

HEADER = ("method", "data set", "shots", "allotment", "trials", "requests each", "images each", "requests", "images")
TEXT_COLUMNS = 4


def plan_table(estimate: SweepEstimate) -> str:
    """Return the predicted bills as text: a line per method, data set, shots and allotment, the total, and notes."""
    bills_of: dict[tuple[str, ...], list[Bill]] = {}
    for cell, _, bill, _ in estimate.trials:
        degraded = f", answers {cell.answers.text}" if cell.answers != FULL_ANSWERS else ""
        cell_name = (cell.choice.name, cell.dataset.name, str(cell.shots), cell.budget_name + degraded)
        bills_of.setdefault(cell_name, []).append(bill)
    lines: list[tuple[str, ...]] = [HEADER]
    for key, bills in bills_of.items():
        each, together = bills[0], total(bills)
        numbers = (len(bills), each.requests, each.images, together.requests, together.images)
        lines.append((*key, *(f"{n:,}" for n in numbers)))
    whole = estimate.total
    trials = f"{len(estimate.trials):,}"
    lines.append(("total", "", "", "", trials, "", "", f"{whole.requests:,}", f"{whole.images:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            c.ljust(w) if i < TEXT_COLUMNS else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    config = estimate.config
    for name, limits in (
        ("sweep", config.sweep_budget),
        (f"global {config.global_budget.name!r}", config.global_budget.limits),
    ):
        if limits != Limits():
            text.append(f"ceiling of {name}: {limits.text}")
    text += [*estimate.notes, *(f"not run: {name} {why}" for name, why in estimate.unable)]
    return "\n".join([*text, *model_lines(estimate), *absent_lines(estimate)])


def model_lines(estimate: SweepEstimate) -> list[str]:
    """Return the model's image preprocessing, and what is changed, skipped or guessed to load it, one line each."""
    facts, name = estimate.model, estimate.config.model.name
    if facts is None:
        return []
    return [f"model {name}: {line}" for line in ((facts.rule, *facts.notes) if facts.rule else facts.notes)]


def absent_lines(estimate: SweepEstimate) -> list[str]:
    """Return what is missing on this machine and where it is published, one line each."""
    lines = [f"missing: {a.kind} {a.name}: {a.what}; published at {a.published}" for a in estimate.missing]
    if not estimate.exact:
        lines.append("These bills are estimated from the cards. `run` is refused (exit code 2) until the data is here.")
    return lines
