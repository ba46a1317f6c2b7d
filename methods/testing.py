"""Contract tests: what a method promises, by the capabilities that it declares.

`contract(name)` returns the tests that apply to a method. For a method of your own, write in a test file:

    import my_package.my_method  # registers "mine"; not needed for a method of an installed plug-in
    from methods.testing import contract

    TestMine = contract("mine")
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from methods import _toy_task as toy
from methods import all_methods
from methods._state import contents, global_state, outside_state
from methods._toy_box import ToyBox
from methods.base import Bill, LabelledImages, Method, MethodInfo, Remaining

_TRAINED: dict[type[MethodContract], tuple[Method, Bill]] = {}


class MethodContract:
    """Promises of every method."""

    info: ClassVar[MethodInfo]

    def build(self) -> Method:
        """Return a new method with its default settings. Override to test other settings."""
        return self.info.cls()

    def trained(self) -> Method:
        """Return a new copy of a method that is fitted once for all tests, with seed 0."""
        if type(self) not in _TRAINED:
            toy.seed_everything(1)
            bill = toy.fitted(method := self.build(), toy.toy_task()[0]).bill
            _TRAINED[type(self)] = method, bill
        return copy.deepcopy(_TRAINED[type(self)][0])

    def check_same(self, logits: Tensor, bill: Bill) -> None:
        """Raise AssertionError unless these are the logits of the test images and the bill of `trained`."""
        assert torch.equal(toy.logits_of(self.trained(), toy.toy_task()[1].images), logits)
        assert bill == _TRAINED[type(self)][1]

    def test_same_seed_gives_same_logits_and_bill(self) -> None:
        self.trained()
        toy.seed_everything(2)  # the generator given to `start` is the only source of randomness
        task, test = toy.toy_task()
        self.check_same(*toy.result(self.build(), task, test.images))

    def test_bill_is_exact_from_the_smallest_allotment_up(self) -> None:
        task = toy.toy_task(shots=2)[0]
        without_val = replace(task, val=LabelledImages(task.val.images[:0], task.val.labels[:0]))
        for case in ((task, 0, 0), (without_val, 0, 0), (task, 2, 45), (without_val, 50, math.inf), (task, 150, 3000)):
            toy.check_bill(self.build(), *case)
        toy.check_bill(self.build(), toy.toy_task(shots=1)[0], *toy.ALLOTMENT)

    def test_plan_stays_within_every_allotment_from_the_smallest_up(self) -> None:
        method, requests = self.build(), (0, 1, 2, 3, 9, 10, 57, 400, 8000, 192_750, 192_900, 500_000)
        for shape in toy.SHAPES:
            least = method.bill(shape, Remaining(0, 0))
            for more in product(requests, (0, 159, 160, 1599, 3000, 10_000_000)):
                allotment = Remaining(least.requests + more[0], least.images + more[1])
                assert min(allotment.minus(method.bill(shape, allotment))) >= 0, (shape, allotment)

    def test_each_row_of_finite_logits_depends_on_its_own_image(self) -> None:
        method, (task, test) = self.trained(), toy.toy_task()
        logits = toy.logits_of(method, test.images)
        toy.check_logits(logits, len(test.labels), len(task.classes))
        rows = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[:7]
        assert_close(toy.logits_of(method, test.images[rows]), logits[rows], rtol=1e-4, atol=1e-4)

    def test_pickled_method_predicts_the_same(self) -> None:
        method, images = self.trained(), toy.toy_task()[1].images
        assert torch.equal(toy.logits_of(pickle.loads(pickle.dumps(method)), images), toy.logits_of(method, images))

    def test_predict_does_not_change_the_method(self) -> None:
        method = self.trained()
        before = contents(method)
        toy.predict(method, toy.toy_task()[1].images)
        assert contents(method) == before

    def test_nothing_outside_the_method_changes(self) -> None:
        method, (task, test), (original, _) = self.build(), toy.toy_task(), toy.toy_task()
        before = outside_state(type(method)), global_state()
        toy.result(method, task, test.images)
        assert outside_state(type(method)) == before[0], "state in a class or a module outlives the trial"
        assert global_state() == before[1], "global random state or a global setting of torch was changed"
        assert task.classes == original.classes
        for part, expected in ((task.train, original.train), (task.val, original.val)):
            assert torch.equal(part.labels, expected.labels), "labels were changed in place: work on a copy"
            assert torch.equal(part.images.pixels(8), expected.images.pixels(8))

    def test_reported_values_are_finite(self) -> None:
        method = self.trained()
        assert all(torch.isfinite(tensor).all() for tensor in method.deployed().values())
        assert method.trainable_params >= 0 and json.dumps(method.notes, allow_nan=False)


class IterativeContract(MethodContract):
    """Promises of methods that define `step`."""

    def test_method_pickled_before_every_step_gives_the_same_result(self) -> None:
        method, (task, test) = self.build(), toy.toy_task()
        box = ToyBox(self.info.access, toy.ALLOTMENT)
        method.begin(task, box, np.random.default_rng(0))
        while (method := pickle.loads(pickle.dumps(method))).step(box):
            pass
        self.check_same(toy.logits_of(method, test.images), box.bill)


class LearningContract(MethodContract):
    """Promises of methods that send requests before they predict."""

    def test_learns_the_toy_task(self) -> None:
        method, (task, test) = self.build(), toy.toy_task(shots=16)
        after, before = toy.result(method, task, test.images, toy.LONG_ALLOTMENT)[0], toy.zero_shot(task, test.images)
        assert cross_entropy(after, test.labels) < cross_entropy(before, test.labels)
        assert (after.argmax(1) == test.labels).sum() >= (before.argmax(1) == test.labels).sum()


class NoBudgetContract(MethodContract):
    """Promises of methods whose schedule can be cut to no request at all."""

    def test_predicts_as_zero_shot_without_budget(self) -> None:
        task, test = toy.toy_task()
        logits, bill = toy.result(self.build(), task, test.images, Remaining(0, 0))
        assert bill == Bill()
        assert_close(logits, toy.zero_shot(task, test.images), rtol=1e-4, atol=1e-4)


class NewClassesContract(MethodContract):
    """Promises of methods that declare `new_classes`."""

    def test_new_classes_are_predicted_by_name(self) -> None:
        method, (task, test) = self.trained(), toy.toy_task()
        new = replace(task.classes, names=("fox", "gnu", "hen"))
        own, before = toy.logits_of(method, test.images), contents(method)
        logits = toy.predict(method, test.images, new)
        assert contents(method) == before
        toy.check_logits(logits, len(test.labels), len(new))
        reversed_names = replace(new, names=new.names[::-1])
        for rows, classes, expected in (
            (slice(None), task.classes, own),
            (slice(None), reversed_names, logits.flip(1)),
            ([3, 1], new, logits[[3, 1]]),
        ):
            assert_close(toy.logits_of(method, test.images[rows], classes), expected, rtol=1e-4, atol=1e-4)


class ViewsContract(MethodContract):
    """Promises of methods that may query augmented views."""

    def test_bill_is_exact_with_fixed_fresh_and_no_views(self) -> None:
        toy.check_bill(self.build(), toy.toy_task(views=2)[0], 1, 45)
        toy.check_bill(self.build(), toy.toy_task(views=10)[0], 150, 3000)
        toy.check_bill(self.build(), toy.toy_task(views=2, fresh_views=True)[0], 7, 145)
        toy.check_bill(self.build(), toy.toy_task(views=0, fresh_views=True)[0], 60, 3000)
        toy.check_bill(self.build(), toy.plain_only(toy.toy_task(views=0)[0]), 150, 3000)


class PlainImagesContract(MethodContract):
    """Promises of methods that declare `uses_views=False`."""

    def test_result_does_not_depend_on_the_views_of_the_task(self) -> None:
        images = toy.toy_task()[1].images
        logits, bill = toy.result(self.build(), toy.toy_task(views=0)[0], images)
        for fresh in (False, True):
            task = toy.plain_only(toy.toy_task(views=3, fresh_views=fresh)[0])
            again = toy.result(self.build(), task, images)
            assert torch.equal(again[0], logits) and again[1] == bill


def contract(name: str) -> type[MethodContract]:
    """Return a class with all tests that apply to a registered method."""
    info = all_methods()[name]
    least, most = (info.cls().bill(toy.SHAPES[0], allotment) for allotment in (Remaining(0, 0), Remaining()))
    contracts = {
        PlainImagesContract: not info.uses_views,
        ViewsContract: info.uses_views,
        NewClassesContract: info.new_classes,
        NoBudgetContract: least == Bill() != most,
        LearningContract: most != Bill() and not info.uses_local,  # else the local model decides it
        IterativeContract: info.cls.step is not Method.step,
        MethodContract: True,
    }
    return type(f"Test_{name}", tuple(cls for cls, applies in contracts.items() if applies), {"info": info})
