"""Claims of CBBT (arXiv:2312.15901), and what its released code does with the test set."""

from __future__ import annotations

import json
from typing import Any

from pipeline.claims.claim import Finding, claim, judge, not_testable
from pipeline.claims.evidence import Evidence
from pipeline.claims.gradients import cosines
from pipeline.claims.measured import Measured, each
from pipeline.results.row import ResultRow

SWEEP = "cbbt_claims"
COMMAND = f"farebox run sweep={SWEEP}"
DIRECTIONS = {4: "cbbt_q4", 16: "cbbt_q16", 52: "cbbt_prompt", 256: "cbbt_q256"}
"""Methods by number of directions per step, for the sweep's 8,000 requests (52: the rule of `cbbt_prompt`)."""


def _over(e: Evidence, method: str, reference: str) -> Measured:
    return e.gain(SWEEP, method, reference)


def gradients(e: Evidence) -> dict[str, Any]:
    """Return cosines between the estimated and the true gradient."""
    return e.measure("gradients", ["cbbt_prompt"], lambda: cosines(e.overrides))


@claim(
    "cbbt",
    "abstract",
    "cosine to the true gradient at the paper's 256 directions and h = 1/d above 0.5, embedded model",
    "farebox claims cbbt",
)
def approximation(e: Evidence) -> Finding:
    """Perturbed prompts approximate the gradient well."""
    values = gradients(e)
    measured = Measured.over_seeds(values["by_directions"]["256"], "cosine")
    means = {q: Measured.over_seeds(v).value for q, v in values["by_directions"].items()}
    return judge(measured, above=0.5, ours=f"{measured}; by directions {each(means, 2)}")


@claim(
    "cbbt",
    "released code",
    "cosine at h = 1/d less that at a tenth of it above -0.05, 256 directions",
    "farebox claims cbbt",
)
def step_size(e: Evidence) -> Finding:
    """The step h = max(1/d, 0.001) is small enough."""
    by_step = gradients(e)["by_step"]
    measured = Measured.over_seeds([a - b for a, b in zip(by_step["1.0"], by_step["0.1"], strict=True)], "cosine")
    means = {h: Measured.over_seeds(v).value for h, v in by_step.items()}
    return judge(measured, above=-0.05, ours=f"{measured}; by h d {each(means, 2)}")


@claim("cbbt", "released code", "256 directions over 4 at the same 8,000 requests above 0", COMMAND)
def directions(e: Evidence) -> Finding:
    """256 directions a step are worth their queries."""
    measured = _over(e, "cbbt_q256", "cbbt_q4")
    means = {str(q): e.mean(SWEEP, name).value for q, name in DIRECTIONS.items()}
    return judge(measured, above=0, ours=f"{measured}; {each(means)}")


@claim("cbbt", "abstract", "cbbt over cbbt_prompt above 0", COMMAND)
def adapter(e: Evidence) -> Finding:
    """The adapter adds to the prompt."""
    return judge(_over(e, "cbbt", "cbbt_prompt"), above=0)


@claim("cbbt", "abstract", "cbbt over cbbt_adapter above 0", COMMAND)
def both(e: Evidence) -> Finding:
    """Prompt and adapter together are better than the adapter alone."""
    measured, alone = _over(e, "cbbt", "cbbt_adapter"), _over(e, "cbbt_adapter", "zero_shot")
    both_steps, steps = (
        e.mean(SWEEP, method, lambda row: json.loads(row.notes)["steps"]).value for method in ("cbbt", "cbbt_adapter")
    )
    alone_text = f"the adapter alone makes {steps:.0f} steps, {alone} over zero_shot; both make {both_steps:.0f} steps"
    return judge(measured, above=0, ours=f"{measured}; {alone_text}")


@claim("cbbt", "abstract", "cbbt over bbt above 0", COMMAND)
def over_bbt(e: Evidence) -> Finding:
    """Better than the black-box rivals of its time (BBT)."""
    measured, prompt = _over(e, "cbbt", "bbt"), _over(e, "cbbt_prompt", "bbt")
    return judge(measured, above=0, ours=f"{measured}; the prompt alone {prompt}")


@claim("cbbt", "abstract", "the sweep of the paper's own grid", "farebox plan sweep=cbbt_paper")
def eleven_data_sets(e: Evidence) -> Finding:
    """Effective on eleven data sets."""
    return not_testable(e.lacking("cbbt_paper"))


@claim(
    "cbbt",
    "released code",
    "what that choice would add to cbbt_prompt, best of 15 points of the curve less the last: above 0",
    COMMAND,
)
def test_set_choice(e: Evidence) -> Finding:
    """Its epoch is the one that is best on the test set."""
    measured = e.mean(SWEEP, "cbbt_prompt", leak)
    return judge(measured, above=0, ours=f"{measured}; cbbt {e.mean(SWEEP, 'cbbt', leak)}")


def leak(row: ResultRow) -> float | None:
    """Return the best accuracy of a row's curve minus its final accuracy; None without a curve."""
    curve = [accuracy for _, _, accuracy in json.loads(row.curve)]
    return max(*curve, row.accuracy) - row.accuracy if curve and row.accuracy is not None else None
