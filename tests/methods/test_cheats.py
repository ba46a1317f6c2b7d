"""One cheating or broken method for each route around the rules, and what a trial does about it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import pickle
import random
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
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
    Lora,
    LowRank,
    Method,
    MethodInfo,
    PixelImages,
    Plan,
    Remaining,
    SoftPrompts,
    TaskShape,
    TextPrompts,
    eight_bits,
)
from methods.testing import IterativeContract
from pipeline.blackbox.client import MeteredBox
from pipeline.budget import Phase
from pipeline.data.images import Images
from pipeline.results.row import ResultRow
from pipeline.trials import watchdog
from pipeline.trials.boundary import Session
from pipeline.trials.image_handle import ImageHandle
from pipeline.trials.trial import run_recorded, run_trial
from tests.support.lab import STORAGE, Lab, outcome, plain_bill, spec_of
from tests.support.patience import patience

TS, TF = Access.TEXT | Access.SCORES, Access.TEXT | Access.FEATURES
WHITE = Access.SOFT | Access.FEATURES | Access.GRADIENTS
PIXELS = Access.TEXT | Access.PIXELS | Access.SCORES


class Honest(Method):
    """Zero-shot, fitted in two steps. The cheats below change one thing each."""

    access = TS
    promised = 3
    """Calls on the training images that `plan` predicts: `start` and each step make one."""

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        self.task, self.done = task, 0
        box.scores(task.train.images, task.classes.prompts())

    def step(self, box: BlackBox) -> bool:
        box.scores(self.task.train.images, self.task.classes.prompts())
        self.done += 1
        return self.done < 2

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(images, self.task.classes.prompts())[0]

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill.scores(1, shape.n_train, shape.n_classes) * self.promised)


ONE = Bill.scores(1, 20, 5)
"""A call of `start` or `step`: 20 training images, 5 classes. The test set has 60 images, the ensemble 3 templates."""


def failed(lab: Lab, cls: type[Honest], *words: str) -> str:
    """Run a trial that must fail; its error, which is one short line and names the method."""
    spec = spec_of(lab, cls, *words, access=cls.access)
    lab.reserve(spec)
    run_recorded(spec, lab.pool, STORAGE, lab.store, lab.folder / "hung.txt", timeout_s=0.3)
    lab.ledger.release(STORAGE, spec.account)
    (row,) = lab.store.rows_of(spec.trial_id)
    assert (row.status, row.accuracy) == ("failed", None)
    assert row.error is not None and "\n" not in row.error
    said = row.error.split(" (traceback in ")[0]
    assert len(said) <= 300
    return said


def done(lab: Lab, cls: type[Honest], *words: str) -> ResultRow:
    (row,) = lab.run(spec_of(lab, cls, *words, access=cls.access))
    assert row.status == "done", row.error
    return row


# --- what a method can reach ---------------------------------------------------------------------------------------

MAX_BUFFERED: list[Any] = []
FOLLOWED = {"__dict__", "__self__", "__func__", "__wrapped__", "__defaults__", "__kwdefaults__"}
"""Special attributes that are followed. `__globals__` is not: it leads no further than `import`."""


def reachable(roots: list[Any]) -> Iterator[Any]:
    """Every object that attributes, items, and what functions are bound to and close over, lead to."""
    todo, seen = list(roots), set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type, types.ModuleType)):
            continue
        seen.add(id(value))
        MAX_BUFFERED.append(value)  # so that no id is used twice
        yield value
        if isinstance(value, (Tensor, np.ndarray, np.random.Generator)):
            continue
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += value
        for name in dir(value):
            if name.startswith("__") and name not in FOLLOWED:
                continue
            try:
                todo.append(getattr(value, name))
            except Exception:  # a property that refuses
                continue
        for cell in getattr(value, "__closure__", None) or ():
            todo.append(cell.cell_contents)


def test_nothing_that_a_method_is_given_leads_to_a_label_or_to_the_machinery(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    class Collector(Honest):
        uses_text_norm = True

        def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
            made = PixelImages(images, torch.zeros(len(images), 3, 8, 8, dtype=torch.uint8))
            here = [images, images[:3], images.views(2), box, self.task, box.score_blocks, made]
            again = pickle.loads(pickle.dumps((images, self.task, made)))
            found.extend(reachable([*here, again, copy.deepcopy(images)]))
            return super().predict(images, box, classes)

    monkeypatch.setattr("pipeline.trials.supervisor.outside_state", lambda cls: {})
    spec = spec_of(lab, Collector)
    source = spec.dataset.source
    done(lab, Collector)
    MAX_BUFFERED.clear()
    kinds = {type(value) for value in found}
    assert {ImageHandle, FewShotTask, Classes, Tensor} <= kinds
    assert not kinds & {Images, type(source), MeteredBox, Session, type(lab.pool), type(lab.store)}
    rows = {tuple(source.rows_of(split).tolist()) for split in ("train", "val", "test")}
    rows |= {spec.split.train, spec.split.val}
    arrays = [tuple(value.tolist()) for value in found if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1]
    assert arrays, "the positions of an image set"
    assert not rows & set(arrays)
    labels = source.labels[source.rows_of("test")]
    assert not [a for a in arrays if len(a) == len(labels) and sorted(a) == sorted(labels.tolist())]


def test_image_sets_and_box_cannot_be_changed_and_the_box_not_kept(lab: Lab) -> None:
    spec = spec_of(lab, Honest)
    box = MeteredBox(lab.pool, STORAGE, spec.account, TS, spec.allotment)
    with Session(box, "m") as session:
        handle = session._open("train", Images.plain(spec.dataset.source, "train", np.arange(5), "crop"))
        with pytest.raises(AttributeError, match="cannot be changed"):
            handle._positions = np.arange(3)
        with pytest.raises(ValueError, match="read-only"):
            handle._positions[0] = 3
        for name in ("phase", "remaining", "scores", "new"):
            with pytest.raises(AttributeError, match=f"cannot set box.{name}"):
                setattr(session.method_box, name, None)
        for name in ("phase", "pool", "meter", "storage", "trial", "allotment", "__dict__"):
            assert not hasattr(session.method_box, name)
        assert len(handle[[]]) == 0 and len(handle[torch.tensor([2, 0])]) == 2 and len(handle.views(3)) == 15
        assert session.resolve(handle[[4, 1]].views(2))[0].rows.tolist() == [4, 1, 4, 1]
    with pytest.raises(Exception, match="outside of its trial"):
        _ = session.method_box.remaining
    with pytest.raises(Exception, match="of another trial"):
        handle.pixels(4)


class ReadsLabels(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        source = self.task.train.images.source  # type: ignore[attr-defined]
        return torch.nn.functional.one_hot(torch.from_numpy(source.labels[images.rows]), 5).float()  # type: ignore[attr-defined]


class SetsThePhase(Honest):
    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        box.phase = Phase.EVALUATE  # type: ignore[attr-defined]


class ReachesThePool(Honest):
    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        box.pool.endpoint  # type: ignore[attr-defined]  # noqa: B018


class KeepsTheBox(Honest):
    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        super().start(task, box, rng, plan)
        self.box = box


class Forges(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        own = type(images)("another/train", np.arange(5), np.zeros(5, int))  # type: ignore[call-arg]
        return box.scores(own, self.task.classes.prompts())[0]


class Subclasses(Honest):
    """Sends an image set of its own class, whose positions could change between check and call."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        class Own(type(images)):  # type: ignore[misc]
            pass

        own = Own(images._set, images._positions, images._views)  # type: ignore[attr-defined]
        return box.scores(own, self.task.classes.prompts())[0]


class ChangesItsPrompts(Honest):
    """Sends prompts that are one set when they are counted, and four later."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        one, reads = self.task.classes.prompts().texts[0], iter(range(1000))

        class Changing(TextPrompts):
            texts = property(lambda _: (one,) * (4 if next(reads) > 0 else 1))  # type: ignore[assignment]

            def __init__(self) -> None:
                pass

        scores = box.scores(images, Changing())
        assert len(scores) == 1, "what was priced is what was sent"
        return scores[0]


class ReadsTextNorm(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        with contextlib.suppress(Exception):
            self.task.classes.prompts(str(box.text_norm))
        return super().predict(images, box, classes)


def test_the_length_of_text_features_is_read_by_methods_that_declare_it(lab: Lab) -> None:
    assert "reads box.text_norm: declare uses_text_norm=True" in failed(lab, ReadsTextNorm)


# --- what predict may ask ------------------------------------------------------------------------------------------


class AsksAboutTrain(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        box.scores(self.task.train.images[[0, 1]], self.task.classes.prompts())
        return super().predict(images, box, classes)


class HidesThatItAsksAboutVal(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        with contextlib.suppress(Exception):
            next(box.score_blocks(self.task.val.images, self.task.classes.prompts()))
        return super().predict(images, box, classes)


class AsksAboutAnEarlierBatch(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        self.first = getattr(self, "first", images)
        logits = super().predict(images, box, classes)
        if self.first is not images:
            super().predict(self.first, box, classes)
        return logits


class ReadsPixelsOfTrain(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        self.task.train.images.pixels(4)
        return super().predict(images, box, classes)


class Twice(Honest):
    """Asks about each image twice."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        super().predict(images, box, classes)
        return super().predict(images, box, classes)


class Views(Honest):
    """Asks about two views of each image."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        scores = box.scores(images.views(2), self.task.classes.prompts())[0]
        return scores[: len(images)] + scores[len(images) :]


class Population(Honest):
    """Sends more prompt sets than the ensemble has, in one call."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        one = self.task.classes.prompts().texts[0]
        return box.scores(images, TextPrompts((one,) * 4)).mean(0)


class FitsOnText(Honest):
    """Keeps the training features, and searches among prompts where the search is not charged."""

    access = TF

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        self.task, self.done, self.train_ND = task, 0, box.image_features(task.train.images)

    def step(self, box: BlackBox) -> bool:
        return False

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        templates = [f"{word} {{}}" for word in ("a", "the", "my", "one", "that")]
        texts = [box.text_features(self.task.classes.prompts(template))[0] for template in templates]
        labels = self.task.train.labels
        best = max(texts, key=lambda text_CD: ((self.train_ND @ text_CD.T).argmax(1) == labels).sum().item())
        return box.image_features(images) @ best.T

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill.image_features(shape.n_train, shape.feature_dim))


class Gradients(FitsOnText):
    """Asks for gradients in predict."""

    access = WHITE

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        prompts = SoftPrompts(torch.zeros(1, 2, box.token_dim), self.task.classes.names)
        box.text_gradients(prompts, torch.ones(1, 5, box.feature_dim))
        return box.scores(images, self.task.classes.prompts())[0]


class Trains(Gradients):
    """Takes a training step in predict."""

    access = WHITE | Access.LORA

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        image, text = (LowRank(torch.ones(n, 3, 1, w), torch.ones(n, 3, w, 1)) for n, w in box.lora_shapes)
        prompts, guessed_B = self.task.classes.prompts(), torch.zeros(len(images), dtype=torch.int64)
        box.lora_gradients(images, guessed_B, prompts, Lora(image, text, 1.0), 0.0, 0)
        return box.scores(images, prompts)[0]


@pytest.mark.parametrize(
    ("cls", "adapt", "evaluate"),
    [
        (Twice, Bill.scores(1, 60, 5), Bill.scores(1, 60, 5)),
        (Views, Bill.scores(1, 120, 5), Bill()),
        (Population, Bill.scores(4, 60, 5), Bill()),
        (FitsOnText, Bill.text_features(1, 5, 16) * 2, Bill.text_features(1, 5, 16) * 3 + Bill.image_features(60, 16)),
        (Gradients, Bill.text_features(1, 5, 16), Bill.scores(1, 60, 5)),
        (Trains, Bill.lora_gradients(60, 5), Bill.scores(1, 60, 5)),
    ],
)
def test_what_predict_asks_beyond_one_pass_is_charged_to_adapt(
    lab: Lab, cls: type[Honest], adapt: Bill, evaluate: Bill
) -> None:
    said = failed(lab, cls)
    assert said.startswith("MethodError: predict of " + cls.__name__), said
    assert "more than one pass" in said and "charged to adapt" in said

    class Paying(cls):  # type: ignore[valid-type,misc]
        def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
            return Plan(bill=super().plan(shape, remaining).bill + adapt)

    row = done(lab, Paying)
    fitted = cls().bill(TaskShape(5, 20, 20, 4, 2, False, 3, 16), Remaining())
    assert plain_bill(row) == fitted + adapt
    assert Bill(*(getattr(row, f"evaluate_{f.name}") for f in dataclasses.fields(Bill))) == evaluate


class InParts(Honest):
    """Asks about each image once, in two calls, and sends the prompts of the ensemble one after the other."""

    access = TF

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        half = len(images) // 2
        for template in self.task.classes.templates:
            text_CD = box.text_features(self.task.classes.prompts(template))[0]
        box.text_features(self.task.classes.prompts(template))
        return torch.cat([box.image_features(part) for part in (images[:half], images[half:])]) @ text_CD.T


def test_one_pass_in_several_calls_is_an_evaluation(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipeline.trials.evaluate.TEST_BATCH", 25
    )  # the ensemble's prompts again, in each of three batches
    row = done(lab, InParts)
    assert plain_bill(row) == ONE * 3
    assert (row.evaluate_images, row.evaluate_requests) == (60, 6 + 3 * 4)


def test_what_is_priced_is_what_is_sent(lab: Lab) -> None:
    assert done(lab, ChangesItsPrompts).evaluate_requests == 1


def test_a_curve_is_drawn_by_the_same_rules(lab: Lab) -> None:
    assert "more than one pass" in failed(lab, Twice, "curve=1")


# --- images that a method made -------------------------------------------------------------------------------------


def darker(images: ImageSet, sets: int = 1) -> PixelImages:
    """Images that are half as bright, so many times."""
    array_B3SS = images.array(8) / 2
    return PixelImages(images, eight_bits(array_B3SS if sets == 1 else array_B3SS.expand(sets, *array_B3SS.shape)))


class SendsPixels(Honest):
    """Sends images that it made, in the fit and in prediction. The cheats below change one thing each."""

    access = PIXELS

    def step(self, box: BlackBox) -> bool:
        box.scores(darker(self.task.train.images), self.task.classes.prompts())
        self.done += 1
        return self.done < 2

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(darker(images), self.task.classes.prompts())[0]


class ReadsArraysOnly(Honest):
    """Reads pixels, which it does not declare, and hides it."""

    def step(self, box: BlackBox) -> bool:
        with contextlib.suppress(Exception):
            self.task.train.images.array(8)
        return super().step(box)


class SendsTrainInPredict(SendsPixels):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        train = PixelImages(self.task.train.images, torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
        box.scores(train, self.task.classes.prompts())
        return super().predict(images, box, classes)


class ReadsArraysOfTrainInPredict(SendsPixels):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        self.task.train.images.array(8)
        return super().predict(images, box, classes)


class SendsAnEarlierBatch(SendsPixels):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        self.first = getattr(self, "first", images)
        made = PixelImages(self.first, torch.zeros(len(self.first), 3, 8, 8, dtype=torch.uint8))
        return box.scores(made, self.task.classes.prompts())[0]


class SendsATestImageInTheFit(SendsPixels):
    """Keeps the images of a prediction, which `curve` makes before the fit ends, and asks about them in a step."""

    kept: list[ImageSet] = []  # noqa: RUF012

    def step(self, box: BlackBox) -> bool:
        for images in self.kept:
            box.scores(
                PixelImages(images, torch.zeros(len(images), 3, 8, 8, dtype=torch.uint8)), self.task.classes.prompts()
            )
        return super().step(box)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        self.kept.append(images)
        return super().predict(images, box, classes)


class ForgesABase(SendsPixels):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        own = type(images)("another/train", np.arange(5), np.zeros(5, int))  # type: ignore[call-arg]
        return box.scores(PixelImages(own, torch.zeros(5, 3, 8, 8, dtype=torch.uint8)), self.task.classes.prompts())[0]


class ChangesItsBase(SendsPixels):
    """Sends images whose base and whose number of sets are other ones at the second look."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        one, three, train = darker(images), darker(images, 3), self.task.train.images
        bases, pixels = iter([images, *[train] * 9]), iter([one.pixels, *[three.pixels] * 9])

        class Changing(PixelImages):
            base = property(lambda _: next(bases))  # type: ignore[assignment]
            pixels = property(lambda _: next(pixels))  # type: ignore[assignment]

            def __init__(self) -> None:
                pass

        scores = box.scores(Changing(), self.task.classes.prompts())
        assert len(scores) == 1, "what was priced is what was sent"
        return scores[0]


class TwicePixels(SendsPixels):
    """Sends each image twice, in two calls."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        super().predict(images, box, classes)
        return super().predict(images, box, classes)


class PlainAndPixels(SendsPixels):
    """Sends each image as it is, and once more as it made it."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        box.scores(images, self.task.classes.prompts())
        return super().predict(images, box, classes)


class TwoSets(SendsPixels):
    """Sends two sets of the images in one call."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.scores(darker(images, 2), self.task.classes.prompts()).mean(0)


class PixelsOfViews(SendsPixels):
    """Sends images made from two views of each image."""

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        scores = box.scores(darker(images.views(2)), self.task.classes.prompts())[0]
        return scores[: len(images)] + scores[len(images) :]


@pytest.mark.parametrize(
    ("cls", "error"),
    [
        (ReadsArraysOnly, "reads images.array: declare access PIXELS in @method"),
        (SendsTrainInPredict, "asked about 20 train images: predict may ask about the images that it is given only"),
        (ReadsArraysOfTrainInPredict, "asked about 20 train images"),
        (SendsAnEarlierBatch, "images of another batch or trial"),
        (SendsATestImageInTheFit, "images of another batch or trial: start and step may ask about train and val"),
        (ForgesABase, "asked about 5 train images: predict may ask about the images that it is given only"),
    ],
)
def test_made_images_stand_for_images_that_the_method_may_ask_about(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, cls: type[Honest], error: str
) -> None:
    monkeypatch.setattr("pipeline.trials.evaluate.TEST_BATCH", 25)
    monkeypatch.setattr("pipeline.trials.supervisor.outside_state", lambda cls: {})
    assert error in failed(lab, cls, "curve=3")


@pytest.mark.parametrize(
    ("cls", "adapt", "evaluate"),
    [
        (TwicePixels, Bill.scores(1, 60, 5), Bill.scores(1, 60, 5)),
        (PlainAndPixels, Bill.scores(1, 60, 5), Bill.scores(1, 60, 5)),
        (TwoSets, Bill.scores(2, 60, 5), Bill()),
        (PixelsOfViews, Bill.scores(1, 120, 5), Bill()),
    ],
)
def test_made_images_beyond_one_pass_are_charged_to_adapt(
    lab: Lab, cls: type[Honest], adapt: Bill, evaluate: Bill
) -> None:
    test_what_predict_asks_beyond_one_pass_is_charged_to_adapt(lab, cls, adapt, evaluate)


@pytest.mark.parametrize("cls", [SendsPixels, ChangesItsBase])
def test_one_pass_of_made_images_is_an_evaluation(lab: Lab, cls: type[Honest]) -> None:
    row = done(lab, cls)
    assert plain_bill(row) == ONE * 3
    assert (row.evaluate_requests, row.evaluate_images) == (1, 60)
    assert row.access == "TEXT+PIXELS+SCORES"


# --- what a method may change --------------------------------------------------------------------------------------


class ChangesLabels(Honest):
    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        super().start(task, box, rng, plan)
        task.train.labels.sub_(1)


class ChangesLabelsLater(Honest):
    def step(self, box: BlackBox) -> bool:
        self.task.val.labels[0] = 4
        return super().step(box)


class ChangesClasses(Honest):
    def step(self, box: BlackBox) -> bool:
        object.__setattr__(self.task.classes, "template", "{}")
        return super().step(box)


class ChangesTheTask(Honest):
    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        object.__setattr__(task, "shots", 9)


class KeepsStateInItsClass(Honest):
    seen = 0

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        type(self).seen += len(images)
        return super().predict(images, box, classes)


MEMORY: dict[str, int] = {}


class KeepsStateInItsModule(Honest):
    def step(self, box: BlackBox) -> bool:
        MEMORY["steps"] = MEMORY.get("steps", 0) + 1
        return super().step(box)


class KeepsStateInADefault(Honest):
    def predict(
        self,
        images: ImageSet,
        box: BlackBox,
        classes: Classes | None = None,
        seen: list[int] = [],  # noqa: B006
    ) -> Tensor:
        seen.append(len(images))
        return super().predict(images, box, classes)


class IsItsOwnCopy(Honest):
    def __deepcopy__(self, memo: dict[int, Any]) -> IsItsOwnCopy:
        return self


class CannotBeCopied(Honest):
    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        super().start(task, box, rng, plan)
        self.numbers = iter(int, 1)
        self.generator = (n for n in range(3))


# --- what a method may return --------------------------------------------------------------------------------------


def predicting(change: Callable[[Tensor], Any]) -> type[Honest]:
    """A method whose logits are changed."""

    class Predicts(Honest):
        def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Any:
            return change(super().predict(images, box, classes))

    return Predicts


def with_value(logits: Tensor, value: float) -> Tensor:
    logits[3, 1] = value
    return logits


def reporting(change: Callable[[Method], None]) -> type[Honest]:
    """A method that reports something else beside its logits."""

    class Reports(Honest):
        def step(self, box: BlackBox) -> bool:
            change(self)
            return super().step(box)

    return Reports


# --- a method that does not come back ------------------------------------------------------------------------------


class Loops(Honest):
    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        while True:
            pass


class Sleeps(Honest):
    def step(self, box: BlackBox) -> bool:
        time.sleep(1e6)
        return False


class LoopsInPredict(Honest):
    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        try:
            while True:
                pass
        except BaseException:  # hides what was raised
            return super().predict(images, box, classes)


class Exits(Honest):
    def step(self, box: BlackBox) -> bool:
        sys.exit(3)


class Interrupts(Honest):
    def step(self, box: BlackBox) -> bool:
        raise KeyboardInterrupt


CAUGHT: list[tuple[type[Honest], str]] = [
    (ReadsLabels, "AttributeError: 'ImageHandle' object has no attribute 'source'"),
    (SetsThePhase, "AttributeError: a method cannot set box.phase"),
    (ReachesThePool, "AttributeError: 'MethodBox' object has no attribute 'pool'"),
    (KeepsTheBox, "MethodError: the method keeps the box"),
    (Forges, "AccessDenied: Forges asked about 5 train images: predict may ask about the images that it is given only"),
    (Subclasses, "TypeError: expected the task's images, got Own"),
    (AsksAboutTrain, "AccessDenied: AsksAboutTrain asked about 2 train images: predict may"),
    (HidesThatItAsksAboutVal, "AccessDenied: HidesThatItAsksAboutVal asked about 20 val images: predict may"),
    (ReadsPixelsOfTrain, "AccessDenied: ReadsPixelsOfTrain asked about 20 train images: predict may"),
    (ChangesLabels, "MethodError: ChangesLabels: start changed the train labels in place"),
    (ChangesLabelsLater, "MethodError: ChangesLabelsLater: step 1 changed the val labels in place"),
    (ChangesClasses, "MethodError: ChangesClasses: step 1 changed task.classes"),
    (ChangesTheTask, "MethodError: ChangesTheTask: start changed task.shots"),
    (KeepsStateInItsClass, "MethodError: KeepsStateInItsClass: changed KeepsStateInItsClass.seen: state outside"),
    (
        KeepsStateInItsModule,
        f"MethodError: KeepsStateInItsModule: changed {__name__}.MEMORY: state outside",
    ),
    (KeepsStateInADefault, "MethodError: KeepsStateInADefault: changed KeepsStateInADefault.predict.__defaults__"),
    (IsItsOwnCopy, "MethodError: IsItsOwnCopy: copy.deepcopy returns the method itself"),
    (CannotBeCopied, "MethodError: CannotBeCopied: its state cannot be copied (cannot pickle"),
    (predicting(lambda x: x[:-1]), "MethodError: Predicts: predict returned float32 on cpu of shape (59, 5), expected"),
    (
        predicting(lambda x: x[:, :4]),
        "MethodError: Predicts: predict returned float32 on cpu of shape (60, 4), expected",
    ),
    (predicting(lambda x: x.double()), "MethodError: Predicts: predict returned float64 on cpu of shape (60, 5)"),
    (predicting(lambda x: x.to("meta")), "MethodError: Predicts: predict returned float32 on meta of shape (60, 5)"),
    (predicting(lambda x: x.numpy()), "MethodError: Predicts: predict returned ndarray, expected a float32 CPU tensor"),
    (predicting(lambda x: x.to_sparse()), "MethodError: Predicts: predict returned Tensor, expected"),
    (predicting(lambda x: None), "MethodError: Predicts: predict returned NoneType, expected"),
    (predicting(lambda x: with_value(x, math.nan)), "NonFiniteError: predict: Predicts gave the logit nan for row "),
    (predicting(lambda x: with_value(x, math.inf)), "NonFiniteError: predict: Predicts gave the logit inf for row "),
    (reporting(lambda m: m.notes.update(x=math.nan)), "NonFiniteError: fit: notes['x'] of Reports is nan"),
    (reporting(lambda m: m.notes.update(x=[1])), "MethodError: Reports: notes['x'] is the value [1] of type list"),  # type: ignore[dict-item]
    (reporting(lambda m: m.notes.update(x=np.float32(1))), "MethodError: Reports: notes['x'] is the number"),  # type: ignore[arg-type]
    (
        reporting(lambda m: setattr(m, "paper_queries", math.inf)),
        "NonFiniteError: fit: paper_queries of Reports is inf",
    ),
    (
        reporting(lambda m: setattr(m, "w_C", torch.tensor([0, math.nan]))),
        "NonFiniteError: fit: Reports deploys w_C[",
    ),
    (Loops, "MethodError: start of Loops neither returned nor called the box for 0.3 s"),
    (Sleeps, "MethodError: step 1 of Sleeps neither returned nor called the box for 0.3 s"),
    (LoopsInPredict, "MethodError: predict of LoopsInPredict neither returned nor called the box for 0.3 s"),
    (Exits, "MethodError: Exits: step 1 exited the process (SystemExit: 3)"),
    (Interrupts, "KeyboardInterrupt: KeyboardInterrupt"),
]


@pytest.mark.parametrize(("cls", "said"), CAUGHT, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_each_route_is_caught_by_name(lab: Lab, cls: type[Honest], said: str) -> None:
    assert failed(lab, cls).startswith(said)
    assert done(lab, Honest).accuracy is not None, "the next trial of the process is not affected"


class WritesOnce(Honest):
    """Leaves something for the next trial of the process, then fails."""

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        super().start(task, box, rng, plan)
        if not MEMORY.get("written"):
            MEMORY["written"] = 1
            raise RuntimeError("a bug")


def test_a_trial_does_not_start_from_what_a_failed_one_left_outside_the_method(lab: Lab) -> None:
    assert failed(lab, WritesOnce).startswith("RuntimeError: a bug")
    said = f"MethodError: WritesOnce: changed {__name__}.MEMORY: state outside its own object"
    assert failed(lab, WritesOnce).startswith(said)
    del MEMORY["written"]


def test_an_image_of_an_earlier_batch_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.trials.evaluate.TEST_BATCH", 25)
    said = "AccessDenied: AsksAboutAnEarlierBatch asked about 25 images of another batch or trial: predict may"
    assert failed(lab, AsksAboutAnEarlierBatch).startswith(said)


def test_a_buffer_that_predict_uses_again_does_not_change_earlier_logits(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Buffer(Honest):
        def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
            self.out = getattr(self, "out", torch.empty(20, 5))
            return self.out.copy_(super().predict(images, box, classes))

    monkeypatch.setattr("pipeline.trials.evaluate.TEST_BATCH", 20)
    assert done(lab, Buffer).predictions_digest == done(lab, Honest).predictions_digest


def test_a_method_that_changes_an_answer_changes_nobody_elses(lab: Lab) -> None:
    class Zeroes(Honest):
        def step(self, box: BlackBox) -> bool:
            prompts = self.task.classes.prompts()
            box.scores(self.task.train.images, prompts).zero_()
            self.done += 1
            return self.done < 2

    wanted = done(lab, Honest)
    assert done(lab, Zeroes).predictions_digest == wanted.predictions_digest


# --- global state --------------------------------------------------------------------------------------------------


class Global(Honest):
    """Uses the global generators, and changes every global setting."""

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        super().start(task, box, rng, plan)
        self.noise = torch.randn(5) + float(np.random.rand()) + random.random()
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("medium")
        torch.set_default_device("meta")
        torch.autograd.set_detect_anomaly(True)
        torch.backends.mkldnn.enabled = False
        np.seterr(divide="raise")
        torch.set_autocast_enabled("cpu", True)
        os.environ["OMP_NUM_THREADS"] = "7"
        os.chdir("/")
        warnings.simplefilter("error")

    def step(self, box: BlackBox) -> bool:
        torch.inference_mode().__enter__()
        return super().step(box)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return super().predict(images, box, classes) + self.noise + torch.rand(5)


def _global() -> list[Any]:
    settings = [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), np.geterr()]
    settings += [torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()]
    settings += [torch.get_default_device(), torch.is_anomaly_enabled(), torch.backends.mkldnn.enabled]
    settings += [torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()]
    settings += [dict(os.environ), Path.cwd(), list(warnings.filters)]
    return [*settings, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_global_state_neither_affects_a_trial_nor_outlives_it(lab: Lab) -> None:
    before = _global()
    first = done(lab, Global)
    assert _global() == before
    done(lab, Honest)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    (again,) = lab.run(dataclasses.replace(spec_of(lab, Global), trial_id="again"))
    assert again.predictions_digest == first.predictions_digest


class Killed(BaseException):
    """What a kill -9 looks like from inside."""


class Noisy(Honest):
    """Uses torch's global generator in each step; can be killed in its second one."""

    def step(self, box: BlackBox) -> bool:
        if self.done == 1 and os.environ.get("KILL"):
            raise Killed
        self.noise = getattr(self, "noise", 0) + torch.randn(5)
        return super().step(box)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return super().predict(images, box, classes) + self.noise


def test_a_trial_that_uses_the_global_generators_continues_to_the_same_row(lab: Lab, tmp_path: Path) -> None:
    straight = Lab(tmp_path / "straight", lab.pool.endpoint, lab.card)
    wanted = straight.run(spec_of(straight, Noisy))
    spec = spec_of(lab, Noisy)
    lab.reserve(spec)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setenv("KILL", "1")
        run_trial(spec, lab.pool, STORAGE, lab.store, checkpoint_s=0)
    torch.rand(7)
    rows = run_trial(spec, lab.pool, STORAGE, lab.store, checkpoint_s=0)
    lab.ledger.release(STORAGE, spec.account)
    assert [outcome(r) for r in rows] == [outcome(r) for r in wanted]


# --- the watchdog --------------------------------------------------------------------------------------------------


def test_waiting_for_the_endpoint_and_reading_pixels_is_not_hanging(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (time.sleep(0.4), function(*args))[1]

    monkeypatch.setattr(type(lab.pool), "send", slow(type(lab.pool).send))
    monkeypatch.setattr(Images, "pixels", slow(Images.pixels))

    class Pixels(Honest):
        def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
            super().start(task, box, rng, plan)
            task.train.images.pixels(2)

    spec = spec_of(lab, Pixels)
    lab.reserve(spec)
    (row,) = run_trial(spec, lab.pool, STORAGE, lab.store, timeout_s=0.3)
    lab.ledger.release(STORAGE, spec.account)
    assert row.status == "done", row.error


STUCK = """
import ctypes, hashlib, sys, time
from pathlib import Path
from pipeline.trials import watchdog
watchdog.GRACE_S = 0.3
with watchdog.Watchdog(0.2, Path(sys.argv[1])) as watch, watch.watching("step"):
    if sys.argv[2] == "native":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    elif sys.argv[2] == "holds the lock":
        ctypes.PyDLL(None).sleep(60)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("how", ["native", "holds the lock", "catches all"])
def test_a_worker_that_cannot_be_interrupted_ends_itself_and_says_where(tmp_path: Path, how: str) -> None:
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path / "dump"), how], check=False, timeout=patience(60)
    )
    assert ended.returncode == 1 and time.monotonic() - began < patience(30)
    assert "line" in (tmp_path / "dump").read_text()


def test_the_next_worker_of_a_trial_that_ended_its_worker_writes_the_row(lab: Lab) -> None:
    spec, dump = spec_of(lab, Honest), lab.folder / "hung.txt"
    dump.write_text("Timeout!\n  File x.py, line 3 in step\n")
    run_recorded(spec, lab.pool, STORAGE, lab.store, dump, timeout_s=7.0)
    (row,) = lab.store.rows_of(spec.trial_id)
    assert row.status == "failed" and row.error is not None
    assert row.error.startswith("MethodError: Honest neither returned nor called the box for 7.0 s and could not")
    assert "x.py, line 3" in (lab.folder / "errors" / f"{spec.trial_id}.txt").read_text()
    assert watchdog.GRACE_S > 1


# --- the shipped contract suite ------------------------------------------------------------------------------------


def check(cls: type[Honest], test: str) -> None:
    """Run one contract test of a method that is not registered."""
    cls.info = MethodInfo(cls.__name__, cls, cls.access, "", 1, False, "")
    suite = type("Suite", (IterativeContract,), {"info": cls.info})()
    getattr(suite, test)()


@pytest.mark.parametrize(
    ("cls", "test", "said"),
    [
        (
            AsksAboutTrain,
            "test_each_row_of_finite_logits_depends_on_its_own_image",
            "images that predict was not given",
        ),
        (Twice, "test_each_row_of_finite_logits_depends_on_its_own_image", "an image twice"),
        (
            Population,
            "test_each_row_of_finite_logits_depends_on_its_own_image",
            "more prompt sets than the ensemble has",
        ),
        (
            FitsOnText,
            "test_each_row_of_finite_logits_depends_on_its_own_image",
            "more prompt sets than the ensemble has",
        ),
        (Gradients, "test_each_row_of_finite_logits_depends_on_its_own_image", "text_gradients in predict"),
        (Trains, "test_each_row_of_finite_logits_depends_on_its_own_image", "lora_gradients in predict"),
        (KeepsTheBox, "test_method_pickled_before_every_step_gives_the_same_result", "keeps the box"),
        (ChangesLabels, "test_nothing_outside_the_method_changes", "labels were changed in place"),
        (KeepsStateInItsClass, "test_nothing_outside_the_method_changes", "state in a class or a module"),
        (KeepsStateInItsModule, "test_nothing_outside_the_method_changes", "state in a class or a module"),
    ],
)
def test_the_contract_suite_finds_it_too(cls: type[Honest], test: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check(cls, test)


def test_the_contract_suite_finds_the_use_of_global_randomness() -> None:
    with pytest.raises(AssertionError):
        check(Noisy, "test_same_seed_gives_same_logits_and_bill")
    with pytest.raises(AssertionError, match="global random state"):
        check(Noisy, "test_nothing_outside_the_method_changes")


def test_the_contract_suite_passes_an_honest_method() -> None:
    for test in ("test_each_row_of_finite_logits_depends_on_its_own_image", "test_nothing_outside_the_method_changes"):
        check(Honest, test)
