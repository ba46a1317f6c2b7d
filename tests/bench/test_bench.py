"""Benchmarks: the two sides compute the same values, and the command finds and prints the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from methods._views import epoch_view, training_views
from methods.craft import CraFT
from pipeline.bench import cost, craft, features, harness, peer_loops, peers, reference
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.cli import main
from pipeline.config.card_files import model_card
from pipeline.data.images import Images
from pipeline.errors import ConfigError
from pipeline.trials.trial import few_shot_task
from tests.support import lab as lab_module
from tests.support.lab import Lab, stored_rows


@pytest.mark.parametrize("shots", [1, 4])
def test_a_craft_trial_has_the_fitness_of_the_papers_loop(tmp_path: Path, shots: int) -> None:
    sides, task = craft.Sides(model_card("tiny"), tmp_path), craft.task(shots, first=3)
    found = sides.trial(task, seed=5)
    loop, c = sides.loop(task, seed=5), CraFT.Config()
    loop.start()
    for generation, fitness_P in enumerate(found):
        view = epoch_view(task, generation)
        assert isinstance(view, Images)
        in_force = generation + 1 <= craft.GENERATIONS * c.kl_fraction
        wanted = loop.generation(view, c.kl_weight if in_force else 0.0)
        assert len(fitness_P) == 40 and fitness_P.std() > 1e-3, "a fitness that tells candidates apart"
        torch.testing.assert_close(fitness_P, wanted, rtol=0, atol=1e-4)
    assert len(found) == craft.GENERATIONS
    sides.ledger.close()


def test_a_second_sweep_on_the_same_images_encodes_none(
    tmp_path: Path, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(name: str) -> int:
        monkeypatch.setattr(lab_module, "STORAGE", name)  # as another storage has another id
        lab = Lab(tmp_path / name, Endpoint(model_card("fake"), tmp_path / "features"), card)
        assert isinstance(lab.pool, LocalPool)
        rows = [row for method in ("linear_probe", "craft") for row in lab.run(lab.spec(method, "seeds=3"))]
        lab.ledger.close()
        assert [row.status for row in rows] == ["done"] * 2 and all(row.n_test == 60 for row in rows)
        return sum(row.computed_images for row in rows)

    assert sweep("first") == stored_rows(tmp_path / "features") > 60
    assert sweep("second") == 0


@pytest.mark.parametrize("method", peer_loops.LOOPS)
def test_a_loop_of_released_code_learns_the_task_of_a_trial(
    tmp_path: Path, tiny: Endpoint, card: Path, method: str
) -> None:
    lab = Lab(tmp_path / "lab", tiny, card)
    words = ("model=tiny", "shots=1", "budget.requests=40", "views=2")
    (ours,) = lab.run(lab.spec(method, *words))
    theirs = peer_loops.LOOPS[method](model_card("tiny"), lab.spec(method, *words))
    assert ours.accuracy is not None and abs(theirs - ours.accuracy) < 12  # 7 of 60 test images; other views
    assert theirs > 100 / 5
    lab.ledger.close()


def test_crafts_loop_scores_candidates_on_the_view_that_the_method_uses(
    tmp_path: Path, tiny: Endpoint, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        """The loop has its images; it is not run further."""

    def start(loop: reference.CraftLoop) -> None:
        raise Started(loop.fixed_view)

    monkeypatch.setattr(reference.CraftLoop, "start", start)
    lab = Lab(tmp_path / "lab", tiny, card)
    spec = lab.spec("craft", "model=tiny", "shots=1", "budget.requests=40", "views=2")
    with pytest.raises(Started) as started:
        peer_loops.craft(model_card("tiny"), spec)
    wanted = training_views(few_shot_task(spec), 1)
    assert isinstance(wanted, Images) and started.value.args[0].keys == wanted.keys
    lab.ledger.close()


def test_the_seeds_of_a_trial_share_what_the_first_one_encodes() -> None:
    measured = {"loop": [(10.0, 50.0)], "cold": [(2.0, 51.0)], "warm": [(0.5, 51.0)]}
    assert peers.five_seeds(measured) == [(50, 4)]
    found = peers.summary(measured)
    assert [found[name].split()[0] for name in ("cold", "warm", "five seeds")] == ["5.0x", "20.0x", "12.5x"]
    assert (found["loop, %"], found["warm, s"]) == (50, 0.5)


# --- the command ---------------------------------------------------------------------------------------------------


def test_every_benchmark_is_found_and_registered_and_has_a_docstring() -> None:
    found = harness.names()
    assert {"cost", "craft", "features", "text_tower", "trials"} <= set(found)
    for name in found:
        assert harness.load(name) is harness.REGISTRY[name]
        assert harness.load(name).__doc__, name
    assert set(found) == set(harness.REGISTRY)
    assert set(found) >= harness.ON_REQUEST


def test_a_benchmark_prints_one_json_object_with_its_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = features.digits()[:96]
    monkeypatch.setattr(features, "digits", lambda: few)
    monkeypatch.setattr(features, "PROCESSES", (2,))
    monkeypatch.setattr(features, "PAIRS", 2)
    assert main(["bench", "--json", "features"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["name", "ratio", "low", "high", "pairs", "detail"]
    assert record["name"] == "features" and record["pairs"] == features.PAIRS
    assert 1 < record["low"] <= record["ratio"] <= record["high"]
    detail = record["detail"]
    assert (detail["images"], detail["encoded cold"], detail["encoded warm"]) == (96, 96, 0)
    assert detail["2 processes"]["encoded"] == 96 and detail["2 processes"]["s"] > 0


def test_the_cost_of_a_trial_is_measured_in_separate_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "RUNS", 1)
    assert main(["bench", "cost", "zero_shot", "model=fake", "shots=1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["name", "value", "unit", "low", "high", "pairs", "detail"]
    assert record["unit"] == "s/trial" and 0 < record["low"] <= record["value"] <= record["high"]
    detail = record["detail"]
    assert 0 <= detail["client's memory, MiB"] < 4096 and 0 <= detail["endpoint's memory, MiB"] < 4096
    assert detail["requests"] == 0 and detail["accuracy"] > 0


def test_the_cost_of_single_steps_is_measured_with_random_weights() -> None:
    result = cost.measure(cost.CostSpec("coop", ("shots=1", "views=1"), steps=2, arch="ViT-S-32-alt"))
    assert result.steps == 2 and result.accuracy is None and result.requests == 1 + 2 * 2
    assert result.endpoint_mib > 164, "the weights alone"
    assert result.client_mib < 200, "the client holds no model"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["text_towr"], "no benchmark named 'text_towr'; did you mean 'text_tower'"),
        (["harness"], "no benchmark named 'harness'"),
        (["features", "model=fake"], "bench features: got 'model=fake', expected no arguments"),
        (["cost"], "bench cost: got 'nothing', expected METHOD [overrides ...]"),
        (["cost", "model=fake"], "got 'model=fake', expected a method first"),
        (["cost", "craft", "steps=none"], "got steps=none, expected a whole number of 1 or more"),
        (["cost", "craft", "arch=ViT-B-33"], "no architecture 'ViT-B-33'"),
        (["cost", "crfat"], "did you mean 'craft'"),
        (["cost", "craft", "shots=[1,2]"], "2 trials, expected one"),
        (["cost", "craft", "method.craft.popsiz=3"], "did you mean 'popsize'"),
    ],
)
def test_wrong_arguments_are_rejected_in_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and line in err


def test_parts_of_the_baseline_are_multiplied_by_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = {"whole": 1.0, "part": 2.0, "fast": 4.0}
    monkeypatch.setattr(harness, "_seconds", lambda run: ticks[run()])
    found = harness.paired(lambda: "whole", lambda: "fast", 4, times=6, parts=[(lambda: "part", 5)])
    assert (found.slow_s, found.fast_s, found.ratio, found.pairs) == (16, 4, 4, 4)


def test_a_result_has_either_a_ratio_or_a_value() -> None:
    with pytest.raises(ValueError, match="either a ratio or a value"):
        harness.BenchResult("x", 1, 2, 5, {})
    with pytest.raises(ConfigError):
        harness.load("reference")
