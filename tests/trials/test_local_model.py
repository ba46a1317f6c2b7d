"""Trials with a local model: what they record, what the handle allows, and that no checkpoint holds its weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.base import Access, Bill, BlackBox, Classes, FewShotTask, ImageSet, Method, Plan, Remaining, TaskShape
from pipeline.blackbox.client import MeteredBox
from pipeline.config.card_files import local_card
from pipeline.errors import AccessDenied
from pipeline.files import sealed_arrow, write_atomic
from pipeline.local.encoder import describe, open_encoder
from pipeline.results.row import to_table
from pipeline.results.store import ResultStore
from pipeline.trials.boundary import Session
from pipeline.trials.fit import State
from pipeline.trials.local_handle import LocalHandle, opened
from pipeline.trials.trial import few_shot_task
from tests.support.lab import Lab, outcome, spec_of

LOCAL = "local=tiny_local"


def test_a_method_that_needs_a_local_model_is_not_run_without_one(lab: Lab) -> None:
    plan = lab.plan("methods=[zero_shot,local_probe,ares]", "local=null")
    assert [name for name, _ in plan.unable] == ["local_probe", "ares"]
    assert all("local=tiny_local" in reason for _, reason in plan.unable)
    plan = lab.plan("methods=[zero_shot,local_probe,ares]", LOCAL)
    assert not plan.unable and any("tiny_conv" in note and "SimCLR" in note for note in plan.notes)


def test_only_the_trials_of_such_methods_have_the_model_in_their_id(lab: Lab, tmp_path: Path) -> None:
    assert lab.spec("taskres", LOCAL).trial_id == lab.spec("taskres", "local=null").trial_id
    assert lab.spec("taskres", LOCAL).local is None
    mine = lab.spec("ares", LOCAL)
    assert mine.local == describe(local_card("tiny_local"))
    text = Path(local_card("tiny_local").file).read_bytes()
    (tmp_path / "other.safetensors").write_bytes(text)
    card = replace(mine.local.card, name="other", weights=str(tmp_path / "other.safetensors"))
    assert describe(card).digest == mine.local.digest, "neither the name nor the path of the same weights counts"


def test_rows_name_the_local_model(lab: Lab) -> None:
    (probe,), (ares,), (other,) = (lab.run(lab.spec(n, LOCAL)) for n in ("local_probe", "ares", "zero_shot"))
    facts = describe(local_card("tiny_local"))
    for row in (probe, ares):
        assert (row.status, row.error) == ("done", None)
        assert (row.local_model, row.local_digest, row.local_params) == ("tiny_local", facts.digest, facts.params)
    assert (other.local_model, other.local_digest, other.local_params) == ("", "", None)
    assert (probe.requests, probe.evaluate_requests, probe.validate_requests) == (0, 0, 0)
    assert (ares.requests, ares.images, ares.evaluate_requests) == (1, 20, 0)


def test_rows_of_an_older_version_are_read(lab: Lab) -> None:
    lab.run(lab.spec("zero_shot"))
    (path,) = (lab.folder / "results").glob("*.arrow")
    (row,) = lab.store.rows_of(path.stem)
    write_atomic(
        path, sealed_arrow(to_table([row]).drop_columns(["local_model", "local_digest", "local_params", "answers"]))
    )
    store = ResultStore(lab.folder)
    assert store.rows_of(path.stem) == [row] and not store.damaged
    write_atomic(path, sealed_arrow(to_table([row]).drop_columns(["access"])))
    assert store.rows_of(path.stem) == [] and "access" in store.damaged[path].reason


@pytest.mark.parametrize("name", ["local_probe", "ares"])
def test_a_trial_killed_between_two_steps_continues_to_the_same_row(
    lab: Lab, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (LOCAL, "method.ares.epochs=6") if name == "ares" else (LOCAL,)
    spec = lab.spec(name, *words)
    (expected,) = lab.run(spec)
    other = Lab(tmp_path / "other", lab.pool.endpoint, lab.card)  # type: ignore[arg-type]
    calls = 0

    def killed(self: Method, box: BlackBox) -> bool:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return step(self, box)

    step = spec.choice.info.cls.step
    if name == "ares":
        monkeypatch.setattr(spec.choice.info.cls, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            other.run(spec, checkpoint_s=0.0)
        monkeypatch.setattr(spec.choice.info.cls, "step", step)
        (file,) = (other.folder / "checkpoints").glob(f"{spec.account}.ckpt")
        weights = open_encoder(local_card("tiny_local")).net.state_dict()
        assert max(w.numpy().tobytes() for w in weights.values() if w.numel() > 1000) not in file.read_bytes()
        assert file.stat().st_size < local_card("tiny_local").file.stat().st_size
    (row,) = other.run(spec, checkpoint_s=0.0)
    assert outcome(row) == outcome(expected)


# --- the handle ----------------------------------------------------------------------------------------------------


@pytest.fixture
def handle(lab: Lab) -> Iterator[tuple[Session, LocalHandle, FewShotTask]]:
    spec = lab.spec("ares", LOCAL)
    box = MeteredBox(lab.pool, "lab", spec.account, spec.choice.info.access, spec.allotment)
    with Session(box, "ares") as session, opened(session, spec.local) as local:
        assert local is not None
        yield session, local, session.task(few_shot_task(spec))


def test_a_pickle_of_the_handle_is_its_trial_alone_and_works_again(
    handle: tuple[Session, LocalHandle, FewShotTask],
) -> None:
    _, local, task = handle
    data = pickle.dumps(local)
    assert len(data) < 300
    for again in (pickle.loads(data), copy.deepcopy(local)):
        assert torch.equal(again.features(task.train.images), local.features(task.train.images))
    assert (local.size, local.feature_dim) == (64, 192)
    with pytest.raises(AttributeError):
        local.size = 3  # type: ignore[misc]


def test_the_handle_reads_only_what_the_trial_allows(
    handle: tuple[Session, LocalHandle, FewShotTask], lab: Lab
) -> None:
    session, local, task = handle
    with pytest.raises(TypeError, match="expected the task's images"):
        local.features(few_shot_task(lab.spec("zero_shot")).train.images)
    from pipeline.budget import Phase

    with session.predicting(Phase.EVALUATE, 1), pytest.raises(AccessDenied, match="predict may ask about"):
        local.pixels(task.train.images, 8)


def test_a_handle_outside_of_its_trial_is_refused(lab: Lab) -> None:
    with pytest.raises(AccessDenied, match="outside of its trial"):
        LocalHandle("another").features(few_shot_task(lab.spec("zero_shot")).train.images)


class Peeking(Method):
    """Reads the local model without declaring it."""

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill())

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        assert task.local is None
        self.classes = task.classes

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, self.classes.prompts())[0]


def test_a_method_that_does_not_declare_it_is_given_no_local_model(lab: Lab) -> None:
    (row,) = lab.run(spec_of(lab, Peeking, LOCAL, access=Access.TEXT | Access.SCORES))
    assert row.status == "done"


def test_the_state_of_a_trial_pickles_while_the_model_is_open(
    handle: tuple[Session, LocalHandle, FewShotTask],
) -> None:
    _, local, _ = handle
    method = Peeking()
    method.local = local  # type: ignore[attr-defined]
    assert len(pickle.dumps(State(method, None))) < 5_000  # type: ignore[arg-type]
