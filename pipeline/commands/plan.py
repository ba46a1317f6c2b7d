"""`farebox plan`: the predicted bills of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from methods.base import Bill
from pipeline.budget import Limits, total
from pipeline.cards import FULL_ANSWERS
from pipeline.config.compose import check_price
from pipeline.errors import USD, BudgetExceeded, dollars
from pipeline.trials.estimate import SweepEstimate
from pipeline.trials.plan import refuse_unpayable

if TYPE_CHECKING:
    from pipeline.trials.physical import Sent

HEADER = ("method", "data set", "shots", "allotment", "trials", "requests each", "images each", "requests", "images")
TEXT_COLUMNS = 4
HTTP_HEADER = ("method", "HTTP calls", "images", "texts", "MiB", "money", "hours")


def plan_table(estimate: SweepEstimate) -> str:
    """Return the predicted bills as text: a line per method, data set, shots and allotment, the total, and notes."""
    bills_of: dict[tuple[str, ...], list[Bill]] = {}
    for cell, _, bill, _ in estimate.trials:
        degraded = f", answers {cell.answers.text}" if cell.answers != FULL_ANSWERS else ""
        name = cell.choice.name + (" hparams=paper" if cell.hparams == "paper" else "")
        cell_name = (name, cell.dataset.name, str(cell.shots), cell.budget_name + degraded)
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
    text += [*http_lines(estimate), *estimate.notes, *(f"not run: {name} {why}" for name, why in estimate.unable)]
    return "\n".join([*text, *model_lines(estimate), *absent_lines(estimate)])


def http_lines(estimate: SweepEstimate) -> list[str]:
    """Return what is sent to a remote model at most: a line per method, and the sum; none for another model."""
    config, http = estimate.config, estimate.config.model.http
    if http is None:
        return []
    from pipeline.trials.physical import total_sent  # imports torch, as the modules that send do

    if config.offline:
        return [f"offline: nothing is sent to {http.host}"]
    lines: list[tuple[str, ...]] = [HTTP_HEADER]
    parts = http_by_method(estimate)
    for name, sent in (*parts.items(), ("total", total_sent(parts.values()))):
        counts, size = (f"{n:,}" for n in (sent.calls, sent.images, sent.texts)), f"{sent.bytes / 2**20:,.1f}"
        cost = "no price" if http.price is None else dollars(sent.micro_usd)
        hours = sent.hours(http.rate)
        lines.append((name, *counts, size, cost, "no rate" if hours is None else f"{hours:,.2f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    limits = (("the sweep", config.usd), (f"global {config.global_budget.name!r}", config.global_budget.usd))
    return [
        f"sent to {http.host} at most, if nothing is recorded and no call is repeated:",
        *rows,
        *([f"prices of {http.price.as_of}"] if http.price else []),
        *(f"money of {name}: at most {dollars(limit)}" for name, limit in limits if limit is not None),
    ]


def http_by_method(estimate: SweepEstimate) -> dict[str, Sent]:
    """Return what each method of a sweep sends at most, and the probes that identify the model."""
    from pipeline.trials.physical import SendPlan, Sent, total_sent

    found, sending = dict[str, Sent](), SendPlan(estimate.config)
    for trial in estimate.trials:
        name = trial.cell.choice.name
        found[name] = found.get(name, Sent()) + sending.trial(trial.cell, trial.bill)
    return found | {"(probes)": sending.probes(total_sent(found.values()).calls)}


def refuse_unpayable_plan(estimate: SweepEstimate) -> None:
    """Check the predicted bill and the money of a sweep against its ceilings.

    Raises:
        ConfigError: money is limited, and the model's card has no price.
        BudgetExceeded: the sweep may need more, and budget.partial is false.
    """
    config = estimate.config
    check_price(config)
    if config.partial:
        return
    refuse_unpayable(config, estimate.total)
    if config.model.http is None:
        return
    upper = sum(sent.micro_usd for sent in http_by_method(estimate).values())
    for account, limit in (
        ("the sweep", config.usd),
        (f"global budget {config.global_budget.name!r}", config.global_budget.usd),
    ):
        if limit is not None and upper > limit:
            raise BudgetExceeded(account, USD, upper, 0, limit)


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
