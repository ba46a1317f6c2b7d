"""Every registered method passes the contract of its capabilities, also with classes that have no training image."""

from dataclasses import replace

import pytest
import torch

from methods import _toy_task as toy
from methods import all_methods
from methods.base import FewShotTask, LabelledImages
from methods.testing import contract

globals().update({f"Test_{name}": contract(name) for name in all_methods()})


class Test_bar(contract("bar")):  # type: ignore[misc]
    """It starts from smaller images than zero-shot: test_pixel_methods.py tests that it learns from there."""

    test_learns_the_toy_task = None


def of_labels(labels: list[int]) -> FewShotTask:
    """The toy task with these labels in training, and without validation images."""
    task, _ = toy.toy_task()
    rows = torch.tensor([4 * label + labels[:i].count(label) for i, label in enumerate(labels)])
    train, val = (LabelledImages(p.images[r], p.labels[r]) for p, r in ((task.train, rows), (task.val, rows[:0])))
    assert train.labels.tolist() == labels
    return replace(task, train=train, val=val)


@pytest.mark.parametrize("labels", [[3, 0, 0, 4, 4, 0, 4, 0, 4], [2, 2, 2]], ids=["two classes missing", "one class"])
@pytest.mark.parametrize("name", sorted(all_methods()))
def test_classes_without_a_training_image_are_fitted_at_the_planned_bill(name: str, labels: list[int]) -> None:
    method, (_, test) = all_methods()[name].cls(), toy.toy_task()
    toy.check_bill(method, of_labels(labels), 150, 3000)
    toy.check_logits(toy.logits_of(method, test.images), len(test.labels), len(toy.TOY_NAMES))
    assert all(torch.isfinite(tensor).all() for tensor in method.deployed().values())
