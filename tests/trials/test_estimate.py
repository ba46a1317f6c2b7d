"""A sweep's outline: exact where its data is here; without it priced from the cards, and what lacks is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.blackbox import architecture, facts
from pipeline.cli import main
from pipeline.config.compose import compose
from pipeline.errors import BudgetExceeded, DataError
from pipeline.trials.estimate import TrialEstimate, estimate
from pipeline.trials.plan import refuse_unpayable
from tests.support.lab import Lab

PAPERS = ("coop", "craft_paper", "taskres_paper", "cbbt_paper", "peers_paper", "paper")


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data, no weights in any cache, and a shut door to the network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan fetches nothing")

    monkeypatch.delenv("FAREBOX_DATA", raising=False)
    monkeypatch.setattr(architecture, "cached_file", lambda settings: None)
    monkeypatch.setattr(architecture, "fetched_file", refuse)
    monkeypatch.setattr(facts, "load_network", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize("sweep", PAPERS)
def test_the_sweep_of_a_paper_is_priced_without_its_data(sweep: str) -> None:
    config = compose([f"sweep={sweep}"])
    made = estimate(config)
    cells = len(config.methods) * len(config.datasets) * len(config.shots) * len(config.seeds) * len(config.allotments)
    assert len(made.trials) == cells and not made.exact and not made.unable
    assert {a.name for a in made.missing if a.kind == "data set"} >= {card.name for card in config.datasets}
    assert all(a.published.startswith("https://") for a in made.missing)
    (weights,) = (a for a in made.missing if a.kind == "weights")
    assert (weights.name, weights.fetched) == ("rn50", True)
    for trial in made.trials:
        for unit in ("requests", "images"):
            limit = getattr(trial.cell.allotment, unit)
            assert limit is None or getattr(trial.bill, unit) <= limit


def test_crafts_own_number_of_candidates_at_each_number_of_shots() -> None:
    made = estimate(compose(["sweep=craft_paper", "datasets=[dtd]", "seeds=1"]))
    asked = {(t.cell.choice.name, t.cell.shots): t.bill.requests for t in made.trials}
    for shots, candidates in {1: 2000, 2: 4000, 4: 4000, 8: 8000, 16: 8000}.items():
        assert asked["bbt", shots] == candidates
        assert asked["craft", shots] == candidates // 40 * 41, "the refiner's request of each generation is billed"


def test_peers_ask_what_their_releases_do_at_sixteen_shots_of_eurosat() -> None:
    made = estimate(compose(["sweep=peers_paper", "datasets=[eurosat]", "shots=16", "seeds=1"]))
    asked = {t.cell.choice.name: (t.bill.requests, t.bill.images) for t in made.trials}
    n, m = 160, 40
    assert asked["clap"] == asked["zs_lp"] == (2, 20 * n)
    assert asked["gda"] == asked["tip_adapter"] == (3, 10 * n + m)
    assert asked["sim"] == (1, n)
    assert asked["zip"] == (5_000, 5_000 * 128)
    assert asked["sharpzo_released"] == (506_200, 506_200 * n)


def test_a_wrong_local_model_is_refused_without_the_data(tmp_path: Path) -> None:
    card = tmp_path / "mine.yaml"
    card.write_text(f"arch: tiny_conv\nweights: {tmp_path}/no\nsha256: {'0' * 64}\nlicence: '-'\ntrained_on: '-'\n")
    words = ["sweep=peers_paper", "methods=[ares,local_probe]", "shots=16", "model=vit_b16"]
    assert [name for name, _ in estimate(compose([*words, "methods=[ares,sim]"])).unable] == ["ares"]
    with pytest.raises(DataError, match="there is no weights file"):
        estimate(compose([*words, f"local={card}"]))
    made = estimate(compose([*words, "local=tiny_local"]))
    assert {t.bill.requests for t in made.trials if t.cell.choice.name == "local_probe"} == {0}
    assert any("SimCLR" in note for note in made.notes)


def test_the_estimate_with_all_data_present_equals_the_plan(lab: Lab) -> None:
    words = ["methods=[taskres,craft]", "shots=[1,4]", "seeds=[1,2]"]
    made, plan = estimate(compose([*lab.words, *words])), lab.plan(*words)
    assert made.exact and made.missing == ()
    assert made.trials == tuple(map(TrialEstimate.of, plan.trials)) and made.total == plan.total
    assert all(t.trial_id for t in made.trials)


def test_a_missing_test_set_is_named_with_the_key_that_leaves_it_out(lab: Lab, tmp_path: Path) -> None:
    card = tmp_path / "elsewhere.yaml"
    card.write_text(
        lab.card.read_text().replace("small.parquet", "gone.parquet") + "name: elsewhere\nshift_of: small\n"
    )
    made = estimate(compose([*lab.words, f"eval_shift=[{card}]", "methods=[taskres]"]))
    (absent,) = made.missing
    assert absent.name == "elsewhere" and "gone.parquet (or leave it out: eval_shift=false)" in absent.what
    (trial,) = made.trials
    assert (trial.trial_id, trial.test_sets) == (None, ("small", "elsewhere"))
    assert trial.bill == lab.spec("taskres").predicted


def test_base_to_new_is_priced_by_its_base_classes(lab: Lab) -> None:
    made = estimate(
        compose(["sweep=coop", "protocol=base_to_new", "methods=[bbt]", "datasets=[oxford_pets]", "shots=16"])
    )
    trial = made.trials[0]
    assert trial.test_sets == ("oxford_pets:base", "oxford_pets:new")
    assert trial.bill.images == trial.bill.requests * 19 * 16, "37 classes: 19 are base"


def test_a_whole_val_split_that_would_be_the_test_split_is_refused_without_data() -> None:
    with pytest.raises(DataError, match="'imagenet' has no val split: type validation=min4"):
        estimate(compose(["sweep=coop", "validation=full"]))


def test_ceilings_are_checked_without_data() -> None:
    made = estimate(compose(["sweep=craft_paper", "budget.sweep.requests=1000"]))
    with pytest.raises(BudgetExceeded):
        refuse_unpayable(made.config, made.total)


def test_plan_lists_missing_assets_and_run_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["sweep=taskres_paper", "datasets=[dtd,eurosat]", "shots=16"]
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert (
        "missing: data set dtd: no data.root=DIR is set, DIR holding dtd/; published at https://www.robots" in printed
    )
    assert "estimated from the cards" in printed and "taskres hparams=paper    eurosat" in printed
    assert main(["plan", *words, "--json"]) == 0
    said = capsys.readouterr()
    records = json.loads(said.out)
    assert len(records) == 2 * 2 * 3 and {r["trial_id"] for r in records} == {None}
    assert "missing: weights rn50" in said.err
    assert main(["run", *words, f"storage={tmp_path / 'none'}"]) == 2
    error = capsys.readouterr().err
    assert (
        "2 data sets or weights of this sweep are not on this machine (dtd, eurosat)" in error
        and error.count("\n") == 1
    )
    assert not (tmp_path / "none").exists()


def test_weights_are_looked_for_where_open_clip_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert not architecture.cached_file({"url": "https://example.org/a/RN50.pt"})
    (tmp_path / ".cache/clip").mkdir(parents=True)
    (tmp_path / ".cache/clip/RN50.pt").touch()
    assert architecture.cached_file({"url": "https://example.org/a/RN50.pt"})
