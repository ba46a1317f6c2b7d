"""What a method can be proved with: a toy black box that counts and refuses, a toy task, and the contract suite.

An outsider's method passes the contract by subclassing `MethodContract` in a test file and returning its name from the
fixture `name`; the project's own tests run it over every registered method.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from methods import all_methods
from methods._state import contents, outside_state
from methods._toy import ToyTowers
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    LabelledImages,
    Method,
    Prompts,
    Remaining,
    SoftPrompts,
    TaskShape,
)


class ToyImages:
    """An ImageSet over a tensor [B, X] of pixels in [0, 1]; a view adds seeded noise.

    numbers_B: what tells the images of a split apart; a view has the number of its image.
    """

    def __init__(self, pixels_BX: Tensor, split: str, numbers_B: Tensor | None = None) -> None:
        self.pixels_BX, self.split = pixels_BX, split
        self.numbers_B = torch.arange(len(pixels_BX)) if numbers_B is None else numbers_B

    def __len__(self) -> int:
        return len(self.pixels_BX)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> ToyImages:
        return ToyImages(self.pixels_BX[rows], self.split, self.numbers_B[rows])

    def views(self, n: int, seed: int = 0) -> ToyImages:
        def one(v: int) -> Tensor:
            g = torch.Generator().manual_seed(1000 * seed + v)
            return (self.pixels_BX + 0.05 * torch.randn(self.pixels_BX.shape, generator=g)).clamp(0, 1)

        return ToyImages(torch.cat([one(v) for v in range(n)]), self.split, self.numbers_B.repeat(n))

    def pixels(self, size: int) -> Tensor:
        side = int(self.pixels_BX.shape[1] ** 0.5)
        grid = self.pixels_BX.view(-1, 1, side, side)
        return torch.nn.functional.adaptive_avg_pool2d(grid, size).flatten(1)


class ToyBox:
    """A BlackBox over `ToyTowers`: bills every call, remembers the calls, and refuses what a trial refuses.

    That is what is not granted or not paid, and within `predicting` what is not one pass over the given images.
    """

    __slots__ = (
        *("_batch", "_prompts", "_sets", "_unseen"),
        *("access", "allotment", "bill", "calls", "feature_dim", "logit_scale", "token_dim", "towers"),
    )

    def __init__(self, access: Access, allotment: Remaining | None = None) -> None:
        self.towers = ToyTowers()
        self.access = access
        self.allotment = allotment or Remaining()
        self.bill = Bill()
        self.calls: list[str] = []
        self.logit_scale = self.towers.logit_scale
        self.token_dim, self.feature_dim = self.towers.E, self.towers.D
        self._batch: ToyImages | None = None
        self._unseen, self._prompts, self._sets = set[int](), set[bytes](), 0

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise AssertionError("the method keeps the box: use the box that each call is given, do not store it")

    @property
    def remaining(self) -> Remaining:
        return self.allotment.minus(self.bill)

    @contextlib.contextmanager
    def predicting(self, images: ImageSet, most_sets: int) -> Iterator[None]:
        """Let a block ask about these images once, with at most `most_sets` different prompt sets, free of the
        allotment.
        """
        assert isinstance(images, ToyImages)
        self._batch, self._unseen = images, set(images.numbers_B.tolist())
        self._prompts, self._sets = set(), most_sets
        before, self.allotment = self.allotment, Remaining()
        try:
            yield
        finally:
            self._batch, self.allotment = None, before

    def _check_pass(self, what: str, images: ToyImages | None, prompts: Prompts | None) -> None:
        if self._batch is None:
            return
        if images is not None:
            numbers = images.numbers_B.tolist()
            known = images.split == self._batch.split and set(numbers) <= set(self._batch.numbers_B.tolist())
            assert known, f"{what} in predict asks about images that predict was not given"
            once = len(set(numbers)) == len(numbers) and set(numbers) <= self._unseen
            assert once, f"{what} in predict asks about an image twice: a trial charges that to adapt"
            self._unseen -= set(numbers)
        if prompts is not None and (content := contents(prompts)) not in self._prompts:
            self._prompts.add(content)
            self._sets -= len(prompts.ctx_PLE if isinstance(prompts, SoftPrompts) else prompts.texts)
            assert self._sets >= 0, f"{what} in predict sends more prompt sets than the ensemble has: charged to adapt"

    def _pay(self, what: str, bill: Bill, *needed: Access) -> None:
        for access in needed:
            assert self.access.covers(access), f"{what} needs {access.label}, declared {self.access.label}"
        self.bill += bill
        self.calls.append(what)
        assert min(self.remaining) >= 0, f"{what} passes the allotment {self.allotment}: {self.bill}"

    @staticmethod
    def _kind(prompts: Prompts) -> Access:
        return Access.SOFT if isinstance(prompts, SoftPrompts) else Access.TEXT

    def scores(self, images: ImageSet, prompts: Prompts) -> Tensor:
        assert isinstance(images, ToyImages)
        self._check_pass("scores", images, prompts)
        text_PCD = self.towers.text_features(prompts)
        scores_PBC = self.logit_scale * self.towers.image_features(images.pixels_BX) @ text_PCD.transpose(1, 2)
        p, b, c = scores_PBC.shape
        self._pay("scores", Bill.scores(p, b, c), Access.SCORES, self._kind(prompts))
        return scores_PBC

    def score_blocks(self, images: ImageSet, prompts: Prompts) -> Iterator[tuple[slice, Tensor]]:
        scores_PBC = self.scores(images, prompts)
        half = max(1, scores_PBC.shape[1] // 2)
        for start in range(0, scores_PBC.shape[1], half):
            rows = slice(start, min(start + half, scores_PBC.shape[1]))
            yield rows, scores_PBC[:, rows]

    def image_features(self, images: ImageSet) -> Tensor:
        assert isinstance(images, ToyImages)
        self._check_pass("image_features", images, None)
        self._pay("image_features", Bill.image_features(len(images), self.feature_dim), Access.FEATURES)
        return self.towers.image_features(images.pixels_BX)

    def text_features(self, prompts: Prompts) -> Tensor:
        self._check_pass("text_features", None, prompts)
        text_PCD = self.towers.text_features(prompts)
        self._pay("text_features", Bill.text_features(*text_PCD.shape), Access.FEATURES, self._kind(prompts))
        return text_PCD

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        assert self._batch is None, "text_gradients in predict: a trial charges that to adapt"
        self._pay("text_gradients", Bill.text_features(*upstream_PCD.shape), Access.GRADIENTS, Access.SOFT)
        return self.towers.text_gradients(prompts, upstream_PCD)

    def embed_text(self, text: str) -> Tensor:
        assert self.access.covers(Access.SOFT), "embed_text needs SOFT"
        return self.towers.embed_text(text)


TOY_NAMES = ("ant", "bee", "cat", "dog", "elk")


def toy_task(shots: int = 4, views: int = 3, fresh_views: bool = False) -> tuple[FewShotTask, LabelledImages]:
    """A five-class task on `ToyTowers` that zero-shot does not solve, and its test set (20 a class)."""
    towers = ToyTowers()

    def draw(n: int, seed: int, split: str) -> LabelledImages:
        pixels = torch.cat([towers.pixels_of(name, n, seed + 100 * c) for c, name in enumerate(TOY_NAMES)])
        return LabelledImages(ToyImages(pixels, split), torch.arange(len(TOY_NAMES)).repeat_interleave(n))

    task = FewShotTask(
        dataset="toy",
        classes=Classes(TOY_NAMES, "a photo of a {}.", ("a photo of a {}.", "the {}.", "art of a {}.")),
        shots=shots,
        train=draw(shots, 1, "train"),
        val=draw(min(shots, 4), 2, "val"),
        views=views,
        fresh_views=fresh_views,
    )
    return task, draw(20, 3, "test")


def fit(method: Method, task: FewShotTask, box: BlackBox, seed: int = 0) -> int:
    """Start and step to the end; the number of steps taken."""
    method.begin(task, box, np.random.default_rng(seed))
    steps = 1
    while method.step(box):
        steps += 1
    return steps


def _global_state() -> tuple[bytes, ...]:
    """Random state and settings that every trial of a process shares."""
    settings = torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), settings, deterministic
    return tuple(contents(state) for state in states)


class MethodContract:
    """What every method promises. Subclass, and return a registered name from `name`."""

    allotment = Remaining(requests=400, images=40_000)

    @pytest.fixture
    def name(self) -> str:
        raise TypeError("override this fixture: return the method's registered name")

    @pytest.fixture
    def build(self, name: str) -> Method:
        return all_methods()[name].cls()

    def box(self, method: Method, allotment: Remaining | None = None) -> ToyBox:
        return ToyBox(method.info.access, allotment or self.allotment)

    def predict(self, method: Method, images: ImageSet, box: ToyBox, *classes: Classes) -> Tensor:
        """The method's own prediction, within the rules of a trial."""
        ensembles = (toy_task()[0].classes, *classes)
        with box.predicting(images, max(1, *(len(c.templates) for c in ensembles))):
            return method.predict(images, box, *classes)

    def logits(self, method: Method, images: ImageSet, box: ToyBox, *classes: Classes) -> Tensor:
        return self.predict(copy.deepcopy(method), images, box, *classes)

    def test_same_seed_same_logits(self, build: Method) -> None:
        task, test = toy_task()
        runs = []
        for n, method in enumerate((build, type(build)())):
            box = self.box(method)
            torch.manual_seed(n)  # the rng that start is given is the only source of randomness
            np.random.seed(n)
            random.seed(n)
            fit(method, task, box, seed=5)
            runs.append((self.logits(method, test.images, box), box.bill))
        assert torch.equal(runs[0][0], runs[1][0])
        assert runs[0][1] == runs[1][1]

    @pytest.mark.parametrize("shots", [1, 4])
    @pytest.mark.parametrize("fresh", [False, True])
    def test_bill_is_predicted_exactly_and_within_the_allotment(self, build: Method, shots: int, fresh: bool) -> None:
        task, _ = toy_task(shots=shots, fresh_views=fresh)
        box = self.box(build)
        predicted = build.bill(TaskShape.of(task, box.feature_dim), self.allotment)
        fit(build, task, box)
        assert box.bill == predicted
        assert self.allotment.affords(box.bill) != 0

    @pytest.mark.parametrize("allotment", [Remaining(requests=60), Remaining(images=3000), Remaining(90, 5000)])
    def test_never_beyond_a_small_allotment(self, build: Method, allotment: Remaining) -> None:
        task, _ = toy_task()
        box = self.box(build, allotment)
        predicted = build.bill(TaskShape.of(task, box.feature_dim), allotment)
        fit(build, task, box)
        assert min(box.remaining) >= 0
        assert box.bill == predicted

    def test_shape_finiteness_and_rows_alone(self, build: Method) -> None:
        task, test = toy_task()
        box = self.box(build)
        fit(build, task, box)
        whole = self.logits(build, test.images, box)
        assert whole.shape == (len(test.labels), len(task.classes))
        assert whole.dtype == torch.float32 and torch.isfinite(whole).all()
        order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[:7]
        torch.testing.assert_close(self.logits(build, test.images[order], box), whole[order], rtol=1e-4, atol=1e-4)

    def test_pickles_at_every_step_and_continues_to_the_same_result(self, build: Method) -> None:
        task, test = toy_task()
        box = self.box(build)
        fit(build, task, box, seed=2)
        spent = box.bill
        straight = self.logits(build, test.images, box)

        method: Method = type(build)()
        box2 = self.box(method)
        method.begin(task, box2, np.random.default_rng(2))
        more = True
        while more:
            method = pickle.loads(pickle.dumps(method))
            more = method.step(box2)
        assert box2.bill == spent
        assert torch.equal(self.logits(method, test.images, box2), straight)

    def test_predict_leaves_the_method_alone(self, build: Method) -> None:
        task, test = toy_task()
        box = self.box(build)
        fit(build, task, box)
        before = contents(build)
        self.predict(build, test.images, box)
        assert contents(build) == before

    def test_leaves_everything_outside_itself_alone(self, build: Method) -> None:
        task, test = toy_task()
        kept, _ = toy_task()
        box = self.box(build)
        before = outside_state(type(build)), _global_state()
        fit(build, task, box)
        self.logits(build, test.images, box)
        assert outside_state(type(build)) == before[0], "state in a class or a module outlives a prediction and a trial"
        assert _global_state() == before[1], "global random state or a global setting of torch was changed"
        assert task.classes == kept.classes
        for given, own in ((task.train, kept.train), (task.val, kept.val)):
            assert torch.equal(given.labels, own.labels), "labels were changed in place: work on a copy"
            assert torch.equal(given.images.pixels(8), own.images.pixels(8))

    def test_new_classes_are_predicted_by_name_when_declared(self, build: Method) -> None:
        if not build.info.new_classes:
            return
        task, test = toy_task()
        box = self.box(build)
        fit(build, task, box)
        own, before = self.logits(build, test.images, box), contents(build)
        new = replace(task.classes, names=("fox", "gnu", "hen"))
        logits = self.predict(build, test.images, box, new)
        assert contents(build) == before
        assert logits.shape == (len(test.labels), 3)
        assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
        for classes, expected in (
            (task.classes, own),  # the fitted classes, asked for by name
            (replace(new, names=new.names[::-1]), logits.flip(1)),  # a class is its name, not its place
        ):
            torch.testing.assert_close(self.logits(build, test.images, box, classes), expected, rtol=1e-4, atol=1e-4)
        some = self.logits(build, test.images[[3, 1]], box, new)
        torch.testing.assert_close(some, logits[[3, 1]], rtol=1e-4, atol=1e-4)

    def test_reports_what_stays_on_the_client(self, build: Method) -> None:
        task, _ = toy_task()
        fit(build, task, self.box(build))
        assert all(isinstance(t, Tensor) and torch.isfinite(t).all() for t in build.deployed().values())
        assert build.trainable_params >= 0
        json.dumps(build.notes, allow_nan=False)
