"""Claims of papers: registration, verdicts, and the rule that derives a verdict from a measurement.

A claim is a function in the module of its paper, registered by `@claim(...)`; its docstring states the paper's claim.
It takes the `Evidence`, which runs missing sweeps, and returns a `Finding`. The tested form of a claim is fixed in the
code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pipeline.claims.evidence import Evidence
from pipeline.claims.measured import Measured

PAPERS = {
    "craft": "CraFT, Wang et al., ICML 2024, arXiv:2402.04050",
    "taskres": "TaskRes, Yu et al., CVPR 2023, arXiv:2211.10277",
    "cbbt": "CBBT, Guo et al., Findings of EMNLP 2023, arXiv:2312.15901",
}


class Verdict(StrEnum):
    """Outcome of testing a claim."""

    REPRODUCED = "reproduced"
    CONTRADICTED = "contradicted"
    """The whole interval lies on the other side of the claimed bound."""
    INCONCLUSIVE = "inconclusive"
    """The interval contains the claimed bound."""
    NOT_TESTABLE = "not testable"
    """Data or weights are missing on this machine, or one value alone has no interval."""


class Finding(NamedTuple):
    """Verdict on a claim, our measurement as text, and the reason."""

    verdict: Verdict
    ours: str
    why: str
    measured: Measured | None = None


@dataclass(frozen=True)
class Claim:
    """A claim of a paper and its test."""

    name: str
    paper: str
    where: str
    """Section of the paper, or its released code."""
    says: str
    tested: str
    """Condition of the verdict `reproduced`."""
    command: str
    """Command that repeats the measurement."""
    find: Callable[[Evidence], Finding]


REGISTRY: list[Claim] = []
Find = Callable[[Evidence], Finding]


def claim(paper: str, where: str, tested: str, command: str) -> Callable[[Find], Find]:
    """Register a function as the test of a claim; its name is the name of the claim."""

    def register(function: Find) -> Find:
        says = (function.__doc__ or "").rstrip(".")
        REGISTRY.append(Claim(function.__name__, paper, where, says, tested, command, function))
        return function

    return register


def judge(measured: Measured, *, above: float | None = None, below: float | None = None, ours: str = "") -> Finding:
    """Derive the verdict of a claim that a value is above, or below, a bound.

    Args:
        measured: The value with its interval.
        above: The claimed lower bound.
        below: The claimed upper bound, if `above` is None.
        ours: Description of the measurement; the value with its interval by default.
    """
    text = ours or str(measured)
    if measured.low is None or measured.high is None:
        few = "no rows to compare" if math.isnan(measured.value) else "one value alone has no interval"
        return Finding(Verdict.NOT_TESTABLE, text, f"{few}; run several seeds with the claim's methods", measured)
    if above is not None:
        side, bound, inside, outside = "above", above, measured.low > above, measured.high < above
    else:
        assert below is not None
        side, bound, inside, outside = "below", below, measured.high < below, measured.low > below
    if inside:
        return Finding(Verdict.REPRODUCED, text, f"the whole interval lies {side} {bound:g}", measured)
    if outside:
        return Finding(Verdict.CONTRADICTED, text, f"the whole interval lies on the other side of {bound:g}", measured)
    return Finding(Verdict.INCONCLUSIVE, text, f"the interval contains {bound:g}", measured)


def not_testable(why: str) -> Finding:
    """Return the finding for a claim that needs what is missing on this machine."""
    return Finding(Verdict.NOT_TESTABLE, "", why)
