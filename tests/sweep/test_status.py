"""`farebox status`: what it says of a storage at work, of one whose driver died, and of one that never was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.budget import Limits
from pipeline.cli import main
from pipeline.errors import ConfigError
from pipeline.results.runs import add_run
from pipeline.sweep.run_ledger import sweep_account
from pipeline.sweep.status import FILE, Heartbeat, shown, status
from pipeline.sweep.storage import alone, held
from pipeline.sweep.storage_id import new_id, write_id
from pipeline.trials.rows import failed_row, spec_columns
from tests.support.lab import Lab


def test_status_of_a_running_sweep_and_after_its_driver_died(lab: Lab) -> None:
    storage, url = lab.folder, f"sqlite:///{lab.folder / 'ledger.db'}"
    identity = new_id(storage)
    write_id(storage, identity)
    account = sweep_account(identity.id)
    lab.ledger.open_account(account, Limits(requests=900))
    done, broken, going, waiting = (lab.spec("logit_head", f"seeds=[{seed}]") for seed in (1, 2, 3, 4))
    lab.run(done)
    lab.store.write([failed_row(broken, "ValueError: no such thing", spec_columns(broken))])
    trials = (done, broken, going, waiting)
    add_run(storage, [t.trial_id for t in trials], False, print)
    starts = {0: 1.0, 2: 1.0}  # the first one's rows are there, and Tune has not said so yet
    heart = Heartbeat(storage, trials, starts, lambda: [3, None])
    heart.beat(90.0)
    with alone(storage):
        record = status(storage, url)
    assert (record["alive"], record["running"], record["waiting"], record["done"]) == (True, [going.name], 1, 1)
    assert [(f["name"], f["why"]) for f in record["failed"]] == [(broken.name, "ValueError: no such thing")]
    assert (record["replicas"], record["left_s"]) == ([3, None], 90.0)
    assert next(a for a in record["accounts"] if a["this_sweep"])["limits"]["requests"] == 900
    text = shown(record)
    for said in (
        "1 running, 1 waiting, 1 done, 1 failed",
        "on each: 3, no answer",
        "1:30 left",
        "ceiling 900 requests",
    ):
        assert said in text

    dead = status(storage, url)
    assert (dead["alive"], dead["running"], dead["waiting"], dead["left_s"]) == (False, [], 2, None)
    assert "the same `farebox run` command continues" in shown(dead)
    (storage / FILE).write_text('{"half')
    assert status(storage, url)["done"] == 1


def test_a_failed_trial_has_the_name_of_its_plan(lab: Lab) -> None:
    specs = [
        *(lab.spec("craft", f"budget.requests={n}", "hparams=paper") for n in (40, 50)),
        lab.spec("logit_head", "answers={scores: probabilities, digits: 3}"),
        lab.spec("zero_shot", "shots=1"),
    ]
    write_id(lab.folder, new_id(lab.folder))
    for spec in specs:
        lab.store.write([failed_row(spec, "no", spec_columns(spec))])
    failed = status(lab.folder, f"sqlite:///{lab.folder / 'ledger.db'}")["failed"]
    assert {f["trial"]: f["name"] for f in failed} == {spec.trial_id: spec.name for spec in specs}


def test_the_heartbeat_does_not_grow_with_the_number_of_trials(lab: Lab) -> None:
    (spec,) = lab.plan("methods=[zero_shot]").trials
    sizes = []
    for n in (1, 1000):
        Heartbeat(lab.folder, [spec] * n, {0: 1.0}, list).beat(None)
        sizes.append((lab.folder / FILE).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 5


def test_reading_the_lock_does_not_take_it(tmp_path: Path) -> None:
    assert not held(tmp_path)
    with alone(tmp_path):
        assert held(tmp_path) and held(tmp_path)
        with pytest.raises(ConfigError, match="another `farebox run`"), alone(tmp_path):
            pass
    assert not held(tmp_path)


def test_status_without_a_sweep_is_refused(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", f"storage={tmp_path / 'none'}"]) == 2
    assert "no sweep at" in capsys.readouterr().err
    write_id(lab.folder, new_id(lab.folder))
    assert main(["status", f"storage={lab.folder}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alive"] is False
