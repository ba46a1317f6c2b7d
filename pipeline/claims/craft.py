"""Claims of CraFT (arXiv:2402.04050)."""

from __future__ import annotations

from statistics import median

from pipeline.bench.cost import Cost, CostSpec, measure
from pipeline.claims.claim import Finding, claim, judge, not_testable
from pipeline.claims.evidence import Evidence
from pipeline.claims.measured import Measured

SWEEP = "craft_ablation"
COMMAND = f"farebox run sweep={SWEEP}"
BIG = ("RN50", "ViT-B-16")
RUNS = 3
FEW = ("shots=1", "views=1")
"""Overrides for timing single steps: time and memory of a step do not depend on the number of images."""


def _over(e: Evidence, reference: str) -> Measured:
    return e.gain(SWEEP, "craft", reference)


@claim(
    "craft",
    "abstract",
    "craft over zero_shot, mean of the embedded sets, above 0; how far from 12 is beside it",
    COMMAND,
)
def gain(e: Evidence) -> Finding:
    """+12 points over zero-shot with 16 shots and 8,000 queries."""
    measured = _over(e, "zero_shot")
    reached = measured.high is not None and measured.low is not None and measured.low <= 12 <= measured.high
    return judge(measured, above=0, ours=f"{measured}; 12 is {'inside' if reached else 'outside'} the interval")


@claim("craft", "abstract", "the sweep of the paper's own grid", "farebox plan sweep=craft_paper")
def fifteen_data_sets(e: Evidence) -> Finding:
    """Better than other black-box tuning (BBT) on 15 data sets."""
    return not_testable(e.lacking("craft_paper"))


@claim("craft", "experiments", "craft over bbt above 0", COMMAND)
def over_bbt(e: Evidence) -> Finding:
    """Better than BBT, which searches the prompt alone."""
    return judge(_over(e, "bbt"), above=0)


@claim("craft", "ablation", "craft over logit_head above 0", COMMAND)
def over_refiner_alone(e: Evidence) -> Finding:
    """Better than the prediction refiner alone."""
    return judge(_over(e, "logit_head"), above=0)


@claim("craft", "ablation", "craft over craft_no_kl above 0", COMMAND)
def consistency_loss(e: Evidence) -> Finding:
    """The consistency loss helps."""
    return judge(_over(e, "craft_no_kl"), above=0)


@claim("craft", "ablation", "craft over craft_sequential above 0", COMMAND)
def collaboration(e: Evidence) -> Finding:
    """Training prompt and refiner together helps."""
    return judge(_over(e, "craft_sequential"), above=0)


@claim("craft", "abstract", "coop over craft below 1.62", COMMAND)
def gap_to_white_box(e: Evidence) -> Finding:
    """Within 1.62 points of white-box tuning."""
    return judge(e.gain(SWEEP, "coop", "craft"), below=1.62)


@claim(
    "craft",
    "abstract",
    "time of CoOp's fit over CraFT's, each alone on one thread, above 1: the embedded model, and by single steps RN50 "
    "and ViT-B/16 with random weights",
    "farebox bench cost craft; farebox bench cost coop arch=RN50 steps=2 shots=1 views=1",
)
def faster(e: Evidence) -> Finding:
    """Trains faster than white-box tuning."""
    runs = list(zip(tiny(e, "coop"), tiny(e, "craft"), strict=True))
    ratios = [median(white["fit_s"] / black["fit_s"] for white, black in runs)]
    texts = [f"tiny {runs[0][0]['fit_s']:.1f} s against {runs[0][1]['fit_s']:.1f}"]
    for arch in BIG:
        white, black = whole_fit(e, "coop", arch), whole_fit(e, "craft", arch)
        ratios.append(white / black)
        texts.append(f"{arch} {white:,.0f} s against {black:,.0f}")
    measured = Measured.of_runs(ratios, "times")
    return judge(measured, above=1, ours=f"{measured}: {'; '.join(texts)}")


@claim(
    "craft",
    "abstract",
    "peak memory of CoOp's side (model, activations) over that of CraFT's client, above 80: RN50 and ViT-B/16, "
    "random weights",
    "farebox bench cost craft arch=RN50 steps=2 shots=1 views=1; the same of coop",
)
def memory(e: Evidence) -> Finding:
    """About 1/80 of the memory on the client."""
    ratios, texts = [], []
    for arch in BIG:
        white, black = big(e, "coop", arch), big(e, "craft", arch)
        ratios.append(white["endpoint_mib"] / black["client_mib"])
        texts.append(f"{arch} {white['endpoint_mib']:,.0f} MiB against {black['client_mib']:,.1f}")
    kept = tiny(e, "craft")[0]["client_bytes"]
    measured = Measured.of_runs(ratios, "times")
    return judge(measured, above=80, ours=f"{measured}: {'; '.join(texts)}; CraFT keeps {kept:,} bytes when deployed")


def tiny(e: Evidence, method: str) -> list[dict[str, float]]:
    """Measure whole trials, one at a time, on the embedded model: digits, 16 shots."""
    return e.measure(f"cost_{method}", [method], lambda: [_kept(measure(CostSpec(method))) for _ in range(RUNS)])


def big(e: Evidence, method: str, arch: str) -> dict[str, float]:
    """Measure the start and two steps of a method on a model with random weights."""
    spec = CostSpec(method, FEW, steps=2, arch=arch)
    return e.measure(f"cost_{method}_{arch}", [method], lambda: _kept(measure(spec)))


def whole_fit(e: Evidence, method: str, arch: str) -> float:
    """Return the seconds of as many steps as the trial on the embedded model takes, without encoding images."""
    return tiny(e, method)[0]["steps"] * big(e, method, arch)["step_s"]


def _kept(cost: Cost) -> dict[str, float]:
    values = cost._asdict() | {"fit_s": cost.start_s + cost.steps * cost.step_s}
    return {k: v for k, v in values.items() if v is not None}
