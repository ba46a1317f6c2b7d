"""The table of claims: its verdicts follow from intervals by one rule, and its figures from rows and gradients."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.blackbox.endpoint import Endpoint
from pipeline.claims import cbbt, craft, gradients, table, taskres
from pipeline.claims.claim import PAPERS, REGISTRY, Verdict, judge
from pipeline.claims.evidence import Evidence
from pipeline.claims.measured import Measured
from pipeline.cli import _parse
from pipeline.config.compose import compose
from pipeline.errors import ConfigError
from pipeline.results.row import ResultRow
from pipeline.trials.plan import make_plan
from tests.support.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
REPRODUCED, CONTRADICTED, INCONCLUSIVE, NOT_TESTABLE = Verdict


@pytest.mark.parametrize(
    ("low", "high", "bound", "verdict", "why"),
    [
        (0.1, 2.0, {"above": 0}, REPRODUCED, "the whole interval lies above 0"),
        (-0.1, 2.0, {"above": 0}, INCONCLUSIVE, "the interval contains 0"),
        (-2.0, -0.1, {"above": 0}, CONTRADICTED, "the whole interval lies on the other side of 0"),
        (0.2, 1.5, {"below": 1.62}, REPRODUCED, "the whole interval lies below 1.62"),
        (0.2, 1.7, {"below": 1.62}, INCONCLUSIVE, "the interval contains 1.62"),
        (1.7, 1.8, {"below": 1.62}, CONTRADICTED, "the whole interval lies on the other side of 1.62"),
        (
            None,
            None,
            {"above": 0},
            NOT_TESTABLE,
            "one value alone has no interval; run several seeds with the claim's methods",
        ),
    ],
)
def test_a_verdict_follows_from_the_interval(low: Any, high: Any, bound: Any, verdict: Verdict, why: str) -> None:
    found = judge(Measured(1.0, low, high), **bound)
    assert (found.verdict, found.why) == (verdict, why)


def test_figures_are_said_with_their_interval_and_unit() -> None:
    assert str(Measured.over_seeds([1.0, 2.0, 3.0])) == "+2.0 (-0.5 to +4.5) points"
    assert str(Measured.over_seeds([1.0])) == "+1.0 points"
    assert str(Measured.of_runs([80.0, 90.0, 85.0], "times")) == "85.00 (80.00 to 90.00) times"


def test_every_claim_says_what_it_is_and_by_which_command_it_is_remade() -> None:
    for claim in REGISTRY:
        assert claim.paper in PAPERS and claim.says and claim.where and claim.tested, claim.name
        for command in claim.command.split("; "):
            if command.startswith("farebox"):
                arguments = _parse(shlex.split(command)[1:])
                if command.startswith(("farebox run", "farebox plan")):
                    compose(arguments.words)
    assert {c.name for c in REGISTRY if c.where == "abstract"} == {
        *("gain", "fifteen_data_sets", "gap_to_white_box", "faster", "memory"),
        *("eleven_data_sets", "over_prompt_tuning", "over_adapter_tuning", "prior_at_one_shot"),
        *("approximation", "adapter", "both", "over_bbt"),
    }


def test_the_documented_table_has_every_claim_in_the_words_of_the_code() -> None:
    documented = (ROOT / "docs" / "claims.md").read_text()
    for claim in REGISTRY:
        assert f"| {claim.says} ({claim.where}) | {claim.tested} |" in documented, claim.name


def test_the_sweeps_hold_what_the_claims_compare() -> None:
    for module, names in (
        (
            craft,
            {"zero_shot", "bbt", "logit_head", "craft_no_kl", "craft_sequential", "craft", "craft_second_ask", "coop"},
        ),
        (taskres, {*taskres.ALPHAS.values(), *taskres.UNIT_ALPHAS.values()}),
        (taskres, {"taskres_enhanced", "taskres_image_side", "tip_adapter_f", "coop"}),
        (cbbt, {*cbbt.DIRECTIONS.values(), "cbbt", "cbbt_adapter", "bbt", "zero_shot"}),
    ):
        assert names <= set(compose([f"sweep={module.SWEEP}"]).methods)  # type: ignore[attr-defined]
    config = compose(["sweep=taskres_claims"])
    for method, names in (("taskres", taskres.ALPHAS), ("taskres_unit", taskres.UNIT_ALPHAS)):
        for alpha, name in names.items():
            choice = config.choice(name, "digits")
            assert (choice.info.name, dict(choice.config)["alpha"]) == (method, alpha)
    for q, name in cbbt.DIRECTIONS.items():
        spec = make_plan(compose(["sweep=cbbt_claims", f"methods=[{name}]", "datasets=[digits]", "seeds=[1]"])).trials[
            0
        ]
        assert spec.predicted.requests % (q + 1) == 0, "so many directions a step"


# --- evidence ------------------------------------------------------------------------------------------------------


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    return Evidence(tmp_path, (), lambda line: None)


@pytest.fixture
def rows(lab: Lab) -> Callable[..., list[ResultRow]]:
    (blank,) = lab.run(lab.spec("zero_shot"))

    def make(method: str, accuracies: dict[tuple[str, int], float], **columns: Any) -> list[ResultRow]:
        return [
            replace(blank, method=method, dataset=dataset, seed=seed, accuracy=accuracy, shots=16, **columns)
            for (dataset, seed), accuracy in accuracies.items()
        ]

    return make


def test_gains_are_paired_by_seed_and_averaged_over_the_data_sets(
    evidence: Evidence, rows: Callable[..., list[ResultRow]]
) -> None:
    evidence._rows["s"] = [
        *rows("a", {("x", 1): 50.0, ("y", 1): 70.0, ("x", 2): 55.0, ("y", 2): 75.0}),
        *rows("b", {("x", 1): 40.0, ("y", 1): 60.0, ("x", 2): 41.0, ("y", 2): 63.0}),
        *rows("a", {("x", 1): 99.0}, kind="shift"),
    ]
    assert evidence.gains("s", "a", "b") == [10.0, 13.0]
    assert evidence.by_seed("s", "a", kind="shift") == {1: 99.0}
    assert evidence.gains("s", "a", "b", shots=1) == []


def test_a_measurement_is_kept_until_its_methods_code_changes(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def take() -> int:
        taken.append(1)
        return len(taken)

    assert [evidence.measure("m", ["craft"], take) for _ in range(2)] == [1, 1]
    monkeypatch.setattr("pipeline.claims.evidence.method_digest", lambda info: "other code")
    assert evidence.measure("m", ["craft"], take) == 2
    assert Evidence(evidence.storage, ["seeds=[1]"], lambda line: None).measure("m", ["craft"], take) == 3
    (evidence.storage / "measured" / "m.json").write_text("{")
    assert evidence.measure("m", ["craft"], take) == 4, "a damaged file is as good as none"


def test_the_leak_is_what_the_best_point_of_the_curve_has_over_the_result(rows: Callable[..., list[ResultRow]]) -> None:
    (row,) = rows("a", {("x", 1): 50.0}, curve=json.dumps([[1, 1, 48.0], [2, 2, 53.5], [3, 3, 50.0]]))
    assert cbbt.leak(row) == 3.5
    assert cbbt.leak(replace(row, accuracy=60.0)) == 0
    assert cbbt.leak(replace(row, curve="[]")) is None


def test_of_a_paper_that_does_not_exist_nothing_is_run(evidence: Evidence) -> None:
    with pytest.raises(ConfigError, match="did you mean 'craft'"):
        table.find(["crfat"], evidence)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(lab: Lab, fake: Endpoint) -> gradients.Start:
    return gradients.Start(lab.spec("cbbt_prompt"), fake)


def test_the_true_gradient_is_that_of_finite_differences(start: gradients.Start) -> None:
    h, axes = 1e-2, torch.eye(start.d)
    slopes = (start.losses(h * axes) - start.losses(-h * axes)) / (2 * h)
    torch.testing.assert_close(start.gradient(), slopes, rtol=2e-2, atol=2e-3)


def test_more_directions_come_nearer_to_the_true_gradient(start: gradients.Start) -> None:
    generator, true_E = torch.Generator().manual_seed(0), start.gradient()
    cosines = [
        torch.nn.functional.cosine_similarity(start.estimates(q, 1e-2, 20, generator), true_E[None]).mean()
        for q in (1, 4, 16, 256)
    ]
    assert cosines == sorted(cosines) and cosines[-1] > 0.9


def test_cosines_are_given_for_each_seed(card: Path) -> None:
    found = gradients.cosines(["model=fake", f"datasets=[{card}]", "shots=[2]", "seeds=[1,2]"])
    assert found["d"] == 8
    assert list(found["by_directions"]) == ["1", "4", "16", "64", "256"]
    for axis in ("by_directions", "by_step"):
        for values in found[axis].values():
            assert len(values) == 2 and np.abs(values).max() <= 1 + 1e-6
