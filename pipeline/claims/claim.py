"""A claim of a paper, the form in which it is tested here, and the verdict, which one function gives.

A claim is a function in the module of its paper, registered by `@claim(...)`; its docstring says what the paper says.
It is given the `Evidence`, which runs what is missing, and returns a `Finding`. The tested form is fixed in the code.
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
    """What a measurement says about a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTABLE = "not testable on this machine"


class Finding(NamedTuple):
    """What was found for a claim."""

    verdict: Verdict
    ours: str
    why: str
    measured: Measured | None = None


@dataclass(frozen=True)
class Claim:
    """One row of the table."""

    name: str
    paper: str
    where: str
    """Of the paper, or of its released code."""
    says: str
    tested: str
    """What must hold here for the verdict `reproduced`."""
    command: str
    """What remakes the figure."""
    find: Callable[[Evidence], Finding]


REGISTRY: list[Claim] = []
Find = Callable[[Evidence], Finding]


def claim(paper: str, where: str, tested: str, command: str) -> Callable[[Find], Find]:
    """Register a function as the test of a claim: its name is the claim's, its docstring what the paper says."""

    def register(function: Find) -> Find:
        says = (function.__doc__ or "").rstrip(".")
        REGISTRY.append(Claim(function.__name__, paper, where, says, tested, command, function))
        return function

    return register


def judge(found: Measured, *, above: float | None = None, below: float | None = None, ours: str = "") -> Finding:
    """Reproduced when the whole interval lies on the claimed side of the bound."""
    text = ours or str(found)
    if found.low is None or found.high is None:
        few = "none of the rows that it compares" if math.isnan(found.value) else "one value alone has no interval"
        return Finding(Verdict.NOT_TESTABLE, text, f"{few}: give several seeds, and what the claim is about", found)
    if above is not None:
        side, bound, inside, outside = "above", above, found.low > above, found.high < above
    else:
        assert below is not None
        side, bound, inside, outside = "below", below, found.high < below, found.low > below
    if inside:
        return Finding(Verdict.REPRODUCED, text, f"the whole interval lies {side} {bound:g}", found)
    why = f"the whole interval lies on the other side of {bound:g}" if outside else f"the interval holds {bound:g}"
    return Finding(Verdict.NOT_REPRODUCED, text, why, found)


def not_testable(why: str) -> Finding:
    """Where a claim needs what is not here."""
    return Finding(Verdict.NOT_TESTABLE, "", why)
