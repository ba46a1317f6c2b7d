"""A trial: scored rightly, killed anywhere and continued to the same row for the same bill, never silently wrong."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Plan,
    Remaining,
    TaskShape,
)
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.request import Request, Response
from pipeline.budget import Phase
from pipeline.config.compose import model_card
from pipeline.data.images import Images
from pipeline.errors import MethodError
from pipeline.ledger.ledger import Ledger
from pipeline.results.store import ResultStore
from pipeline.trials import evaluate as scoring
from pipeline.trials import trial as trials
from pipeline.trials.boundary import Session, _session
from pipeline.trials.checkpoint import Checkpoint, stored_checkpoints
from pipeline.trials.evaluate import metrics
from pipeline.trials.plan import TrialSpec
from pipeline.trials.rows import spec_columns, write_failure
from pipeline.trials.supervisor import Supervisor
from pipeline.trials.trial import State, few_shot_task, run_trial
from tests.support.lab import STORAGE, Lab, outcome, plain_bill, spec_of

# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_those_worked_out_by_hand() -> None:
    half, sure = math.log(0.5), math.log(0.9)
    rest, tenth = math.log(0.25), math.log(0.05)
    logits = torch.tensor([[half, rest, rest], [tenth, sure, tenth], [half, rest, rest], [half, rest, rest]])
    labels = torch.tensor([0, 1, 0, 1])  # right, right, right, wrong; no image of the third class
    found = metrics(logits + torch.tensor([[3.0], [0.0], [-7.0], [1.0]]), labels)  # a shift of a row changes nothing
    assert found["accuracy"] == pytest.approx(75)
    assert found["macro_accuracy"] == pytest.approx(100 * (2 / 2 + 1 / 2) / 2)
    assert found["nll"] == pytest.approx(-(half + sure + half + rest) / 4, rel=1e-6)
    # bin of 0.5: three images, two right; bin of 0.9: one image, right
    assert found["ece"] == pytest.approx(100 * (3 / 4 * abs(2 / 3 - 0.5) + 1 / 4 * abs(1 - 0.9)), rel=1e-5)


def test_ece_has_fifteen_bins_and_takes_a_confidence_of_one() -> None:
    logits = torch.tensor([[100.0, -100.0], [100.0, -100.0], [0.0, 0.0]])
    found = metrics(logits, torch.tensor([0, 1, 1]))
    assert found["ece"] == pytest.approx(100 * (2 / 3 * abs(0.5 - 1.0) + 1 / 3 * abs(0 - 0.5)))
    assert found["accuracy"] == pytest.approx(100 / 3)


# --- what a method is given ----------------------------------------------------------------------------------------


def test_the_task_holds_the_drawn_images_and_none_of_the_test_set(lab: Lab) -> None:
    spec = lab.spec("taskres")
    task = few_shot_task(spec)
    assert isinstance(task.train.images, Images) and isinstance(task.val.images, Images)
    assert tuple(task.train.images.rows) == spec.split.train and tuple(task.val.images.rows) == spec.split.val
    test = Images.plain(task.train.images.source, "test", task.train.images.source.rows_of("test"), "crop")
    assert not {*task.train.images.keys, *task.val.images.keys} & set(test.keys)
    assert torch.bincount(task.train.labels).tolist() == [4] * 5
    assert task.classes.template == "an icon of a {}." and len(task.classes) == 5


class Probe(Method):
    """A method of this test: it keeps what happens to it, scores once in `start`, and predicts zero-shot."""

    asks = 1
    """Calls that each step makes."""
    steps = 3
    promised = 4
    """Calls that `plan` predicts."""

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        self.task, self.done, self.seen = task, 0, 0
        box.scores(task.train.images, task.classes.prompts())

    def step(self, box: BlackBox) -> bool:
        for _ in range(self.asks):
            box.scores(self.task.train.images, self.task.classes.prompts())
        self.done += 1
        return self.done < self.steps

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        self.seen += len(images)
        return box.scores(images, self.task.classes.prompts())[0]

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill.scores(1, shape.n_train, shape.n_classes) * self.promised)


class Greedy(Probe):
    """It asks for more than the bill that its plan predicts."""

    promised = 3


class GreedyAtOnce(Probe):
    """It asks for more before its first step."""

    promised = 2

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        for _ in range(4):
            super().start(task, box, rng, plan)


class Hides(Greedy):
    """It catches the refusal and goes on."""

    def step(self, box: BlackBox) -> bool:
        try:
            return super().step(box)
        except Exception:
            return False


class Intruder(Probe):
    """It asks what it did not declare, in its second step."""

    def step(self, box: BlackBox) -> bool:
        if self.done == 1:
            box.image_features(self.task.train.images)
        return super().step(box)


class Buggy(Probe):
    """It has a bug in its second step."""

    def step(self, box: BlackBox) -> bool:
        if self.done == 1:
            raise RuntimeError("a bug")
        return super().step(box)


ONE = Bill.scores(1, 20, 5)


def test_predictions_are_made_by_a_copy_on_shuffled_batches_and_kept_in_file_order(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TEST_BATCH", 25)
    batches, copies = list[Images](), list[Any]()
    batch, copy = Session.batch, Supervisor.copy
    monkeypatch.setattr(Session, "batch", lambda self, images: (batches.append(images), batch(self, images))[1])
    monkeypatch.setattr(Supervisor, "copy", lambda self, method: (copies.append(copy(self, method)), copies[-1])[1])
    spec = spec_of(lab, Probe, "curve=1")
    (row,) = lab.run(spec)
    assert [len(images) for images in batches] == [25, 25, 10] * 2
    assert [subject.seen for subject in copies] == [60, 60], "each time a new copy"
    asked = [key for images in batches[3:] for key in images.keys]
    kept = lab.store.read_predictions(row.trial_id, "small", row.predictions_digest)
    assert sorted(asked) == sorted(kept.image_keys) and asked != kept.image_keys
    source = batches[0].source
    in_order = Images.plain(source, "test", source.rows_of("test"), "crop")
    assert kept.image_keys == in_order.keys and kept.labels.tolist() == source.labels[in_order.rows].tolist()
    request = Request(
        "scores", in_order, few_shot_task(spec).classes.prompts(), lab.ledger.charges(STORAGE, spec.account)[0].charge
    )
    np.testing.assert_allclose(kept.logits_BC, lab.pool.endpoint.compute(request).values[0], rtol=1e-4, atol=1e-4)
    assert row.accuracy == pytest.approx(100 * float((kept.logits_BC.argmax(1) == kept.labels).mean()))
    assert (row.evaluate_requests, row.evaluate_images) == (3, 60)


def test_a_row_has_the_bill_the_labels_and_the_size_of_the_method(lab: Lab) -> None:
    (row,) = lab.run(spec_of(lab, Probe))
    assert (row.status, row.test_set, row.n_test, row.n_classes) == ("done", "small", 60, 5)
    assert plain_bill(row) == ONE * 4
    assert row.labels_used == 20 + 20 and row.access == "TEXT+SCORES"
    assert (row.device, row.threads) == ("cpu", 1)
    assert lab.store.rows_of(row.trial_id) == [row]


def test_shift_sets_are_scored_by_the_same_fit_and_pay_only_for_their_own_evaluation(lab: Lab) -> None:
    source, shift = lab.run(lab.spec("logit_head", "datasets=[icons]", "shots=1"))
    assert (source.test_set, shift.test_set) == ("icons", "icons_outline")
    assert shift.dataset == "icons" and plain_bill(shift) == plain_bill(source)
    assert (source.evaluate_images, shift.evaluate_images) == (source.n_test, shift.n_test)
    for row in (source, shift):
        kept = lab.store.read_predictions(row.trial_id, row.test_set, row.predictions_digest)
        assert len(kept.labels) == row.n_test


# --- killed and continued ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill -9 looks like from inside: nothing after it runs."""


def once_for_each(
    function: Callable[..., Any], name_of: Callable[..., Any], before: bool = False
) -> Callable[..., Any]:
    """The function, but the process dies the first time that it is called with each name: after its work, or before."""
    died: set[Any] = set()

    def dying(*arguments: Any) -> Any:
        name = name_of(*arguments)
        if name in died:
            return function(*arguments)
        died.add(name)
        if not before:
            function(*arguments)
        raise Killed(name)

    return dying


def die(monkeypatch: pytest.MonkeyPatch, point: str, cls: type[Method]) -> None:
    """Arrange deaths at every occasion of one kind."""
    if point in ("before a call is charged", "after a call was charged and its answer lost"):
        dying = once_for_each(LocalPool.send, lambda _, request: request.charge.id, before=point.startswith("before"))
        monkeypatch.setattr(LocalPool, "send", dying)
    elif point == "after a step":
        monkeypatch.setattr(
            cls, "step", once_for_each(cls.step, lambda method, box: pickle.dumps(vars(_session(box).box.meter)))
        )
    else:
        saves: set[int] = set()
        save = Checkpoint.save

        def dying_save(self: Checkpoint, state: State) -> None:
            save(self, state)
            if state.meter.call not in saves:
                saves.add(state.meter.call)
                raise Killed(state.meter.call)

        monkeypatch.setattr(Checkpoint, "save", dying_save)


def run_to_the_end(lab: Lab, spec: TrialSpec, checkpoint_s: float = 0.0) -> tuple[list[Any], int]:
    """Start again after every death."""
    lab.reserve(spec)
    for deaths in range(2000):
        try:
            rows = run_trial(spec, lab.pool, STORAGE, lab.store, checkpoint_s)
        except Killed:
            continue
        lab.ledger.release(STORAGE, spec.account)
        return rows, deaths
    raise AssertionError("it never ends")


POINTS = (
    "before a call is charged",
    "after a call was charged and its answer lost",
    "after a step",
    "after a checkpoint",
)
ITERATIVE = {
    "bbt": ["budget.requests=130"],
    "craft": ["budget.requests=130"],
    "cbbt_prompt": ["budget.requests=60"],
    "cbbt": ["budget.requests=60", "views=fresh"],
    "taskres": ["method.taskres.epochs=4", "views=fresh"],
    "tip_adapter_f": ["method.tip_adapter_f.epochs=3"],
    "logit_head": ["method.logit_head.epochs=5"],
    "zip": ["budget.requests=60"],
    "sharpzo": ["budget.requests=150", "method.sharpzo.n_directions=8"],
    "linear_probe": [],
    "clip_lora": ["budget.requests=7"],
}


CASES = [(method, POINTS[1]) for method in ITERATIVE] + [
    (method, point) for method in ("craft", "cbbt_prompt", "clip_lora") for point in (POINTS[0], *POINTS[2:])
]


@pytest.mark.parametrize(("method", "point"), CASES)
def test_a_trial_killed_again_and_again_ends_with_the_same_row_and_bill(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, point: str
) -> None:
    spec = lab.spec(method, *ITERATIVE[method], "curve=2")
    straight = Lab(tmp_path / "straight", lab.pool.endpoint, lab.card)
    wanted = straight.run(spec)
    die(monkeypatch, point, spec.choice.info.cls)
    rows, deaths = run_to_the_end(lab, spec)
    assert deaths > 0
    assert [outcome(r) for r in rows] == [outcome(r) for r in wanted]
    assert lab.bills(spec) == straight.bills(spec)
    assert lab.bills(spec)[Phase.REPLAY] == Bill()
    assert len(lab.ledger.charges(STORAGE, spec.account)) == len(straight.ledger.charges(STORAGE, spec.account))
    assert not list((lab.folder / "checkpoints").glob("*")), "a finished trial leaves no checkpoint"


def test_a_trial_without_any_checkpoint_starts_again_for_free(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = lab.spec("craft", "budget.requests=130")
    straight = Lab(tmp_path / "straight", lab.pool.endpoint, lab.card)
    wanted = straight.run(spec)
    die(monkeypatch, "after a call was charged and its answer lost", spec.choice.info.cls)
    rows, deaths = run_to_the_end(lab, spec, checkpoint_s=1e6)
    assert deaths == len(straight.ledger.charges(STORAGE, spec.account))
    assert [outcome(r) for r in rows] == [outcome(r) for r in wanted]
    assert lab.bills(spec) == straight.bills(spec)


def test_a_trial_killed_while_it_is_scored_continues(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = lab.spec("logit_head", "datasets=[icons]", "shots=1")
    monkeypatch.setattr(trials, "_score", once_for_each(trials._score, lambda spec, state, box, test, *_: test.name))
    rows, deaths = run_to_the_end(lab, spec)
    assert deaths == 2
    source, shift = rows
    assert (source.evaluate_images, shift.evaluate_images) == (source.n_test, shift.n_test)
    assert lab.bills(spec)[Phase.EVALUATE].images == source.n_test + shift.n_test


@pytest.mark.parametrize(("method", "requests"), [("craft", 90), ("clip_lora", 4)])
def test_the_real_model_gives_the_same_bits_after_a_kill(
    tiny: Endpoint, lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, requests: int
) -> None:
    mine, straight = (Lab(tmp_path / name, tiny, lab.card) for name in ("mine", "straight"))
    spec = mine.spec(method, "model=tiny", f"budget.requests={requests}")
    wanted = straight.run(spec)
    die(monkeypatch, "after a call was charged and its answer lost", spec.choice.info.cls)
    rows, _ = run_to_the_end(mine, spec)
    assert [outcome(r) for r in rows] == [outcome(r) for r in wanted]
    assert mine.bills(spec) == straight.bills(spec)


@pytest.mark.parametrize("damaged", [("newest",), ("newest", "spare")])
@pytest.mark.parametrize("how", ["cut", "flipped", "of another Farebox"])
def test_a_damaged_checkpoint_changes_neither_row_nor_bill(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damaged: tuple[str, ...], how: str
) -> None:
    spec = lab.spec("bbt", "budget.requests=130")
    straight = Lab(tmp_path / "straight", lab.pool.endpoint, lab.card)
    wanted = straight.run(spec)
    checkpoint = Checkpoint(lab.folder, spec.account)
    files = {"newest": checkpoint.path, "spare": checkpoint.before}

    with monkeypatch.context() as patch:
        die(patch, "after a step", spec.choice.info.cls)
        lab.reserve(spec)
        for _ in range(2):
            with pytest.raises(Killed):
                run_trial(spec, lab.pool, STORAGE, lab.store, checkpoint_s=0)
    spare = checkpoint.load()
    assert spare is not None and spare.started
    for name in damaged:
        data = bytearray(files[name].read_bytes())
        if how == "of another Farebox":
            checkpoint.save(Unreadable())
            data = bytearray(checkpoint.path.read_bytes())
        elif how == "flipped":
            data[100] ^= 1
        files[name].write_bytes(data[: len(data) // 2] if how == "cut" else data)
    rows, _ = run_to_the_end(lab, spec)
    assert [outcome(r) for r in rows] == [outcome(r) for r in wanted]
    assert lab.bills(spec) == straight.bills(spec)


class Unreadable:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _fail, ("no such class any more",)


def _fail(message: str) -> None:
    raise AttributeError(message)


def test_the_newest_whole_checkpoint_is_loaded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c", "t")
    assert checkpoint.load() is None
    checkpoint.save({"step": 1})
    assert checkpoint.load() == {"step": 1}
    checkpoint.save({"step": 2})
    assert checkpoint.load() == {"step": 2}
    checkpoint.path.write_bytes(b"")
    assert checkpoint.load() == {"step": 1}
    checkpoint.save({"step": 3})
    checkpoint.path.write_bytes(b"")
    assert checkpoint.load() == {"step": 1}  # a damaged one never takes the place of a whole one
    checkpoint.save({"step": 4})
    checkpoint.path.replace(checkpoint.before)  # killed between the two renames
    assert checkpoint.load() == {"step": 4}
    checkpoint.clear()
    assert checkpoint.load() is None and not list((tmp_path / "c" / "checkpoints").iterdir())


def test_the_checkpoints_of_a_storage_are_listed_by_trial(tmp_path: Path) -> None:
    assert stored_checkpoints(tmp_path) == []
    for name in ("b.1.2", "a.1.2"):
        checkpoint = Checkpoint(tmp_path, name)
        checkpoint.save("first")
        checkpoint.save("second")  # the first becomes the spare
    Checkpoint(tmp_path, "a.1.2").path.unlink()
    found = stored_checkpoints(tmp_path)
    assert [checkpoint.trial for checkpoint in found] == ["a.1.2", "b.1.2"]
    assert [checkpoint.load() for checkpoint in found] == ["first", "second"]
    for checkpoint in found:
        checkpoint.clear()
    assert stored_checkpoints(tmp_path) == []


def test_a_checkpoint_of_another_trial_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = Checkpoint(tmp_path, "one"), Checkpoint(tmp_path, "other")
    one.save("state of one")
    one.path.rename(other.path)
    assert other.load() is None and "is of another trial" in caplog.text
    assert not other.path.exists()


def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "trial")
    checkpoint.save({"step": 1})
    data = checkpoint.path.read_bytes()
    for at in range(len(data)):
        checkpoint.path.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
        assert checkpoint.load() is None, at


def test_weights_that_changed_after_the_plan_fail_the_trial_before_any_request(lab: Lab) -> None:
    spec = replace(lab.spec("taskres"), model_identity="other weights")
    lab.reserve(spec)
    (row,) = run_trial(spec, lab.pool, STORAGE, lab.store)
    assert row.status == "failed" and "the weights changed after the run was planned" in str(row.error)
    assert lab.paid(spec) == Bill()


# --- the curve -----------------------------------------------------------------------------------------------------


def test_a_curve_changes_nothing_but_its_own_phase(lab: Lab) -> None:
    (plain,) = lab.run(lab.spec("craft"))
    (drawn,) = lab.run(lab.spec("craft", "curve=3"))
    assert (drawn.accuracy, drawn.nll, plain_bill(drawn)) == (plain.accuracy, plain.nll, plain_bill(plain))
    points = json.loads(drawn.curve)
    assert len(points) == 3 and points[-1] == [drawn.requests, drawn.images, pytest.approx(drawn.accuracy)]
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert drawn.curve_images == 3 * 60 and plain.curve_images == 0 and json.loads(plain.curve) == []


def test_a_curve_under_images_has_its_points_at_equal_images(lab: Lab) -> None:
    (row,) = lab.run(lab.spec("craft", "curve=4", "budget.requests=null", "budget.images=4000"))
    for i, (_, images, _) in enumerate(json.loads(row.curve)):
        assert images * 4 >= row.images * (i + 1)
    assert len(json.loads(row.curve)) == 4


def test_no_curve_is_drawn_on_large_test_sets(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LARGEST_CURVE", 59)
    (row,) = lab.run(lab.spec("craft", "curve=3"))
    assert row.status == "done" and json.loads(row.curve) == [] and row.curve_requests == 0


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "predicted"), [(Greedy, 3), (GreedyAtOnce, 2), (Hides, 3)])
def test_a_plan_whose_bill_is_too_small_fails_the_trial_as_the_methods_own_error(
    lab: Lab, cls: type[Probe], predicted: int
) -> None:
    (row,) = lab.run(spec_of(lab, cls))
    assert row.status == "failed" and row.accuracy is None and row.error is not None
    said = f"its plan predicted {predicted} requests for the fit; {predicted} are spent and the next call needs 1 "
    assert row.error.startswith(f"MethodError: {cls.__name__}: {said}")
    assert plain_bill(row) == ONE * predicted


@pytest.mark.parametrize("name", ["bill", "begin"])
def test_bill_and_begin_cannot_be_overridden(name: str) -> None:
    with pytest.raises(TypeError, match=f"Overrides defines {name}, which is final: define plan and start"):
        type("Overrides", (Method,), {name: lambda *_: None})


def test_a_plan_whose_bill_has_too_few_images_is_reported_in_images(lab: Lab) -> None:
    class Views(Probe):
        def step(self, box: BlackBox) -> bool:
            box.scores(self.task.train.images.views(2), self.task.classes.prompts())
            return True

    (row,) = lab.run(spec_of(lab, Views))
    said = "its plan predicted 80 images for the fit; 60 are spent and the next call needs 40 "
    assert row.status == "failed" and row.error is not None and row.error.startswith(f"MethodError: Views: {said}")


def test_a_method_that_exceeds_its_allotment_is_cut_off_before_the_request_is_sent(lab: Lab) -> None:
    spec = spec_of(lab, Probe, "budget.requests=2")
    (row,) = lab.run(spec)
    assert row.status == "budget_exhausted" and row.accuracy is not None
    assert plain_bill(row) == ONE * 2 and row.evaluate_images == 60
    assert (
        row.error
        == f"1 requests asked of account 'trial {spec.account}', which has 0 left (2 of 2 charged or reserved)"
    )


def test_a_method_that_cannot_pay_for_its_start_fails_with_its_bill(lab: Lab) -> None:
    class StartsFourTimes(GreedyAtOnce):
        promised = 4

    (row,) = lab.run(spec_of(lab, StartsFourTimes, "budget.requests=2"))
    assert row.status == "failed" and row.accuracy is None
    assert row.error is not None and row.error.startswith("BudgetExceeded: 1 requests asked")
    assert plain_bill(row) == ONE * 2


def test_a_method_that_exceeds_its_access_fails_with_its_bill(lab: Lab) -> None:
    (row,) = lab.run(spec_of(lab, Intruder))
    assert row.status == "failed" and row.accuracy is None
    file = lab.store.storage / "errors" / f"{row.trial_id}.txt"
    said = "AccessDenied: image_features needs FEATURES, the method declares TEXT+SCORES"
    assert row.error == f"{said} (traceback in {file})"
    assert row.trial_id in (written := file.read_text()) and "Traceback" in written and said in written
    assert plain_bill(row) == ONE * 2
    assert lab.store.rows_of(row.trial_id) == [row]


def test_a_trial_out_of_budget_killed_while_it_is_scored_stays_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (wanted,) = lab.run(spec_of(lab, Probe, "budget.requests=2"))
    spec = TrialSpec(**{**vars(spec_of(lab, Probe, "budget.requests=2")), "method_digest": "another"})
    monkeypatch.setattr(trials, "_score", once_for_each(trials._score, lambda *_: "score"))
    (row,), deaths = run_to_the_end(lab, spec)
    assert deaths == 1 and row.status == "budget_exhausted"
    assert plain_bill(row) == plain_bill(wanted) and row.accuracy == wanted.accuracy


def test_an_exception_of_a_method_is_raised_and_nothing_is_written(lab: Lab) -> None:
    spec = spec_of(lab, Buggy)
    lab.reserve(spec)
    with pytest.raises(RuntimeError, match="a bug"):
        run_trial(spec, lab.pool, STORAGE, lab.store)
    assert lab.store.rows_of(spec.trial_id) == []
    lab.ledger.release(STORAGE, spec.account)
    assert lab.paid(spec) == ONE * 2


def test_a_replay_with_another_digest_marks_the_row(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(lab, Probe)
    lab.reserve(spec)
    box = trials.MeteredBox(lab.pool, STORAGE, spec.account, Access.TEXT | Access.SCORES, spec.allotment)
    task = few_shot_task(spec)
    box.scores(task.train.images, task.classes.prompts("another {}"))  # what another machine asked, before it died
    asked: list[Request] = []
    send = LocalPool.send

    def noting(self: LocalPool, request: Request) -> Response:
        asked.append(request)
        return send(self, request)

    monkeypatch.setattr(LocalPool, "send", noting)
    (row,) = lab.run(spec)
    assert row.status == "done" and len(asked) == 5
    assert plain_bill(row) == ONE * 4
    assert (row.replay_requests, row.replay_images) == (1, 20)


def test_an_orphaned_replica_charges_nothing_twice(lab: Lab, features: Path) -> None:
    """A replica of a former run, with a ledger client of its own, goes on beside the one that took its trial over."""
    spec = lab.spec("craft", "budget.requests=60")
    lab.reserve(spec)
    orphan = Ledger(f"sqlite:///{lab.folder / 'ledger.db'}")
    pool, store = LocalPool(Endpoint(model_card("fake"), features), orphan), ResultStore(lab.folder / "orphan")
    with ThreadPoolExecutor(2) as both:
        late = both.submit(run_trial, spec, pool, STORAGE, store)
        (row,) = both.submit(run_trial, spec, lab.pool, STORAGE, lab.store).result()
    assert [outcome(r) for r in late.result()] == [outcome(row)]
    assert lab.paid(spec) == plain_bill(row) == spec.predicted
    assert lab.bills(spec)[Phase.REPLAY] == Bill()
    lab.ledger.release(STORAGE, spec.account)
    (again,) = run_trial(spec, pool, STORAGE, store)  # dead for a day, and all of it is asked again
    orphan.close()
    assert outcome(again) == outcome(row) and lab.paid(spec) == spec.predicted


def test_a_late_failure_of_an_orphan_does_not_change_a_finished_trial(lab: Lab) -> None:
    spec = lab.spec("taskres")
    rows = lab.run(spec)
    write_failure(spec, RuntimeError("its replicas are gone"), lab.store, spec_columns(spec))
    assert lab.store.rows_of(spec.trial_id) == rows


def test_each_row_has_the_evaluation_bill_of_its_own_test_set(lab: Lab) -> None:
    rows = lab.run(lab.spec("zero_shot", "protocol=base_to_new"))
    assert [row.evaluate_images for row in rows] == [row.n_test for row in rows]


def test_a_failed_evaluation_keeps_the_bill_of_earlier_test_sets(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, predict, calls = lab.spec("zero_shot", "protocol=base_to_new"), trials.predict, list[str]()

    def second_fails(*arguments: Any) -> Any:
        calls.append("predict")
        result = predict(*arguments)
        if len(calls) == 2:
            raise MethodError("the second test set")
        return result

    monkeypatch.setattr(trials, "predict", second_fails)
    lab.reserve(spec)
    (row,) = run_trial(spec, lab.pool, STORAGE, lab.store)
    assert row.status == "failed" and row.evaluate_images == sum(len(t.rows) for t in spec.eval_sets)
    assert row.evaluate_images == lab.bills(spec)[Phase.EVALUATE].images


class Growing(Probe):
    """It deploys one number more at each call."""

    calls = 0

    def deployed(self) -> dict[str, Tensor]:
        self.calls += 1
        return {"weights": torch.zeros(self.calls)}


def test_deployed_is_called_once(lab: Lab) -> None:
    rows = lab.run(spec_of(lab, Growing, "datasets=[icons]", "shots=1"))
    assert [row.client_bytes for row in rows] == [4, 4]
