"""Claims of TaskRes (arXiv:2211.10277)."""

from __future__ import annotations

import json
from collections import defaultdict

from pipeline.claims.claim import Finding, claim, judge, not_testable
from pipeline.claims.evidence import Evidence
from pipeline.claims.measured import Measured, each
from pipeline.results.row import ResultRow

SWEEP = "taskres_claims"
COMMAND = f"farebox run sweep={SWEEP}"
ALPHAS = {
    0.0: "taskres_a0",
    0.1: "taskres_a01",
    0.3: "taskres_a03",
    0.5: "taskres",
    0.7: "taskres_a07",
    1.0: "taskres_a1",
}
"""Methods by alpha, on text features at the length of the tower's output, as the paper's release has them."""
UNIT_ALPHAS = {
    0.1: "taskres_unit_a01",
    0.3: "taskres_unit_a03",
    0.5: "taskres_unit",
    0.7: "taskres_unit_a07",
    1.0: "taskres_unit_a1",
}
"""Methods by alpha, on text features of unit length."""


def _over(e: Evidence, reference: str, method: str = "taskres", shots: int = 16, kind: str = "source") -> Measured:
    return e.gain(SWEEP, method, reference, shots=shots, kind=kind)


def _unit(e: Evidence, reference: str, shots: int = 16, kind: str = "source") -> str:
    return f"on unit-length text {_over(e, reference, 'taskres_unit', shots, kind)}"


@claim("taskres", "abstract", "the sweep of the paper's own grid", "farebox plan sweep=taskres_paper")
def eleven_data_sets(e: Evidence) -> Finding:
    """Clearly better than earlier tuning methods on 11 data sets."""
    return not_testable(e.lacking("taskres_paper"))


@claim("taskres", "abstract", "taskres over coop above 0, 16 shots", COMMAND)
def over_prompt_tuning(e: Evidence) -> Finding:
    """Better than prompt tuning (CoOp)."""
    one = _over(e, "coop", shots=1)
    measured = _over(e, "coop")
    return judge(measured, above=0, ours=f"{measured}; at 1 shot {one}; {_unit(e, 'coop')}")


@claim("taskres", "abstract", "taskres over tip_adapter_f above 0, 16 shots", COMMAND)
def over_adapter_tuning(e: Evidence) -> Finding:
    """Better than adapter tuning (Tip-Adapter-F)."""
    one = _over(e, "tip_adapter_f", shots=1)
    measured = _over(e, "tip_adapter_f")
    return judge(measured, above=0, ours=f"{measured}; at 1 shot {one}; {_unit(e, 'tip_adapter_f')}")


@claim(
    "taskres",
    "abstract",
    "taskres over zero_shot above 0 at 1 shot, where little can be learned and much forgotten",
    COMMAND,
)
def prior_at_one_shot(e: Evidence) -> Finding:
    """Keeps prior knowledge: a residual beside it, not in its place."""
    measured, probe = _over(e, "zero_shot", shots=1), _over(e, "zero_shot", "linear_probe", shots=1)
    unit = _unit(e, "zero_shot", shots=1)
    return judge(measured, above=0, ours=f"{measured}; {unit}; linear_probe, which keeps none, {probe}")


@claim("taskres", "experiments", "taskres over zero_shot above 0 on the shift sets, 16 shots", COMMAND)
def shift(e: Evidence) -> Finding:
    """Generalises under a shift of domain."""
    measured, coop = _over(e, "zero_shot", kind="shift"), _over(e, "zero_shot", "coop", kind="shift")
    return judge(measured, above=0, ours=f"{measured}; {_unit(e, 'zero_shot', kind='shift')}; coop {coop}")


@claim("taskres", "ablation", "alpha 0.5 over the better of 0.1 and 1.0 above -1 point, 16 shots", COMMAND)
def alpha(e: Evidence) -> Finding:
    """The scale alpha = 0.5 is a good default."""
    rivals = [e.by_seed(SWEEP, ALPHAS[a]) for a in (0.1, 1.0)]
    ours = e.by_seed(SWEEP, "taskres")
    measured = Measured.over_seeds([ours[s] - max(r[s] for r in rivals) for s in ours])
    curve, unit = (
        each({f"{a:g}": e.mean(SWEEP, name).value for a, name in names.items()}) for names in (ALPHAS, UNIT_ALPHAS)
    )
    return judge(measured, above=-1, ours=f"{measured}; {curve}; on unit-length text {unit}")


@claim("taskres", "experiments", "taskres_enhanced over taskres above 0, 16 shots", COMMAND)
def enhanced_base(e: Evidence) -> Finding:
    """An enhanced base raises it further."""
    measured, one = _over(e, "taskres", "taskres_enhanced"), _over(e, "taskres", "taskres_enhanced", shots=1)
    return judge(measured, above=0, ours=f"{measured}; at 1 shot {one}")


@claim("taskres", "ablation", "taskres over taskres_image_side above 0, 16 shots", COMMAND)
def text_against_image(e: Evidence) -> Finding:
    """A residual on the text side is better than one on the image side."""
    measured = _over(e, "taskres_image_side")
    return judge(measured, above=0, ours=f"{measured}; {_unit(e, 'taskres_image_side')}, as the image features")


@claim(
    "taskres",
    "analysis",
    "angle between tuned and zero-shot classifier on the set where zero-shot is worst, less that where it is best: "
    "above 0, 16 shots",
    COMMAND,
)
def distance(e: Evidence) -> Finding:
    """The harder a data set is for zero-shot, the larger its residual."""
    angles: dict[int, dict[str, float]] = defaultdict(dict)
    accuracy: dict[str, list[float]] = defaultdict(list)
    for row in e.rows(SWEEP):
        if row.shots == 16 and row.kind == "source":
            if row.method == "taskres":
                angles[row.seed][row.dataset] = turned(row)
            if row.method == "zero_shot" and row.accuracy is not None:
                accuracy[row.dataset].append(row.accuracy)
    order = sorted(accuracy, key=lambda name: sum(accuracy[name]) / len(accuracy[name]))
    measured = Measured.over_seeds([by_set[order[0]] - by_set[order[-1]] for by_set in angles.values()], "degrees")
    means = {name: sum(by_set[name] for by_set in angles.values()) / len(angles) for name in order}
    return judge(
        measured, above=0, ours=f"{measured}; hardest first: " + ", ".join(f"{n} {m:.1f}" for n, m in means.items())
    )


def turned(row: ResultRow) -> float:
    """Return the angle in degrees between the tuned and the zero-shot classifier of a row."""
    return float(json.loads(row.notes)["classifier_rotation_deg"])
