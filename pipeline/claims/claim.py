"""A claim of a paper, the form in which it is tested here, and the verdict, which one function gives.

A claim is a function in the module of its paper, registered by `@claim(...)`; its docstring says what the paper says.
It is given the `Evidence`, which runs what is missing, and returns a `Finding`. The tested form is fixed in the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from pipeline.claims.evidence import Evidence
from pipeline.stats import student

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


class Measured(NamedTuple):
    """A figure with the interval that counts: Student's 95 % over seeds, or the least and greatest of repetitions."""

    value: float
    low: float | None
    """None where there is one value alone."""
    high: float | None
    unit: str = "points"

    @classmethod
    def over_seeds(cls, values: Sequence[float], unit: str = "points") -> Measured:
        """Mean and Student's 95 % interval; nan of nothing."""
        mean, half = student(values)
        if mean is None:
            return cls(math.nan, None, None, unit)
        return cls(mean, None if half is None else mean - half, None if half is None else mean + half, unit)

    @classmethod
    def of_runs(cls, values: Sequence[float], unit: str) -> Measured:
        """Median, least and greatest."""
        middle = float(np.median(values))
        return cls(middle, min(values), max(values), unit)

    def __str__(self) -> str:
        sign = "+" if self.unit == "points" else ""
        digits = 1 if self.unit in ("points", "degrees") else 2
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.{digits}f} {self.unit}"
        return (
            f"{self.value:{sign}.{digits}f} ({self.low:{sign}.{digits}f} to {self.high:{sign}.{digits}f}) {self.unit}"
        )


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
    bound = above if above is not None else below
    assert bound is not None
    inside = found.low > bound if above is not None else found.high < bound
    if inside:
        return Finding(Verdict.REPRODUCED, text, f"the whole interval lies {_side(above)} {bound:g}", found)
    other = found.high < bound if above is not None else found.low > bound
    why = f"the whole interval lies on the other side of {bound:g}" if other else f"the interval holds {bound:g}"
    return Finding(Verdict.NOT_REPRODUCED, text, why, found)


def not_testable(why: str) -> Finding:
    """Where a claim needs what is not here."""
    return Finding(Verdict.NOT_TESTABLE, "", why)


def _side(above: float | None) -> str:
    return "above" if above is not None else "below"
